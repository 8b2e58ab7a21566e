package load

import (
	"encoding/xml"
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
)

// The layout of the pictures, in pixels.
const (
	plotWidth  = 960.0
	plotLeft   = 92.0
	plotRight  = plotWidth - 56
	latencyTop = 84.0
	latencyEnd = 324.0
	rateTop    = 360.0
	rateEnd    = 470.0
	laneTop    = 488.0
	laneHeight = 20.0
	lanes      = 5
	axisTop    = laneTop + lanes*laneHeight
	plotHeight = axisTop + 52

	percentileTop    = 84.0
	percentileEnd    = 400.0
	percentileHeight = percentileEnd + 56
)

// Colours from Okabe and Ito's palette, which colour-blind people can tell apart.
const (
	fontFamily   = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif"
	ink          = "#20262e"
	faintInk     = "#66707c"
	gridLine     = "#e6e9ed"
	medianColour = "#0072b2"
	p99Colour    = "#d98200"
	maxColour    = "#a9b1bb"
	spreadColour = "#f1f4f7"
	rateColour   = "#cfe3f1"
	drainColour  = "#f3f0e8"
	noticeColour = "#aa4499"
	errorColour  = "#d55e00"
	backColour   = "#009e73"
)

// A drawing is an SVG picture in the making.
type drawing struct{ strings.Builder }

func newDrawing(height float64) *drawing {
	d := &drawing{}
	d.add(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %g %g" width="%g" height="%g" font-family="%s">`,
		plotWidth, height, plotWidth, height, fontFamily)
	d.add(`<rect width="%g" height="%g" fill="#ffffff"/>`, plotWidth, height)
	return d
}

func (d *drawing) add(format string, args ...any) { fmt.Fprintf(d, format+"\n", args...) }

func (d *drawing) text(x, y float64, anchor, colour string, size float64, s string) {
	d.add(`<text x="%.1f" y="%.1f" text-anchor="%s" fill="%s" font-size="%g">%s</text>`, x, y, anchor,
		colour, size, escaped(s))
}

func (d *drawing) sideways(y float64, s string) {
	d.add(`<text x="22" y="%g" text-anchor="middle" fill="%s" font-size="12" transform="rotate(-90 22 %g)">%s</text>`,
		y, ink, y, s)
}

func (d *drawing) line(x1, y1, x2, y2 float64, colour string) {
	d.add(`<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s"/>`, x1, y1, x2, y2, colour)
}

// key adds an entry to a legend. style adds attributes to its line.
func (d *drawing) key(x, y float64, name, colour, style string) {
	d.add(`<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s" stroke-width="3"%s/>`, x, y-4, x+18,
		y-4, colour, style)
	d.text(x+24, y, "start", ink, 12, name)
}

// polyline draws a line through points ("x,y x,y"). A single point becomes a dot.
func (d *drawing) polyline(points []string, colour string, width float64, style string) {
	if len(points) == 1 {
		x, y, _ := strings.Cut(points[0], ",")
		d.add(`<circle cx="%s" cy="%s" r="2" fill="%s"/>`, x, y, colour)
		return
	}
	d.add(`<polyline points="%s" fill="none" stroke="%s" stroke-width="%g" stroke-linejoin="round"%s/>`,
		strings.Join(points, " "), colour, width, style)
}

// finish writes the picture.
func (d *drawing) finish(w io.Writer) error {
	d.add(`</svg>`)
	if _, err := io.WriteString(w, d.String()); err != nil {
		return fmt.Errorf("writing the picture: %w", err)
	}
	return nil
}

// escaped makes text safe for XML. Control characters are replaced.
func escaped(s string) string {
	var b strings.Builder
	_ = xml.EscapeText(&b, []byte(s)) // a Builder accepts everything
	return b.String()
}

