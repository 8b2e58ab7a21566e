package load

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

const (
	progressEvery = 200 * time.Millisecond
	maxPoints     = 1200 // of the time series
	maxRecent     = 10   // windows, for how a run is going
	maxErrors     = 5    // different ones that a report says
)

// Progress is how a run is going.
type Progress struct {
	Elapsed    time.Duration
	Ending     bool // nothing new falls due any more
	Open       int  // connections
	Sent       int64
	Returned   int64
	Lost       int64 // so far; most of it shows when a connection ends only
	Corrupted  int64
	Notices    int64
	Reconnects int64
	Rate       float64       // echoes a second, in the last second or so
	P50, P99   time.Duration // of those
}

// A run is one call of Run.
type run struct {
	opts     Options
	id       uint32
	dial     func(ctx context.Context, address string) (net.Conn, error)
	schedule schedule
	began    time.Time
	conns    atomic.Uint32 // made so far
	stopping atomic.Bool
	hurried  atomic.Bool // waits for nothing any more

	mu     sync.Mutex    // guards what follows
	step   time.Duration // of the time series
	total  Counts
	points []point
	recent []recent // the last windows
	errs   []string
}

// A recent is what came back in a window of time.
type recent struct {
	at        time.Duration
	returned  int64
	latencies *hdrhistogram.Histogram
}

// Run puts load on a server as opts say, waits for what is under way, and reports.
// When ctx ends the run ends early, in order. An error means that there was no run,
// or that this side could not go on with it, as when it may open no more files.
func Run(ctx context.Context, opts Options) (*Report, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	opts = opts.withDefaults()
	r := &run{
		opts: opts, id: rand.Uint32(), dial: opts.Dial,
		schedule: newSchedule(&opts),
		step:     window,
	}
	if r.dial == nil {
		var d net.Dialer
		r.dial = func(ctx context.Context, address string) (net.Conn, error) { return d.DialContext(ctx, "tcp", address) }
	}
	r.began = time.Now()
	loops := make([]*loop, opts.Loops)
	for i := range loops {
		var err error
		if loops[i], err = newLoop(r, i); err != nil {
			for _, l := range loops[:i] {
				l.poll.close()
			}
			return nil, err
		}
	}

	defer context.AfterFunc(ctx, func() {
		r.stopping.Store(true)
		for _, l := range loops {
			l.poll.wake()
		}
	})()
	ended := make(chan error, len(loops))
	for _, l := range loops {
		go func() { ended <- l.carry() }()
	}
	var failed error
	hurry := opts.Hurry
	ticker := time.NewTicker(progressEvery)
	defer ticker.Stop()
	for left := len(loops); left > 0; {
		select {
		case err := <-ended:
			left--
			if err != nil && failed == nil {
				failed = err
				r.stopping.Store(true)
			}
		case <-hurry:
			hurry = nil
			r.hurried.Store(true)
			for _, l := range loops {
				l.poll.wake()
			}
		case <-ticker.C:
			if opts.OnProgress != nil {
				opts.OnProgress(r.progress())
			}
		}
	}
	if outOfFiles(failed) {
		return nil, fmt.Errorf("putting load on %s: too many open files for %d connections: raise the limit (ulimit -n)", opts.Address, opts.Conns)
	}
	if failed != nil {
		return nil, fmt.Errorf("putting load on %s: %w", opts.Address, failed)
	}
	return r.report(loops), nil
}

func (r *run) stopped() bool { return r.stopping.Load() }

// noteError keeps an error for the report, unless it has enough or the same.
func (r *run) noteError(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if text := plain(err); len(r.errs) < maxErrors && !slices.Contains(r.errs, text) {
		r.errs = append(r.errs, text)
	}
}

// absorb takes in what a loop has counted since the given time.
func (r *run) absorb(l *loop, since time.Duration) {
	t := l.tally
	r.mu.Lock()
	defer r.mu.Unlock()
	r.total.add(&t.Counts)
	for int(since/r.step) >= maxPoints {
		r.points = halved(r.points)
		r.step *= 2
	}
	at := int(since / r.step)
	for len(r.points) <= at {
		r.points = append(r.points, point{})
	}
	r.points[at].add(t)
	r.addRecent(t, since.Truncate(window))
	t.Counts = Counts{}
	t.window.Reset()
}

// addRecent adds what a loop has counted to the window that begins then, if it is
// one of the last.
func (r *run) addRecent(t *tally, begins time.Duration) {
	i, known := slices.BinarySearchFunc(r.recent, begins, func(w recent, at time.Duration) int { return cmp.Compare(w.at, at) })
	if !known {
		r.recent = slices.Insert(r.recent, i, recent{at: begins, latencies: newWindowHistogram()})
	}
	r.recent[i].returned += t.Echoes.Returned
	r.recent[i].latencies.Merge(t.window)
	if len(r.recent) > maxRecent {
		r.recent = slices.Delete(r.recent, 0, 1)
	}
}

func (r *run) progress() Progress {
	r.mu.Lock()
	defer r.mu.Unlock()
	elapsed := time.Since(r.began)
	p := Progress{
		Elapsed: elapsed, Ending: elapsed >= r.opts.Duration || r.stopped(),
		Open:     int(r.total.open()),
		Sent:     r.total.Echoes.Sent,
		Returned: r.total.Echoes.Returned,
		Lost:     r.total.Echoes.Lost, Corrupted: r.total.Echoes.Corrupted,
		Notices: r.total.Notices.Seen(), Reconnects: r.total.Reconnects,
	}
	if len(r.recent) == 0 {
		return p
	}
	latencies := newWindowHistogram()
	returned := int64(0)
	for _, w := range r.recent {
		returned += w.returned
		latencies.Merge(w.latencies)
	}
	span := r.recent[len(r.recent)-1].at + window - r.recent[0].at
	p.Rate = float64(returned) / span.Seconds()
	p.P50, p.P99 = at(latencies, 50), at(latencies, 99)
	return p
}

// at returns a percentile.
func at(h *hdrhistogram.Histogram, percent float64) time.Duration {
	return time.Duration(h.ValueAtPercentile(percent))
}
