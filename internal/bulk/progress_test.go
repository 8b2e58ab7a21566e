package bulk

import (
	"bytes"
	"fmt"
	"net"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/mattn/go-runewidth"

	"echod/client"
	"echod/internal/records"
)

// The position counts what has come back, not what was read.
func TestPositionIsWhatIsDone(t *testing.T) {
	empty, some := file(t, "empty", ""), file(t, "some", "1234\n5678\n")
	tally := newTally([]string{empty, some})
	expect := func(when string, end, size int64) {
		t.Helper()
		if e, s, known := tally.position(); e != end || s != size || !known {
			t.Errorf("%s: %d of %d (%v), want %d of %d", when, e, s, known, end, size)
		}
	}
	expect("at the start", 0, 10)
	tally.inputs[0].read.Store(true) // as by an earlier run
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
	in.read.Store(true)
	expect("when all is read", 0, 10)
	in.finished(key{input: 1, end: 5})
	expect("when half is done", 5, 10)
	in.finished(key{input: 1, end: 9})
	expect("when all is done, whatever is behind it", 10, 10)
}

// A file that grew since the start does not exceed its size.
func TestPositionOfAFileThatGrew(t *testing.T) {
	tally := newTally([]string{file(t, "a", "123\n")})
	tally.inputs[0].end.Store(8)
	if end, size, known := tally.position(); end > size || !known {
		t.Errorf("%d of %d, %v", end, size, known)
	}
}

func TestPositionOfCompleteInputs(t *testing.T) {
	tally := newTally([]string{file(t, "a", "123\n")})
	tally.inputs[0].read.Store(true)
	if end, size, known := tally.position(); end != 4 || size != 4 || !known {
		t.Errorf("%d of %d, %v; want 4 of 4", end, size, known)
	}
	if tally := newTally([]string{"http://host/x"}); tally.inputs[0].name != "http://host/x" {
		t.Errorf("the name is %q", tally.inputs[0].name)
	} else if _, _, known := tally.position(); known {
		t.Error("the size is known before the URL is open")
	}
}

// advanced returns a pace with a sample for each second, in which an input of a million
// bytes and 10,000 records advances to these percents.
func advanced(t *testing.T, name string, percents ...int64) *pace {
	t.Helper()
	tally := newTally([]string{name})
	in := &tally.inputs[0]
	in.size = 1_000_000
	p := newPace(tally)
	for i, percent := range percents {
		in.end.Store(percent * 10_000)
		in.came.Store(percent * 100)
		in.closed.Store(percent * 100)
		in.taken.Store(percent*100 + 64)
		p.sample(p.began.Add(time.Duration(i+1) * time.Second))
	}
	return p
}

