package bulk

import (
	"fmt"
	"io"
	"path"
	"strings"
	"sync"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/mattn/go-runewidth"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

const (
	redrawn   = 100 * time.Millisecond
	barsAfter = 500 * time.Millisecond // what is done by then needs no bars
	maxName   = 24                     // columns
)

// Bars draws the progress on a terminal of so many rows: a bar for each input, as far as they fit, and one for all.
func Bars(w io.Writer, rows int) Display {
	return &bars{events: events{w: w}, most: max(rows-3, 1)} // a line for all, one for the cursor, one for what is said
}

type bars struct {
	events
	most int // bars of inputs at a time

	mu       sync.Mutex // guards progress
	progress *mpb.Progress
}

// Say writes above the bars.
func (b *bars) Say(text string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.progress == nil {
		b.events.Say(text)
		return
	}
	_, _ = fmt.Fprintf(b.progress, "echod: %s\n", Printable(text))
}

func (b *bars) set(p *mpb.Progress) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.progress = p
}

func (b *bars) show(t *tally) (end func()) {
	began := time.Now()
	d := &drawing{tally: t, most: b.most, began: began}
	stop := repeat(redrawn, func(since time.Duration) {
		if since < barsAfter {
			return
		}
		if d.p == nil {
			d.p = mpb.New(mpb.WithOutput(b.w), mpb.WithRefreshRate(redrawn), mpb.WithAutoRefresh())
			b.set(d.p)
		}
		d.update()
	})
	return func() {
		stop()
		if d.p == nil {
			return
		}
		d.update()
		d.finish()
		b.set(nil)
		d.p.Wait()
	}
}

// drawing is what is on the screen.
type drawing struct {
	tally *tally
	most  int
	began time.Time

	p     *mpb.Progress
	bars  []inputBar
	next  int // the input that has no bar yet
	total *mpb.Bar
}

type inputBar struct {
	*mpb.Bar
	input *inputTally
}

func (d *drawing) update() {
	for d.next < len(d.tally.inputs) && d.room() {
		in := &d.tally.inputs[d.next]
		d.bars = append(d.bars, inputBar{d.add(title(in.name), d.next, in.position, func() string {
			return plural(in.came.Load(), "record")
		}), in})
		d.next++
	}
	if d.total == nil && len(d.tally.inputs) > 1 {
		d.total = d.add("total", len(d.tally.inputs), d.tally.position, d.all)
	}
	for _, bar := range d.bars {
		move(bar.Bar, bar.input.position)
	}
	if d.total != nil {
		move(d.total, d.tally.position)
	}
}

// room makes room for another bar: that of an input that is done is taken off.
func (d *drawing) room() bool {
	if len(d.bars) < d.most {
		return true
	}
	for i, bar := range d.bars {
		if bar.input.isDone() {
			bar.Abort(true)
			d.bars = append(d.bars[:i], d.bars[i+1:]...)
			return true
		}
	}
	return false
}

func move(bar *mpb.Bar, position func() (end, size int64, known bool)) {
	end, size, known := position()
	if known {
		bar.SetTotal(size, false)
	}
	bar.SetCurrent(end)
}

// title is the end of an input's name, in a line.
func title(name string) string {
	return runewidth.Truncate(Printable(strings.ReplaceAll(path.Base(name), "\t", " ")), maxName, "…")
}

// finish leaves the bars on the screen as they are.
func (d *drawing) finish() {
	for _, bar := range d.bars {
		bar.Abort(false)
	}
	if d.total != nil {
		d.total.Abort(false)
	}
}

func (d *drawing) all() string { return plural(d.tally.records(), "record") }

// add makes a bar. Where the length is not known there is nothing to fill it with.
func (d *drawing) add(name string, place int, position func() (end, size int64, known bool), done func() string) *mpb.Bar {
	last := len(d.tally.inputs) == 1 || place == len(d.tally.inputs) // the one that tells how it goes on the whole
	return d.p.New(0, mpb.BarStyle().Lbound("[").Filler("=").Tip(">").Padding(" ").Rbound("]"),
		mpb.BarPriority(place),
		mpb.PrependDecorators(decor.Name(name, decor.WCSyncSpaceR)),
		mpb.AppendDecorators(
			decor.Any(func(decor.Statistics) string {
				end, size, known := position()
				if !known {
					return " " + humanize.Bytes(uint64(end))
				}
				return fmt.Sprintf(" %3d %% of %s", percent(end, size), humanize.Bytes(uint64(size)))
			}, decor.WCSyncSpaceR),
			decor.Any(func(decor.Statistics) string { return done() }, decor.WCSyncSpace),
			decor.Any(func(decor.Statistics) string {
				if !last {
					return ""
				}
				return d.pace()
			}, decor.WCSyncSpaceR),
		))
}

// pace says how fast it goes, how long it may take, and what has not gone well.
func (d *drawing) pace() string {
	since := time.Since(d.began)
	parts := []string{fmt.Sprintf(" %s/s", humanize.Comma(int64(float64(d.tally.records())/since.Seconds())))}
	if left, ok := d.tally.timeLeft(since); ok {
		parts = append(parts, left+" left")
	}
	return strings.Join(append(parts, d.tally.troubles()...), "  ")
}
