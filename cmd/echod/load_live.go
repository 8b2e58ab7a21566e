package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	humanize "github.com/dustin/go-humanize"
	"golang.org/x/term"

	"echod/client/load"
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
		fmt.Fprintln(v.out, v.line(p))
		return
	}
	line := []rune(v.line(p))
	line = line[:min(len(line), v.width()-1)]
	fmt.Fprintf(v.out, "\r%s%s", string(line), strings.Repeat(" ", max(0, v.shown-len(line))))
	v.shown = len(line)
}

// end takes the line away.
func (v *live) end() {
	if v.shown > 0 {
		fmt.Fprintf(v.out, "\r%s\r", strings.Repeat(" ", v.shown))
	}
}

func (v *live) line(p load.Progress) string {
	what := fmt.Sprintf("%.0f of %s", min(p.Elapsed, v.duration).Seconds(), v.duration)
	if p.Ending {
		what = "waiting for what is under way"
	}
	return fmt.Sprintf("%s  %d open  %s/s  p50 %s  p99 %s  lost %s  notices %s  reconnects %s", what, p.Open,
		humanize.Comma(int64(p.Rate)), latency(p.P50.Seconds()), latency(p.P99.Seconds()),
		humanize.Comma(p.Lost), humanize.Comma(p.Notices), humanize.Comma(p.Reconnects))
}
