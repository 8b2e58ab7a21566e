package bulk

import (
	"bytes"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/mattn/go-runewidth"
	"github.com/vbauerster/mpb/v8"

	"echod/client"
	"echod/internal/records"
)

// What is done is what has come back, and not what was read.
func TestProgressIsWhatIsDone(t *testing.T) {
	empty, some := file(t, "empty", ""), file(t, "some", "1234\n5678\n")
	tally := newTally([]string{empty, some})
	expect := func(when string, end, size int64) {
		t.Helper()
		if e, s, known := tally.position(); e != end || s != size || !known {
			t.Errorf("%s: %d of %d (%v), want %d of %d", when, e, s, known, end, size)
		}
	}
	expect("at the start", 0, 10)
	tally.inputs[0].done.Store(true) // as by an earlier run
	in := &tally.inputs[1]
	source, err := records.Open(t.Context(), some, nil, records.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	in.source.Store(source)
	for range source.All() {
		in.taken.Add(1)
	}
	in.done.Store(true)
	expect("when all is read", 0, 10)
	if text := tally.progress(time.Second); !strings.Contains(text, "0 % of 10 B done") || strings.Contains(text, "left") {
		t.Errorf("the progress is %q", text)
	}
	in.settled(key{input: 1, end: 5})
	expect("when half is done", 5, 10)
	if text := tally.progress(time.Second); !strings.Contains(text, "50 % of 10 B done") || !strings.Contains(text, "1s left") {
		t.Errorf("the progress is %q", text)
	}
	in.before.Store(4)
	if left, ok := tally.timeLeft(time.Second); !ok || left != "5s" {
		t.Errorf("%s left after a byte of six in a second, want 5s", left)
	}
	in.settled(key{input: 1, end: 9})
	expect("when all is done, whatever is behind it", 10, 10)
}

// An input that an earlier run has completed counts as done.
func TestProgressOfWhatIsDoneAlready(t *testing.T) {
	tally := newTally([]string{file(t, "a", "123\n")})
	tally.inputs[0].done.Store(true)
	if end, size, known := tally.position(); end != 4 || size != 4 || !known {
		t.Errorf("%d of %d, %v; want 4 of 4", end, size, known)
	}
	if tally := newTally([]string{"http://host/x"}); tally.inputs[0].name != "http://host/x" {
		t.Errorf("the name is %q", tally.inputs[0].name)
	} else if _, _, known := tally.position(); known {
		t.Error("the length of what is not open is known")
	}
}

// No more bars are drawn than fit: that of what is done makes room.
func TestBarsAreAsManyAsFit(t *testing.T) {
	empty := file(t, "in", "")
	d := &drawing{tally: newTally([]string{empty, empty, empty}), most: Bars(io.Discard, 5).(*bars).most, p: mpb.New(mpb.WithOutput(io.Discard))}
	d.update()
	if d.most != 2 || len(d.bars) != 2 {
		t.Errorf("%d bars of at most %d on five rows, want 2", len(d.bars), d.most)
	}
	d.tally.inputs[0].done.Store(true)
	d.update()
	if len(d.bars) != 2 || d.bars[0].input != &d.tally.inputs[1] || d.bars[1].input != &d.tally.inputs[2] {
		t.Errorf("%d bars, want those of the second and the third input", len(d.bars))
	}
	d.finish()
	d.p.Wait()
}

func TestBarsHaveTitlesOfOneLine(t *testing.T) {
	for name, want := range map[string]string{
		"dir/short.csv":                "short.csv",
		"a\x1b]0;b\a\nc":               "a\ufffd]0;b\ufffd\ufffdc",
		strings.Repeat("x", 30):        strings.Repeat("x", 23) + "…",
		strings.Repeat("語", 20):        strings.Repeat("語", 11) + "…",
		"https://me:pw@host/x?token=y": "x?...",
	} {
		if got := title(newTally([]string{name}).inputs[0].name); got != want || runewidth.StringWidth(got) > maxName {
			t.Errorf("the title of %q is %q, want %q", name, got, want)
		}
	}
}

// The reason to connect again is told once, without what is another each time.
func TestReasonsAreToldOnce(t *testing.T) {
	var said bytes.Buffer
	r := &run{opts: Options{Display: Events(&said)}, tally: newTally(nil)}
	r.opts.Stream.Reconnect = &client.Backoff{MaxElapsed: time.Minute}
	for port := range 3 {
		r.reconnect(&net.OpError{Op: "read", Net: "tcp", Source: &net.TCPAddr{Port: port}, Err: net.ErrClosed})
	}
	want := "echod: use of closed network connection: connecting again, for at most 1m0s without an echo\n"
	if said.String() != want || r.tally.reconnects.Load() != 3 {
		t.Errorf("said %q, %d reconnects; want %q, 3", said.String(), r.tally.reconnects.Load(), want)
	}
}
