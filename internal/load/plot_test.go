package load

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// pictures returns reports of all kinds, by name.
func pictures() map[string]Report {
	busy := Report{
		Address: "a<b>&c\x01:1", Conns: 1234, Sizes: "64", Rate: 1e6, Lasted: 2, Took: 2,
		Counts: Counts{Echoes: Echoes{Sent: 10, Lost: 1, Corrupted: 2}},
		Echo:   Latency{Count: 1e9, P50: 1e-5, P90: 1e-4, P99: 1e-3, P999: 1e-2, P9999: 1e-1, Max: 12},
	}
	for i := range 20 {
		busy.Series = append(busy.Series, Point{
			At: float64(i) / 10, Offered: 2e6, PerSecond: float64(i * 1e5), P50: 1e-5 * float64(1+i%7), P99: 1e-3, Max: 12,
			Lost: int64(i % 2), Notices: int64(i % 3), Disconnects: int64(i % 5), Refused: int64(i % 4), Reconnects: 12345,
		})
	}
	gaps := busy
	gaps.Series = append([]Point(nil), busy.Series...)
	for _, i := range []int{3, 4, 6, 19} { // 5 is alone
		gaps.Series[i] = Point{At: gaps.Series[i].At}
	}
	drained := busy
	drained.Lasted, drained.Took = 0.8, 1.85
	drained.Stages = []ReportedStage{{1, 1}, {2, 2}, {3, 3}, {4, 4}, {5, 5}}
	return map[string]Report{
		"nothing":   {},
		"no echo":   {Lasted: 1, Series: make([]Point, 1)},
		"one point": {Lasted: 0.05, Series: []Point{{PerSecond: 3, P50: 1e-3, P99: 1e-3, Max: 1e-3}}},
		"busy":      busy,
		"gaps":      gaps,
		"drained":   drained,
		"long": {
			Lasted: 86400,
			Series: []Point{
				{P50: 1e-9, P99: 1, Max: 3600, PerSecond: 1e-3},
				{At: 43200, P50: 1, P99: 1, Max: 1, PerSecond: 1e7},
			},
		},
		"short": {Lasted: 1e-9, Series: []Point{{PerSecond: 1e9, P50: 1, P99: 1, Max: 1}}},
		"single echoes": {
			Lasted: 1,
			Echo:   Latency{Count: 1, P50: 1, P90: 1, P99: 1, P999: 1, P9999: 1, Max: 1},
		},
	}
}

// Every picture is XML, the same each time, and inside its frame.
func TestPlotIsWellFormed(t *testing.T) {
	all := pictures()
	before := all["busy"]
	for name, r := range all {
		for kind, draw := range map[string]func(io.Writer) error{
			"timeline":         r.WritePlot,
			"percentiles":      func(w io.Writer) error { return r.WritePercentilePlot(w, nil) },
			"percentiles, two": func(w io.Writer) error { return r.WritePercentilePlot(w, &before) },
		} {
			var drawn, again bytes.Buffer
			if err := errors.Join(draw(&drawn), draw(&again)); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(drawn.Bytes(), again.Bytes()) {
				t.Errorf("%s, %s: two pictures of the same report differ", name, kind)
			}
			for dec := xml.NewDecoder(bytes.NewReader(drawn.Bytes())); ; {
				if _, err := dec.Token(); errors.Is(err, io.EOF) {
					break
				} else if err != nil {
					t.Fatalf("%s, %s: %v\n%s", name, kind, err, drawn.String())
				}
			}
			if strings.Contains(drawn.String(), "NaN") || strings.Contains(drawn.String(), "Inf") {
				t.Errorf("%s, %s: a coordinate is not a number:\n%s", name, kind, drawn.String())
			}
			for _, points := range regexp.MustCompile(` points="([^"]+)"`).FindAllStringSubmatch(drawn.String(), -1) {
				for pair := range strings.FieldsSeq(points[1]) {
					x, y, _ := strings.Cut(pair, ",")
					for s, limit := range map[string]float64{x: plotWidth, y: plotHeight} {
						if v, err := strconv.ParseFloat(s, 64); err != nil || v < 0 || v > limit {
							t.Errorf("%s, %s: %s is outside of the picture", name, kind, pair)
						}
					}
				}
			}
		}
	}
}

