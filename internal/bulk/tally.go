package bulk

import (
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dustin/go-humanize"

	"echod/client"
	"echod/internal/records"
)

// tally counts what happens. All of it may be read at any time.
type tally struct {
	inputs []inputTally

	bytes      atomic.Int64 // of what came back
	malformed  atomic.Int64
	failed     atomic.Int64 // sent, and corrupted or given up
	unfinished atomic.Int64 // not back when the stream ended
	skipped    atomic.Int64 // done by an earlier run
	resent     atomic.Int64 // sent another time
	reconnects atomic.Int64
	said       atomic.Int64

	earlier int64 // malformed or failed in an earlier run

	mu     sync.Mutex // guards what follows
	notice string     // the last that was told
	told   time.Time
	reason string // for another connection, the last that was told
}

type inputTally struct {
	name string // without what may be secret
	file int64  // the length of a regular file; -1 for anything else

	came   atomic.Int64
	taken  atomic.Int64                   // records
	closed atomic.Int64                   // those of them of which it is known what has become
	end    atomic.Int64                   // of the last of these, in the input
	before atomic.Int64                   // as end, of what an earlier run has done
	source atomic.Pointer[records.Source] // nil before it is opened
	done   atomic.Bool                    // it was read to its end
}

func newTally(names []string) *tally {
	t := &tally{inputs: make([]inputTally, len(names))}
	for i, name := range names {
		in := &t.inputs[i]
		in.name, in.file = records.PublicName(name), -1
		if info := statRegular(name); info != nil {
			in.file = info.Size()
		}
	}
	return t
}

func (t *tally) came(k key, size int) {
	t.inputs[k.input].came.Add(1)
	t.bytes.Add(int64(size))
}

// settled notes that it is known what has become of a record.
func (in *inputTally) settled(k key) {
	for {
		end := in.end.Load()
		if k.end <= end || in.end.CompareAndSwap(end, k.end) {
			break
		}
	}
	in.closed.Add(1)
}

// isDone reports whether nothing of it is to come.
func (in *inputTally) isDone() bool { return in.done.Load() && in.closed.Load() == in.taken.Load() }

// records is how many have come back.
func (t *tally) records() (n int64) {
	for i := range t.inputs {
		n += t.inputs[i].came.Load()
	}
	return n
}

// place names a record as its errors do.
func (t *tally) place(k key) string {
	name := t.inputs[k.input].source.Load().Name()
	if k.line > 0 {
		return fmt.Sprintf("%s:%d", name, k.line)
	}
	return fmt.Sprintf("%s, block %d", name, k.number)
}

// header is that of the input a record is from.
func (t *tally) header(k key) []string { return t.inputs[k.input].source.Load().Header() }

// newNotice reports whether a notice is not the one that another connection has brought just now.
func (t *tally) newNotice(n client.Notice) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	text := n.String()
	again := text == t.notice && time.Since(t.told) < time.Second
	t.notice, t.told = text, time.Now()
	return !again
}

// newReason reports whether a reason to connect again is not the one that was told last.
func (t *tally) newReason(text string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	again := text == t.reason
	t.reason = text
	return !again
}

// Summary is what has become of all records that were taken from the inputs.
type Summary struct {
	Came       int64 // back, byte for byte
	Bytes      int64 // of these
	Malformed  int64 // and not sent
	Failed     int64 // corrupted or given up
	Unfinished int64 // not back when the run ended
	Earlier    int64 // malformed or failed in an earlier run
	Skipped    int64 // done by an earlier run, those of Earlier counted too
	Unread     bool  // there was more in the inputs
	Resent     int64 // times that a record was sent once more
	Reconnects int64
	Took       time.Duration
}

func (t *tally) summary(took time.Duration) Summary {
	return Summary{
		Came: t.records(), Bytes: t.bytes.Load(), Malformed: t.malformed.Load(), Failed: t.failed.Load(), Unfinished: t.unfinished.Load(),
		Earlier: t.earlier, Skipped: t.skipped.Load(), Resent: t.resent.Load(), Reconnects: t.reconnects.Load(), Took: took,
	}
}

// Missing is how many records have not come back.
func (s Summary) Missing() int64 { return s.Malformed + s.Failed + s.Unfinished + s.Earlier }

// String says it on a line.
func (s Summary) String() string {
	var b strings.Builder
	switch {
	case s.Missing() == 0 && (s.Came < 2 || s.Unread):
		b.WriteString(plural(s.Came, "record") + " came back")
	case s.Missing() == 0:
		fmt.Fprintf(&b, "all %s came back", plural(s.Came, "record"))
	default:
		fmt.Fprintf(&b, "%s of %s came back", humanize.Comma(s.Came), plural(s.Came+s.Missing(), "record"))
	}
	fmt.Fprintf(&b, ": %s in %s", humanize.Bytes(uint64(s.Bytes)), s.Took.Round(time.Millisecond))
	if seconds := s.Took.Seconds(); seconds > 0 && s.Came > 0 {
		fmt.Fprintf(&b, ", %s/s", humanize.Comma(int64(float64(s.Came)/seconds)))
	}
	for _, more := range []struct {
		n    int64
		what string
	}{
		{s.Malformed, "malformed"},
		{s.Failed, "failed"},
		{s.Unfinished, "not finished"},
		{s.Earlier, "failed before"},
		{s.Skipped - s.Earlier, "done before"},
		{s.Resent, "sent again"},
	} {
		if more.n > 0 {
			fmt.Fprintf(&b, "; %s %s", humanize.Comma(more.n), more.what)
		}
	}
	if s.Reconnects > 0 {
		b.WriteString("; " + plural(s.Reconnects, "reconnect"))
	}
	if s.Unread {
		b.WriteString("; not all of the input was read")
	}
	return b.String()
}

func plural(n int64, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return humanize.Comma(n) + " " + noun + "s"
}
