package bulk

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/dustin/go-humanize"
)

// Display tells a person what happens during a run.
type Display interface {
	// Say tells an event. It may be called by several goroutines at a time.
	Say(text string)

	// show shows the progress until end is called, which awaits it.
	show(t *tally) (end func())
}

// Events tells events alone.
func Events(w io.Writer) Display { return &events{w: w} }

type events struct {
	mu sync.Mutex
	w  io.Writer
}

func (e *events) Say(text string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	fmt.Fprintf(e.w, "echod: %s\n", Printable(text))
}

// Printable makes text of others, such as the name of a file, fit for a terminal: what could move the cursor, change colours or
// end the line becomes U+FFFD. A tab stays.
func Printable(text string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) && r != '\t' {
			return unicode.ReplacementChar
		}
		return r
	}, text)
}

func (e *events) show(*tally) (end func()) { return func() {} }

// Lines tells the progress too, in a line from time to time.
func Lines(w io.Writer, every time.Duration) Display { return &lines{events{w: w}, every} }

type lines struct {
	events
	every time.Duration
}

func (l *lines) show(t *tally) (end func()) {
	return repeat(l.every, func(since time.Duration) { l.Say(t.progress(since)) })
}

// repeat calls f again and again, in a goroutine that the function which it returns ends and awaits.
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

// progress says in words how far a run has come.
func (t *tally) progress(since time.Duration) string {
	parts := []string{fmt.Sprintf("%s, %s back", plural(t.records(), "record"), humanize.Bytes(uint64(t.bytes.Load())))}
	end, size, known := t.position()
	if known {
		parts = append(parts, fmt.Sprintf("%d %% of %s done", percent(end, size), humanize.Bytes(uint64(size))))
	} else {
		parts = append(parts, humanize.Bytes(uint64(end))+" done")
	}
	parts = append(parts, humanize.Comma(int64(float64(t.records())/since.Seconds()))+"/s")
	if left, ok := t.timeLeft(since); ok {
		parts = append(parts, left+" left")
	}
	return strings.Join(append(parts, t.troubles()...), ", ")
}

// percent is how much of an input is done. Of an empty one that is all.
func percent(end, size int64) int64 {
	if size == 0 {
		return 100
	}
	return end * 100 / size
}

// troubles says what has not gone well.
func (t *tally) troubles() (parts []string) {
	if n := t.reconnects.Load(); n > 0 {
		parts = append(parts, plural(n, "reconnect"))
	}
	if n := t.malformed.Load() + t.failed.Load(); n > 0 {
		parts = append(parts, humanize.Comma(n)+" failed")
	}
	return parts
}

// timeLeft is how long the rest will take if it goes on like this.
func (t *tally) timeLeft(since time.Duration) (text string, ok bool) {
	end, size, known := t.position()
	for i := range t.inputs { // which has taken no time
		end, size = end-t.inputs[i].before.Load(), size-t.inputs[i].before.Load()
	}
	if !known || end <= 0 || end >= size {
		return "", false
	}
	left := time.Duration(float64(since) * float64(size-end) / float64(end))
	return left.Round(time.Second).String(), true
}

// position is how far the inputs are done, and how long they are. That is known once all are open, or are files.
func (t *tally) position() (end, size int64, known bool) {
	known = true
	for i := range t.inputs {
		e, s, ok := t.inputs[i].position()
		end, size, known = end+e, size+s, known && ok
	}
	return end, size, known
}

// position is how far an input is done, and how long it is.
func (in *inputTally) position() (end, size int64, known bool) {
	size, known = max(in.file, 0), in.file >= 0
	if source := in.source.Load(); source != nil {
		size, known = source.Size()
	}
	end = in.end.Load()
	if in.isDone() {
		size = max(size, end)
		return size, size, true
	}
	return end, size, known
}