// The rate and the time left are those of the last seconds.
func TestPace(t *testing.T) {
	var slow []int64 // 50 % in a second, and then 1 % each
	for i := range int64(20) {
		slow = append(slow, 50+i)
	}
	for want, p := range map[string]*pace{
		`1,000 records, 0 B back, 10 % of 1\.0 MB done, 100 kB/s, 1,000 records/s, 00:01 elapsed, 00:09 left`: advanced(t, "a", 10),
		`6,900 records, 0 B back, 69 % of 1\.0 MB done, 10 kB/s, 100 records/s, 00:20 elapsed, 00:31 left`:    advanced(t, "a", slow...),
		`1,000 records, 0 B back, 10 % of 1\.0 MB done, 20 kB/s, 200 records/s, 00:05 elapsed, stalled`:       advanced(t, "a", 10, 10, 10, 10, 10),
		`0 records, 0 B back, 0 % of 1\.0 MB done, 0 B/s, 0 records/s, 00:01 elapsed`:                         advanced(t, "a", 0),
		`10,000 records, 0 B back, 100 % of 1\.0 MB done, 1\.0 MB/s, 10,000 records/s, 00:01 elapsed`:         advanced(t, "a", 100),
	} {
		if got := p.line(); !regexp.MustCompile("^" + want + "$").MatchString(got) {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	if got := advanced(t, "a", 10, 10, 10, 10, 10).bars(200, 24)[0]; !strings.Contains(got, "00:05 stalled") {
		t.Errorf("a bar that is stalled is %q", got)
	}
	p := advanced(t, "a", 10)
	p.tally.inputs[0].before.Store(90_000) // by an earlier run, in no time
	p.sample(p.began.Add(time.Second))
	if left, ok := p.left(); !ok || left != 90*time.Second {
		t.Errorf("%v left (%v) after 1 %% in a second, want 90s", left, ok)
	}
}

// As a terminal gets narrow, the bar shrinks first, and the numbers stay.
func TestBarShrinksBeforeTheNumbers(t *testing.T) {
	for columns, want := range map[int]string{
		200: "people.csv   45 % [==================>                     ]  450 kB of 1.0 MB  00:01<00:01  450 kB/s  4,500 records  4,500/s",
		100: "people.csv   45 % [======>       ]  450 kB of 1.0 MB  00:01<00:01  450 kB/s  4,500 records  4,500/s",
		60:  "people.csv   45 %  450 kB of 1.0 MB  00:01<00:01  450 kB/s",
		40:  "people.csv   45 % [==>   ]  00:01<00:01",
		30:  "people.csv   45 % [====>    ]",
		20:  "people.csv   45 %",
		5:   "peop",
	} {
		got := advanced(t, "dir/people.csv", 45).bars(columns, 24)
		if len(got) != 1 || strings.Join(strings.Fields(got[0]), " ") != strings.Join(strings.Fields(want), " ") {
			t.Errorf("%d columns: got\n%q, want\n%q", columns, got, want)
		}
	}
}

// Whatever the terminal and the inputs, bars fit, and a bar is full only at 100 %.
func TestBarsFit(t *testing.T) {
	var names []string
	for i := range 30 {
		names = append(names, file(t, fmt.Sprintf("ein langer Name 語 %d.csv", i), "123456789\n"))
	}
	p := newPace(newTally(names))
	for i := range names {
		in := &p.tally.inputs[i]
		source, err := records.New(strings.NewReader(""), "in", records.Options{})
		if err != nil {
			t.Fatal(err)
		}
		in.source.Store(source)
		in.read.Store(true)
		in.end.Store(10)
		if i == 29 {
			in.read.Store(false)
			in.source.Store(nil)
			in.end.Store(9)
		}
	}
	for columns := 1; columns < 200; columns++ {
		for _, rows := range []int{1, 2, 5, 24} {
			lines := p.bars(columns, rows)
			if len(lines) > max(rows-1, 1) || len(lines) > maxBars+1 {
				t.Errorf("%d lines on %d rows", len(lines), rows)
			}
			for _, line := range lines {
				if width := runewidth.StringWidth(line); width >= max(columns, 2) {
					t.Errorf("%d columns of %d: %q", width, columns, line)
				}
				if full := strings.Contains(line, "=]"); full && !strings.Contains(line, "100 %") {
					t.Errorf("a full bar: %q", line)
				}
			}
		}
	}
	if lines := p.bars(150, 24); !strings.HasPrefix(lines[len(lines)-1], "all 29/30") {
		t.Errorf("the last line is %q", lines[len(lines)-1])
	}
}

// The cursor stays at the start of the bars, so that nothing above them is overwritten
// when a terminal wraps them.
func TestBarsAreDrawnBelowTheCursor(t *testing.T) {
	var screen bytes.Buffer
	foreground := true
	b := &bars{events: events{w: &screen}, size: func() (int, int) { return 80, 24 }, foreground: func() bool { return foreground }}
	b.pace = newPace(newTally([]string{file(t, "a", "x"), file(t, "b", "x")}))
	b.pace.tally.inputs[0].read.Store(true)
	b.draw(false)
	if got := screen.String(); strings.Count(got, "\n") != 1 || !strings.HasSuffix(got, "\x1b[J\r\x1b[1A") {
		t.Errorf("the bars are %q", got)
	}
	screen.Reset()
	b.Say("an event")
	if got := screen.String(); got != "\r\x1b[Jechod: an event\n" {
		t.Errorf("an event is %q", got)
	}
	screen.Reset()
	foreground = false
	b.draw(false)
	b.Say("an event")
	if got := screen.String(); got != "echod: an event\n" {
		t.Errorf("in the background: %q", got)
	}
	screen.Reset()
	foreground = true
	b.draw(true)
	if got := screen.String(); !strings.HasSuffix(got, "\n") || strings.Contains(got, "\x1b[J") {
		t.Errorf("at the end: %q", got)
	}
}

func TestTitlesHaveOneLine(t *testing.T) {
	for name, want := range map[string]string{
		"dir/short.csv":                "short.csv",
		"a\x1b]0;b\a\nc":               `a\x1b]0;b\a\nc`,
		strings.Repeat("x", 30):        strings.Repeat("x", 23) + "…",
		strings.Repeat("語", 20):        strings.Repeat("語", 11) + "…",
		"https://me:pw@host/x?token=y": "x?...",
	} {
		if got := title(newTally([]string{name}).inputs[0].name); got != want ||
			runewidth.StringWidth(got) > maxName {
			t.Errorf("the title of %q is %q, want %q", name, got, want)
		}
	}
}

// The reason for new connections is reported once, without what differs each time.
func TestReasonsAreReportedOnce(t *testing.T) {
	var reports bytes.Buffer
	r := &run{opts: Options{Display: Events(&reports)}, tally: newTally(nil)}
	r.opts.Stream.Reconnect = &client.Backoff{MaxElapsed: time.Minute}
	for port := range 3 {
		r.reconnect(&net.OpError{Op: "read", Net: "tcp", Source: &net.TCPAddr{Port: port}, Err: net.ErrClosed})
	}
	want := "echod: use of closed network connection: connecting again, for at most 1m0s without an echo\n"
	if reports.String() != want || r.tally.reconnects.Load() != 3 {
		t.Errorf("reported %q, %d reconnects; want %q, 3", reports.String(), r.tally.reconnects.Load(), want)
	}
}

func TestErrorsReportsErrorsOnly(t *testing.T) {
	var reports bytes.Buffer
	d := Errors(&reports)
	d.Say("an event")
	d.Error("a failure")
	if reports.String() != "echod: a failure\n" {
		t.Errorf("reported %q", reports.String())
	}
}
