package main

import (
	"cmp"
	_ "embed"
	"errors"
	"fmt"
	"image/color"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"text/template"
	"time"

	"github.com/dustin/go-humanize"
	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

//go:embed report.md.tmpl
var reportTemplate string

// write writes the report and its plots to out, and prints the summary.
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
		"thousands": thousands, "inc": func(n int) int { return n + 1 },
		"s":   func(d time.Duration) string { return fmt.Sprintf("%.2f", d.Seconds()) },
		"mib": func(b uint64) string { return humanize.IBytes(b) }, "shapes": func() []shape { return shapes },
		"messageShapes": func() []shape { return messageShapes },
		"places":        func() []string { return []string{pinnedName, unpinnedName} },
		"disturbances":  func() []disturbance { return disturbances },
	}).Parse(reportTemplate)
	if err != nil {
		return err
	}
	return t.Execute(w, r)
}

// summarize prints the main figures.
func (r *results) summarize(w io.Writer, report string) error {
	fmt.Fprintf(w,
		"CPU time of the server per echo in µs, pinned; connections per second; memory per idle connection in KiB\n\n")
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
	if r.TLS != nil {
		fmt.Fprintf(w, "\nover TLS: CPU time in µs per echo of 64 B and of 64 KiB and per handshake, handshakes per second of it; memory\n\n")
		for _, e := range r.TLS.Contenders {
			fmt.Fprintf(w, "%-20s %s\n", e.Name, strings.Join(r.TLS.TLSRow(e.Name), "  "))
		}
	}
	fmt.Fprintln(w)
	if !r.Quick { // one short round is not enough
		for _, g := range r.Goals() {
			fmt.Fprintf(w, "%-9s %s: %s (%s)\n", map[bool]string{true: "reached", false: "MISSED"}[g.Reached], g.What,
				g.Measured, g.Bound)
		}
	}
	_, err := fmt.Fprintf(w, "report: %s\n", report)
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
	CPU, Range, Floor, Rival         string // Floor and Rival are ratios
	PerSecond, P50, P99, P999, Loads string
}

// Table returns the lines for a shape, least CPU time first.
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
			Floor:     times(r.ratio(place, sh.Name, name, floor, cpu)),
			Rival:     times(r.ratio(place, sh.Name, name, rival, cpu)),
			PerSecond: thousands(int(run.PerSecond())),
			P50:       milliseconds(p50(run)), P99: milliseconds(p99(run)), P999: milliseconds(p999(run)),
			Loads: fmt.Sprintf("%.0f %%", 100*run.LoadCPU.Seconds()/run.Elapsed.Seconds()),
		})
	}
	return lines
}

// Row returns a contender's CPU times for messageShapes.
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

// TLSRow returns a contender's CPU times over TLS, the handshakes per second of CPU time, and the memory per idle
// connection.
func (r *results) TLSRow(name string) (cells []string) {
	for _, sh := range tlsShapes {
		run, ok := r.typical(pinnedName, sh.Name, name)
		text := microseconds(run.CPUPerEcho())
		if against, both := r.ratio(pinnedName, sh.Name, name, subject, cpu); both && name != subject {
			text += " (" + times(against, true) + ")"
		}
		cells = append(cells, cell(ok, text))
		if sh.Churn {
			cells = append(cells, cell(ok, thousands(int(time.Second/max(1, run.CPUPerEcho())))))
		}
	}
	for _, conns := range r.Held() {
		m, ok := r.leastMemory(name, conns)
		cells = append(cells, cell(ok, fmt.Sprintf("%.1f", m.perConn()/kib)))
	}
	return cells
}

// messageShapes are the shapes with lasting connections.
var messageShapes = shapes[:5]

// MemoryRow returns a contender's memory per connection, and the slope between the fewest and the most connections.
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

// A disturbedLatency is a latency next to idle connections, with each disturbance.
type disturbedLatency struct {
	Place, Shape, What string
	With               []string
}

