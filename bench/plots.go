package main

import (
	"cmp"
	"errors"
	"fmt"
	"image/color"
	"io/fs"
	"math"
	"os"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// A bar is a contender's value in a plot.
type bar struct {
	name  string
	value float64
	label string
}

// Colours that are told apart without seeing red and green apart (Okabe and Ito).
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

// panel draws bars, the first on top. Those longer than limit are cut short there: their label tells.
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
	if len(panels) == 0 { // nothing of it was measured, so no older one is to be shown either
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
	whole.SetColor(color.White) // or the text would be black on the black of a reader who likes it dark
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

// plotCPU draws CPU times in relation to the floor's, or where there is no floor to the subject's.
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
		p, err := panel(sh.Title, "CPU time for an echo, as a multiple of "+unit+"'s", bars, cut)
		if err != nil {
			return err
		}
		panels = append(panels, p)
	}
	return save(path, panels, 2)
}

// plotLatency draws what a client waits for its echo, most of the time and at worst.
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

// plotMemory draws what an idle connection costs.
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
		p, err := panel(thousands(conns)+" idle connections", "KiB resident for each", bars, math.Inf(1))
		if err != nil {
			return err
		}
		panels = append(panels, p)
	}
	return save(path, panels, 2)
}

// plotChurn draws how many connections are opened, used once and closed in a second.
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
		p, err := panel("Connect, one echo, close: "+place, "connections a second", bars, math.Inf(1))
		if err != nil {
			return err
		}
		panels = append(panels, p)
	}
	return save(path, panels, 2)
}
