package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode/utf8"

	humanize "github.com/dustin/go-humanize"
	"golang.org/x/term"

	"echod/internal/load"
)

// sayEvery is how often a run says how it is going where there is no terminal.
const sayEvery = 5 * time.Second

// live says how a run is going: in one line that changes on a terminal, else in a line now and then.
type live struct {
	out      io.Writer
	terminal bool
	width    func() int
	duration time.Duration
	said     time.Duration
	shown    int // columns of the line that is there
}

func newLive(out io.Writer, duration time.Duration) *live {
	v := &live{out: out, duration: duration}
	if file, ok := out.(*os.File); ok && term.IsTerminal(int(file.Fd())) {
		v.terminal = true
		v.width = func() int {
			width, _, err := term.GetSize(int(file.Fd()))
			if err != nil || width == 0 {
				return 80
			}
			return width
		}
	}
	return v
}

func (v *live) show(p load.Progress) {
	if !v.terminal {
		if p.Elapsed-v.said < sayEvery {
			return
		}
		v.said = p.Elapsed
		fmt.Fprintln(v.out, strings.Join(v.fields(p), fieldGap))
		return
	}
	line := []rune(fitting(v.fields(p), v.width()-1))
	fmt.Fprintf(v.out, "\r%s%s", string(line), strings.Repeat(" ", max(0, v.shown-len(line))))
	v.shown = len(line)
}

// end takes the line away.
func (v *live) end() {
	if v.shown > 0 {
		fmt.Fprintf(v.out, "\r%s\r", strings.Repeat(" ", v.shown))
	}
}

// fields are what there is to say, the most important first.
func (v *live) fields(p load.Progress) []string {
	when := fmt.Sprintf("%.0f/%s", min(p.Elapsed, v.duration).Seconds(), v.duration)
	if p.Ending {
		when = "waiting for the rest"
	}
	fields := []string{when, "lost " + humanize.Comma(p.Lost)}
	if p.Corrupted > 0 {
		fields = append(fields, "corrupted "+humanize.Comma(p.Corrupted))
	}
	return append(fields, "notices "+humanize.Comma(p.Notices), "reconnects "+humanize.Comma(p.Reconnects),
		humanize.Comma(int64(p.Open))+" open", humanize.Comma(int64(p.Rate))+"/s",
		"p99 "+latency(p.P99.Seconds()), "p50 "+latency(p.P50.Seconds()))
}

const fieldGap = "  "

// fitting joins as many of the fields as there is room for. Of the first as much as there is.
func fitting(fields []string, width int) string {
	first := []rune(fields[0])
	line := string(first[:min(len(first), max(0, width))])
	for _, field := range fields[1:] {
		longer := line + fieldGap + field
		if utf8.RuneCountInString(longer) > width {
			break
		}
		line = longer
	}
	return line
}
