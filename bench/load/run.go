package load

import (
	"cmp"
	"fmt"
	"runtime/debug"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"golang.org/x/sys/unix"
)

// Run puts load on a server as spec says, and at its end waits for the echo of all that was sent. An error means that an
// echo was wrong or missing, or that nothing could be measured.
func Run(spec Spec) (Result, error) {
	debug.SetGCPercent(-1) // what a run allocates is bounded, and a collection would show as latency
	defer debug.SetGCPercent(100)
	r, err := newRunner(spec)
	if err != nil {
		return Result{}, err
	}
	defer r.close()
	if err := r.openAll(); err != nil {
		return Result{}, err
	}
	if err := r.until(r.now() + spec.Warmup); err != nil {
		return Result{}, err
	}
	if spec.Corrected && r.echoes > 0 { // how often each message is sent on average
		r.interval = spec.Warmup * time.Duration(spec.Conns*spec.Depth) / time.Duration(r.echoes)
	}
	result, err := r.measure()
	if err != nil {
		return Result{}, err
	}
	return result, r.finish()
}

// A runner is one run.
type runner struct {
	spec    Spec
	target  *unix.SockaddrInet4
	poll    int
	streams []*stream
	opened  int // connections so far
	buf     []byte
	start   time.Time

	ending    bool          // nothing is sent any more but what was begun
	interval  time.Duration // for the correction of latencies; 0: they are not corrected
	echoes    int64
	latencies *hdrhistogram.Histogram // in nanoseconds
}

// slowest is the longest latency that is told from longer ones.
const slowest = time.Minute

// readBuffer is what is read at once: as much as the servers with the largest buffers write.
const readBuffer = 512 << 10

func newRunner(spec Spec) (*runner, error) {
	target, err := resolve(spec.Address)
	if err != nil {
		return nil, err
	}
	poll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("making an epoll instance: %w", err)
	}
	return &runner{
		spec: spec, target: target, poll: poll, buf: make([]byte, readBuffer), start: time.Now(),
		latencies: hdrhistogram.New(1, int64(slowest), 3),
	}, nil
}

func (r *runner) close() {
	for _, s := range r.streams {
		unix.Close(s.fd)
	}
	unix.Close(r.poll)
}

func (r *runner) now() time.Duration { return time.Since(r.start) }

// openAll opens the connections, and begins what is to be under way on each.
func (r *runner) openAll() error {
	r.streams = make([]*stream, 0, r.spec.Conns)
	for i := range r.spec.Conns {
		s := &stream{fd: -1, began: make([]time.Duration, r.spec.Depth)}
		r.streams = append(r.streams, s)
		if err := r.open(i, !r.spec.Churn); err != nil {
			return err
		}
	}
	return nil
}

// open connects the stream at index i anew. Where it does not wait, the connection may be under way on return.
func (r *runner) open(i int, wait bool) error {
	s := r.streams[i]
	begun := r.now()
	fd, err := connect(r.target, r.opened, wait)
	if err != nil {
		return err
	}
	*s = stream{fd: fd, phase: r.opened * 131 % period, began: s.began}
	r.opened++
	event := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLET, Fd: int32(i)}
	if err := unix.EpollCtl(r.poll, unix.EPOLL_CTL_ADD, fd, &event); err != nil {
		return fmt.Errorf("watching a connection: %w", err)
	}
	for range r.spec.Depth {
		s.begin(r.spec.Size, begun)
	}
	return s.flush()
}

// measure counts from now on, for as long as spec says.
func (r *runner) measure() (Result, error) {
	r.echoes = 0
	r.latencies.Reset()
	server, err := cpuTime(r.spec.PID)
	if err != nil {
		return Result{}, err
	}
	own, err := cpuTime(0)
	if err != nil {
		return Result{}, err
	}
	begun := r.now()
	if err := r.until(begun + r.spec.Duration); err != nil {
		return Result{}, err
	}
	ended := r.now()
	serverAfter, err := cpuTime(r.spec.PID)
	if err != nil {
		return Result{}, err
	}
	ownAfter, err := cpuTime(0)
	if err != nil {
		return Result{}, err
	}
	at := func(percent float64) time.Duration { return time.Duration(r.latencies.ValueAtPercentile(percent)) }
	return Result{
		Echoes: r.echoes, Elapsed: ended - begun, ServerCPU: serverAfter - server, LoadCPU: ownAfter - own,
		P50: at(50), P99: at(99), P999: at(99.9), Max: time.Duration(r.latencies.Max()),
	}, nil
}

// until serves the connections until the given time.
func (r *runner) until(end time.Duration) error {
	var events [256]unix.EpollEvent
	for {
		now := r.now()
		if now >= end {
			return nil
		}
		n, err := unix.EpollWait(r.poll, events[:], int((end-now)/time.Millisecond)+1)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("waiting for the server: %w", err)
		}
		for _, e := range events[:max(n, 0)] {
			if err := r.serve(int(e.Fd)); err != nil {
				return fmt.Errorf("connection %d: %w", e.Fd, err)
			}
		}
	}
}

// serve reads and writes what can be on the stream at index i.
func (r *runner) serve(i int) error {
	s := r.streams[i]
	for {
		n, err := s.fill(r.buf, &r.spec)
		if err != nil {
			return err
		}
		if n > 0 {
			now, done := r.now(), 0
			for ; s.finished(r.spec.Size); done++ {
				r.count(now - s.finish())
			}
			switch {
			case r.ending || done == 0:
			case r.spec.Churn:
				unix.Close(s.fd) // which takes it out of the poller, too
				return r.open(i, false)
			default:
				for range done {
					s.begin(r.spec.Size, now)
				}
			}
		}
		if err := s.flush(); err != nil {
			return err
		}
		if n < len(r.buf) {
			return nil // no more than that is here; the next byte makes an event of its own
		}
	}
}

func (r *runner) count(latency time.Duration) {
	r.echoes++
	_ = r.latencies.RecordCorrectedValue(int64(min(latency, slowest)), int64(r.interval))
}

// finish waits for the echoes of all that was sent.
func (r *runner) finish() error {
	r.ending = true
	patience := cmp.Or(r.spec.Patience, patience)
	for end := r.now() + patience; ; {
		waiting := 0
		for _, s := range r.streams {
			if s.under > 0 {
				waiting++
			}
		}
		if waiting == 0 {
			return nil
		}
		now := r.now()
		if now >= end {
			return fmt.Errorf("on %d of %d connections the echo has not come within %v", waiting, len(r.streams), patience)
		}
		if err := r.until(min(now+10*time.Millisecond, end)); err != nil {
			return err
		}
	}
}
