package top

import (
	"strings"
	"time"

	"echod/control"
)

// series is something that is counted per second.
type series int

const (
	accepts series = iota
	closes
	bytesIn
	bytesOut
	nSeries
)

const window = time.Minute

// step holds the rates between two statuses.
type step struct {
	from, to time.Time
	rate     [nSeries]float64
}

// rates holds the rates of the last minute.
type rates struct {
	minGap time.Duration // between two statuses that are compared; shorter ones give noise
	last   totals
	steps  []step // oldest first
}

type totals struct {
	at    time.Time
	total [nSeries]uint64
}

// add takes the counters of a status. Byte counts can fall a little: the server does not read all of them at
// the same instant.
func (r *rates) add(at time.Time, st control.Status) {
	closed := uint64(0)
	for _, n := range st.Closed {
		closed += n
	}
	now := totals{at, [nSeries]uint64{st.Accepted, closed, st.BytesIn, st.BytesOut}}
	if !r.last.at.IsZero() {
		passed := at.Sub(r.last.at)
		if passed < r.minGap {
			return
		}
		m := step{from: r.last.at, to: at}
		for i := range m.rate {
			m.rate[i] = float64(max(now.total[i], r.last.total[i])-r.last.total[i]) / passed.Seconds()
		}
		r.steps = append(r.steps, m)
	}
	r.last = now
	for len(r.steps) > 0 && r.steps[0].to.Before(at.Add(-window)) {
		r.steps = r.steps[1:]
	}
}

// now returns the latest rate.
func (r *rates) now(s series) float64 {
	if len(r.steps) == 0 {
		return 0
	}
	return r.steps[len(r.steps)-1].rate[s]
}

// peak returns the highest rate of the minute before until.
func (r *rates) peak(s series, until time.Time) (peak float64) {
	for _, m := range r.steps {
		if !m.to.Before(until.Add(-window)) {
			peak = max(peak, m.rate[s])
		}
	}
	return peak
}

// minute divides the minute before until into n equal parts, and returns the mean of each; a negative mean is
// unknown. The parts begin at multiples of their length, so that a chart moves in steps and does not flicker.
func (r *rates) minute(s series, n int, until time.Time) []float64 {
	means := make([]float64, n)
	if n == 0 {
		return means
	}
	part := window / time.Duration(n)
	end := until.Truncate(part).Add(part)
	for i := range means {
		from := end.Add(-time.Duration(n-i) * part)
		to := from.Add(part)
		sum, known := 0.0, time.Duration(0)
		for _, m := range r.steps {
			if overlap := earlier(to, m.to).Sub(later(from, m.from)); overlap > 0 {
				sum += m.rate[s] * overlap.Seconds()
				known += overlap
			}
		}
		means[i] = -1
		if known > 0 {
			means[i] = sum / known.Seconds()
		}
	}
	return means
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// sparkline draws values with bars, lowest first. An unknown value is a space, zero the lowest bar.
func sparkline(values []float64, bars []rune) string {
	peak := 0.0
	for _, v := range values {
		peak = max(peak, v)
	}
	var line strings.Builder
	for _, v := range values {
		switch {
		case v < 0:
			line.WriteByte(' ')
		case v == 0:
			line.WriteRune(bars[0])
		default:
			line.WriteRune(bars[min(len(bars)-1, 1+int(v/peak*float64(len(bars)-1)))])
		}
	}
	return line.String()
}