// heading writes the settings of the run and its main results.
func (d *drawing) heading(r *Report) {
	load := "closed model, " + grouped(float64(r.Pipeline)) + " in flight per connection"
	switch {
	case len(r.Stages) > 1:
		load = stagesText(r.Stages)
	case r.Rate > 0:
		load = grouped(r.Rate) + " messages/s"
	case r.Think != "":
		load = "closed model, think time " + r.Think
	}
	if r.Rate > 0 {
		load += ", latency since each message was due"
	}
	connections := grouped(float64(r.Conns)) + " connections"
	if r.Conns == 1 {
		connections = "1 connection"
	}
	d.add(`<text x="24" y="30" fill="%s" font-size="17" font-weight="600">%s</text>`, ink,
		escaped("echod load "+r.Address))
	d.text(24, 51, "start", faintInk, 13, fmt.Sprintf("%s, %s B, %s", connections, r.sizes(), load))
	e := r.Echoes
	result := fmt.Sprintf("%s sent, %s returned, %s lost", grouped(float64(e.Sent)),
		grouped(float64(e.Returned)), grouped(float64(e.Lost)))
	colour := ink
	if e.Corrupted > 0 {
		result += ", " + grouped(float64(e.Corrupted)) + " corrupted"
	}
	if e.Lost+e.Corrupted > 0 {
		colour = errorColour
	}
	d.text(plotRight, 30, "end", colour, 14, result)
}

// stagesText lists stages, but not too many.
func stagesText(stages []ReportedStage) string {
	const most = 4
	var parts []string
	for i, s := range stages {
		if i == most {
			parts = append(parts, "…")
			break
		}
		parts = append(parts, fmt.Sprintf("%s/s for %s", grouped(s.Rate), secondsText(s.Seconds)))
	}
	return strings.Join(parts, ", ")
}

func secondsText(s float64) string { return strconv.FormatFloat(s, 'f', -1, 64) + " s" }

// A logScale maps seconds to a logarithmic axis that spans whole decades.
type logScale struct{ low, high, top, end float64 }

func newLogScale(least, most, top, end float64) logScale {
	if most == 0 {
		least, most = 1e-4, 1e-3
	}
	s := logScale{low: math.Floor(math.Log10(least)), high: math.Ceil(math.Log10(most)), top: top, end: end}
	if s.high == s.low {
		s.high++
	}
	return s
}

func (s logScale) y(seconds float64) float64 {
	return s.end - (s.end-s.top)*(math.Log10(seconds)-s.low)/(s.high-s.low)
}

// grid draws a line for each decade.
func (s logScale) grid(d *drawing) {
	for e := s.low; e <= s.high; e++ {
		y := s.end - (s.end-s.top)*(e-s.low)/(s.high-s.low)
		d.line(plotLeft, y, plotRight, y, gridLine)
		d.text(plotLeft-8, y+4, "end", faintInk, 12, decade(int(e)))
	}
	d.sideways((s.top+s.end)/2, "latency (log scale)")
}

// A timeline is a picture of a run over time.
type timeline struct {
	*drawing
	points []Point
	step   float64 // of a point, in seconds
	lasted float64 // until the drain, in seconds
	span   float64 // of the picture, in seconds
}

// WritePlot draws the run over time as SVG: latency on a logarithmic scale, throughput,
// and events below. It includes the wait for what was in flight at the end. The same
// report makes the same bytes.
func (r *Report) WritePlot(w io.Writer) error {
	t := &timeline{drawing: newDrawing(plotHeight), points: r.Series, step: r.step(), lasted: r.Lasted}
	t.span = math.Max(math.Max(r.Lasted, r.Took), 1e-3)
	if n := len(r.Series); n > 0 && r.Series[n-1].At >= r.Lasted {
		t.span = math.Max(t.span, r.Series[n-1].At+t.step)
	}
	t.heading(r)
	t.shade()
	t.axis()
	t.latencies()
	t.throughput()
	t.events()
	return t.finish(w)
}

// step returns how many seconds a point covers.
func (r *Report) step() float64 {
	if len(r.Series) < 2 {
		return math.Max(r.Lasted, 1e-3)
	}
	return r.Series[1].At - r.Series[0].At
}

func (t *timeline) x(at float64) float64 {
	return plotLeft + (plotRight-plotLeft)*math.Min(at, t.span)/t.span
}

