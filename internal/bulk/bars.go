package bulk

import (
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/mattn/go-runewidth"

	"echod/internal/text"
)

const (
	redrawEvery = 100 * time.Millisecond
	barsAfter   = 500 * time.Millisecond // a run that is done by then needs no bars
	maxBars     = 10                     // of inputs
	maxName     = 24                     // columns
	minName     = 10
	maxBar      = 40
	minBar      = 4
)

// Bars draws the progress on a terminal: a bar for each input that is being read, as far
// as they fit, and one for all. It draws nothing while this process is in the background.
//
// The cursor rests at the start of the first bar, not after the last: when a terminal
// shrinks, it may wrap the bars to an unknown number of rows, but the cursor stays in front
// of them, so that everything after it can be erased. (mpb counts rows instead, and drops
// the numbers rather than the bar when space is short.)
func Bars(terminal *os.File) (d Display, ok bool) {
	if !canDraw(terminal) {
		return nil, false
	}
	return &bars{
		events:     events{w: terminal},
		size:       func() (int, int) { return terminalSize(terminal) },
		foreground: func() bool { return inForeground(terminal) },
	}, true
}

type bars struct {
	events     // its mutex guards what follows
	size       func() (columns, rows int)
	foreground func() bool

	drawn bool // bars are on the screen
	pace  *pace
}

// Say writes above the bars.
func (b *bars) Say(s string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out strings.Builder
	if b.drawn && b.foreground() {
		out.WriteString("\r\x1b[J")
	}
	b.drawn = false
	fmt.Fprintf(&out, "echod: %s\n", text.Printable(s))
	_, _ = io.WriteString(b.w, out.String())
}

func (b *bars) Error(s string) { b.Say(s) }

func (b *bars) show(t *tally) (end func()) {
	b.pace = newPace(t)
	stop := repeat(redrawEvery, func(since time.Duration) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.pace.sample(time.Now())
		if since >= barsAfter {
			b.draw(false)
		}
	})
	began := time.Now()
	return func() {
		stop()
		b.mu.Lock()
		defer b.mu.Unlock()
		if time.Since(began) >= barsAfter {
			b.pace.sample(time.Now())
			b.draw(true)
		}
	}
}

// draw draws the bars. The last time it leaves them on the screen.
func (b *bars) draw(last bool) {
	if !b.foreground() {
		b.drawn = false
		return
	}
	columns, rows := b.size()
	lines := b.pace.bars(columns, rows)
	var out strings.Builder
	out.WriteString("\r")
	for i, line := range lines {
		out.WriteString(line + "\x1b[K") // erases the rest of the line
		if i < len(lines)-1 {
			out.WriteString("\n")
		}
	}
	switch {
	case last:
		out.WriteString("\n")
	case len(lines) > 1:
		fmt.Fprintf(&out, "\x1b[J\r\x1b[%dA", len(lines)-1)
	default:
		out.WriteString("\x1b[J\r")
	}
	b.drawn = !last
	_, _ = io.WriteString(b.w, out.String())
}

// bars returns the lines to draw on a terminal of that size.
func (p *pace) bars(columns, rows int) []string {
	t := p.tally
	var bars []bar
	if len(t.inputs) == 1 {
		in := &t.inputs[0]
		bars = []bar{{title(in.name), in.position, p.numbers(in.came.Load())}}
	} else {
		for _, i := range p.visible(max(min(maxBars, rows-2), 0)) {
			in := &t.inputs[i]
			count := number{text.Count(in.came.Load(), "record"), 1}
			if in.bad.Load() {
				count = number{"failed", 9}
			}
			bars = append(bars, bar{title(in.name), in.position, []number{count}})
		}
		name := fmt.Sprintf("all %d/%d", t.done(), len(t.inputs))
		bars = append(bars, bar{name, t.position, p.numbers(t.records())})
	}
	nameWidth := 0
	for _, b := range bars {
		nameWidth = max(nameWidth, runewidth.StringWidth(b.name))
	}
	var lines []string
	for _, b := range bars {
		lines = append(lines, b.line(columns, nameWidth))
	}
	return lines
}

