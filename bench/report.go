package main

import (
	_ "embed"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"text/template"
	"time"

	"github.com/dustin/go-humanize"
)

//go:embed report.md.tmpl
var reportTemplate string

// write makes the report of r in out, with its plots, and prints the summary.
func write(r *results, out string, summary io.Writer) error {
	for name, draw := range map[string]func(*results, string) error{
		"cpu.svg": plotCPU, "latency.svg": plotLatency, "memory.svg": plotMemory, "churn.svg": plotChurn,
	} {
		if err := draw(r, filepath.Join(plotsDir(out), name)); err != nil {
			return fmt.Errorf("drawing %s: %w", name, err)
		}
	}
	report := filepath.Join(out, "benchmarks.md")
	file, err := os.Create(report)
	if err != nil {
		return err
	}
	err = r.render(file)
	if closed := file.Close(); err == nil {
		err = closed
	}
	if err != nil {
		return fmt.Errorf("writing %s: %w", report, err)
	}
	return r.summarize(summary, report)
}

func (r *results) render(w io.Writer) error {
	t, err := template.New("report").Funcs(template.FuncMap{
		"thousands": thousands, "inc": func(n int) int { return n + 1 }, "s": func(d time.Duration) string { return fmt.Sprintf("%.2f", d.Seconds()) },
		"mib": func(b uint64) string { return humanize.IBytes(b) }, "shapes": func() []shape { return shapes }, "messageShapes": func() []shape { return messageShapes },
		"places": func() []string { return []string{pinnedName, unpinnedName} }, "disturbances": func() []disturbance { return disturbances },
	}).Parse(reportTemplate)
	if err != nil {
		return err
	}
	return t.Execute(w, r)
}

// summarize prints what a person waits for at the terminal.
func (r *results) summarize(w io.Writer, report string) error {
	fmt.Fprintf(w, "CPU time of the server for an echo in µs, pinned; connections in a second; memory of an idle connection in KiB\n\n")
	tab := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(tab, "\t")
	for _, sh := range shapes {
		fmt.Fprintf(tab, "%s\t", sh.Name)
	}
	fmt.Fprintln(tab, "memory\t")
	for _, e := range r.Contenders {
		fmt.Fprintf(tab, "%s\t", e.Name)
		for _, sh := range shapes {
			run, ok := r.typical(pinnedName, sh.Name, e.Name)
			text := microseconds(run.CPUPerEcho())
			if sh.Churn && ok {
				text = thousands(int(run.PerSecond()))
			}
			fmt.Fprintf(tab, "%s\t", cell(ok, text))
		}
		m, ok := memory{}, false
		for _, conns := range r.Held() {
			m, ok = r.leastMemory(e.Name, conns)
		}
		fmt.Fprintf(tab, "%s\t\n", cell(ok, fmt.Sprintf("%.2f", m.perConn()/kib)))
	}
	if err := tab.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w)
	if !r.Quick { // one short round proves nothing
		for _, g := range r.Goals() {
			fmt.Fprintf(w, "%-9s %s: %s (%s)\n", map[bool]string{true: "reached", false: "MISSED"}[g.Reached], g.What, g.Measured, g.Bound)
		}
	}
	_, err := fmt.Fprintf(w, "the whole report: %s\n", report)
	return err
}

func cell(ok bool, text string) string {
	if !ok {
		return "–"
	}
	return text
}

// A line is a contender in a table of one shape.
type line struct {
	Name                             string
	Own                              bool
	CPU, Range, Floor, Rival         string // the ratios to the floor, and to the best rival
	PerSecond, P50, P99, P999, Loads string
}

