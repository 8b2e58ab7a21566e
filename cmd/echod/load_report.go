package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"unicode/utf8"

	humanize "github.com/dustin/go-humanize"

	"echod/internal/load"
)

// writeReport prints a report for people.
func writeReport(out io.Writer, r *load.Report, why []string) error {
	var b strings.Builder
	what := fmt.Sprintf("%s of %d bytes on each\n(closed model: a stall holds up the load, and most of its waits are not seen)", many(r.Pipeline, "message"), r.Size)
	if r.Rate > 0 {
		what = fmt.Sprintf("%s messages of %d bytes a second\n(open model: latency counts from when each was due)", humanize.Commaf(r.Rate), r.Size)
	}
	fmt.Fprintf(&b, "%s for %s: %s, %s\n\n", r.Address, seconds(r.Lasted), many(r.Conns, "connection"), what)

	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	row := func(name string, cells ...string) {
		for i, line := range folded(cells, 63) {
			if i > 0 {
				name = ""
			}
			fmt.Fprintf(w, "%s\t%s\n", name, line)
		}
	}
	n := func(n int64, what string) string { return humanize.Comma(n) + " " + what }
	c, e, not, end := r.Connects, r.Echoes, r.Notices, r.Ends
	row("connects", append([]string{n(c.Tried, "tried"), n(c.Made, "made"), n(c.Refused, "refused"), n(c.Reset, "reset"), n(c.TimedOut, "timed out")},
		some(c.Failed, "failed otherwise", c.TurnedAway, "turned away")...)...)
	row("echoes", append([]string{n(e.Sent, "sent"), n(e.Returned, "returned"), n(e.Late, "late"), n(e.Lost, "lost"), n(e.Corrupted, "corrupted")},
		some(e.Unexpected, "unexpected", e.TurnedAway, "turned away", e.Unsent, "never sent")...)...)
	row("order", n(e.Duplicated, "duplicated"), n(e.Reordered, "out of order"), n(e.Foreign, "misdelivered"))
	row("throughput", humanize.Comma(int64(r.PerSecond))+" echoes/s")
	row("notices", append([]string{n(not.Seen(), "seen"), n(not.Heeded, "heeded")},
		some(not.Shutdown, "SHUTDOWN", not.Paused, "PAUSED", not.Busy, "BUSY", not.Messages, "NOTICE")...)...)
	row("ends", n(end.Left, "left in order"), n(end.Noticed, "noticed"), n(end.Closed, "closed"), n(end.Reset, "reset"), n(end.Failed, "otherwise"))
	row("reconnects", humanize.Comma(r.Reconnects))
	row("without service", n(int64(r.Outage.Clients), "of "+many(r.Conns, "client")), "median "+latency(r.Outage.Median), "max "+latency(r.Outage.Max))
	_ = w.Flush()

	b.WriteByte('\n')
	w = tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "latency\tp50\tp90\tp99\tp99.9\tp99.99\tmax\t")
	for _, line := range []struct {
		name string
		load.Latency
	}{{"connect", r.Connect}, {"echo", r.Echo}} {
		fmt.Fprintf(w, "%s\t", line.name)
		for _, v := range []float64{line.P50, line.P90, line.P99, line.P999, line.P9999, line.Max} {
			fmt.Fprintf(w, "%s\t", latency(v))
		}
		fmt.Fprintln(w)
	}
	_ = w.Flush()
	for _, text := range r.Errors {
		fmt.Fprintf(&b, "\nerror: %s", text)
	}
	fmt.Fprintln(&b)
	if len(why) == 0 {
		fmt.Fprintln(&b, wellEnough(r))
	}
	if _, err := io.WriteString(out, b.String()); err != nil {
		return fmt.Errorf("writing the report: %w", err)
	}
	return nil
}

// wellEnough says what became of the messages of a run that is not to be blamed.
func wellEnough(r *load.Report) string {
	if r.Echoes.Returned == r.Echoes.Sent {
		text := "All that was sent has come back, once and in order."
		if r.Outage.Clients > 0 {
			text += fmt.Sprintf("\n%s of %s had to do without service for a while, for %s at most.",
				humanize.Comma(int64(r.Outage.Clients)), many(r.Conns, "client"), latency(r.Outage.Max))
		}
		return text
	}
	missing := some(r.Echoes.Lost, "lost", r.Echoes.TurnedAway, "turned away")
	return "Not all has come back, but no bound is broken: " + strings.Join(missing, ", ") + "."
}

// folded joins cells to lines of the width, as far as they go.
func folded(cells []string, width int) []string {
	lines := []string{""}
	for i, cell := range cells {
		if i < len(cells)-1 {
			cell += ","
		}
		last := &lines[len(lines)-1]
		switch {
		case *last == "":
			*last = cell
		case utf8.RuneCountInString(*last+" "+cell) > width:
			lines = append(lines, cell)
		default:
			*last += " " + cell
		}
	}
	return lines
}

// many is count with commas.
func many(n int, noun string) string {
	if n == 1 {
		return count(n, noun)
	}
	return humanize.Comma(int64(n)) + " " + noun + "s"
}

// some says those counts that are not zero, each before its name.
func some(pairs ...any) []string {
	var said []string
	for i := 0; i < len(pairs); i += 2 {
		if n := pairs[i].(int64); n > 0 {
			said = append(said, humanize.Comma(n)+" "+pairs[i+1].(string))
		}
	}
	return said
}

// latency shows seconds to three digits.
func latency(s float64) string {
	switch {
	case s == 0:
		return "-"
	case s < 0.9995e-3: // not 1000 of them
		return digits(s*1e6) + " µs"
	case s < 0.9995:
		return digits(s*1e3) + " ms"
	default:
		return digits(s) + " s"
	}
}

func digits(v float64) string {
	switch {
	case v < 10:
		return fmt.Sprintf("%.2f", v)
	case v < 100:
		return fmt.Sprintf("%.1f", v)
	default:
		return fmt.Sprintf("%.0f", v)
	}
}
