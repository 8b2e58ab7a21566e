package top

import (
	"strings"
	"time"

	"echod/control"
)

// series are what is measured per second.
type series int

const (
	accepts series = iota
	closes
	bytesIn
	bytesOut
	nSeries
)

const window = time.Minute

// measured is how much came to pass per second, from one status to the next.
type measured struct {
	from, to time.Time
	rate     [nSeries]float64
}

// rates knows the last minute.
type rates struct {
	least time.Duration // between two statuses that are compared: chance makes too much of what is shorter
	last  counted
	steps []measured // the oldest first
}

type counted struct {
	at    time.Time
	total [nSeries]uint64
}

// add takes the counters of a status. They never fall, but for those of bytes, which come together at different instants.
func (r *rates) add(at time.Time, st control.Status) {
	closed := uint64(0)
	for _, n := range st.Closed {
		closed += n
	}
	now := counted{at, [nSeries]uint64{st.Accepted, closed, st.BytesIn, st.BytesOut}}
	if !r.last.at.IsZero() {
		passed := at.Sub(r.last.at)
		if passed < r.least {
			return
		}
		m := measured{from: r.last.at, to: at}
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

// now is the latest rate, peak the highest of the minute before the given time.
func (r *rates) now(s series) float64 {
	if len(r.steps) == 0 {
		return 0
	}
	return r.steps[len(r.steps)-1].rate[s]
}

func (r *rates) peak(s series, until time.Time) (peak float64) {
	for _, m := range r.steps {
		if !m.to.Before(until.Add(-window)) {
			peak = max(peak, m.rate[s])
		}
	}
	return peak
}

// minute gives the minute before the given time in n equal parts, the mean of each; negative is a part of which nothing is known. The parts
// begin at multiples of their length, so that a picture of them moves in steps and does not flicker.
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
			if both := earlier(to, m.to).Sub(later(from, m.from)); both > 0 {
				sum += m.rate[s] * both.Seconds()
				known += both
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

// sparkline draws values with bars, the lowest first: nothing for what is not known, the lowest for zero.
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
