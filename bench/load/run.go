package load

import (
	"bytes"
	"cmp"
	"fmt"
	"runtime/debug"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"golang.org/x/sys/unix"
)

// Run puts a load on a server, and waits for all echoes at the end. An error means that an echo was wrong or missing,
// or that measuring failed.
func Run(spec Spec) (Result, error) {
	if spec.TLS {
		return runTLS(spec)
	}
	debug.SetGCPercent(-1) // a run allocates little, and a collection would show as latency
	defer debug.SetGCPercent(100)
	r, err := startRunner(spec)
	if err != nil {
		return Result{}, err
	}
	defer r.close()
	if spec.Corrected && r.echoes > 0 { // mean time between two messages
		r.interval = spec.Warmup * time.Duration(spec.Conns*spec.Depth) / time.Duration(r.echoes)
	}
	result, err := r.measure()
	if err != nil {
		return Result{}, err
	}
	return result, r.finish()
}

// RunUntil is Run until done is closed. It measures no CPU times.
func RunUntil(spec Spec, done <-chan struct{}) (Result, error) {
	debug.SetGCPercent(-1)
	defer debug.SetGCPercent(100)
	r, err := startRunner(spec)
	if err != nil {
		return Result{}, err
	}
	defer r.close()
	r.echoes = 0
	r.latencies.Reset()
	begun := r.now()
	for {
		const interval = 20 * time.Millisecond // between checks of done
		if err := r.until(r.now() + interval); err != nil {
			return Result{}, err
		}
		select {
		case <-done:
			result := r.result(r.now() - begun)
			return result, r.finish()
		default:
		}
	}
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

	ending    bool          // no new messages
	interval  time.Duration // for Corrected; 0: not corrected
	echoes    int64
	latencies *hdrhistogram.Histogram // in nanoseconds
}

// slowest is the longest latency that is recorded. Longer ones count as slowest.
const slowest = time.Minute

// readBuffer is as large as the largest buffers of the servers.
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

// startRunner opens the connections of a run, and runs it until the warm-up ends.
func startRunner(spec Spec) (*runner, error) {
	r, err := newRunner(spec)
	if err != nil {
		return nil, err
	}
	if err = r.openAll(); err == nil {
		err = r.until(r.now() + spec.Warmup)
	}
	if err != nil {
		r.close()
		return nil, err
	}
	return r, nil
}

func (r *runner) close() {
	for _, s := range r.streams {
		unix.Close(s.fd)
	}
	unix.Close(r.poll)
}

func (r *runner) now() time.Duration { return time.Since(r.start) }

// openAll opens all connections and sends the first messages.
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

// open connects stream i again. If wait is false, it may return before the connection is established.
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

// measure measures for spec.Duration.
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
	result := r.result(ended - begun)
	result.ServerCPU, result.LoadCPU = serverAfter-server, ownAfter-own
	return result, nil
}

// result returns what was counted, without CPU times.
func (r *runner) result(elapsed time.Duration) Result {
	at := func(percent float64) time.Duration { return time.Duration(r.latencies.ValueAtPercentile(percent)) }
	return Result{
		Echoes: r.echoes, Elapsed: elapsed,
		P50: at(50), P99: at(99), P999: at(99.9), Max: time.Duration(r.latencies.Max()),
	}
}

// until handles events until the given time.
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

// serve reads and writes stream i as far as possible.
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
				unix.Close(s.fd) // also removes it from the epoll instance
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
			return nil // nothing left; the next byte is a new event
		}
	}
}

func (r *runner) count(latency time.Duration) {
	r.echoes++
	_ = r.latencies.RecordCorrectedValue(int64(min(latency, slowest)), int64(r.interval))
}

// finish waits for all echoes.
func (r *runner) finish() error {
	r.ending = true
	timeout := cmp.Or(r.spec.Timeout, echoTimeout)
	for end := r.now() + timeout; ; {
		waiting := 0
		for _, s := range r.streams {
			if s.inFlight > 0 {
				waiting++
			}
		}
		if waiting == 0 {
			return nil
		}
		now := r.now()
		if now >= end {
			return fmt.Errorf("on %d of %d connections the echo did not come within %v", waiting,
				len(r.streams), timeout)
		}
		if err := r.until(min(now+10*time.Millisecond, end)); err != nil {
			return err
		}
	}
}

// A stream is a connection and its messages in flight.
type stream struct {
	fd    int
	phase int // its offset in the pattern

	queued, sent, received int64 // bytes that are to be sent, were sent, and came back

	began    []time.Duration // ring: when each message in flight was begun
	first    int             // index of the oldest
	inFlight int
}

// flush writes queued bytes, as many as the kernel takes.
func (s *stream) flush() error {
	for s.sent < s.queued {
		n, err := unix.Write(s.fd, expect(s.phase, s.sent, int(min(s.queued-s.sent, longest))))
		switch err {
		case nil:
			s.sent += int64(n)
		case unix.EINTR:
		case unix.EAGAIN:
			return nil // an event follows when there is room
		default:
			return fmt.Errorf("writing to the server after %d bytes: %w", s.sent, err)
		}
	}
	return nil
}

// fill reads once into buf and verifies the data. It returns the number of bytes, 0 if there are none.
func (s *stream) fill(buf []byte, spec *Spec) (int, error) {
	for {
		n, err := unix.Read(s.fd, buf)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			return 0, nil
		case err != nil:
			return 0, fmt.Errorf("reading from the server after %d bytes: %w", s.received, err)
		case n == 0:
			return 0, fmt.Errorf("the server ended the stream after %d of %d bytes", s.received, s.sent)
		default:
			return n, s.verify(buf[:n], spec)
		}
	}
}

// verify checks that got continues the echo. Notices may come between messages.
func (s *stream) verify(got []byte, spec *Spec) error {
	for len(got) > 0 {
		part := got
		if spec.Notice != "" {
			part = got[:min(len(got), spec.Size-int(s.received%int64(spec.Size)))]
		}
		if matches(s.phase, s.received, part) {
			s.received += int64(len(part))
			got = got[len(part):]
			continue
		}
		rest, ok := bytes.CutPrefix(bytes.TrimPrefix(got, []byte("\n")), []byte(spec.Notice))
		if !ok || spec.Notice == "" || s.received%int64(spec.Size) != 0 {
			return fmt.Errorf("after %d bytes the server sent something else than the echo", s.received)
		}
		got = rest
	}
	return nil
}

// begin queues a message of size bytes, at time now.
func (s *stream) begin(size int, now time.Duration) {
	s.began[(s.first+s.inFlight)%len(s.began)] = now
	s.inFlight++
	s.queued += int64(size)
}

// finished reports whether the oldest message in flight has come back.
func (s *stream) finished(size int) bool {
	return s.inFlight > 0 && s.received >= s.queued-int64(s.inFlight-1)*int64(size)
}

// finish removes the oldest message in flight, and returns when it was begun.
func (s *stream) finish() time.Duration {
	at := s.began[s.first]
	s.first = (s.first + 1) % len(s.began)
	s.inFlight--
	return at
}