// visible returns the inputs whose bars are drawn: the last ones that were opened.
func (p *pace) visible(most int) (inputs []int) {
	for i := range p.tally.inputs {
		in := &p.tally.inputs[i]
		if in.source.Load() != nil || in.isDone() {
			inputs = append(inputs, i)
		}
	}
	return inputs[max(0, len(inputs)-most):]
}

// A number is a part of a bar's line. When space is short, those of the lowest rank go
// first.
type number struct {
	text string
	rank int
}

// numbers returns the numbers of the whole run.
func (p *pace) numbers(came int64) []number {
	bytes, perSecond := p.rates()
	times := clock(p.elapsed())
	if left, ok := p.left(); p.stalled() {
		times += " stalled"
	} else if ok {
		times += "<" + clock(left)
	}
	numbers := []number{
		{times, 8},
		{humanize.Bytes(uint64(bytes)) + "/s", 7},
		{text.Count(came, "record"), 3},
		{humanize.Comma(int64(perSecond)) + "/s", 2},
	}
	for _, trouble := range p.tally.troubles() {
		numbers = append(numbers, number{trouble, 6})
	}
	return numbers
}

// A bar is a line about an input, or about all.
type bar struct {
	name     string
	position func() (end, size int64, known bool)
	numbers  []number
}

// line formats a bar. As space gets short, first the bar itself shrinks, then numbers are
// left out.
func (b bar) line(columns, nameWidth int) string {
	width := max(columns-1, 1) // a full line would wrap on some terminals
	end, size, known := b.position()
	numbers := []number{{humanize.Bytes(uint64(end)), 10}}
	if known {
		numbers = []number{
			{fmt.Sprintf("%3d %%", percent(end, size)), 10},
			{fmt.Sprintf("%s of %s", humanize.Bytes(uint64(end)), humanize.Bytes(uint64(size))), 4},
		}
	}
	numbers = append(numbers, b.numbers...)
	for len(numbers) > 1 && min(nameWidth, minName)+numbersWidth(numbers) > width {
		numbers = withoutLowest(numbers)
	}
	nameWidth = max(min(nameWidth, width-numbersWidth(numbers)), min(nameWidth, minName))
	free := width - nameWidth - numbersWidth(numbers) - 1 // and a space
	if !known || free < minBar+2 {
		return runewidth.Truncate(join(b.name, nameWidth, numbers, ""), width, "")
	}
	return join(b.name, nameWidth, numbers, progressBar(min(free, maxBar+2), end, size))
}

func numbersWidth(numbers []number) (width int) {
	for _, n := range numbers {
		width += 2 + runewidth.StringWidth(n.text)
	}
	return width
}

func withoutLowest(numbers []number) []number {
	lowest := 0
	for i, n := range numbers {
		if n.rank <= numbers[lowest].rank {
			lowest = i
		}
	}
	return append(append([]number(nil), numbers[:lowest]...), numbers[lowest+1:]...)
}

// join puts the bar behind the first number.
func join(name string, nameWidth int, numbers []number, bar string) string {
	parts := []string{runewidth.FillRight(runewidth.Truncate(name, nameWidth, "…"), nameWidth)}
	for i, n := range numbers {
		parts = append(parts, "  "+n.text)
		if i == 0 && bar != "" {
			parts = append(parts, " "+bar)
		}
	}
	return strings.Join(parts, "")
}

// progressBar returns a bar that is filled as far as percent says.
func progressBar(width int, end, size int64) string {
	inside := width - 2
	filled := int(percent(end, size)) * inside / 100
	bar := strings.Repeat("=", filled)
	if filled < inside {
		bar += ">"
	}
	return "[" + (bar + strings.Repeat(" ", inside))[:inside] + "]"
}

// title returns the end of an input's name, in one line.
func title(name string) string {
	return runewidth.Truncate(text.Printable(path.Base(name)), maxName, "…")
}
