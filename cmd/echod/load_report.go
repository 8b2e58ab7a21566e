package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	humanize "github.com/dustin/go-humanize"

	"echod/internal/load"
	"echod/internal/text"
)

// writeLoadReport prints a report as text.
func writeLoadReport(out io.Writer, r *load.Report, failures []string, comparison *load.Comparison) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n\n", loadTitle(r))
	writeLoadCounts(&b, r)
	b.WriteByte('\n')
	writeLoadLatencies(&b, r)
	if comparison != nil {
		b.WriteByte('\n')
		writeLoadComparison(&b, comparison)
	}
	for _, err := range r.Errors {
		fmt.Fprintf(&b, "\nerror: %s", text.Printable(err))
	}
	fmt.Fprintln(&b)
	if len(failures) == 0 {
		fmt.Fprintln(&b, loadConclusion(r))
	}
	// Addresses and the report to compare with are untrusted.
	for line := range strings.Lines(b.String()) {
		if err := printLine(out, "%s", strings.TrimSuffix(line, "\n")); err != nil {
			return fmt.Errorf("writing the report: %w", err)
		}
	}
	return nil
}

// loadTitle returns the first line: what the run did.
func loadTitle(r *load.Report) string {
	title := []string{fmt.Sprintf("%s: %s for %s", r.Address, text.Count(r.Conns, "connection"),
		formatSeconds(r.Lasted))}
	sizes := "messages of " + strings.ReplaceAll(r.Sizes, ",", ", ") + " bytes"
	model := "Open model: latency counts from when each message was due."
	switch {
	case len(r.Stages) > 1:
		title = append(title, sizes)
		for _, s := range r.Stages {
			title = append(title, fmt.Sprintf("%s/s for %s", humanize.Commaf(s.Rate), formatSeconds(s.Seconds)))
		}
	case r.Rate > 0:
		title = append(title, humanize.Commaf(r.Rate)+" "+sizes+" a second")
	default:
		title = append(title, sizes)
		model = fmt.Sprintf("Closed model, %s in flight on each connection", text.Count(r.Pipeline, "message"))
		if r.Think != "" {
			model += ", think time " + r.Think
		}
		model += ".\nA stall also stalls the load, so most of the waiting it would cause is not seen."
	}
	return strings.Join(wrapCells(title, 80), "\n") + "\n" + model
}

func writeLoadCounts(b *strings.Builder, r *load.Report) {
	w := tabwriter.NewWriter(b, 0, 0, 2, ' ', 0)
	row := func(name string, cells ...string) {
		for i, line := range wrapCells(cells, 63) {
			if i > 0 {
				name = ""
			}
			fmt.Fprintf(w, "%s\t%s\n", name, line)
		}
	}
	n := func(n int64, what string) string { return humanize.Comma(n) + " " + what }
	c, e, not, end := r.Connects, r.Echoes, r.Notices, r.Ends
	row("connects", append([]string{
		n(c.Tried, "tried"), n(c.Made, "made"), n(c.Refused, "refused"),
		n(c.Reset, "reset"), n(c.TimedOut, "timed out"),
	},
		listCounts(c.NoPort, "without a local port", c.Failed, "failed otherwise", c.TurnedAway,
			"turned away")...)...)
	if r.Handshake.Count+c.NoHandshake > 0 {
		row("handshakes", n(r.Handshake.Count, "made"), n(c.Resumed, "resumed"), n(c.NoHandshake, "failed"))
	}
	row("echoes", append([]string{
		n(e.Sent, "sent"), n(e.Returned, "returned"), n(e.Late, "late"),
		n(e.Lost, "lost"), n(e.Corrupted, "corrupted"),
	},
		listCounts(e.Unexpected, "unexpected", e.TurnedAway, "turned away", e.Unsent, "never sent")...)...)
	row("order", n(e.Duplicated, "duplicated"), n(e.Reordered, "out of order"), n(e.Foreign, "misdelivered"))
	throughput := []string{humanize.Comma(int64(r.PerSecond+0.5)) + " echoes/s over " + formatSeconds(r.Took)}
	if r.OfferedPerSecond > 0 {
		throughput = append(throughput,
			fmt.Sprintf("%s/s offered over %s", humanize.Comma(int64(r.OfferedPerSecond+0.5)),
				formatSeconds(r.Lasted)))
	}
	row("throughput", throughput...)
	row("notices", append([]string{n(not.Seen(), "seen"), n(not.Heeded, "heeded")},
		listCounts(not.Shutdown, "SHUTDOWN", not.Paused, "PAUSED", not.Busy, "BUSY", not.Messages,
			"NOTICE")...)...)
	row("ends", n(end.Left, "left in order"), n(end.Noticed, "after a notice"), n(end.Closed, "closed"),
		n(end.Reset, "reset"), n(end.Failed, "other"))
	row("reconnects", humanize.Comma(r.Reconnects))
	row("without service", n(int64(r.Outage.Clients), "of "+text.Count(r.Conns, "client")),
		"median "+formatLatency(r.Outage.Median), "max "+formatLatency(r.Outage.Max))
	if len(r.Addresses) > 1 {
		for i, a := range r.Addresses {
			name := ""
			if i == 0 {
				name = "addresses"
			}
			row(name, a.Address+" "+n(a.Made, "connects"), n(a.Failed, "failed"))
		}
	}
	_ = w.Flush() // writing to a Builder does not fail
}

