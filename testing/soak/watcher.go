package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"echod/control"
)

// A watcher checks the server from outside: its status, metrics and events, and /proc.
type watcher struct {
	*phase
	upgrades           atomic.Int64
	stopped            atomic.Int32 // how many SIGSTOPs are in force
	expectNoMoreEvents atomic.Bool

	statuses, scrapes, events, missed atomic.Int64
	slowest                           time.Duration // answer to a status request

	mu          sync.Mutex
	idleFigures []figures

	seen eventsSeen
}

// figures is what a server without clients uses.
type figures struct {
	at         time.Duration
	pid        int
	fds        int
	goroutines int
	heap, rss  int64 // bytes; heap after a garbage collection
	upgrades   int64 // before, of all processes
}

func newWatcher(p *phase) *watcher { return &watcher{phase: p} }

func (w *watcher) upgraded() { w.upgrades.Add(1) }

func (w *watcher) frozen() (end func()) {
	w.stopped.Add(1)
	return func() { w.stopped.Add(-1) }
}

// run watches until ctx ends.
func (w *watcher) run(ctx context.Context) {
	var last control.Status
	var lastLineage int64
	counters := make(map[string]float64)
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		lineage := w.lineage.Load()
		if lineage != lastLineage {
			last, lastLineage = control.Status{}, lineage
			clear(counters)
		}
		began := time.Now()
		st, err := w.status(ctx)
		took := time.Since(began)
		switch {
		case w.stopped.Load() > 0 || ctx.Err() != nil || w.lineage.Load() != lineage:
			continue
		case err != nil:
			w.checkLater(outcome{kind: cut, connecting: true, detail: fmt.Sprintf("status: %v, after %s", err, took.Round(time.Millisecond)), at: time.Now()})
			continue
		}
		w.statuses.Add(1)
		w.slowest = max(w.slowest, took)
		w.check(last, st)
		last = st
		if n%4 == 0 {
			if samples, err := w.metrics(); err == nil && w.lineage.Load() == lineage {
				w.scrapes.Add(1)
				w.compare(counters, samples)
			}
		}
	}
}

// check checks that a status adds up, and compares it with an earlier one.
func (w *watcher) check(last, st control.Status) {
	closed := uint64(0)
	for _, n := range st.Closed {
		closed += n
	}
	if st.Accepted != uint64(st.Connections)+closed {
		w.violate("accepted %d is not open %d + closed %d", st.Accepted, st.Connections, closed)
	}
	if last.PID == 0 {
		return
	}
	back := func(what string, from, to uint64) {
		if to < from {
			w.violate("%s went back from %d to %d (process %d, then %d)", what, from, to, last.PID, st.PID)
		}
	}
	for what, pair := range map[string][2]uint64{
		"accepted": {last.Accepted, st.Accepted}, "bytes_in": {last.BytesIn, st.BytesIn}, "bytes_out": {last.BytesOut, st.BytesOut},
		"notices sent": {uint64(last.Notices.Sent), uint64(st.Notices.Sent)},
	} {
		back(what, pair[0], pair[1])
	}
	for why, n := range last.Closed {
		back("closed as "+why, n, st.Closed[why])
	}
}

// compare checks that no counter of connections went back, not even over an upgrade.
func (w *watcher) compare(last, now map[string]float64) {
	for name, v := range now {
		if !strings.HasPrefix(name, "echod_") || !strings.Contains(name, "_total") {
			continue
		}
		if strings.HasPrefix(name, "echod_signals") || strings.HasPrefix(name, "echod_control") || strings.HasPrefix(name, "echod_log") ||
			strings.HasPrefix(name, "echod_tls") {
			continue // of the process
		}
		if v < last[name] {
			w.violate("metric %s went back from %v to %v", name, last[name], v)
		}
		last[name] = v
	}
}

// eventsSeen is the connections that the events of one lineage have reported.
type eventsSeen struct {
	sync.Mutex
	lineage        int64
	opened, closed map[uint64]bool
	open           map[uint64]bool // opened in this subscription, and not closed
}

// followEvents checks the events, and subscribes again when the stream ends.
func (w *watcher) followEvents(ctx context.Context) {
	for ctx.Err() == nil {
		lineage := w.lineage.Load()
		w.seen.Lock()
		if lineage != w.seen.lineage || w.seen.opened == nil {
			w.seen.lineage, w.seen.opened, w.seen.closed = lineage, map[uint64]bool{}, map[uint64]bool{}
		}
		w.seen.open = make(map[uint64]bool)
		w.seen.Unlock()
		for e, err := range w.control.Events(ctx) {
			if err != nil {
				break
			}
			w.events.Add(1)
			w.seen.take(w, e)
		}
		pause(ctx, 20*time.Millisecond)
	}
}

