package control

import (
	"context"
	"fmt"
	"math"
	"strings"
	"sync"
	"time"

	humanize "github.com/dustin/go-humanize"

	"echod/server"
)

// The status page draws what happened in the last minutes.
const (
	sampleEvery = 2 * time.Second
	sampleCount = 151 // five minutes
)

// sample holds the figures of a server at one time.
type sample struct {
	at                        time.Time
	open                      int
	accepted, closed, in, out uint64
}

// history keeps the latest samples of a server. Its methods may be called concurrently.
type history struct {
	srv *server.Server

	mu      sync.Mutex
	samples []sample // the oldest first; guarded by mu
}

// sample takes samples until ctx ends.
func (h *history) sample(ctx context.Context) {
	tick := time.NewTicker(sampleEvery)
	defer tick.Stop()
	for {
		h.addSample()
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// addSample adds a sample, unless the latest one is less than half of sampleEvery old. So each listener of a Plane can run
// sample on the same history.
func (h *history) addSample() {
	now := time.Now()
	h.mu.Lock()
	defer h.mu.Unlock()
	if n := len(h.samples); n > 0 && now.Sub(h.samples[n-1].at) < sampleEvery/2 {
		return
	}
	st := h.srv.Status()
	s := sample{at: now, open: st.Connections, accepted: st.Accepted, in: st.BytesIn, out: st.BytesOut}
	for _, n := range st.Closed {
		s.closed += n
	}
	if len(h.samples) == sampleCount {
		h.samples = append(h.samples[:0], h.samples[1:]...)
	}
	h.samples = append(h.samples, s)
}

// traffic is the part of the page that shows a history.
type traffic struct {
	Span   string
	Charts []chart
}

// A chart is a picture of one or two lines over the same time, with the same scale.
type chart struct {
	Title, Words string
	Lines        []chartLine
}

type chartLine struct {
	Name, Class string
	Points      string // of an SVG polyline
	Now, Most   string
}

// traffic returns the charts of the samples.
func (h *history) traffic() traffic {
	h.mu.Lock()
	samples := append([]sample(nil), h.samples...)
	h.mu.Unlock()
	if len(samples) == 0 {
		return traffic{Span: "minutes"}
	}
	perSecond := func(of func(sample) uint64) []float64 {
		rates := make([]float64, 0, len(samples))
		for i := 1; i < len(samples); i++ {
			before, after := samples[i-1], samples[i]
			seconds := after.at.Sub(before.at).Seconds()
			// The difference can be negative, because a closing connection may be counted later than its bytes.
			rates = append(rates, max(0, float64(int64(of(after)-of(before)))/seconds))
		}
		return rates
	}
	open := make([]float64, len(samples))
	for i, s := range samples {
		open[i] = float64(s.open)
	}
	number := func(f float64) string { return humanize.Comma(int64(math.Round(f))) }
	rate := func(f float64) string { return number(f) + "/s" }
	size := func(f float64) string { return humanize.IBytes(uint64(f)) + "/s" }
	return traffic{
		Span: formatDuration(time.Since(samples[0].at)),
		Charts: []chart{
			newChart("Open connections", number, series{"open", open}),
			newChart("Connections accepted and closed", rate,
				series{"accepted", perSecond(func(s sample) uint64 { return s.accepted })},
				series{"closed", perSecond(func(s sample) uint64 { return s.closed })}),
			newChart("Bytes in and out", size,
				series{"in", perSecond(func(s sample) uint64 { return s.in })},
				series{"out", perSecond(func(s sample) uint64 { return s.out })}),
		},
	}
}

type series struct {
	name   string
	values []float64
}

// newChart draws the series in a view box of 300 x 60.
func newChart(title string, format func(float64) string, all ...series) chart {
	const width, height, margin = 300.0, 60.0, 2.0
	top := 1.0 // draws a line of zeros at the bottom
	for _, s := range all {
		for _, v := range s.values {
			top = max(top, v)
		}
	}
	c := chart{Title: title}
	var words []string
	for i, s := range all {
		l := chartLine{Name: s.name, Class: [...]string{"first", "second"}[i], Now: format(0), Most: format(0)}
		var points strings.Builder
		most := 0.0
		for i, v := range s.values {
			// The newest value is at the right edge, so that a short history starts there.
			x := width - float64(len(s.values)-1-i)*width/(sampleCount-1)
			fmt.Fprintf(&points, "%.1f,%.1f ", x, height-margin-v/top*(height-2*margin))
			most = max(most, v)
		}
		if n := len(s.values); n > 0 {
			l.Points, l.Now, l.Most = strings.TrimSpace(points.String()), format(s.values[n-1]), format(most)
		}
		words = append(words, fmt.Sprintf("%s now %s, at most %s", l.Name, l.Now, l.Most))
		c.Lines = append(c.Lines, l)
	}
	c.Words = strings.Join(words, "; ")
	return c
}