// middle is where a point is drawn.
func (t *timeline) middle(p Point) float64 { return t.x(math.Min(p.At+t.step/2, t.span)) }

// shade marks the drain, and when clients were told to leave or were disconnected.
func (t *timeline) shade() {
	if t.lasted < t.span*0.999 {
		x := t.x(t.lasted)
		t.add(`<rect x="%.1f" y="%g" width="%.1f" height="%g" fill="%s"/>`, x, latencyTop, plotRight-x,
			rateEnd-latencyTop, drainColour)
		t.add(`<line x1="%.1f" y1="%g" x2="%.1f" y2="%g" stroke="%s" stroke-dasharray="3 3"/>`, x,
			latencyTop, x, rateEnd, faintInk)
		if x+190 < plotRight {
			t.text(x+6, latencyTop+15, "start", faintInk, 11, "nothing new sent from here on")
		} else {
			t.text(x-6, latencyTop+15, "end", faintInk, 11, "nothing new sent from here on")
		}
	}
	for _, p := range t.points {
		colour := ""
		switch {
		case p.Disconnects > 0:
			colour = errorColour
		case p.Notices > 0:
			colour = noticeColour
		default:
			continue
		}
		t.add(`<rect x="%.1f" y="%g" width="%.1f" height="%g" fill="%s" fill-opacity="0.10"/>`, t.x(p.At),
			latencyTop, math.Max(2, t.x(p.At+t.step)-t.x(p.At)), rateEnd-latencyTop, colour)
	}
}

func (t *timeline) axis() {
	step := niceStep(t.span, 10)
	for i := 0; float64(i)*step <= t.span*1.0001; i++ {
		x := t.x(float64(i) * step)
		t.line(x, latencyTop, x, latencyEnd, gridLine)
		t.line(x, rateTop, x, rateEnd, gridLine)
		t.line(x, axisTop, x, axisTop+5, faintInk)
		t.text(x, axisTop+20, "middle", faintInk, 12, secondsText(math.Round(float64(i)*step*1e6)/1e6))
	}
	t.line(plotLeft, axisTop, plotRight, axisTop, faintInk)
	t.text((plotLeft+plotRight)/2, axisTop+42, "middle", faintInk, 12, "time since the start of the run")
}

func (t *timeline) latencies() {
	least, most := math.Inf(1), 0.0
	for _, p := range t.points {
		if p.P50 > 0 {
			least, most = math.Min(least, p.P50), math.Max(most, p.Max)
		}
	}
	scale := newLogScale(least, most, latencyTop, latencyEnd)
	scale.grid(t.drawing)
	curves := []struct {
		name, colour string
		width        float64
		of           func(Point) float64
	}{
		{"max", maxColour, 1.2, func(p Point) float64 { return p.Max }},
		{"p99", p99Colour, 1.6, func(p Point) float64 { return p.P99 }},
		{"median", medianColour, 1.8, func(p Point) float64 { return p.P50 }},
	}
	for _, part := range unbroken(t.points) {
		var outline []string
		for _, p := range part {
			outline = append(outline, fmt.Sprintf("%.1f,%.1f", t.middle(p), scale.y(p.Max)))
		}
		for i := range part {
			p := part[len(part)-1-i]
			outline = append(outline, fmt.Sprintf("%.1f,%.1f", t.middle(p), scale.y(p.P50)))
		}
		t.add(`<polygon points="%s" fill="%s" fill-opacity="0.8"/>`, strings.Join(outline, " "), spreadColour)
		for _, c := range curves {
			var points []string
			for _, p := range part {
				points = append(points, fmt.Sprintf("%.1f,%.1f", t.middle(p), scale.y(c.of(p))))
			}
			t.polyline(points, c.colour, c.width, "")
		}
	}
	for i, c := range curves {
		t.key(plotRight-194+62*float64(i), latencyTop-8, c.name, c.colour, "")
	}
}

// unbroken splits points into runs without gaps. A gap is where nothing came back.
func unbroken(points []Point) [][]Point {
	var parts [][]Point
	continues := false
	for _, p := range points {
		switch {
		case p.P50 == 0:
			continues = false
			continue
		case !continues:
			parts = append(parts, nil)
			continues = true
		}
		last := &parts[len(parts)-1]
		*last = append(*last, p)
	}
	return parts
}

