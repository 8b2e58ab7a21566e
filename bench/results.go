package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"slices"
	"time"

	"echod/bench/load"
)

// results are all measurements, and the machine. They are kept as JSON, so that the report can be written again.
type results struct {
	Machine machine
	Began   time.Time
	Seed    uint64 // of the contenders' order
	Quick   bool
	Length  time.Duration

	Contenders []participant
	Missing    []string // with the reasons
	Runs       []shapeRun
	Memory     []memoryRun
	Drains     []load.Drained
	Crowd      int
	Beside     []disturbedRun

	TLS *results `json:",omitempty"` // over TLS
}

// A participant is a contender that was measured.
type participant struct{ Name, About, Version string }

// A shapeRun is one measurement of a contender.
type shapeRun struct {
	Place, Shape, Name string
	Round              int
	Result             load.Result
	Failed             string `json:",omitempty"` // why it has no result
}

// memory is a server's resident memory in bytes, with one and with Conns idle connections.
type memory struct {
	Conns         int
	Before, After int64
}

// perConn returns the bytes per connection.
func (m memory) perConn() float64 { return float64(m.After-m.Before) / float64(m.Conns-1) }

type memoryRun struct {
	Name   string
	Memory memory
	Failed string `json:",omitempty"`
}

func reason(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// runs returns the successful measurements of a contender, by round.
func (r *results) runs(place, shape, name string) map[int]load.Result {
	all := make(map[int]load.Result)
	for _, run := range r.Runs {
		if run.Place == place && run.Shape == shape && run.Name == name && run.Failed == "" {
			all[run.Round] = run.Result
		}
	}
	return all
}

// typical returns the run with the median CPU time per echo.
func (r *results) typical(place, shape, name string) (typical load.Result, ok bool) {
	var all []load.Result
	for _, run := range r.runs(place, shape, name) {
		all = append(all, run)
	}
	if len(all) == 0 {
		return typical, false
	}
	slices.SortFunc(all, func(a, b load.Result) int { return cmp.Compare(a.CPUPerEcho(), b.CPUPerEcho()) })
	return all[(len(all)-1)/2], true
}

// A figure is a number in a result.
type figure func(load.Result) float64

func cpu(r load.Result) float64       { return float64(r.CPUPerEcho()) }
func perSecond(r load.Result) float64 { return r.PerSecond() }

// ratio compares a figure of two contenders. It is the median of the ratios within each round, because other work of
// the machine affected both in the same minute.
func (r *results) ratio(place, shape, name, other string, of figure) (ratio float64, ok bool) {
	var all []float64
	others := r.runs(place, shape, other)
	for round, own := range r.runs(place, shape, name) {
		if theirs, both := others[round]; both {
			all = append(all, of(own)/of(theirs))
		}
	}
	return median(all)
}

// median sorts values and returns their median.
func median(values []float64) (m float64, ok bool) {
	n := len(values)
	if n == 0 {
		return 0, false
	}
	slices.Sort(values)
	return (values[(n-1)/2] + values[n/2]) / 2, true
}

// leastMemory returns the measurement of a contender with the least memory per connection.
func (r *results) leastMemory(name string, conns int) (least memory, ok bool) {
	for _, run := range r.Memory {
		if run.Name == name && run.Memory.Conns == conns && run.Failed == "" &&
			(!ok || run.Memory.perConn() < least.perConn()) {
			least, ok = run.Memory, true
		}
	}
	return least, ok
}

// Held returns the numbers of idle connections that were measured, in order.
func (r *results) Held() (conns []int) {
	for _, run := range r.Memory {
		conns = append(conns, run.Memory.Conns)
	}
	slices.Sort(conns)
	return slices.Compact(conns)
}

func milli(d time.Duration) float64     { return float64(d) / float64(time.Millisecond) }
func p50(r load.Result) float64         { return milli(r.P50) }
func p99(r load.Result) float64         { return milli(r.P99) }
func p999(r load.Result) float64        { return milli(r.P999) }
func longestWait(r load.Result) float64 { return milli(r.Max) }

// beside returns a figure of all runs next to the crowd with a disturbance.
func (r *results) beside(place, shape, disturbance string, of figure) (all []float64) {
	for _, run := range r.Beside {
		if run.Place == place && run.Shape == shape && run.Disturbance == disturbance {
			all = append(all, of(run.Result))
		}
	}
	return all
}

// ranked returns the names of the measured contenders, least CPU time first.
func (r *results) ranked(place, shape string) (names []string) {
	times := make(map[string]time.Duration)
	for _, e := range r.Contenders {
		if run, ok := r.typical(place, shape, e.Name); ok {
			times[e.Name] = run.CPUPerEcho()
			names = append(names, e.Name)
		}
	}
	slices.SortStableFunc(names, func(a, b string) int { return cmp.Compare(times[a], times[b]) })
	return names
}

// bestRival returns the rival with the least CPU time per echo, or "".
func (r *results) bestRival(place, shape string) string {
	for _, name := range r.ranked(place, shape) {
		if slices.Contains(rivals, name) {
			return name
		}
	}
	return ""
}

// best returns the contender with the least CPU time per echo, apart from the subject; "" if there is none.
func (r *results) best(place, shape string) string {
	for _, name := range r.ranked(place, shape) {
		if name != subject {
			return name
		}
	}
	return ""
}

// Has reports whether a placement was measured.
func (r *results) Has(place string) bool {
	return slices.ContainsFunc(r.Runs, func(run shapeRun) bool { return run.Place == place })
}

// Failures lists the failed measurements with their reasons, each once.
func (r *results) Failures() (all []string) {
	for _, run := range r.Runs {
		if run.Failed != "" {
			all = append(all, fmt.Sprintf("%s, %s, %s: %s", run.Name, run.Shape, run.Place, run.Failed))
		}
	}
	for _, run := range r.Memory {
		if run.Failed != "" {
			all = append(all, fmt.Sprintf("%s, memory of %d connections: %s", run.Name, run.Memory.Conns, run.Failed))
		}
	}
	if r.TLS != nil {
		all = append(all, r.TLS.Failures()...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

func (r *results) Grace() time.Duration { return grace }

func (r *results) save(path string) error {
	text, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}

func readResults(path string) (*results, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	r := new(results)
	if err := json.Unmarshal(text, r); err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	return r, nil
}

// A goal is a bound that the project has set itself, and what was measured.
type goal struct {
	What, Bound, Measured string
	Reached               bool
}

// rivalShapes are the shapes in which CPU time is compared with the rivals'.
var rivalShapes = shapes[:4]

const kib = 1024

// Goals returns the goals for which there is a measurement.
func (r *results) Goals() (goals []goal) {
	add := func(reached bool, what, bound, format string, args ...any) {
		goals = append(goals, goal{what, bound, fmt.Sprintf(format, args...), reached})
	}
	for _, sh := range rivalShapes {
		rival := r.bestRival(pinnedName, sh.Name)
		if times, ok := r.ratio(pinnedName, sh.Name, subject, rival, cpu); ok {
			add(atMost(times, 1), "CPU time per echo, "+sh.Title,
				"at most that of the best of gnet, netpoll, nbio and net with io.Copy",
				"%.2f times that of %s", times, rival)
		}
	}
	first := shapes[0]
	if times, ok := r.ratio(pinnedName, first.Name, subject, floor, cpu); ok {
		add(atMost(times, 1.4), "CPU time per echo, "+first.Title, "at most 1.4 times that of the floor",
			"%.2f times", times)
	}
	const many = 15000
	if m, ok := r.leastMemory(subject, many); ok {
		add(atMost(m.perConn()/kib, 4), "memory per idle connection, of 15,000", "at most 4.0 KiB resident",
			"%.2f KiB", m.perConn()/kib)
	}
	if len(r.Drains) > 0 {
		var told, closed time.Duration
		first := time.Duration(math.MaxInt64)
		for _, d := range r.Drains {
			told, closed, first = max(told, d.LastTold), max(closed, d.LastClosed), min(first, d.FirstClosed)
		}
		late := closed - grace
		add(told <= time.Second/2, thousands(r.Crowd)+" clients told of a drain", "within 0.5 s of the signal",
			"%.2f s", told.Seconds())
		add(late <= time.Second && first >= grace, thousands(r.Crowd)+" connections closed",
			"not before the deadline, and within 1 s after it",
			"%.2f s to %.2f s after it", (first - grace).Seconds(), late.Seconds())
	}
	if times, ok := r.ratio(pinnedName, churn, subject, net4KiB, perSecond); ok {
		add(math.Round(100*times) >= 100, "connections opened, used once and closed, per second",
			"at least as many as with package net and a goroutine each",
			"%.2f times as many", times)
	}
	for _, place := range []string{pinnedName, unpinnedName} {
		with, ok := median(r.beside(place, first.Name, listing, p99))
		without, _ := median(r.beside(place, first.Name, disturbances[0].Name, p99))
		if ok && without > 0 {
			add(atMost(with/without, 1.5), "p99 of the echo while "+thousands(r.Crowd)+
				" connections are listed every second, "+place,
				"at most 1.5 times that without", "%.2f times", with/without)
		}
	}
	for _, d := range disturbances[1:] {
		if held, ok := r.delay(d.Name); ok {
			add(atMost(held, 10), "delay of other clients by "+d.Name+" to "+thousands(r.Crowd)+" connections",
				"at most 10 ms", "%.1f ms", held)
		}
	}
	if r.TLS != nil {
		for _, sh := range tlsShapes[:2] {
			other := r.TLS.best(pinnedName, sh.Name)
			if times, ok := r.TLS.ratio(pinnedName, sh.Name, subject, other, cpu); ok {
				add(atMost(times, 1), "CPU time per echo, "+sh.Title, "at most that of the best other", "%.2f times that of %s", times, other)
			}
		}
		if times, ok := r.TLS.ratio(pinnedName, tlsHandshake, tls4KiB, subject, cpu); ok {
			add(math.Round(100*times) >= 100, "TLS handshakes per second of CPU time", "at least as many as with crypto/tls and a goroutine each",
				"%.2f times as many", times)
		}
		for _, conns := range r.TLS.Held() {
			own, ok := r.TLS.leastMemory(subject, conns)
			other, both := r.TLS.leastMemory(tls4KiB, conns)
			if ok && both {
				add(own.perConn() <= other.perConn(), fmt.Sprintf("memory per idle TLS connection, of %s", thousands(conns)),
					"at most that of crypto/tls with a buffer of 4 KiB", "%.1f KiB, to %.1f KiB", own.perConn()/kib, other.perConn()/kib)
			}
		}
	}
	return goals
}

// delay returns by how many milliseconds a disturbance lengthens a client's longest wait, in the worst shape and
// placement. It takes the least of several measurements: the disturbance affects all of them, other delays of the
// machine do not.
func (r *results) delay(disturbance string) (worst float64, ok bool) {
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

// atMost compares with as many digits as the report shows.
func atMost(value, bound float64) bool { return math.Round(100*value) <= math.Round(100*bound) }
