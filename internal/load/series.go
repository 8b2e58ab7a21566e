package load

import (
	"fmt"
	"io"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// A Point is what happened in one part of the run. The parts are equally long, the
// last one perhaps shorter.
type Point struct {
	At          float64 `json:"at_seconds"` // when the part began, since the start of the run
	Offered     float64 `json:"offered_per_second"`
	PerSecond   float64 `json:"echoes_per_second"`
	P50         float64 `json:"p50_seconds"` // zero if nothing came back
	P99         float64 `json:"p99_seconds"`
	Max         float64 `json:"max_seconds"`
	Open        int64   `json:"open"`        // connections, at the end of the part
	Lost        int64   `json:"lost"`        // messages, counted when their connection ended
	Notices     int64   `json:"notices"`     // that end connections
	Disconnects int64   `json:"disconnects"` // without a notice
	Refused     int64   `json:"refused"`     // see Connects.Missed
	Reconnects  int64   `json:"reconnects"`
}

// A point collects what becomes a Point.
type point struct {
	Counts
	latencies *hdrhistogram.Histogram // nil if nothing came back
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

// halved merges points in pairs.
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

// series returns the points of a run. Messages were offered until lasted, and the
// run was over at end. Points after lasted in which nothing happened are left out at
// the end.
func series(points []point, step, lasted, end time.Duration, offered func(time.Duration) float64) []Point {
	made := make([]Point, 0, len(points))
	open := int64(0)
	for i, p := range points {
		at := time.Duration(i) * step
		length := min(step, end-at)
		open += p.open()
		q := Point{
			At: at.Seconds(), Open: open, Lost: p.Echoes.Lost,
			Notices:     p.Notices.Shutdown + p.Notices.Paused + p.Notices.Busy,
			Disconnects: p.Ends.Unannounced(),
			Refused:     p.Connects.Missed(), Reconnects: p.Reconnects,
		}
		if at < lasted {
			q.Offered = offered(at + min(step, lasted-at)/2)
		}
		if length > 0 {
			q.PerSecond = float64(p.Echoes.Returned) / length.Seconds()
		}
		if p.latencies != nil {
			q.P50 = percentile(p.latencies, 50)
			q.P99 = percentile(p.latencies, 99)
			q.Max = percentile(p.latencies, 100)
		}
		made = append(made, q)
	}
	for n := len(made); n > 0; n-- {
		last := &made[n-1]
		if last.At < lasted.Seconds() || *last != (Point{At: last.At}) {
			break
		}
		made = made[:n-1]
	}
	return made
}

// An interval holds the latencies of one second.
type interval struct{ echo, connect, handshake *hdrhistogram.Histogram }

func newInterval() *interval { return &interval{newHistogram(), newHistogram(), newHistogram()} }

func (v *interval) merge(o *interval) {
	v.echo.Merge(o.echo)
	v.connect.Merge(o.connect)
	v.handshake.Merge(o.handshake)
}

func (v *interval) reset() {
	v.echo.Reset()
	v.connect.Reset()
	v.handshake.Reset()
}

// latencyLog collects the intervals of all workers. It sums them up and, if it has a
// log, writes each second to it once all workers have handed it over. It belongs to
// the goroutine of Run.
type latencyLog struct {
	total   *interval
	pending map[int]*interval // by second
	next    int               // first second that is not written
	began   time.Time

	log *hdrhistogram.HistogramLogWriter // nil if not wanted
	err error                            // the first error of log
}

func newLatencyLog(w io.Writer, began time.Time) *latencyLog {
	l := &latencyLog{total: newInterval(), pending: make(map[int]*interval), began: began}
	if w == nil {
		return l
	}
	l.log = hdrhistogram.NewHistogramLogWriter(w)
	l.check(l.log.OutputLogFormatVersion())
	l.check(l.log.OutputStartTime(began.UnixMilli()))
	l.check(l.log.OutputLegend())
	return l
}

func (l *latencyLog) check(err error) {
	if l.err == nil && err != nil {
		l.err = fmt.Errorf("writing the histogram log: %w", err)
	}
}

// add takes what a worker recorded in a second.
func (l *latencyLog) add(second int, v *interval) {
	l.total.merge(v)
	if l.log == nil {
		return
	}
	if sum, ok := l.pending[second]; ok {
		sum.merge(v)
		return
	}
	sum := newInterval()
	sum.merge(v)
	l.pending[second] = sum
}

// writeUntil writes the seconds before the given one. The last one ends at end.
func (l *latencyLog) writeUntil(second int, end time.Duration) {
	if l.log == nil {
		return
	}
	for ; l.next < second; l.next++ {
		v, ok := l.pending[l.next]
		if !ok {
			v = newInterval()
		}
		delete(l.pending, l.next)
		from := time.Duration(l.next) * time.Second
		for _, tagged := range []struct {
			tag string
			h   *hdrhistogram.Histogram
		}{{"echo", v.echo}, {"connect", v.connect}, {"handshake", v.handshake}} {
			if tagged.tag != "echo" && tagged.h.TotalCount() == 0 {
				continue
			}
			tagged.h.SetTag(tagged.tag)
			tagged.h.SetStartTimeMs(l.began.Add(from).UnixMilli())
			tagged.h.SetEndTimeMs(l.began.Add(min(from+time.Second, max(from, end))).UnixMilli())
			l.check(l.log.OutputIntervalHistogram(tagged.h))
		}
	}
}