// DisturbedLatencies returns the latencies with each disturbance: medians of all measurements, and for the longest wait the
// least; see delay.
func (r *results) DisturbedLatencies() (all []disturbedLatency) {
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
				c := disturbedLatency{Place: place, Shape: sh.Title, What: l.name, With: []string{milliseconds(base)}}
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

// VersionSuffix returns the version after a space, or "".
func (e participant) VersionSuffix() string {
	if e.Version == "" {
		return ""
	}
	return " " + strings.TrimSpace(e.Version)
}

// A bar is one contender in a plot.
type bar struct {
	name  string
	value float64
	label string
}

// Colours that people who cannot distinguish red and green can distinguish (Okabe and Ito).
var (
	subjectColour = color.RGBA{R: 0x00, G: 0x72, B: 0xb2, A: 0xff}
	floorColour   = color.RGBA{R: 0xe6, G: 0x9f, B: 0x00, A: 0xff}
	othersColour  = color.RGBA{R: 0xb8, G: 0xbc, B: 0xc2, A: 0xff}
)

func colourOf(name string) color.Color {
	switch name {
	case subject:
		return subjectColour
	case floor:
		return floorColour
	}
	return othersColour
}

// panel draws bars, the first on top. Bars longer than limit are cut off; their labels have the values.
func panel(title, axis string, bars []bar, limit float64) (*plot.Plot, error) {
	p := plot.New()
	for _, style := range []*text.Style{&p.Title.TextStyle, &p.X.Label.TextStyle, &p.X.Tick.Label, &p.Y.Tick.Label} {
		style.Font.Variant = "Sans"
	}
	p.Title.Text, p.X.Label.Text = title, axis
	p.Title.TextStyle.Font.Size = vg.Points(12)
	p.Title.Padding = vg.Points(6)
	var names []string
	var texts []string
	points := make(plotter.XYs, len(bars))
	longest := 0.0
	for i, b := range bars {
		at := len(bars) - 1 - i
		length := min(b.value, limit)
		longest = max(longest, length)
		chart, err := plotter.NewBarChart(plotter.Values{length}, vg.Points(11))
		if err != nil {
			return nil, err
		}
		chart.Horizontal, chart.XMin, chart.Color, chart.LineStyle.Width = true, float64(at), colourOf(b.name), 0
		p.Add(chart)
		points[i] = plotter.XY{X: length, Y: float64(at)}
		texts = append(texts, " "+b.label)
		names = append(names, b.name)
	}
	labels, err := plotter.NewLabels(plotter.XYLabels{XYs: points, Labels: texts})
	if err != nil {
		return nil, err
	}
	for i := range labels.TextStyle {
		labels.TextStyle[i].YAlign = draw.YCenter
		labels.TextStyle[i].Font.Size = vg.Points(9)
		labels.TextStyle[i].Font.Variant = "Sans"
	}
	p.Add(labels)
	slices.Reverse(names)
	p.NominalY(names...)
	p.X.Min, p.X.Max = 0, longest*1.2
	p.Y.Min, p.Y.Max = -0.7, float64(len(bars))-0.3
	return p, nil
}

// save writes panels, in so many columns, to an SVG file.
func save(path string, panels []*plot.Plot, columns int) error {
	if len(panels) == 0 { // not measured: remove an older plot
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	const width, height = 4.6 * vg.Inch, 2.7 * vg.Inch
	rows := (len(panels) + columns - 1) / columns
	grid := make([][]*plot.Plot, rows)
	for i := range grid {
		grid[i] = make([]*plot.Plot, columns)
	}
	for i, p := range panels {
		grid[i/columns][i%columns] = p
	}
	canvas := vgsvg.New(width*vg.Length(columns), height*vg.Length(rows))
	whole := draw.New(canvas)
	whole.SetColor(color.White) // readable in dark mode too
	whole.Fill(whole.Rectangle.Path())
	tiles := draw.Tiles{
		Rows: rows, Cols: columns, PadX: vg.Points(14), PadY: vg.Points(12),
		PadTop: vg.Points(6), PadBottom: vg.Points(6), PadLeft: vg.Points(6), PadRight: vg.Points(10),
	}
	for i, row := range plot.Align(grid, tiles, whole) {
		for j, c := range row {
			if grid[i][j] != nil {
				grid[i][j].Draw(c)
			}
		}
	}
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = canvas.WriteTo(file)
	if closed := file.Close(); err == nil {
		err = closed
	}
	return err
}

// plotCPU draws CPU times relative to the floor's or, without a floor, to the subject's.
func plotCPU(r *results, path string) error {
	var panels []*plot.Plot
	for _, sh := range shapes {
		unit := floor
		if _, ok := r.typical(pinnedName, sh.Name, floor); !ok {
			unit = subject
		}
		var bars []bar
		for _, name := range r.ranked(pinnedName, sh.Name) {
			if against, ok := r.ratio(pinnedName, sh.Name, name, unit, cpu); ok {
				bars = append(bars, bar{name, against, times(against, true)})
			}
		}
		if len(bars) == 0 {
			continue
		}
		const cut = 4
		p, err := panel(sh.Title, "CPU time per echo, as a multiple of "+unit+"'s", bars, cut)
		if err != nil {
			return err
		}
		panels = append(panels, p)
	}
	return save(path, panels, 2)
}

// plotLatency draws the median and the p99 of the latency.
func plotLatency(r *results, path string) error {
	var panels []*plot.Plot
	for _, sh := range shapes[:2] {
		for _, l := range []struct {
			name string
			of   figure
		}{{"median", p50}, {"p99", p99}} {
			var bars []bar
			for _, name := range r.ranked(pinnedName, sh.Name) {
				run, _ := r.typical(pinnedName, sh.Name, name)
				bars = append(bars, bar{name, l.of(run), milliseconds(l.of(run))})
			}
			if len(bars) == 0 {
				continue
			}
			slices.SortFunc(bars, func(a, b bar) int { return cmp.Compare(a.value, b.value) })
			p, err := panel(sh.Title+": "+l.name, "ms from the write to the echo", bars, math.Inf(1))
			if err != nil {
				return err
			}
			panels = append(panels, p)
		}
	}
	return save(path, panels, 2)
}

// plotMemory draws the memory per idle connection.
func plotMemory(r *results, path string) error {
	var panels []*plot.Plot
	for _, conns := range r.Held() {
		var bars []bar
		for _, e := range r.Contenders {
			if m, ok := r.leastMemory(e.Name, conns); ok {
				each := m.perConn() / kib
				bars = append(bars, bar{e.Name, max(0, each), fmt.Sprintf("%.2f", each)})
			}
		}
		slices.SortFunc(bars, func(a, b bar) int { return cmp.Compare(a.value, b.value) })
		p, err := panel(thousands(conns)+" idle connections", "KiB resident per connection", bars, math.Inf(1))
		if err != nil {
			return err
		}
		panels = append(panels, p)
	}
	return save(path, panels, 2)
}

// plotChurn draws how many connections are opened, used once and closed per second.
func plotChurn(r *results, path string) error {
	var panels []*plot.Plot
	for _, place := range []string{pinnedName, unpinnedName} {
		var bars []bar
		for _, name := range r.ranked(place, churn) {
			run, _ := r.typical(place, churn, name)
			bars = append(bars, bar{name, run.PerSecond(), thousands(int(run.PerSecond()))})
		}
		if len(bars) == 0 {
			continue
		}
		slices.SortFunc(bars, func(a, b bar) int { return cmp.Compare(b.value, a.value) })
		p, err := panel("Connect, one echo, close: "+place, "connections per second", bars, math.Inf(1))
		if err != nil {
			return err
		}
		panels = append(panels, p)
	}
	return save(path, panels, 2)
}
