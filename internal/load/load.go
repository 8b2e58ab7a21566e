// Package load generates load for an echo server (RFC 862) and accounts for every
// message: whether it came back, how late, broken, twice, out of order, or never.
// [Run] does one run and returns its [Report]. [Report.Failures] says what is wrong.
//
// # Messages
//
// A message is a line with the run, the connection, a sequence number and a checksum.
// These tell apart what comes back:
//
//   - returned: intact. It is late if it took longer than Options.Late, and reordered
//     if a message that was sent later came first.
//   - duplicated: intact, but it had already come back.
//   - corrupted: in the place of a missing message came bytes that are no message, or a
//     message that was never sent. The missing message then does not count as lost.
//     Consecutive broken bytes count as several messages, by their length.
//   - unexpected: such bytes or such a message came where no message is missing.
//   - foreign: intact, but sent on another connection or by another run.
//   - lost: nothing came in its place before the connection ended, or before the
//     run stopped waiting (Options.DrainWait).
//
// A server's notices (package echod/client) do not count as echoes, even in the middle
// of a message. After a notice that ends the connection, the client waits for what is
// in flight, half-closes, reads to the end, and connects again. A connection that is
// turned away by a notice has lost nothing: its messages count as turned away.
//
// One case is ambiguous: if a notice comes before the last byte of a message, the
// newline, and something broken follows, it is unknown whether that newline was sent.
//
// # Time
//
// In the open model ([Options].Stages) a schedule says when each message is due, with a
// resolution of 0.2 to 1 ms. Latency counts from then, whether or not a connection could
// take the message. A server that stalls shows all the delay that it causes, not only
// that of the few messages that were in flight (coordinated omission). In the closed
// model latency counts from when the message was made.
//
// Latency ends when the message arrives at this machine, if the system tells when that
// was (Linux, SO_TIMESTAMPNS), and otherwise when it is read. So a busy load generator
// does not make the server look slow. Messages that are read together all end with the
// last of them.
//
// # Goroutines
//
//   - Run starts Options.Threads workers and waits for them. Each one serves its share
//     of the users. On Linux it needs no other goroutine for that, and holds a thread.
//   - A worker starts one goroutine for each connect, and waits for all of them.
//   - With Options.Dial, over TLS, or on other systems than Linux, each connection has
//     one goroutine that reads and one that writes. They end when the worker closes the
//     connection. The worker waits for them.
package load

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"

	"echod/client"
)

// The zero values of [Options].
const (
	DefaultSize         = 64
	DefaultDuration     = 10 * time.Second
	DefaultTimeout      = 5 * time.Second
	DefaultLate         = time.Second
	DefaultDrainWait    = 5 * time.Second
	DefaultPipeline     = 1    // in the closed model
	DefaultOpenPipeline = 1000 // in the open model
)

// MaxRate is the highest rate of a [Stage].
const MaxRate = 10_000_000

