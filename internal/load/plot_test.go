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
)

// TestPlot: whatever a run was like, its picture is XML, the same each time, and within its frame.
func TestPlot(t *testing.T) {
	busy := Report{Address: "a<b>&c\x01:1", Conns: 1234, Size: 64, Rate: 1e6, Lasted: 2, Counts: Counts{Echoes: Echoes{Sent: 10, Lost: 1, Corrupted: 2}}}
	for i := range 20 {
		busy.Series = append(busy.Series, Point{
			At: float64(i) / 10, PerSecond: float64(i * 1e5), P50: 1e-5 * float64(1+i%7), P99: 1e-3, Max: 12,
			Notices: int64(i % 3), Disconnects: int64(i % 5), Refused: int64(i % 4), Reconnects: 12345,
		})
	}
	gaps := busy
	gaps.Series = append([]Point(nil), busy.Series...)
	for _, i := range []int{3, 4, 6, 19} { // 5 is alone
		gaps.Series[i] = Point{At: gaps.Series[i].At}
	}
	for name, r := range map[string]Report{
		"nothing":     {},
		"no echo":     {Lasted: 1, Series: make([]Point, 1)},
		"one point":   {Lasted: 0.05, Series: []Point{{PerSecond: 3, P50: 1e-3, P99: 1e-3, Max: 1e-3}}},
		"busy":        busy,
		"with gaps":   gaps,
		"a long one":  {Lasted: 86400, Series: []Point{{P50: 1e-9, P99: 1, Max: 3600, PerSecond: 1e-3}, {At: 43200, P50: 1, P99: 1, Max: 1, PerSecond: 1e7}}},
		"a short one": {Lasted: 1e-9, Series: []Point{{PerSecond: 1e9, P50: 1, P99: 1, Max: 1}}},
	} {
		var drawn, again bytes.Buffer
		if err := errors.Join(r.WritePlot(&drawn), r.WritePlot(&again)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(drawn.Bytes(), again.Bytes()) {
			t.Errorf("%s: two pictures of it differ", name)
		}
		for dec := xml.NewDecoder(bytes.NewReader(drawn.Bytes())); ; {
			if _, err := dec.Token(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("%s: %v\n%s", name, err, drawn.String())
			}
		}
		if strings.Contains(drawn.String(), "NaN") || strings.Contains(drawn.String(), "Inf") {
			t.Errorf("%s: has no place for something:\n%s", name, drawn.String())
		}
		for _, points := range regexp.MustCompile(` points="([^"]+)"`).FindAllStringSubmatch(drawn.String(), -1) {
			for pair := range strings.FieldsSeq(points[1]) {
				x, y, _ := strings.Cut(pair, ",")
				for s, limit := range map[string]float64{x: plotWidth, y: plotHeight} {
					if v, err := strconv.ParseFloat(s, 64); err != nil || v < 0 || v > limit {
						t.Errorf("%s: %s is outside of the picture", name, pair)
					}
				}
			}
		}
	}
}

// TestPlotLabels: as a person would write them.
func TestPlotLabels(t *testing.T) {
	var drawn bytes.Buffer
	if err := (&Report{Conns: 1, Pipeline: 1, Lasted: 1}).WritePlot(&drawn); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{">0.3 s<", ">0.7 s<", ">1 s<", ">1 connection, "} {
		if !strings.Contains(drawn.String(), want) {
			t.Errorf("lacks %q:\n%s", want, drawn.String())
		}
	}
}

// TestPlotLanes: each shows what it is named for.
func TestPlotLanes(t *testing.T) {
	var drawn bytes.Buffer
	r := &Report{Lasted: 1, Series: []Point{{Notices: 11, Disconnects: 22, Refused: 33, Reconnects: 44}}}
	if err := r.WritePlot(&drawn); err != nil {
		t.Fatal(err)
	}
	lanes := regexp.MustCompile(`(?s)>notices<.*<title>11<.*>disconnects<.*<title>22<.*>refused<.*<title>33<.*>reconnects<.*<title>44<`)
	if !lanes.MatchString(drawn.String()) {
		t.Errorf("the lanes are mixed up:\n%s", drawn.String())
	}
}