func writeLoadLatencies(b *strings.Builder, r *load.Report) {
	w := tabwriter.NewWriter(b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "latency\tp50\tp90\tp99\tp99.9\tp99.99\tmax\t")
	for _, line := range []struct {
		name string
		load.Latency
	}{{"connect", r.Connect}, {"handshake", r.Handshake}, {"echo", r.Echo}} {
		if line.name == "handshake" && line.Count == 0 {
			continue // no TLS
		}
		fmt.Fprintf(w, "%s\t", line.name)
		for _, v := range []float64{line.P50, line.P90, line.P99, line.P999, line.P9999, line.Max} {
			fmt.Fprintf(w, "%s\t", formatLatency(v))
		}
		fmt.Fprintln(w)
	}
	_ = w.Flush()
}

func writeLoadComparison(b *strings.Builder, c *load.Comparison) {
	w := tabwriter.NewWriter(b, 0, 0, 2, ' ', tabwriter.AlignRight)
	names := strings.NewReplacer("_per_second", "/s", "p999", "p99.9", "_", " ")
	fmt.Fprintln(w, "compared\tbefore\tnow\tchange\t")
	for _, f := range c.Figures {
		format := func(v float64) string { return humanize.Comma(int64(v + 0.5)) }
		name, isTime := strings.CutSuffix(f.Name, "_seconds")
		if isTime {
			format = formatLatency
		}
		change := "-"
		switch {
		case f.Before == f.After:
			change = "same"
		case f.Change != nil && *f.Change >= 9:
			change = "x " + threeDigits(*f.Change+1)
		case f.Change != nil:
			change = fmt.Sprintf("%+.1f %%", *f.Change*100)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t\n", names.Replace(name), format(f.Before), format(f.After), change)
	}
	_ = w.Flush()
	fmt.Fprintf(b, "Before: %s.\n", c.Before.Local().Format(time.DateTime))
	if len(c.Differences) > 0 {
		fmt.Fprintf(b, "The runs differ, so take care:\n  %s\n", strings.Join(c.Differences, "\n  "))
	}
}

// loadConclusion sums up a run without failures.
func loadConclusion(r *load.Report) string {
	if r.Echoes.Returned == r.Echoes.Sent {
		conclusion := "All messages came back, once and in order."
		if r.Outage.Clients > 0 {
			conclusion += fmt.Sprintf("\n%s of %s were without service for a while, at most %s.",
				humanize.Comma(int64(r.Outage.Clients)), text.Count(r.Conns, "client"), formatLatency(r.Outage.Max))
		}
		return conclusion
	}
	missing := listCounts(r.Echoes.Lost, "lost", r.Echoes.TurnedAway, "turned away")
	return "Some messages did not come back, but no limit was exceeded: " + strings.Join(missing, ", ") + "."
}

// wrapCells joins cells with commas into lines of at most width columns.
func wrapCells(cells []string, width int) []string {
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

// listCounts lists the counts that are not zero. pairs are counts and what they count.
func listCounts(pairs ...any) []string {
	var listed []string
	for i := 0; i < len(pairs); i += 2 {
		if n := pairs[i].(int64); n > 0 {
			listed = append(listed, humanize.Comma(n)+" "+pairs[i+1].(string))
		}
	}
	return listed
}

// formatLatency formats seconds with three digits.
func formatLatency(s float64) string {
	switch {
	case s == 0:
		return "-"
	case s < 0.9995e-3: // 1000 µs is 1 ms
		return threeDigits(s*1e6) + " µs"
	case s < 0.9995:
		return threeDigits(s*1e3) + " ms"
	default:
		return threeDigits(s) + " s"
	}
}

func threeDigits(v float64) string {
	switch {
	case v < 10:
		return fmt.Sprintf("%.2f", v)
	case v < 100:
		return fmt.Sprintf("%.1f", v)
	default:
		return fmt.Sprintf("%.0f", v)
	}
}
