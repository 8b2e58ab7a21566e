// Package simulate finds faults that no written test covers. From a seed it generates a history: what clients, operators
// and the network do. It runs the history with a complete server, and checks what clients and operators observe against a
// model. See docs/testing.md.
package simulate

import (
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

var (
	seeds = flag.Int("seeds", 30, "number of new seeds to run")
	seed  = flag.Uint64("seed", 0, "run only this seed")

	socketSeeds = flag.Int("sockets", 0, "number of new seeds to run on loopback")
	socketSeed  = flag.Uint64("socketseed", 0, "run only this seed, on loopback")

	firstSeed   = flag.Uint64("first", 0, "the first seed; 0 chooses one")
	historyFile = flag.String("history", "", "run only the history in this file")
	keepGoing   = flag.Bool("all", false, "continue after a failure, and report the first failure of each rule")
	noReruns    = flag.Bool("brief", false, "do not run failures again")
	saveDir     = flag.String("save", "", "write histories that fail into this directory")
	show        = flag.Bool("show", false, "print what happens, even if nothing fails")
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// runInBubble runs a history in a bubble, and returns the world that it ended in.
func runInBubble(t *testing.T, h *history) (w *world) {
	t.Helper()
	defer func() {
		if p := recover(); p != nil {
			w.violate("goroutines end", "%v", p)
		}
	}()
	synctest.Test(t, func(*testing.T) {
		w = newWorld(h, bubbleShape)
		w.platform = newBubble(w)
		w.run()
	})
	return w
}

// TestSimulation runs new seeds, or the one of -seed.
func TestSimulation(t *testing.T) {
	run := func(h *history) *world { return runInBubble(t, h) }
	if *historyFile != "" {
		reportFailure(t, run, run(load(t, *historyFile)), "")
		return
	}
	simulate(t, run, bubbleShape, *seed, *seeds, runtime.GOMAXPROCS(0))
}

// simulate runs new seeds concurrently, or only the given one.
func simulate(t *testing.T, run func(*history) *world, sh shape, only uint64, seeds, parallel int) {
	if only != 0 {
		reportFailure(t, run, run(draw(only, sh)), "")
		return
	}
	from := *firstSeed
	if from == 0 {
		from = rand.Uint64() >> 24
	}
	began := time.Now()
	var done atomic.Int64
	var failures failures
	var workers sync.WaitGroup
	next := make(chan uint64)
	for range parallel {
		workers.Go(func() {
			for s := range next {
				failures.add(run(draw(s, sh)), done.Add(1))
			}
		})
	}
	for i := range uint64(seeds) {
		if failures.count() > 0 && !*keepGoing {
			break
		}
		next <- from + i
	}
	close(next)
	workers.Wait()
	took := time.Since(began)
	t.Logf("%d histories from seed %d on in %v, %.0f a minute", done.Load(), from, took.Round(time.Millisecond),
		float64(done.Load())/took.Minutes())
	for _, f := range failures.list {
		t.Logf("rule %q: %d times in %d histories, first after %d", f.rule, f.times, done.Load(), f.after)
	}
	for _, f := range failures.list {
		reportFailure(t, run, f.w, f.rule)
	}
}

// TestFailedBefore runs the histories that have failed once.
func TestFailedBefore(t *testing.T) {
	files, err := filepath.Glob("testdata/failed/*.json")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".json"), func(t *testing.T) {
			h := load(t, name)
			for range 3 { // a seed does not determine the scheduler
				run := func(h *history) *world { return runInBubble(t, h) }
				w := run(h)
				reportFailure(t, run, w, "")
				if t.Failed() {
					return
				}
			}
		})
	}
}

// failures are the first failures of each rule.
type failures struct {
	mu   sync.Mutex
	list []*failure
}

type failure struct {
	rule  string
	times int
	after int64
	w     *world
}

func (f *failures) add(w *world, after int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, rule := range w.rules() {
		i := slices.IndexFunc(f.list, func(o *failure) bool { return o.rule == rule })
		if i < 0 {
			i = len(f.list)
			f.list = append(f.list, &failure{rule: rule, after: after, w: w})
		}
		f.list[i].times++
	}
}

