package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"time"

	"echod/bench/load"
)

// results are all that was measured, and on what. They are kept as JSON, so that a report can be made of them again.
type results struct {
	Machine machine
	Began   time.Time
	Seed    uint64 // of the order in which contenders took turns
	Quick   bool
	Length  time.Duration

	Contenders []entrant
	Missing    []string // with the reason
	Runs       []shapeRun
	Memory     []memoryRun
	Drains     []load.Drained
	Crowd      int
	Beside     []besideRun
}

// An entrant is a contender that took part.
type entrant struct{ Name, About, Version string }

// A shapeRun is one measurement of a contender.
type shapeRun struct {
	Place, Shape, Name string
	Round              int
	Result             load.Result
	Failed             string `json:",omitempty"` // why there is no result
}

// memory is what a server had before and with a number of idle connections, in bytes.
type memory struct {
	Conns         int
	Before, After int64 // with one connection, and with all
}

// perConn is the memory for each connection, in bytes.
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

// runs are the measurements of a contender that came to something, by round.
func (r *results) runs(place, shape, name string) map[int]load.Result {
	all := make(map[int]load.Result)
	for _, run := range r.Runs {
		if run.Place == place && run.Shape == shape && run.Name == name && run.Failed == "" {
			all[run.Round] = run.Result
		}
	}
	return all
}

// typical returns the run of a contender whose CPU time for an echo is the median.
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

// A figure is one of those in a result.
type figure func(load.Result) float64

func cpu(r load.Result) float64       { return float64(r.CPUPerEcho()) }
func perSecond(r load.Result) float64 { return r.PerSecond() }

// ratio compares a figure of two contenders: the median of the ratios within each round, since what the machine did in that
// minute met both of them.
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

// median returns the middle of values; of an even number, the mean of the two in the middle.
func median(values []float64) (m float64, ok bool) {
	n := len(values)
	if n == 0 {
		return 0, false
	}
	slices.Sort(values)
	return (values[(n-1)/2] + values[n/2]) / 2, true
}

// leastMemory returns the measurement of a contender with the least memory for each of so many connections.
func (r *results) leastMemory(name string, conns int) (least memory, ok bool) {
	for _, run := range r.Memory {
		if run.Name == name && run.Memory.Conns == conns && run.Failed == "" && (!ok || run.Memory.perConn() < least.perConn()) {
			least, ok = run.Memory, true
		}
	}
	return least, ok
}

// Held are the numbers of idle connections that memory was measured with, in order.
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

// beside returns a figure of all runs beside the crowd with a disturbance.
func (r *results) beside(place, shape, disturbance string, of figure) (all []float64) {
	for _, run := range r.Beside {
		if run.Place == place && run.Shape == shape && run.Disturbance == disturbance {
			all = append(all, of(run.Result))
		}
	}
	return all
}

// ranked are the contenders that were measured, the one with the least CPU time first.
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

// bestRival is the one of the rivals with the least CPU time for an echo; empty without any.
func (r *results) bestRival(place, shape string) string {
	for _, name := range r.ranked(place, shape) {
		if slices.Contains(rivals, name) {
			return name
		}
	}
	return ""
}

// Has reports whether anything was measured in a placement.
func (r *results) Has(place string) bool {
	return slices.ContainsFunc(r.Runs, func(run shapeRun) bool { return run.Place == place })
}

// Failures are the measurements that came to nothing, each once, with the reason.
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
