package main

import (
	"fmt"
	"math"
	"slices"
	"time"
)

// A goal is what the project has set itself, and how near it came.
type goal struct {
	What, Bound, Measured string
	Reached               bool
}

// rivalShapes are the shapes whose CPU time is set against the rivals'.
var rivalShapes = shapes[:4]

const kib = 1024

// Goals are those that something was measured for.
func (r *results) Goals() (goals []goal) {
	add := func(reached bool, what, bound, format string, args ...any) {
		goals = append(goals, goal{what, bound, fmt.Sprintf(format, args...), reached})
	}
	for _, sh := range rivalShapes {
		rival := r.bestRival(pinnedName, sh.Name)
		if times, ok := r.ratio(pinnedName, sh.Name, subject, rival, cpu); ok {
			add(atMost(times, 1), "CPU time for an echo, "+sh.Title, "at most that of the best of gnet, netpoll, nbio and net with io.Copy",
				"%.2f times that of %s", times, rival)
		}
	}
	first := shapes[0]
	if times, ok := r.ratio(pinnedName, first.Name, subject, floor, cpu); ok {
		add(atMost(times, 1.4), "CPU time for an echo, "+first.Title, "at most 1.4 times that of the floor", "%.2f times", times)
	}
	const many = 15000
	if m, ok := r.leastMemory(subject, many); ok {
		add(atMost(m.perConn()/kib, 4), "memory of an idle connection, of 15,000", "at most 4.0 KiB resident", "%.2f KiB", m.perConn()/kib)
	}
	if len(r.Drains) > 0 {
		var told, closed time.Duration
		first := time.Duration(math.MaxInt64)
		for _, d := range r.Drains {
			told, closed, first = max(told, d.LastTold), max(closed, d.LastClosed), min(first, d.FirstClosed)
		}
		late := closed - grace
		add(told <= time.Second/2, thousands(r.Crowd)+" clients told of a drain", "within 0.5 s of the signal", "%.2f s", told.Seconds())
		add(late <= time.Second && first >= grace, thousands(r.Crowd)+" connections closed", "not before the deadline, and within 1 s of it",
			"%.2f s to %.2f s after it", (first - grace).Seconds(), late.Seconds())
	}
	if times, ok := r.ratio(pinnedName, churn, subject, net4KiB, perSecond); ok {
		add(math.Round(100*times) >= 100, "connections opened, used once and closed in a second", "at least as many as with package net and a goroutine each",
			"%.2f times as many", times)
	}
	for _, place := range []string{pinnedName, unpinnedName} {
		with, ok := median(r.beside(place, first.Name, listing, p99))
		without, _ := median(r.beside(place, first.Name, disturbances[0].Name, p99))
		if ok && without > 0 {
			add(atMost(with/without, 1.5), "p99 of the echo while "+thousands(r.Crowd)+" connections are listed once a second, "+place,
				"at most 1.5 times that without", "%.2f times", with/without)
		}
	}
	for _, d := range disturbances[1:] {
		if held, ok := r.heldUp(d.Name); ok {
			add(atMost(held, 10), "who echoes or connects is held up by "+d.Name+" to "+thousands(r.Crowd)+" connections", "for at most 10 ms", "%.1f ms", held)
		}
	}
	return goals
}

// heldUp is for how many milliseconds longer than with nothing a client has to wait with a disturbance, in the worst of the
// shapes and placements. Of several measurements the least counts: a disturbance is in each of them, once a second, and what else makes
// the machine stop for a moment is not.
func (r *results) heldUp(disturbance string) (worst float64, ok bool) {
	for _, place := range []string{pinnedName, unpinnedName} {
		for _, sh := range shapes {
			with := r.beside(place, sh.Name, disturbance, longestWait)
			without := r.beside(place, sh.Name, disturbances[0].Name, longestWait)
			if len(with) > 0 && len(without) > 0 {
				worst, ok = max(worst, slices.Min(with)-slices.Min(without)), true
			}
		}
	}
	return worst, ok
}

// atMost compares with as many digits as are shown.
func atMost(value, bound float64) bool { return math.Round(100*value) <= math.Round(100*bound) }
