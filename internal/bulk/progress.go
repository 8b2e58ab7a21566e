package bulk

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/dustin/go-humanize"
	"golang.org/x/term"

	"echod/internal/text"
)

// Display reports to a person what happens during a run. Say and Error may be called
// concurrently.
type Display interface {
	// Say reports an event, and Error a failure.
	Say(text string)
	Error(text string)

	// show displays the progress until end is called, which waits for it.
	show(t *tally) (end func())
}

// Events reports events and failures.
func Events(w io.Writer) Display { return &events{w: w} }

// Errors reports failures only.
func Errors(w io.Writer) Display { return &errorsOnly{events{w: w}} }

type events struct {
	mu sync.Mutex
	w  io.Writer
}

func (e *events) Say(s string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	fmt.Fprintf(e.w, "echod: %s\n", text.Printable(s))
}

func (e *events) Error(s string) { e.Say(s) }

func (e *events) show(*tally) (end func()) { return func() {} }

type errorsOnly struct{ events }

func (e *errorsOnly) Say(string) {}

func (e *errorsOnly) Error(s string) { e.events.Say(s) }

// Lines reports the progress too, in a line at intervals. It prints nothing while this process is in the background
// of terminal, which may be nil.
func Lines(w io.Writer, terminal *os.File, every time.Duration) Display {
	return &lines{events{w: w}, terminal, every}
}

type lines struct {
	events
	terminal *os.File
	every    time.Duration
}

func (l *lines) show(t *tally) (end func()) {
	p := newPace(t)
	return repeat(l.every, func(time.Duration) {
		if p.sample(time.Now()); l.terminal == nil || inForeground(l.terminal) {
			l.Say(p.line())
		}
	})
}

// repeat calls f at intervals, in a goroutine that end stops and waits for.
func repeat(every time.Duration, f func(since time.Duration)) (end func()) {
	done := make(chan struct{})
	var running sync.WaitGroup
	running.Go(func() {
		began, ticker := time.Now(), time.NewTicker(every)
		defer ticker.Stop()
		for {
			select {
			case now := <-ticker.C:
				f(now.Sub(began))
			case <-done:
				return
			}
		}
	})
	return func() {
		close(done)
		running.Wait()
	}
}

const (
	// paceWindow is the time over which rates are measured.
	paceWindow = 10 * time.Second

	// stalledAfter is the time without progress after which a run is called stalled.
	stalledAfter = 3 * time.Second
)

// A pace measures how fast a run has been recently.
type pace struct {
	tally   *tally
	began   time.Time
	samples []paceSample // of the last paceWindow, the oldest first
	moved   time.Time    // the last progress
}

type paceSample struct {
	at          time.Time
	end, before int64 // bytes of the inputs that are done, and done by an earlier run
	records     int64
}

func newPace(t *tally) *pace {
	now := time.Now()
	p := &pace{tally: t, began: now, moved: now}
	p.sample(now)
	return p
}

// sample takes a sample.
func (p *pace) sample(now time.Time) {
	s := paceSample{at: now, records: p.tally.records()}
	s.end, _, _ = p.tally.position()
	for i := range p.tally.inputs {
		s.before += p.tally.inputs[i].before.Load()
	}
	if last := len(p.samples) - 1; last >= 0 && (p.samples[last].end != s.end ||
		p.samples[last].records != s.records) {
		p.moved = now
	}
	p.samples = append(p.samples, s)
	for len(p.samples) > 2 && now.Sub(p.samples[1].at) >= paceWindow {
		p.samples = p.samples[1:]
	}
}

// rates returns the bytes of input and the records per second.
func (p *pace) rates() (bytes, records float64) {
	first, last := p.samples[0], p.samples[len(p.samples)-1]
	seconds := last.at.Sub(first.at).Seconds()
	if seconds <= 0 {
		return 0, 0
	}
	done := (last.end - last.before) - (first.end - first.before)
	return float64(max(done, 0)) / seconds, float64(last.records-first.records) / seconds
}