// Options describes the load.
type Options struct {
	// Address is the server's address, in a form that client.ParseAddress reads. If its
	// host is a name with several IP addresses, connections are spread over them. If one
	// cannot be reached, the others are tried.
	Address string

	// TLS configures connections to a tls:// address. Nil means the system's roots.
	TLS *tls.Config

	// Dial connects to Address. Nil means the network. Half-closing needs a connection
	// with the method CloseWrite() error.
	Dial func(ctx context.Context, address string) (net.Conn, error)

	Conns int   // connections at a time; zero means one
	Sizes Sizes // of messages; zero means 64 bytes

	// Stages selects the open model: messages are sent when they are due, whether or
	// not the server keeps up. The run lasts as long as all stages together. Without
	// stages the model is closed: each connection waits for its echo before it sends
	// the next message.
	Stages []Stage

	Duration time.Duration // of a run without Stages; zero means 10 s

	// Think is how long a connection waits after an echo before it sends again, in the
	// closed model. Zero means not at all.
	Think Range

	// Pipeline is how many messages may be in flight on a connection. In the open
	// model, messages that are due beyond that wait, and the wait counts. Zero means
	// one, and 1,000 in the open model. Late messages do not count, as long as there
	// are less than twice as many in all, or 4 MiB.
	Pipeline int

	Ramp  time.Duration // spreads the first connects evenly; zero means all at once
	Churn time.Duration // replaces a connection after this time, plus or minus half; zero means never

	// IgnoreNotices makes clients go on after a notice, as clients do that do not know notices. Notices are still told
	// apart from echoes, and counted.
	IgnoreNotices bool

	NoReconnect bool           // do not replace connections that end or cannot be made
	Backoff     client.Backoff // before a connection is replaced; Retries is ignored; zero Max means 2 s

	Timeout   time.Duration // of a connect; zero means 5 s
	Late      time.Duration // an echo that takes longer is late; zero means 1 s
	DrainWait time.Duration // at the end, for what is in flight and for connects; zero means 5 s

	// Threads is the number of workers. Zero means one for every four processors, and
	// at least one.
	Threads int

	// SkipDrain ends the wait at the end of the run when it is closed. Nil means that
	// only DrainWait ends it.
	SkipDrain <-chan struct{}

	// OnProgress, if not nil, is called by Run's goroutine about every 200 ms.
	OnProgress func(Progress)

	// HistogramLog, if not nil, receives the latencies of each second as a log in
	// HdrHistogram's format (.hlog), with the tags echo and connect, in nanoseconds.
	HistogramLog io.Writer
}

// withDefaults returns o with its zero values replaced.
func (o Options) withDefaults() Options {
	pipeline := DefaultPipeline
	if o.open() {
		pipeline = DefaultOpenPipeline
		o.Duration = 0
		for _, s := range o.Stages {
			o.Duration += s.Duration
		}
	}
	if o.Sizes.ranges == nil {
		o.Sizes = FixedSize(DefaultSize)
	}
	o.Conns = cmp.Or(o.Conns, 1)
	o.Pipeline = cmp.Or(o.Pipeline, pipeline)
	o.Duration = cmp.Or(o.Duration, DefaultDuration)
	o.Timeout = cmp.Or(o.Timeout, DefaultTimeout)
	o.Late = cmp.Or(o.Late, DefaultLate)
	o.DrainWait = cmp.Or(o.DrainWait, DefaultDrainWait)
	o.Backoff.Min = cmp.Or(o.Backoff.Min, 100*time.Millisecond)
	o.Backoff.Max = max(o.Backoff.Min, cmp.Or(o.Backoff.Max, 2*time.Second))
	o.Threads = min(o.Conns, cmp.Or(o.Threads, max(1, runtime.GOMAXPROCS(0)/4)))
	return o
}

// open reports whether the model is open.
func (o *Options) open() bool { return len(o.Stages) > 0 }

// Validate returns an error if the options make no sense.
func (o Options) Validate() error {
	if o.Address == "" {
		return errors.New("no address")
	}
	if o.Dial == nil {
		if _, err := client.ParseAddress(o.Address); err != nil {
			return err
		}
	}
	if err := o.Sizes.validate(); err != nil {
		return err
	}
	if err := o.validateModel(); err != nil {
		return err
	}
	for _, n := range []struct {
		name  string
		value int
	}{{"number of connections", o.Conns}, {"pipeline", o.Pipeline}, {"number of threads", o.Threads}} {
		if n.value < 0 {
			return fmt.Errorf("%s %d: must not be negative", n.name, n.value)
		}
	}
	for _, d := range []struct {
		name  string
		value time.Duration
	}{
		{"duration", o.Duration},
		{"think time", o.Think.Min},
		{"ramp", o.Ramp},
		{"churn", o.Churn},
		{"timeout", o.Timeout},
		{"late", o.Late},
		{"drain wait", o.DrainWait},
		{"backoff", o.Backoff.Min},
		{"backoff", o.Backoff.Max},
	} {
		if d.value < 0 {
			return fmt.Errorf("%s %s: must not be negative", d.name, d.value)
		}
	}
	return nil
}

