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
	"echod/internal/text"
)

// tally counts what happens. It may be used concurrently.
type tally struct {
	inputs []inputTally

	bytes      atomic.Int64 // that came back
	malformed  atomic.Int64
	failed     atomic.Int64 // sent, and came back differently or were given up
	unfinished atomic.Int64 // did not come back before the stream ended
	skipped    atomic.Int64 // done by an earlier run
	resent     atomic.Int64 // sends after the first of a record
	replaced   atomic.Int64 // bytes or characters that could not be decoded
	badInputs  atomic.Int64
	reconnects atomic.Int64
	reported   atomic.Int64 // failures

	earlier int64 // malformed or failed in an earlier run

	mu       sync.Mutex // guards what follows
	notice   string     // the last one reported
	noticeAt time.Time
	reason   string // of a reconnect, the last one reported
}

// inputTally counts the records of an input.
type inputTally struct {
	name string // without its secrets
	size int64  // of a regular file; -1 for anything else

	came   atomic.Int64                   // records that came back
	taken  atomic.Int64                   // records that were read
	closed atomic.Int64                   // those of them that came back or failed
	end    atomic.Int64                   // of the last of these, in the input
	before atomic.Int64                   // as end, of an earlier run
	source atomic.Pointer[records.Source] // nil before it is opened
	read   atomic.Bool                    // it was read to its end
	bad    atomic.Bool                    // it cannot be read
}

func newTally(names []string) *tally {
	t := &tally{inputs: make([]inputTally, len(names))}
	for i, name := range names {
		in := &t.inputs[i]
		in.name, in.size = records.PublicName(name), -1
		if info := statRegular(name); info != nil {
			in.size = info.Size()
		}
	}
	return t
}

// returned counts a record that came back.
func (t *tally) returned(k key, size int) {
	t.inputs[k.input].came.Add(1)
	t.bytes.Add(int64(size))
}

// finished counts a record that came back or failed.
func (in *inputTally) finished(k key) {
	for {
		end := in.end.Load()
		if k.end <= end || in.end.CompareAndSwap(end, k.end) {
			break
		}
	}
	in.closed.Add(1)
}

// isDone reports whether every record of the input has come back or failed.
func (in *inputTally) isDone() bool {
	return (in.read.Load() || in.bad.Load()) && in.closed.Load() == in.taken.Load()
}

// outstanding returns how many records were read and did not come back yet.
func (t *tally) outstanding() (n int64) {
	for i := range t.inputs {
		n += t.inputs[i].taken.Load() - t.inputs[i].closed.Load()
	}
	return n
}

// records returns how many have come back.
func (t *tally) records() (n int64) {
	for i := range t.inputs {
		n += t.inputs[i].came.Load()
	}
	return n
}

// done returns how many inputs are done.
func (t *tally) done() (n int) {
	for i := range t.inputs {
		if t.inputs[i].isDone() {
			n++
		}
	}
	return n
}

// place names a record in the form that errors have.
func (t *tally) place(k key) string {
	name := t.inputs[k.input].source.Load().Name()
	if k.line > 0 {
		return fmt.Sprintf("%s:%d", name, k.line)
	}
	return fmt.Sprintf("%s, block %d", name, k.number)
}

// header returns the header of the input of a record.
func (t *tally) header(k key) []string { return t.inputs[k.input].source.Load().Header() }

// isNewNotice reports whether no other connection has just received the same notice.
func (t *tally) isNewNotice(n client.Notice) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	text := n.String()
	again := text == t.notice && time.Since(t.noticeAt) < time.Second
	t.notice, t.noticeAt = text, time.Now()
	return !again
}

// isNewReason reports whether the reason for a new connection differs from the last.
func (t *tally) isNewReason(text string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	again := text == t.reason
	t.reason = text
	return !again
}

// Summary counts what happened to the records that were read.
type Summary struct {
	Came       int64 // back, byte for byte
	Bytes      int64 // of these
	Malformed  int64 // and not sent
	Failed     int64 // came back differently, or were given up
	Unfinished int64 // did not come back before the run ended
	Earlier    int64 // malformed or failed in an earlier run
	Skipped    int64 // done by an earlier run, those of Earlier included
	Replaced   int64 // bytes or characters that could not be decoded
	BadInputs  int64 // inputs that could not be read, or not to their end
	Unread     bool  // the run ended before the inputs did
	Resent     int64 // sends after the first of a record
	Reconnects int64
	Took       time.Duration
}

func (t *tally) summary(took time.Duration) Summary {
	return Summary{
		Came: t.records(), Bytes: t.bytes.Load(), Malformed: t.malformed.Load(), Failed: t.failed.Load(),
		Unfinished: t.unfinished.Load(), Earlier: t.earlier, Skipped: t.skipped.Load(), Replaced: t.replaced.Load(),
		BadInputs: t.badInputs.Load(), Resent: t.resent.Load(), Reconnects: t.reconnects.Load(), Took: took,
	}
}

// Missing returns how many records did not come back.
func (s Summary) Missing() int64 { return s.Malformed + s.Failed + s.Unfinished + s.Earlier }

// String returns a line of text.
func (s Summary) String() string {
	var b strings.Builder
	switch {
	case s.Missing() == 0 && (s.Came < 2 || s.Unread || s.BadInputs > 0):
		b.WriteString(text.Count(s.Came, "record") + " came back")
	case s.Missing() == 0:
		fmt.Fprintf(&b, "all %s came back", text.Count(s.Came, "record"))
	default:
		fmt.Fprintf(&b, "%s of %s came back", humanize.Comma(s.Came), text.Count(s.Came+s.Missing(), "record"))
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
		{s.Replaced, "not decodable and replaced"},
	} {
		if more.n > 0 {
			fmt.Fprintf(&b, "; %s %s", humanize.Comma(more.n), more.what)
		}
	}
	if s.Reconnects > 0 {
		b.WriteString("; " + text.Count(s.Reconnects, "reconnect"))
	}
	if s.BadInputs > 0 {
		b.WriteString("; " + text.Count(s.BadInputs, "input") + " not read to the end")
	}
	if s.Unread {
		b.WriteString("; not all of the input was read")
	}
	return b.String()
}