// elapsed returns the time since the beginning.
func (p *pace) elapsed() time.Duration { return p.samples[len(p.samples)-1].at.Sub(p.began) }

// stalled reports whether records are outstanding, and none has come back for a while.
func (p *pace) stalled() bool {
	return p.tally.outstanding() > 0 && p.samples[len(p.samples)-1].at.Sub(p.moved) >= stalledAfter
}

// left returns how long the rest takes at the recent rate.
func (p *pace) left() (d time.Duration, known bool) {
	end, size, known := p.tally.position()
	rate, _ := p.rates()
	if !known || rate <= 0 || end >= size {
		return 0, false
	}
	seconds := float64(size-end) / rate
	if seconds > (1000 * time.Hour).Seconds() {
		return 0, false
	}
	return time.Duration(seconds * float64(time.Second)), true
}

// line describes the progress in words.
func (p *pace) line() string {
	t := p.tally
	came := humanize.Bytes(uint64(t.bytes.Load()))
	parts := []string{text.Count(t.records(), "record"), came + " back"}
	end, size, known := t.position()
	if known {
		parts = append(parts, fmt.Sprintf("%d %% of %s done", percent(end, size), humanize.Bytes(uint64(size))))
	} else {
		parts = append(parts, humanize.Bytes(uint64(end))+" done")
	}
	bytes, records := p.rates()
	parts = append(parts, humanize.Bytes(uint64(bytes))+"/s", humanize.Comma(int64(records))+" records/s",
		clock(p.elapsed())+" elapsed")
	if left, ok := p.left(); p.stalled() {
		parts = append(parts, "stalled")
	} else if ok {
		parts = append(parts, clock(left)+" left")
	}
	return strings.Join(append(parts, t.troubles()...), ", ")
}

// clock formats a duration as minutes and seconds, or hours, minutes and seconds.
func clock(d time.Duration) string {
	s := int64(d.Round(time.Second).Seconds())
	if s >= 3600 {
		return fmt.Sprintf("%d:%02d:%02d", s/3600, s/60%60, s%60)
	}
	return fmt.Sprintf("%02d:%02d", s/60, s%60)
}

// percent returns how much of an input is done. An empty one is done.
func percent(end, size int64) int64 {
	if size == 0 {
		return 100
	}
	return int64(float64(end) * 100 / float64(size))
}

// troubles says what went wrong.
func (t *tally) troubles() (parts []string) {
	if n := t.malformed.Load() + t.failed.Load(); n > 0 {
		parts = append(parts, humanize.Comma(n)+" failed")
	}
	if n := t.badInputs.Load(); n > 0 {
		parts = append(parts, text.Count(n, "bad input"))
	}
	if n := t.reconnects.Load(); n > 0 {
		parts = append(parts, text.Count(n, "reconnect"))
	}
	return parts
}

// position returns how much of the inputs is done, and their size. The size is known if
// that of each input is.
func (t *tally) position() (end, size int64, known bool) {
	known = true
	for i := range t.inputs {
		e, s, ok := t.inputs[i].position()
		end, size, known = end+e, size+s, known && ok
	}
	return end, size, known
}

// position returns how much of one input is done, and its size.
func (in *inputTally) position() (end, size int64, known bool) {
	size, known = max(in.size, 0), in.size >= 0
	if source := in.source.Load(); source != nil {
		size, known = source.Size()
	}
	end = max(in.end.Load(), in.before.Load())
	if in.isDone() && !in.bad.Load() {
		size = max(size, end)
		return size, size, true
	}
	return end, max(size, end), known
}

// terminalSize returns the columns and rows of a terminal.
func terminalSize(f *os.File) (columns, rows int) {
	columns, rows, err := term.GetSize(int(f.Fd()))
	if err != nil || columns <= 0 || rows <= 0 {
		return 80, 24
	}
	return columns, rows
}
