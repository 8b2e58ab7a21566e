package bulk

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

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
	fmt.Fprintf(e.w, "echod: %s\n", text)
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
	read, size, known := t.consumed()
	if known && size > 0 {
		parts = append(parts, fmt.Sprintf("%d %% of %s read", read*100/size, humanize.Bytes(uint64(size))))
	} else {
		parts = append(parts, humanize.Bytes(uint64(read))+" read")
	}
	parts = append(parts, humanize.Comma(int64(float64(t.records())/since.Seconds()))+"/s")
	if left, ok := timeLeft(since, read, size); known && ok {
		parts = append(parts, left+" left")
	}
	return strings.Join(append(parts, t.troubles()...), ", ")
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
func timeLeft(since time.Duration, read, size int64) (text string, ok bool) {
	if read <= 0 || read > size {
		return "", false
	}
	left := time.Duration(float64(since) * float64(size-read) / float64(read))
	return left.Round(time.Second).String(), true
}

// consumed is how much of the inputs was read, and how long they are. That is known once all are open, or are files.
func (t *tally) consumed() (read, size int64, known bool) {
	known = true
	for i := range t.inputs {
		in := &t.inputs[i]
		r, s, ok := in.progress()
		read, size, known = read+r, size+s, known && ok
	}
	return read, size, known
}

// progress is how much of an input was read, and how long it is.
func (in *inputTally) progress() (read, size int64, known bool) {
	source := in.source.Load()
	if source == nil {
		size = sizeOf(in.name)
		return 0, size, size > 0
	}
	size, known = source.Size()
	read = source.Consumed()
	if in.done.Load() {
		size, known = max(size, read), true
	}
	return read, size, known
}
