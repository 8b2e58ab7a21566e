package main

import (
	"fmt"
	"math"
	"time"

	"echod/bench/load"
)

// A goal is what the project has set itself, and how near it came.
type goal struct {
	What, Bound, Measured string
	Reached               bool
}

// bulkShapes are the shapes whose CPU time is set against the rivals'.
var bulkShapes = shapes[:4]

const kib = 1024

// Goals are those that something was measured for.
func (r *results) Goals() (goals []goal) {
	add := func(reached bool, what, bound, format string, args ...any) {
		goals = append(goals, goal{what, bound, fmt.Sprintf(format, args...), reached})
	}
	for _, sh := range bulkShapes {
		own, ok := r.best(pinnedName, sh.Name, subject)
		rival, name := r.bestRival(pinnedName, sh.Name)
		if ok && name != "" {
			ratio := float64(own.CPUPerEcho()) / float64(rival.CPUPerEcho())
			add(ratio <= 1, "CPU time for an echo, "+sh.Title, "at most that of the best of gnet, netpoll, nbio and net with io.Copy",
				"%.2f times that of %s", ratio, name)
		}
	}
	first := shapes[0]
	if own, ok := r.best(pinnedName, first.Name, subject); ok {
		if least, ok := r.best(pinnedName, first.Name, floor); ok {
			ratio := float64(own.CPUPerEcho()) / float64(least.CPUPerEcho())
			add(ratio <= 1.4, "CPU time for an echo, "+first.Title, "at most 1.4 times that of the floor", "%.2f times", ratio)
		}
	}
	const many = 15000
	if m, ok := r.leastMemory(subject, many); ok {
		add(m.perConn() <= 4*kib, "memory of an idle connection, of 15,000", "at most 4.0 KiB resident", "%.2f KiB", m.perConn()/kib)
	}
	if d, ok := r.slowestDrain(); ok {
		late := d.LastClosed - grace
		add(d.LastTold <= time.Second/2, thousands(r.Crowd)+" clients told of a drain", "within 0.5 s of the signal", "%.2f s", d.LastTold.Seconds())
		add(late <= time.Second, thousands(r.Crowd)+" connections closed", "within 1 s of the deadline", "%.2f s", late.Seconds())
	}
	if own, plain := r.fastest(pinnedName, churn, subject), r.fastest(pinnedName, churn, net4KiB); own > 0 && plain > 0 {
		add(own >= plain, "connections opened, used once and closed in a second", "at least as many as with package net and a goroutine each",
			"%.2f times as many", own/plain)
	}
	for _, place := range []string{pinnedName, unpinnedName} {
		with, ok := r.beside(place, first.Name, listing, p99)
		without, _ := r.beside(place, first.Name, disturbances[0].Name, p99)
		if ok && without > 0 {
			ratio := float64(with) / float64(without)
			add(ratio <= 1.5, "p99 of the echo while "+thousands(r.Crowd)+" connections are listed once a second, "+place, "at most 1.5 times that without",
				"%.2f times", ratio)
		}
	}
	return goals
}

// bestRival returns the least CPU time for an echo among the rivals, and whose it is.
func (r *results) bestRival(place, shape string) (best load.Result, name string) {
	least := time.Duration(math.MaxInt64)
	for _, rival := range rivals {
		if run, ok := r.best(place, shape, rival); ok && run.CPUPerEcho() < least {
			best, name, least = run, rival, run.CPUPerEcho()
		}
	}
	return best, name
}
