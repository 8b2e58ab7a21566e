package bulk

import (
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dustin/go-humanize"

	"echod/client"
	"echod/client/records"
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

	mu     sync.Mutex // guards what follows
	notice string     // the last that was told
	told   time.Time
}

type inputTally struct {
	name   string
	came   atomic.Int64
	source atomic.Pointer[records.Source] // nil before it is opened
	done   atomic.Bool
}

func newTally(names []string) *tally {
	t := &tally{inputs: make([]inputTally, len(names))}
	for i, name := range names {
		if t.inputs[i].name = name; name == stdin {
			t.inputs[i].name = "standard input"
		}
	}
	return t
}

func (t *tally) opened(i int, source *records.Source) { t.inputs[i].source.Store(source) }
func (t *tally) closed(i int)                         { t.inputs[i].done.Store(true) }

func (t *tally) came(i, size int) {
	t.inputs[i].came.Add(1)
	t.bytes.Add(int64(size))
}

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

// Summary is what has become of all records that were taken from the inputs.
type Summary struct {
	Came       int64 // back, byte for byte
	Bytes      int64 // of these
	Malformed  int64 // and not sent
	Failed     int64 // corrupted or given up
	Unfinished int64 // not back when the run ended
	Skipped    int64 // done by an earlier run
	Resent     int64 // times that a record was sent once more
	Reconnects int64
	Took       time.Duration
}

func (t *tally) summary(took time.Duration) Summary {
	return Summary{
		Came: t.records(), Bytes: t.bytes.Load(), Malformed: t.malformed.Load(), Failed: t.failed.Load(), Unfinished: t.unfinished.Load(),
		Skipped: t.skipped.Load(), Resent: t.resent.Load(), Reconnects: t.reconnects.Load(), Took: took,
	}
}

// Missing is how many records have not come back.
func (s Summary) Missing() int64 { return s.Malformed + s.Failed + s.Unfinished }

// String says it on a line.
func (s Summary) String() string {
	var b strings.Builder
	switch {
	case s.Missing() == 0 && s.Came == 1:
		b.WriteString("1 record came back")
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
		{s.Skipped, "done before"},
		{s.Reconnects, "reconnects"},
		{s.Resent, "sent again"},
	} {
		if more.n > 0 {
			fmt.Fprintf(&b, "; %s %s", humanize.Comma(more.n), more.what)
		}
	}
	return b.String()
}

func plural(n int64, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return humanize.Comma(n) + " " + noun + "s"
}