func (t *timeline) throughput() {
	most, offers := 1.0, false
	for _, p := range t.points {
		most = math.Max(most, math.Max(p.PerSecond, p.Offered))
		offers = offers || p.Offered > 0
	}
	step := niceStep(most*1.05, 3)
	top := math.Ceil(most*1.02/step) * step
	y := func(v float64) float64 { return rateEnd - (rateEnd-rateTop)*v/top }
	for i := 0; float64(i)*step <= top*1.0001; i++ {
		v := float64(i) * step
		t.line(plotLeft, y(v), plotRight, y(v), gridLine)
		t.text(plotLeft-8, y(v)+4, "end", faintInk, 12, grouped(v))
	}
	t.sideways((rateTop+rateEnd)/2, "per second")
	var echoes, offered []string
	for _, p := range t.points {
		from, to := t.x(p.At), t.x(p.At+t.step)
		echoes = append(echoes, fmt.Sprintf("%.1f,%.1f", from, y(p.PerSecond)),
			fmt.Sprintf("%.1f,%.1f", to, y(p.PerSecond)))
		if p.At < t.lasted {
			to = math.Min(to, t.x(t.lasted))
			offered = append(offered, fmt.Sprintf("%.1f,%.1f", from, y(p.Offered)),
				fmt.Sprintf("%.1f,%.1f", to, y(p.Offered)))
		}
	}
	if len(echoes) > 0 {
		last, _, _ := strings.Cut(echoes[len(echoes)-1], ",")
		t.add(`<polygon points="%.1f,%g %s %s,%g" fill="%s" fill-opacity="0.7"/>`, plotLeft, rateEnd,
			strings.Join(echoes, " "), last, rateEnd, rateColour)
		t.polyline(echoes, medianColour, 1.4, "")
	}
	t.key(plotRight-70, rateTop-8, "echoes", medianColour, "")
	if offers {
		const dashed = ` stroke-dasharray="5 3"`
		t.polyline(offered, ink, 1.2, dashed)
		t.key(plotRight-158, rateTop-8, "offered", ink, dashed)
	}
}

// events draws a lane for each kind of event. More events make a taller mark.
func (t *timeline) events() {
	for i, lane := range []struct {
		name, colour string
		of           func(Point) int64
	}{
		{"notices", noticeColour, func(p Point) int64 { return p.Notices }},
		{"disconnects", errorColour, func(p Point) int64 { return p.Disconnects }},
		{"refused", ink, func(p Point) int64 { return p.Refused }},
		{"lost", errorColour, func(p Point) int64 { return p.Lost }},
		{"reconnects", backColour, func(p Point) int64 { return p.Reconnects }},
	} {
		floor := laneTop + float64(i+1)*laneHeight - 3
		t.line(plotLeft, floor, plotRight, floor, gridLine)
		t.text(plotLeft-8, floor-2, "end", lane.colour, 12, lane.name)
		most, sum := int64(1), int64(0)
		for _, p := range t.points {
			most, sum = max(most, lane.of(p)), sum+lane.of(p)
		}
		for _, p := range t.points {
			if n := lane.of(p); n > 0 {
				height := (laneHeight - 6) * (0.35 + 0.65*float64(n)/float64(most))
				t.add(`<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" fill="%s"><title>%d</title></rect>`,
					t.x(p.At), floor-height, math.Max(2,
						t.x(p.At+t.step)-t.x(p.At)-0.5), height, lane.colour, n)
			}
		}
		t.text(plotRight+4, floor-2, "start", faintInk, 11, grouped(float64(sum)))
	}
}

// A curve is a latency distribution: points of a fraction and seconds.
type curve struct {
	name, colour, style string
	points              [][2]float64
}