func (o *Options) validateModel() error {
	highest := 0.0
	for _, s := range o.Stages {
		if !(s.Rate >= 0 && s.Rate <= MaxRate) { // also rejects NaN
			return fmt.Errorf("rate %g: must be from 0 to %d", s.Rate, MaxRate)
		}
		if s.Duration <= 0 {
			return fmt.Errorf("stage of %s: must be longer than 0", s.Duration)
		}
		highest = max(highest, s.Rate)
	}
	switch {
	case o.open() && highest == 0:
		return errors.New("stages: no stage sends anything")
	case o.open() && o.Think != Range{}:
		return errors.New("think time: not possible with a fixed rate, which says when messages are sent")
	case o.Think != Range{} && o.Pipeline > 1:
		return errors.New("think time: not possible with more than one message in flight on a connection")
	case o.Think.Max < o.Think.Min:
		return fmt.Errorf("think time %s: the second time is shorter than the first", o.Think)
	}
	return nil
}

const (
	progressEvery = 200 * time.Millisecond
	maxPoints     = 1200 // of the time series
	maxRecent     = 10   // windows that Progress.Rate covers
	maxErrors     = 5    // different errors in a report
)

// Progress is the state of a run in progress.
type Progress struct {
	Elapsed    time.Duration
	Draining   bool // no new messages; waiting for those in flight
	Open       int  // connections
	Sent       int64
	Returned   int64
	Lost       int64 // so far; most losses are seen only when a connection ends
	Corrupted  int64
	Notices    int64
	Reconnects int64
	Offered    float64       // messages a second; zero in the closed model
	Rate       float64       // echoes a second, over about the last second
	P50, P99   time.Duration // of those echoes
}

// A run is one call of Run.
type run struct {
	opts     Options
	id       uint32
	padding  []byte
	raw      bool // connections are plain sockets
	targets  []*target
	schedule schedule
	began    time.Time
	conns    atomic.Uint32 // connections made so far
	stopping atomic.Bool
	skipping atomic.Bool // do not wait for what is in flight

	latencies *latencyLog // owned by the goroutine of Run

	mu       sync.Mutex // guards what follows
	total    Counts
	points   []point
	step     time.Duration // of points
	recent   []recent      // the last windows
	errs     []string
	seconds  []finishedSecond // to be taken by the goroutine of Run
	spare    []*interval
	reached  []int // the present second of each worker
	lastEcho time.Duration
}

// recent is what came back in a window.
type recent struct {
	at        time.Duration
	returned  int64
	latencies *hdrhistogram.Histogram
}

// A finishedSecond is what a worker recorded in a second.
type finishedSecond struct {
	second int
	*interval
}

// Run puts load on a server, waits for what is in flight, and reports. When ctx ends,
// the run ends early and in order. An error means that the run was not possible, or
// that this machine could not continue with it, for example because it ran out of
// files.
func Run(ctx context.Context, opts Options) (*Report, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	opts = opts.withDefaults()
	r := &run{
		opts: opts, id: rand.Uint32(), padding: newPadding(opts.Sizes.Max()),
		schedule: newSchedule(&opts), step: window, reached: make([]int, opts.Threads),
	}
	if err := r.prepare(ctx); err != nil {
		return nil, err
	}
	r.began = time.Now()
	r.latencies = newLatencyLog(opts.HistogramLog, r.began)
	workers := make([]*worker, opts.Threads)
	for i := range workers {
		var err error
		if workers[i], err = newWorker(r, i); err != nil {
			for _, w := range workers[:i] {
				w.poll.close()
			}
			return nil, err
		}
	}
	if err := r.drive(ctx, workers); err != nil {
		if outOfFiles(err) {
			return nil, r.tooFewFiles()
		}
		return nil, fmt.Errorf("load on %s: %w", opts.Address, err)
	}
	return r.report(workers), r.latencies.err
}