func drawn(t *testing.T, r *Report) string {
	t.Helper()
	var b bytes.Buffer
	if err := r.WritePlot(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestPlot(t *testing.T) {
	t.Run("labels", func(t *testing.T) {
		text := drawn(t, &Report{Conns: 1, Pipeline: 1, Lasted: 1})
		for _, want := range []string{">0.3 s<", ">0.7 s<", ">1 s<", ">1 connection, "} {
			if !strings.Contains(text, want) {
				t.Errorf("lacks %q:\n%s", want, text)
			}
		}
		if strings.Contains(text, "nothing new sent") {
			t.Error("a run without a drain shows one")
		}
	})
	t.Run("each lane shows its own events", func(t *testing.T) {
		text := drawn(t, &Report{
			Lasted: 1,
			Series: []Point{{Notices: 11, Disconnects: 22, Refused: 33, Lost: 55, Reconnects: 44}},
		})
		if !regexp.MustCompile(`(?s)>notices<.*<title>11<.*>disconnects<.*<title>22<.*>refused<.*<title>33<.*>lost<.*<title>55<.*>reconnects<.*<title>44<`).MatchString(text) {
			t.Errorf("the lanes are mixed up:\n%s", text)
		}
	})
	t.Run("it covers the drain, with the worst latency", func(t *testing.T) {
		r := &Report{Lasted: 1, Took: 3.95, Series: []Point{}}
		for i := range 40 {
			r.Series = append(r.Series,
				Point{At: float64(i) / 10, PerSecond: 200, Offered: 500, P50: 0.01, P99: 0.01, Max: 0.01})
		}
		r.Series[39].Max = 900
		for i := 10; i < 40; i++ {
			r.Series[i].Offered = 0
		}
		text := drawn(t, r)
		for _, want := range []string{">4 s<", ">1000 s<", "nothing new sent from here on", ">offered<"} {
			if !strings.Contains(text, want) {
				t.Errorf("lacks %q:\n%s", want, text)
			}
		}
	})
	t.Run("the offered rate of stages is a dashed line, drawn until the drain", func(t *testing.T) {
		r := &Report{
			Lasted: 2, Took: 2, Rate: 150,
			Series: []Point{{Offered: 100, PerSecond: 100}, {At: 1, Offered: 200, PerSecond: 100}},
		}
		text := drawn(t, r)
		line := regexp.MustCompile(`<polyline points="([^"]*)"[^>]*dasharray`).FindStringSubmatch(text)
		if line == nil {
			t.Fatalf("no dashed line:\n%s", text)
		}
		points := strings.Fields(line[1])
		y := func(i int) string { _, y, _ := strings.Cut(points[i], ","); return y }
		if len(points) != 4 || y(0) != y(1) || y(1) == y(2) || y(2) != y(3) {
			t.Errorf("the line of two stages is %v", points)
		}
	})
	t.Run("a distribution ends where its number of values does", func(t *testing.T) {
		r := &Report{Echo: Latency{Count: 100, P50: 1, P90: 2, P99: 3, P999: 4, P9999: 4, Max: 5}}
		expect(t, "points", r.distribution(r.Echo, true), [][2]float64{{0.5, 1}, {0.9, 2}, {0.99, 5}})
	})
	t.Run("the percentile picture shows the tail", func(t *testing.T) {
		r := &Report{Lasted: 1, histograms: newInterval()}
		for range 9999 {
			record(r.histograms.echo, time.Millisecond)
		}
		record(r.histograms.echo, 20*time.Second)
		r.Echo = latencyOf(r.histograms.echo)
		var b bytes.Buffer
		if err := r.WritePercentilePlot(&b, nil); err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{">100 s<", ">99.9 %<", ">max<", ">echo<"} {
			if !strings.Contains(b.String(), want) {
				t.Errorf("lacks %q:\n%s", want, b.String())
			}
		}
		if strings.Contains(b.String(), ">connect<") {
			t.Error("there is a key for connects, of which there are none")
		}
	})
}