func (f *failures) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.list)
}

// rules returns which rules were violated, each once.
func (w *world) rules() (rules []string) {
	for _, v := range w.violations {
		if !slices.Contains(rules, v.Rule) {
			rules = append(rules, v.Rule)
		}
	}
	return rules
}

// reruns is how often a failed history is run again, to find out how often it fails.
const reruns = 100

// reportFailure reports a history that violates the given rule, or any rule if it is empty: shortened, with the command
// that runs it again.
func reportFailure(t *testing.T, run func(*history) *world, w *world, rule string) {
	t.Helper()
	h := w.h
	if *show {
		t.Log(w.report())
	}
	if len(w.violations) == 0 {
		return
	}
	if *noReruns {
		t.Errorf("seed %d:\n%s", h.Seed, w.details())
		return
	}
	rule = cmp.Or(rule, w.violations[0].Rule)
	again, times, variable := 0, reruns, "SEED"
	if w.shape.sockets { // each takes seconds
		times, variable = 5, "SOCKETSEED"
	}
	for range times {
		if slices.Contains(run(h).rules(), rule) {
			again++
		}
	}
	small := w
	if again > 0 && !w.shape.sockets {
		small = shrink(run, w, rule)
	}
	name := ""
	if *saveDir != "" {
		name = filepath.Join(*saveDir, fmt.Sprintf("%d.json", h.Seed))
		if text, err := json.MarshalIndent(small.h, "", " "); err == nil {
			_ = os.WriteFile(name, append(text, '\n'), 0o644)
		}
	}
	t.Errorf("seed %d violates %q, and %d of %d reruns do. Run it again with:\n  make simulate %s=%d\n%s\nIn short%s:\n%s",
		h.Seed, rule, again, times, variable, h.Seed, w.details(), fileNote(name), small.report())
}

func fileNote(name string) string {
	if name == "" {
		return ""
	}
	return " (" + name + ")"
}

// shrink removes clients, operations and steps, as long as the history still fails.
func shrink(run func(*history) *world, w *world, rule string) *world {
	budget := 400 // runs
	try := func(h *history) bool {
		for range 3 {
			if budget--; budget < 0 {
				return false
			}
			if got := run(h); slices.Contains(got.rules(), rule) {
				w = got
				return true
			}
		}
		return false
	}
	for again := true; again; {
		again = false
		for n := max(len(w.h.Clients)/2, 1); n >= 1; n /= 2 {
			for i := 0; i+n <= len(w.h.Clients) && len(w.h.Clients) > n; {
				h := w.h.clone()
				h.Clients = slices.Delete(h.Clients, i, i+n)
				if !try(h) {
					i += n
				} else {
					again = true
				}
			}
		}
		for i := 0; i < len(w.h.Ops); {
			h := w.h.clone()
			h.Ops = slices.Delete(h.Ops, i, i+1)
			if !try(h) {
				i++
			} else {
				again = true
			}
		}
		for c := range w.h.Clients {
			for i := 0; i < len(w.h.Clients[c].Steps); {
				h := w.h.clone()
				h.Clients[c].Steps = slices.Delete(h.Clients[c].Steps, i, i+1)
				if !try(h) {
					i++
				} else {
					again = true
				}
			}
		}
		again = again && budget > 0
	}
	return w
}

func load(t *testing.T, name string) *history {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	h := new(history)
	if err := json.Unmarshal(text, h); err != nil {
		t.Fatal(err)
	}
	return h
}

// details lists the violations.
func (w *world) details() string {
	var b strings.Builder
	for _, v := range w.violations[:min(len(w.violations), 8)] {
		fmt.Fprintf(&b, "%9.3fs %s: %s\n", v.At.Seconds(), v.Rule, v.Detail)
	}
	return b.String()
}

// report describes a history, and what happened.
func (w *world) report() string {
	return fmt.Sprintf("%s\nwhat happened:\n%s\n\n%s", w.h, strings.Join(w.log, "\n"), w.details())
}