// drive runs the workers to their end.
func (r *run) drive(ctx context.Context, workers []*worker) error {
	wakeAll := func() {
		for _, w := range workers {
			w.poll.wake()
		}
	}
	defer context.AfterFunc(ctx, func() {
		r.stopping.Store(true)
		wakeAll()
	})()
	ended := make(chan error, len(workers))
	for _, w := range workers {
		go func() { ended <- w.work() }()
	}
	var failed error
	skip := r.opts.SkipDrain
	ticker := time.NewTicker(progressEvery)
	defer ticker.Stop()
	for left := len(workers); left > 0; {
		select {
		case err := <-ended:
			left--
			if err != nil && failed == nil {
				failed = err
				r.stopping.Store(true)
				wakeAll()
			}
		case <-skip:
			skip = nil
			r.skipping.Store(true)
			wakeAll()
		case <-ticker.C:
			r.takeSeconds()
			if r.opts.OnProgress != nil {
				r.opts.OnProgress(r.progress())
			}
		}
	}
	r.takeSeconds()
	return failed
}

// collect takes what a worker has counted in the window that began at the given time.
func (r *run) collect(w *worker, since time.Duration) {
	t := w.tally
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
	r.lastEcho = max(r.lastEcho, w.lastEcho)
	t.reset()
}

// addRecent adds what a worker has counted to the window that begins then.
func (r *run) addRecent(t *tally, begins time.Duration) {
	i, known := slices.BinarySearchFunc(r.recent, begins,
		func(w recent, at time.Duration) int { return cmp.Compare(w.at, at) })
	if !known {
		r.recent = slices.Insert(r.recent, i, recent{at: begins, latencies: newWindowHistogram()})
	}
	r.recent[i].returned += t.Echoes.Returned
	r.recent[i].latencies.Merge(t.window)
	if len(r.recent) > maxRecent {
		r.recent = slices.Delete(r.recent, 0, 1)
	}
}

// finishSecond takes the interval of a worker that now begins another second.
func (r *run) finishSecond(w *worker, next int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seconds = append(r.seconds, finishedSecond{r.reached[w.number], w.tally.second})
	r.reached[w.number] = next
	if n := len(r.spare); n > 0 {
		w.tally.second, r.spare = r.spare[n-1], r.spare[:n-1]
		return
	}
	w.tally.second = newInterval()
}

// takeSeconds sums up the seconds that workers have finished.
func (r *run) takeSeconds() {
	r.mu.Lock()
	taken := r.seconds
	r.seconds = nil
	complete := slices.Min(r.reached)
	r.mu.Unlock()
	for _, s := range taken {
		r.latencies.add(s.second, s.interval)
		s.reset()
	}
	r.latencies.writeUntil(complete, time.Since(r.began))
	r.mu.Lock()
	for _, s := range taken {
		r.spare = append(r.spare, s.interval)
	}
	r.mu.Unlock()
}

func (r *run) progress() Progress {
	r.mu.Lock()
	defer r.mu.Unlock()
	elapsed := time.Since(r.began)
	p := Progress{
		Elapsed: elapsed, Draining: elapsed >= r.opts.Duration || r.stopping.Load(),
		Open:     int(r.total.open()),
		Sent:     r.total.Echoes.Sent,
		Returned: r.total.Echoes.Returned,
		Lost:     r.total.Echoes.Lost, Corrupted: r.total.Echoes.Corrupted,
		Notices: r.total.Notices.Seen(), Reconnects: r.total.Reconnects,
		Offered: r.schedule.rate(elapsed),
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
	p.P50 = time.Duration(latencies.ValueAtPercentile(50))
	p.P99 = time.Duration(latencies.ValueAtPercentile(99))
	return p
}

// noteError keeps an error for the report, unless it is known or there are enough.
func (r *run) noteError(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if text := withoutAddress(err); len(r.errs) < maxErrors && !slices.Contains(r.errs, text) {
		r.errs = append(r.errs, text)
	}
}

// withoutAddress returns the text of err. The reader knows the address.
func withoutAddress(err error) string {
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "dial" {
		err = op.Err
	}
	return err.Error()
}