func (s *eventsSeen) take(w *watcher, e control.Event) {
	s.Lock()
	defer s.Unlock()
	switch e.Type {
	case "missed":
		w.missed.Add(int64(e.Missed))
		clear(s.open)
	case "opened":
		if s.opened[e.Conn.ID] || s.closed[e.Conn.ID] {
			w.violate("event: connection %d was opened before", e.Conn.ID)
		}
		s.opened[e.Conn.ID], s.open[e.Conn.ID] = true, true
	case "closed":
		if s.closed[e.Closed.ID] {
			w.violate("event: connection %d was closed before", e.Closed.ID)
		}
		s.closed[e.Closed.ID] = true
		delete(s.open, e.Closed.ID)
	}
}

// checkIdle waits until all clients have left, and records what the idle server uses.
func (w *watcher) checkIdle(ctx context.Context) {
	if ctx.Err() != nil {
		ctx = context.Background()
	}
	within, cancel := context.WithTimeout(ctx, busyTimeout+stallAfter)
	defer cancel()
	if _, err := w.control.Wait(within, control.WaitRequest{Connections: new(int)}); err != nil {
		st, _ := w.status(context.Background())
		w.violate("connections are left though all clients have gone: %d, %v, %v", st.Connections, st.Phases, err)
		return
	}
	var f figures
	var err error
	for range 40 { // closing takes a moment
		if f, err = w.figures(ctx); err == nil && w.settled(f) {
			break
		}
		time.Sleep(250 * time.Millisecond)
	}
	if err != nil {
		w.violate("figures: %v", err)
		return
	}
	w.seen.Lock()
	if n := len(w.seen.open); n > 0 {
		w.violate("events: %d connections were opened and not closed, though none is open", n)
	}
	w.seen.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.idleFigures = append(w.idleFigures, f)
	if problem := w.growth(f); problem != "" {
		w.mu.Unlock()
		w.violate("%s", problem)
		w.mu.Lock()
	}
}

func (w *watcher) settled(f figures) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.growth(f) == ""
}

// Allowed growth over the first figures. A process that took over has a few more files, for the link to the first one.
const (
	moreFiles      = 6
	moreGoroutines = 8
	moreHeap       = 12 << 20
)

// growth compares f with the first figures, those of a process that has had no clients. The caller holds w.mu.
func (w *watcher) growth(f figures) string {
	if len(w.idleFigures) == 0 {
		return ""
	}
	first := w.idleFigures[0]
	switch {
	case f.fds > first.fds+moreFiles:
		return fmt.Sprintf("descriptors grew from %d to %d (process %d, %d upgrades)", first.fds, f.fds, f.pid, f.upgrades)
	case f.goroutines > first.goroutines+moreGoroutines:
		return fmt.Sprintf("goroutines grew from %d to %d (process %d, %d upgrades)", first.goroutines, f.goroutines, f.pid, f.upgrades)
	case f.heap > first.heap+moreHeap:
		return fmt.Sprintf("the heap grew from %d to %d bytes (process %d, %d upgrades)", first.heap, f.heap, f.pid, f.upgrades)
	}
	return ""
}

func (w *watcher) figures(ctx context.Context) (f figures, err error) {
	st, err := w.status(ctx)
	if err != nil {
		return f, err
	}
	f = figures{at: time.Since(w.began), pid: st.PID, upgrades: w.upgrades.Load()}
	for range 2 { // pools need two collections to become empty
		if _, err = w.get("/debug/pprof/heap?gc=1"); err != nil {
			return f, err
		}
	}
	samples, err := w.metrics()
	if err != nil {
		return f, err
	}
	f.goroutines, f.heap = int(samples["go_goroutines"]), int64(samples["go_memstats_heap_alloc_bytes"])
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", st.PID))
	if err != nil {
		return f, err
	}
	f.fds = len(fds)
	statm, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", st.PID))
	if fields := strings.Fields(string(statm)); err == nil && len(fields) > 1 {
		pages, _ := strconv.ParseInt(fields[1], 10, 64)
		f.rss = pages * int64(os.Getpagesize())
	}
	return f, err
}
