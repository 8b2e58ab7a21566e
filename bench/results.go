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
	Result             load.Result
	Failed             string `json:",omitempty"` // why there is no result
}

// memory is what a server had before and with a number of idle connections, in bytes.
type memory struct {
	Conns         int
	Before, After int64
}

// perConn is the memory for each connection, in bytes.
func (m memory) perConn() float64 { return float64(m.After-m.Before) / float64(m.Conns) }

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

func (r *results) addRun(place, shape, name string, result load.Result, err error) {
	r.Runs = append(r.Runs, shapeRun{Place: place, Shape: shape, Name: name, Result: result, Failed: reason(err)})
}

func (r *results) addMemory(name string, m memory, err error) {
	r.Memory = append(r.Memory, memoryRun{Name: name, Memory: m, Failed: reason(err)})
}

// best returns the run of a contender that took the least CPU time for each echo. What else a machine does
// can only add to that.
func (r *results) best(place, shape, name string) (best load.Result, ok bool) {
	for _, run := range r.Runs {
		if run.Place != place || run.Shape != shape || run.Name != name || run.Failed != "" {
			continue
		}
		if !ok || run.Result.CPUPerEcho() < best.CPUPerEcho() {
			best, ok = run.Result, true
		}
	}
	return best, ok
}

// fastest returns the most echoes per second of any run of a contender.
func (r *results) fastest(place, shape, name string) (most float64) {
	for _, run := range r.Runs {
		if run.Place == place && run.Shape == shape && run.Name == name && run.Failed == "" {
			most = max(most, run.Result.PerSecond())
		}
	}
	return most
}

// leastMemory returns the measurement of a contender with the least memory for each of so many connections.
func (r *results) leastMemory(name string, conns int) (least memory, ok bool) {
	for _, run := range r.Memory {
		if run.Name == name && run.Memory.Conns == conns && run.Failed == "" && (!ok || run.Memory.After < least.After) {
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

// beside returns the median of a latency beside the crowd, with a disturbance.
func (r *results) beside(place, shape, disturbance string, of latency) (median time.Duration, ok bool) {
	var all []time.Duration
	for _, run := range r.Beside {
		if run.Place == place && run.Shape == shape && run.Disturbance == disturbance {
			all = append(all, of(run.Result))
		}
	}
	if len(all) == 0 {
		return 0, false
	}
	slices.Sort(all)
	return all[len(all)/2], true
}

// A latency is one of those in a result.
type latency func(load.Result) time.Duration

func p50(r load.Result) time.Duration     { return r.P50 }
func p99(r load.Result) time.Duration     { return r.P99 }
func p999(r load.Result) time.Duration    { return r.P999 }
func longest(r load.Result) time.Duration { return r.Max }

// ranked are the contenders that were measured, the one with the least CPU time first.
func (r *results) ranked(place, shape string) (names []string) {
	cpu := make(map[string]time.Duration)
	for _, e := range r.Contenders {
		if run, ok := r.best(place, shape, e.Name); ok {
			cpu[e.Name] = run.CPUPerEcho()
			names = append(names, e.Name)
		}
	}
	slices.SortStableFunc(names, func(a, b string) int { return cmp.Compare(cpu[a], cpu[b]) })
	return names
}

// spread is how much more CPU time the median run of a contender took than its best one: 0.1 is a tenth more.
func (r *results) spread(place, shape, name string) float64 {
	var all []time.Duration
	for _, run := range r.Runs {
		if run.Place == place && run.Shape == shape && run.Name == name && run.Failed == "" {
			all = append(all, run.Result.CPUPerEcho())
		}
	}
	slices.Sort(all)
	return float64(all[len(all)/2])/float64(all[0]) - 1
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

// slowestDrain returns the drain whose last client was told last.
func (r *results) slowestDrain() (d load.Drained, ok bool) {
	if len(r.Drains) == 0 {
		return d, false
	}
	return slices.MaxFunc(r.Drains, func(a, b load.Drained) int { return cmp.Compare(a.LastTold, b.LastTold) }), true
}

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
