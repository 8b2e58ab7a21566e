package load

import (
	"encoding/xml"
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
)

// The picture's measures, in pixels. The panels share an axis of time.
const (
	plotWidth   = 960.0
	plotLeft    = 92.0
	plotRight   = plotWidth - 56
	latencyTop  = 74.0
	latencyEnd  = 314.0
	rateTop     = 344.0
	rateEnd     = 454.0
	laneTop     = 474.0
	laneHeight  = 20.0
	lanes       = 4
	axisTop     = laneTop + lanes*laneHeight
	plotHeight  = axisTop + 52
	fontFamily  = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif"
	ink         = "#20262e"
	faintInk    = "#66707c"
	gridLine    = "#e6e9ed"
	medianLine  = "#0072b2" // colours that are told apart without seeing red and green apart (Okabe and Ito)
	p99Line     = "#d98200"
	maxLine     = "#a9b1bb"
	spreadArea  = "#f1f4f7"
	rateArea    = "#cfe3f1"
	noticeMark  = "#aa4499"
	endMark     = "#d55e00"
	refusedMark = "#20262e"
	backMark    = "#009e73"
)

// A drawing is a picture in the making.
type drawing struct {
	strings.Builder
	span float64 // of time, in seconds
}

func (d *drawing) x(at float64) float64 { return plotLeft + (plotRight-plotLeft)*at/d.span }

func (d *drawing) add(format string, args ...any) { fmt.Fprintf(d, format+"\n", args...) }

func (d *drawing) text(x, y float64, anchor, colour string, size float64, s string) {
	d.add(`<text x="%.1f" y="%.1f" text-anchor="%s" fill="%s" font-size="%g">%s</text>`, x, y, anchor, colour, size, escaped(s))
}

// escaped makes text fit for XML, which has no place for control characters.
func escaped(s string) string {
	var b strings.Builder
	_ = xml.EscapeText(&b, []byte(s)) // a Builder takes everything
	return b.String()
}

func (d *drawing) line(x1, y1, x2, y2 float64, colour string) {
	d.add(`<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s"/>`, x1, y1, x2, y2, colour)
}

