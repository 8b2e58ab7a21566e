package load

import (
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// A Point is what happened in a part of the run.
type Point struct {
	At          float64 `json:"at_seconds"` // its beginning, since that of the run
	PerSecond   float64 `json:"echoes_per_second"`
	P50         float64 `json:"p50_seconds"` // zero when nothing came back
	P99         float64 `json:"p99_seconds"`
	Max         float64 `json:"max_seconds"`
	Open        int64   `json:"open"`        // connections, at its end
	Notices     int64   `json:"notices"`     // that end connections
	Disconnects int64   `json:"disconnects"` // that no notice announced
	Refused     int64   `json:"refused"`     // connects that led to no service
	Reconnects  int64   `json:"reconnects"`
}

// A point is what happened in a part of the run, while that is not yet over.
type point struct {
	Counts
	latencies *hdrhistogram.Histogram
}

func (p *point) add(t *tally) {
	p.Counts.add(&t.Counts)
	if t.Echoes.Returned > 0 {
		if p.latencies == nil {
			p.latencies = newWindowHistogram()
		}
		p.latencies.Merge(t.window)
	}
}

// halved makes one point of each two.
func halved(points []point) []point {
	half := points[:0]
	for i, p := range points {
		if i%2 == 0 {
			half = append(half, p)
			continue
		}
		q := &half[len(half)-1]
		q.Counts.add(&p.Counts)
		switch {
		case q.latencies == nil:
			q.latencies = p.latencies
		case p.latencies != nil:
			q.latencies.Merge(p.latencies)
		}
	}
	clear(points[len(half):])
	return half
}

// series makes points of parts of a run that lasted until the given time and was
// over at end. The parts last for step each, the last one perhaps less. At the end
// there is none for the time after the run in which nothing happened any more.
func series(parts []point, step, lasted, end time.Duration) []Point {
	points := make([]Point, 0, len(parts))
	open := int64(0)
	for i, p := range parts {
		at := time.Duration(i) * step
		long := min(step, end-at)
		open += p.open()
		made := Point{
			At: at.Seconds(), Open: open,
			Notices:     p.Notices.Shutdown + p.Notices.Paused + p.Notices.Busy,
			Disconnects: p.Ends.Unannounced(),
			Refused:     p.Connects.Missed(), Reconnects: p.Reconnects,
		}
		if long > 0 {
			made.PerSecond = float64(p.Echoes.Returned) / long.Seconds()
		}
		if p.latencies != nil {
			made.P50 = percentile(p.latencies, 50)
			made.P99 = percentile(p.latencies, 99)
			made.Max = percentile(p.latencies, 100)
		}
		points = append(points, made)
	}
	for n := len(points); n > 0; n-- {
		last := &points[n-1]
		if last.At < lasted.Seconds() || *last != (Point{At: last.At}) {
			break
		}
		points = points[:n-1]
	}
	return points
}

// percentile returns one in seconds.
func percentile(h *hdrhistogram.Histogram, percent float64) float64 {
	return time.Duration(h.ValueAtPercentile(percent)).Seconds()
}