// WritePercentilePlot draws the latencies of the run by percentile as SVG. On the
// axis the distances from 90 % to 99 % and from 99 % to 99.9 % are equal, and so on. If before is not
// nil, its latencies are drawn dashed.
func (r *Report) WritePercentilePlot(w io.Writer, before *Report) error {
	d := newDrawing(percentileHeight)
	d.heading(r)
	curves := []curve{
		{"echo", medianColour, "", r.distribution(r.Echo, true)},
		{"connect", p99Colour, "", r.distribution(r.Connect, false)},
	}
	if before != nil {
		const dashed = ` stroke-dasharray="5 3"`
		curves = append(curves,
			curve{"echo before", medianColour, dashed, before.distribution(before.Echo, true)},
			curve{"connect before", p99Colour, dashed, before.distribution(before.Connect, false)})
	}
	least, most, count := math.Inf(1), 0.0, int64(10)
	for _, c := range curves {
		for _, p := range c.points {
			if p[1] > 0 {
				least, most = math.Min(least, p[1]), math.Max(most, p[1])
			}
		}
	}
	count = max(count, r.Echo.Count, r.Connect.Count)
	nines := math.Min(8, math.Log10(float64(count)))
	x := func(fraction float64) float64 {
		return plotLeft + (plotRight-plotLeft)*math.Min(nines, -math.Log10(math.Max(1-fraction, 1e-12)))/nines
	}
	scale := newLogScale(least, most, percentileTop, percentileEnd)
	scale.grid(d)
	ticks := []float64{0, 0.5}
	for n := 1.0; n < nines-0.15; n++ { // the label of the maximum would cover it
		ticks = append(ticks, 1-math.Pow(10, -n))
	}
	for _, fraction := range ticks {
		d.line(x(fraction), percentileTop, x(fraction), percentileEnd+5, gridLine)
		d.text(x(fraction), percentileEnd+20, "middle", faintInk, 12,
			strconv.FormatFloat(math.Round(fraction*1e10)/1e8, 'f', -1, 64)+" %")
	}
	d.text(plotRight, percentileEnd+20, "middle", faintInk, 12, "max")
	d.line(plotLeft, percentileEnd, plotRight, percentileEnd, faintInk)
	d.text((plotLeft+plotRight)/2, percentileEnd+42, "middle", faintInk, 12, "percentile")
	keyX := plotRight
	for i := len(curves) - 1; i >= 0; i-- {
		c := curves[i]
		var points []string
		for _, p := range c.points {
			if p[1] > 0 {
				points = append(points, fmt.Sprintf("%.1f,%.1f", x(p[0]), scale.y(p[1])))
			}
		}
		if len(points) == 0 {
			continue
		}
		d.polyline(points, c.colour, 1.8, c.style)
		keyX -= 36 + 7*float64(len(c.name))
		d.key(keyX, percentileTop-8, c.name, c.colour, c.style)
	}
	return d.finish(w)
}

// distribution returns the curve of a latency: from the histogram if the report has it,
// and otherwise through the known percentiles. It ends at the percentile that its number
// of values resolves.
func (r *Report) distribution(l Latency, echo bool) [][2]float64 {
	if l.Count == 0 {
		return nil
	}
	end := 1 - 1/float64(l.Count)
	var points [][2]float64
	if r.histograms == nil {
		for _, p := range [][2]float64{
			{0.5, l.P50},
			{0.9, l.P90},
			{0.99, l.P99},
			{0.999, l.P999},
			{0.9999, l.P9999},
		} {
			if p[0] < end {
				points = append(points, p)
			}
		}
		return append(points, [2]float64{end, l.Max})
	}
	h := r.histograms.connect
	if echo {
		h = r.histograms.echo
	}
	const steps = 200
	for i := range steps {
		fraction := 1 - math.Pow(float64(l.Count), -float64(i)/steps)
		points = append(points, [2]float64{fraction, percentile(h, 100*fraction)})
	}
	return append(points, [2]float64{end, l.Max})
}

// niceStep returns 1, 2 or 5 times a power of ten, so that about n of them make span.
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
	case e >= -6:
		return strconv.FormatFloat(math.Pow(10, float64(e+6)), 'f', -1, 64) + " µs"
	default:
		return strconv.FormatFloat(math.Pow(10, float64(e+9)), 'f', -1, 64) + " ns"
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