// Table gives the lines for a shape, the least CPU time first.
func (r *results) Table(place string, sh shape) (lines []line) {
	rival := r.bestRival(place, sh.Name)
	for _, name := range r.ranked(place, sh.Name) {
		run, _ := r.typical(place, sh.Name, name)
		least, most := run.CPUPerEcho(), run.CPUPerEcho()
		for _, other := range r.runs(place, sh.Name, name) {
			least, most = min(least, other.CPUPerEcho()), max(most, other.CPUPerEcho())
		}
		lines = append(lines, line{
			Name: name, Own: name == subject,
			CPU: microseconds(run.CPUPerEcho()), Range: microseconds(least) + "–" + microseconds(most),
			Floor: times(r.ratio(place, sh.Name, name, floor, cpu)), Rival: times(r.ratio(place, sh.Name, name, rival, cpu)),
			PerSecond: thousands(int(run.PerSecond())),
			P50:       milliseconds(p50(run)), P99: milliseconds(p99(run)), P999: milliseconds(p999(run)),
			Loads: fmt.Sprintf("%.0f %%", 100*run.LoadCPU.Seconds()/run.Elapsed.Seconds()),
		})
	}
	return lines
}

// Row gives a contender's CPU times for the shapes of messages, as cells.
func (r *results) Row(place, name string) (cells []string) {
	for _, sh := range messageShapes {
		run, ok := r.typical(place, sh.Name, name)
		text := microseconds(run.CPUPerEcho())
		if against, both := r.ratio(place, sh.Name, name, floor, cpu); both && name != floor {
			text += " (" + times(against, true) + ")"
		}
		cells = append(cells, cell(ok, text))
	}
	return cells
}

// messageShapes are those whose connections last.
var messageShapes = shapes[:5]

// MemoryRow gives a contender's memory for each connection, as cells, and the slope between the least and the most.
func (r *results) MemoryRow(name string) (cells []string) {
	held := r.Held()
	for _, conns := range held {
		m, ok := r.leastMemory(name, conns)
		cells = append(cells, cell(ok, fmt.Sprintf("%.2f", m.perConn()/kib)))
	}
	if len(held) > 1 {
		few, okFew := r.leastMemory(name, held[0])
		many, okMany := r.leastMemory(name, held[len(held)-1])
		slope := float64((many.After-many.Before)-(few.After-few.Before)) / float64(many.Conns-few.Conns)
		cells = append(cells, cell(okFew && okMany, fmt.Sprintf("%.2f", slope/kib)))
	}
	return cells
}

// A contrast is a latency beside the crowd with each of the disturbances, the first being nothing.
type contrast struct {
	Place, Shape, What string
	With               []string
}

// Contrasts are what disturbances do to latencies: medians of all measurements, but for the longest wait; see heldUp.
func (r *results) Contrasts() (all []contrast) {
	for _, place := range []string{pinnedName, unpinnedName} {
		for _, sh := range shapes {
			for _, l := range []struct {
				name string
				of   figure
				sum  func([]float64) (float64, bool)
			}{{"p50", p50, median}, {"p99", p99, median}, {"p99.9", p999, median}, {"longest", longestWait, least}} {
				base, ok := l.sum(r.beside(place, sh.Name, disturbances[0].Name, l.of))
				if !ok {
					continue
				}
				c := contrast{Place: place, Shape: sh.Title, What: l.name, With: []string{milliseconds(base)}}
				for _, d := range disturbances[1:] {
					with, ok := l.sum(r.beside(place, sh.Name, d.Name, l.of))
					c.With = append(c.With, cell(ok, milliseconds(with)+" ("+times(with/base, true)+")"))
				}
				all = append(all, c)
			}
		}
	}
	return all
}

func least(values []float64) (float64, bool) {
	if len(values) == 0 {
		return 0, false
	}
	return slices.Min(values), true
}

func times(ratio float64, ok bool) string { return cell(ok, fmt.Sprintf("%.2f", ratio)) }

func microseconds(d time.Duration) string {
	us := float64(d) / float64(time.Microsecond)
	switch {
	case us < 10:
		return fmt.Sprintf("%.2f", us)
	case us < 100:
		return fmt.Sprintf("%.1f", us)
	}
	return thousands(int(us + 0.5))
}

func milliseconds(ms float64) string {
	if ms < 10 {
		return fmt.Sprintf("%.2f", ms)
	}
	return fmt.Sprintf("%.1f", ms)
}

func thousands(n int) string { return humanize.Comma(int64(n)) }

func (e entrant) Told() string {
	if e.Version == "" {
		return ""
	}
	return " " + strings.TrimSpace(e.Version)
}