// WritePlot draws the run over time as SVG: latency, on a logarithmic scale, over
// throughput, with notices, disconnects, connects that led nowhere and reconnects
// below. The same report makes the same bytes.
func (r *Report) WritePlot(w io.Writer) error {
	d := &drawing{span: math.Max(r.Lasted, 1e-3)}
	var points []Point
	for _, p := range r.Series { // what came while the run waited at its end is not part of the picture
		if p.At < r.Lasted {
			points = append(points, p)
		}
	}
	d.add(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %g %g" width="%g" height="%g" font-family="%s">`, plotWidth, plotHeight, plotWidth, plotHeight, fontFamily)
	d.add(`<rect width="%g" height="%g" fill="#ffffff"/>`, plotWidth, plotHeight)
	d.heading(r)
	d.bands(points, r.step())
	d.timeAxis()
	d.latencies(points, r.step())
	d.throughput(points, r.step())
	d.marks(points, r.step())
	d.add(`</svg>`)
	if _, err := io.WriteString(w, d.String()); err != nil {
		return fmt.Errorf("writing the picture: %w", err)
	}
	return nil
}

// step is how much time a point stands for.
func (r *Report) step() float64 {
	if len(r.Series) < 2 {
		return math.Max(r.Lasted, 1e-3)
	}
	return r.Series[1].At - r.Series[0].At
}

func (d *drawing) heading(r *Report) {
	model := "closed model, " + strconv.Itoa(r.Pipeline) + " under way on each"
	if r.Rate > 0 {
		model = grouped(r.Rate) + " messages/s, latency counted from when each was due"
	}
	d.add(`<text x="%g" y="30" fill="%s" font-size="17" font-weight="600">%s</text>`, 24.0, ink, escaped("echod load "+r.Address))
	connections := grouped(float64(r.Conns)) + " connections"
	if r.Conns == 1 {
		connections = "1 connection"
	}
	d.text(24, 51, "start", faintInk, 13, fmt.Sprintf("%s, %d B, %s", connections, r.Size, model))
	e := r.Echoes
	verdict := fmt.Sprintf("%s sent, %s returned, %s lost", grouped(float64(e.Sent)), grouped(float64(e.Returned)), grouped(float64(e.Lost)))
	colour := ink
	if e.Corrupted > 0 {
		verdict += ", " + grouped(float64(e.Corrupted)) + " corrupted"
	}
	if e.Lost+e.Corrupted > 0 {
		colour = endMark
	}
	d.text(plotRight, 30, "end", colour, 14, verdict)
}

// bands shade the times when clients were told to go, or were cut off.
func (d *drawing) bands(points []Point, step float64) {
	for _, p := range points {
		colour := ""
		switch {
		case p.Disconnects > 0:
			colour = endMark
		case p.Notices > 0:
			colour = noticeMark
		default:
			continue
		}
		d.add(`<rect x="%.1f" y="%g" width="%.1f" height="%g" fill="%s" fill-opacity="0.10"/>`, d.x(p.At), latencyTop, math.Max(2, d.x(p.At+step)-d.x(p.At)), rateEnd-latencyTop, colour)
	}
}

func (d *drawing) timeAxis() {
	step := niceStep(d.span, 10)
	for i := 0; float64(i)*step <= d.span*1.0001; i++ {
		x := d.x(float64(i) * step)
		d.line(x, latencyTop, x, latencyEnd, gridLine)
		d.line(x, rateTop, x, rateEnd, gridLine)
		d.line(x, axisTop, x, axisTop+5, faintInk)
		d.text(x, axisTop+20, "middle", faintInk, 12, strconv.FormatFloat(math.Round(float64(i)*step*1e6)/1e6, 'f', -1, 64)+" s")
	}
	d.line(plotLeft, axisTop, plotRight, axisTop, faintInk)
	d.text((plotLeft+plotRight)/2, axisTop+42, "middle", faintInk, 12, "time since the start of the run")
}

func (d *drawing) latencies(points []Point, step float64) {
	low, high := math.Inf(1), 0.0
	for _, p := range points {
		if p.P50 > 0 {
			low, high = math.Min(low, p.P50), math.Max(high, p.Max)
		}
	}
	if high == 0 {
		low, high = 1e-4, 1e-3
	}
	bottom, top := math.Floor(math.Log10(low)), math.Ceil(math.Log10(high))
	if top == bottom {
		top++
	}
	y := func(s float64) float64 {
		return latencyEnd - (latencyEnd-latencyTop)*(math.Log10(s)-bottom)/(top-bottom)
	}
	for e := bottom; e <= top; e++ {
		at := latencyEnd - (latencyEnd-latencyTop)*(e-bottom)/(top-bottom)
		d.line(plotLeft, at, plotRight, at, gridLine)
		d.text(plotLeft-8, at+4, "end", faintInk, 12, decade(int(e)))
	}
	d.add(`<text x="22" y="%g" text-anchor="middle" fill="%s" font-size="12" transform="rotate(-90 22 %g)">latency (log scale)</text>`, (latencyTop+latencyEnd)/2, ink, (latencyTop+latencyEnd)/2)

	middle := func(p Point) float64 { return d.x(math.Min(p.At+step/2, d.span)) }
	for _, part := range unbroken(points) {
		var there, back strings.Builder
		for i, p := range part {
			fmt.Fprintf(&there, "%.1f,%.1f ", middle(p), y(p.Max))
			q := part[len(part)-1-i]
			fmt.Fprintf(&back, "%.1f,%.1f ", middle(q), y(q.P50))
		}
		d.add(`<polygon points="%s%s" fill="%s" fill-opacity="0.8"/>`, there.String(), strings.TrimSpace(back.String()), spreadArea)
		for _, line := range []struct {
			colour string
			width  float64
			of     func(Point) float64
		}{
			{maxLine, 1.2, func(p Point) float64 { return p.Max }},
			{p99Line, 1.6, func(p Point) float64 { return p.P99 }},
			{medianLine, 1.8, func(p Point) float64 { return p.P50 }},
		} {
			var b strings.Builder
			for _, p := range part {
				fmt.Fprintf(&b, "%.1f,%.1f ", middle(p), y(line.of(p)))
			}
			if len(part) == 1 { // a point has no line
				d.add(`<circle cx="%.1f" cy="%.1f" r="2" fill="%s"/>`, middle(part[0]), y(line.of(part[0])), line.colour)
				continue
			}
			d.add(`<polyline points="%s" fill="none" stroke="%s" stroke-width="%g" stroke-linejoin="round"/>`, strings.TrimSpace(b.String()), line.colour, line.width)
		}
	}
	x := plotRight - 194
	for _, key := range []struct{ name, colour string }{{"max", maxLine}, {"p99", p99Line}, {"median", medianLine}} {
		d.add(`<line x1="%.1f" y1="%g" x2="%.1f" y2="%g" stroke="%s" stroke-width="3"/>`, x, latencyTop-12, x+18, latencyTop-12, key.colour)
		d.text(x+24, latencyTop-8, "start", ink, 12, key.name)
		x += 62
	}
}

// unbroken splits points where nothing came back.
func unbroken(points []Point) [][]Point {
	var parts [][]Point
	begun := false
	for _, p := range points {
		switch {
		case p.P50 == 0:
			begun = false
			continue
		case !begun:
			parts = append(parts, nil)
			begun = true
		}
		last := &parts[len(parts)-1]
		*last = append(*last, p)
	}
	return parts
}

func (d *drawing) throughput(points []Point, step float64) {
	high := 1.0
	for _, p := range points {
		high = math.Max(high, p.PerSecond)
	}
	each := niceStep(high*1.05, 3)
	top := math.Ceil(high*1.02/each) * each
	y := func(v float64) float64 { return rateEnd - (rateEnd-rateTop)*v/top }
	for v := 0.0; v <= top*1.0001; v += each {
		d.line(plotLeft, y(v), plotRight, y(v), gridLine)
		d.text(plotLeft-8, y(v)+4, "end", faintInk, 12, grouped(v))
	}
	d.add(`<text x="22" y="%g" text-anchor="middle" fill="%s" font-size="12" transform="rotate(-90 22 %g)">echoes/s</text>`, (rateTop+rateEnd)/2, ink, (rateTop+rateEnd)/2)
	var b strings.Builder
	for _, p := range points {
		fmt.Fprintf(&b, "%.1f,%.1f %.1f,%.1f ", d.x(p.At), y(p.PerSecond), d.x(math.Min(p.At+step, d.span)), y(p.PerSecond))
	}
	steps := strings.TrimSpace(b.String())
	d.add(`<polygon points="%.1f,%g %s %.1f,%g" fill="%s" fill-opacity="0.7"/>`, plotLeft, rateEnd, steps, plotRight, rateEnd, rateArea)
	d.add(`<polyline points="%s" fill="none" stroke="%s" stroke-width="1.4"/>`, steps, medianLine)
}

// marks draws a lane for each kind of thing that happens to connections: the more
// of it, the taller.
func (d *drawing) marks(points []Point, step float64) {
	for i, lane := range []struct {
		name, colour string
		of           func(Point) int64
	}{
		{"notices", noticeMark, func(p Point) int64 { return p.Notices }},
		{"disconnects", endMark, func(p Point) int64 { return p.Disconnects }},
		{"refused", refusedMark, func(p Point) int64 { return p.Refused }},
		{"reconnects", backMark, func(p Point) int64 { return p.Reconnects }},
	} {
		floor := laneTop + float64(i+1)*laneHeight - 3
		d.line(plotLeft, floor, plotRight, floor, gridLine)
		d.text(plotLeft-8, floor-2, "end", lane.colour, 12, lane.name)
		most, sum := int64(1), int64(0)
		for _, p := range points {
			most, sum = max(most, lane.of(p)), sum+lane.of(p)
		}
		for _, p := range points {
			if n := lane.of(p); n > 0 {
				height := (laneHeight - 6) * (0.35 + 0.65*float64(n)/float64(most))
				d.add(`<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" fill="%s"><title>%d</title></rect>`,
					d.x(p.At), floor-height, math.Max(2, d.x(p.At+step)-d.x(p.At)-0.5), height, lane.colour, n)
			}
		}
		d.text(plotRight+4, floor-2, "start", faintInk, 11, grouped(float64(sum)))
	}
}

// niceStep returns 1, 2 or 5 times a power of ten, so that no more than about n of
// them span the range.
func niceStep(span float64, n int) float64 {
	raw := span / float64(n)
	power := math.Pow(10, math.Floor(math.Log10(raw)))
	for _, m := range []float64{1, 2, 5} {
		if m*power >= raw*0.9999 {
			return m * power
		}
	}
	return 10 * power
}

// decade names ten to the power of e, in seconds.
func decade(e int) string {
	switch {
	case e >= 0:
		return strconv.FormatFloat(math.Pow(10, float64(e)), 'f', -1, 64) + " s"
	case e >= -3:
		return strconv.FormatFloat(math.Pow(10, float64(e+3)), 'f', -1, 64) + " ms"
	default:
		return strconv.FormatFloat(math.Pow(10, float64(e+6)), 'f', -1, 64) + " µs"
	}
}

// grouped writes a number with commas.
func grouped(v float64) string {
	whole, fraction, _ := strings.Cut(strconv.FormatFloat(v, 'f', -1, 64), ".")
	for i := len(whole) - 3; i > 0; i -= 3 {
		whole = whole[:i] + "," + whole[i:]
	}
	if fraction != "" {
		return whole + "." + fraction
	}
	return whole
}
