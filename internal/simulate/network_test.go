package simulate

import (
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"
)

// An in-memory network for a synctest bubble. It behaves like TCP over a network with delays:
//
//   - Data arrives late, in order, and in pieces. A window limits what is in flight or unread.
//   - Each direction ends on its own.
//   - A close with unread input resets the connection, and so does data that arrives after the close.
//   - Several handles can share an endpoint, as descriptors in several processes share a socket.
//
// All waits are on sync.Cond, because synctest does not see through a mutex. Calls that the server makes under its locks,
// such as SetDeadline, never wait.

// network has all connections and listeners of one history. Its mutex guards everything below.
type network struct {
	mu     sync.Mutex
	random *rand.Rand
	faults faultPlan
}

// faultPlan says how unreliable the network is.
type faultPlan struct {
	Delay       time.Duration // of each segment, at most
	Segment     int           // bytes that travel together, at most
	Accept      float64       // share of accepts that fail
	AcceptSlips float64       // share of interrupted accepts that still return a connection, as in the kernel
}

func newNetwork(seed uint64, faults faultPlan) *network {
	return &network{random: rand.New(rand.NewPCG(seed, 0x6e6574)), faults: faults}
}

// delay draws the delay of a segment. Many have none, so that order is also left to the scheduler.
func (n *network) delay(maximum time.Duration) time.Duration {
	if maximum == 0 || n.random.IntN(3) == 0 {
		return 0
	}
	return time.Duration(n.random.Int64N(int64(maximum)))
}

// stream is one direction of a connection.
type stream struct {
	net      *network
	cond     *sync.Cond
	segments []segment
	arrived  []byte // and not read yet
	window   int    // bound on what is in segments or unread
	inFlight int
	last     time.Time // when the newest segment arrives
	maxDelay time.Duration
	finSent  bool
	fin      bool    // the FIN has arrived
	closed   bool    // the receiver has closed
	reset    bool    // an RST has arrived at the receiver
	reverse  *stream // the other direction
}

type segment struct {
	data []byte
	fin  bool
	rst  bool
	at   time.Time
}

// send puts a segment on its way.
func (s *stream) send(g segment) {
	at := time.Now().Add(s.net.delay(s.maxDelay))
	if at.Before(s.last) {
		at = s.last
	}
	g.at, s.last = at, at
	s.segments = append(s.segments, g)
	s.inFlight += len(g.data)
	if wait := time.Until(at); wait > 0 {
		time.AfterFunc(wait, func() {
			s.net.mu.Lock()
			defer s.net.mu.Unlock()
			s.deliver()
		})
		return
	}
	s.deliver()
}

// deliver delivers the segments that are due.
func (s *stream) deliver() {
	for len(s.segments) > 0 && !s.segments[0].at.After(time.Now()) {
		g := s.segments[0]
		s.segments = s.segments[1:]
		s.inFlight -= len(g.data)
		switch {
		case s.reset:
		case g.rst:
			s.reset, s.arrived = true, nil // what was not read is lost (RFC 1122, 4.2.2.13)
			s.reverse.cond.Broadcast()
		case s.closed && len(g.data) > 0:
			s.reverse.sendReset()
		case s.closed:
		case g.fin:
			s.fin = true
		default:
			s.arrived = append(s.arrived, g.data...)
		}
	}
	s.cond.Broadcast()
}

// sendReset sends an RST towards the receiver of s.
func (s *stream) sendReset() {
	s.send(segment{rst: true})
}

// endpoint is one end of a connection.
type endpoint struct {
	net           *network
	in, out       *stream
	local, remote net.Addr
	handles       int
}

// handle is a descriptor of an endpoint.
type handle struct {
	*endpoint
	owner       *process
	read, write timeLimit
	closed      bool
	linger0     bool
}

// pair makes a connection.
func (n *network) pair(local, remote net.Addr, window int, delay time.Duration) (served, client *endpoint) {
	up := &stream{net: n, cond: sync.NewCond(&n.mu), window: window, maxDelay: delay}
	down := &stream{net: n, cond: sync.NewCond(&n.mu), window: window, maxDelay: delay}
	up.reverse, down.reverse = down, up
	served = &endpoint{net: n, in: up, out: down, local: local, remote: remote}
	client = &endpoint{net: n, in: down, out: up, local: remote, remote: local}
	return served, client
}

func (e *endpoint) open(owner *process) *handle {
	e.handles++
	h := &handle{endpoint: e, owner: owner}
	owner.add(h)
	return h
}

func (h *handle) Read(p []byte) (int, error) {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	for {
		switch {
		case h.closed:
			return 0, net.ErrClosed
		case h.read.passed():
			return 0, os.ErrDeadlineExceeded
		case h.in.reset:
			return 0, syscall.ECONNRESET
		case len(p) == 0:
			return 0, nil
		case len(h.in.arrived) > 0:
			k := min(len(p), len(h.in.arrived))
			if k > 1 && h.net.random.IntN(4) == 0 { // a partial read
				k = 1 + h.net.random.IntN(k)
			}
			copy(p, h.in.arrived[:k])
			h.in.arrived = h.in.arrived[k:]
			h.in.cond.Broadcast()
			return k, nil
		case h.in.fin:
			return 0, io.EOF
		}
		h.in.cond.Wait()
	}
}

func (h *handle) Write(p []byte) (written int, err error) {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	for {
		switch {
		case h.closed:
			return written, net.ErrClosed
		case h.write.passed():
			return written, os.ErrDeadlineExceeded
		case h.in.reset:
			return written, syscall.ECONNRESET
		case h.out.finSent:
			return written, syscall.EPIPE
		case written == len(p):
			return written, nil
		}
		room := h.out.window - h.out.inFlight - len(h.out.arrived)
		if room > 0 {
			k := min(room, len(p)-written)
			if size := h.net.faults.Segment; size > 0 {
				k = min(k, 1+h.net.random.IntN(size))
			}
			h.out.send(segment{data: slices.Clone(p[written : written+k])})
			written += k
			continue
		}
		h.out.cond.Wait()
	}
}

func (h *handle) CloseWrite() error {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	if h.closed || h.in.reset {
		return syscall.ENOTCONN
	}
	if !h.out.finSent {
		h.out.finSent = true
		h.out.send(segment{fin: true})
	}
	h.out.cond.Broadcast()
	return nil
}

// Close closes the handle. The last one ends the connection.
func (h *handle) Close() error {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	if h.closed {
		return net.ErrClosed
	}
	h.close()
	return nil
}

func (h *handle) close() {
	if h.closed {
		return
	}
	h.closed = true
	h.read.stop()
	h.write.stop()
	h.owner.remove(h)
	h.in.cond.Broadcast()
	h.out.cond.Broadcast()
	if h.handles--; h.handles > 0 {
		return
	}
	h.in.closed = true
	switch {
	case h.in.reset:
	case h.linger0 || len(h.in.arrived) > 0:
		h.in.arrived = nil
		h.out.sendReset()
	case !h.out.finSent:
		h.out.finSent = true
		h.out.send(segment{fin: true})
	}
}

// Reset closes the connection with an RST.
func (h *handle) Reset() {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	h.linger0 = true
	h.close()
}

func (h *handle) SetReadDeadline(t time.Time) error {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	if h.closed {
		return net.ErrClosed
	}
	h.read.set(t, h.in.cond)
	return nil
}

func (h *handle) SetWriteDeadline(t time.Time) error {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	if h.closed {
		return net.ErrClosed
	}
	h.write.set(t, h.out.cond)
	return nil
}

func (h *handle) SetDeadline(t time.Time) error {
	_ = h.SetReadDeadline(t)
	return h.SetWriteDeadline(t)
}

func (h *handle) LocalAddr() net.Addr  { return h.local }
func (h *handle) RemoteAddr() net.Addr { return h.remote }

// timeLimit is a deadline. When it passes it wakes the waiters of a cond.
type timeLimit struct {
	at    time.Time
	timer *time.Timer
}

func (d *timeLimit) set(t time.Time, cond *sync.Cond) {
	d.stop()
	d.at = t
	if left := time.Until(t); !t.IsZero() && left > 0 {
		d.timer = time.AfterFunc(left, func() {
			cond.L.Lock()
			defer cond.L.Unlock()
			cond.Broadcast()
		})
	}
	cond.Broadcast()
}

func (d *timeLimit) stop() {
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
}

func (d *timeLimit) passed() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }

// backlog is the length of an accept queue.
const backlog = 64

// acceptQueue is a listening socket, which several handles can share.
type acceptQueue struct {
	net          *network
	cond         *sync.Cond
	addr         net.Addr
	waiting      []*endpoint
	handles      int
	injectFaults bool    // accepts may fail
	nextErrors   []error // that the next accepts return
	succeedNext  bool    // after a series of errors one accept succeeds, so that every history makes progress
}

// listener is a descriptor of an accept queue.
type listener struct {
	*acceptQueue
	owner  *process
	limit  timeLimit
	closed bool
}

// listen opens a listener.
func (n *network) listen(port int, owner *process) *listener {
	q := &acceptQueue{net: n, cond: sync.NewCond(&n.mu), addr: &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: port}}
	return q.open(owner)
}

func (q *acceptQueue) open(owner *process) *listener {
	q.handles++
	l := &listener{acceptQueue: q, owner: owner}
	owner.add(l)
	return l
}

func (l *listener) Accept() (net.Conn, error) {
	l.net.mu.Lock()
	defer l.net.mu.Unlock()
	for {
		late := l.limit.passed()
		switch {
		case l.closed:
			return nil, l.failed(net.ErrClosed)
		case late && (len(l.waiting) == 0 || l.net.random.Float64() >= l.net.faults.AcceptSlips):
			return nil, l.failed(os.ErrDeadlineExceeded)
		case len(l.waiting) > 0:
			if err := l.fault(); err != nil {
				return nil, l.failed(err)
			}
			e := l.waiting[0]
			l.waiting = l.waiting[1:]
			return e.open(l.owner), nil
		}
		l.cond.Wait()
	}
}

// fault draws whether accept(2) fails now: for lack of files, several times in a row.
func (l *listener) fault() (err error) {
	if l.injectFaults && !l.succeedNext && len(l.nextErrors) == 0 && l.net.random.Float64() < l.net.faults.Accept {
		for range 1 + l.net.random.IntN(4) {
			l.nextErrors = append(l.nextErrors, []error{syscall.EMFILE, syscall.ECONNABORTED, syscall.ENFILE, syscall.ENOBUFS}[l.net.random.IntN(4)])
		}
	}
	if len(l.nextErrors) > 0 {
		err, l.nextErrors = l.nextErrors[0], l.nextErrors[1:]
	}
	l.succeedNext = err != nil && len(l.nextErrors) == 0
	return err
}

func (l *listener) failed(err error) error {
	return &net.OpError{Op: "accept", Net: "tcp", Addr: l.addr, Err: err}
}

func (l *listener) SetDeadline(t time.Time) error {
	l.net.mu.Lock()
	defer l.net.mu.Unlock()
	if l.closed {
		return net.ErrClosed
	}
	l.limit.set(t, l.cond)
	return nil
}

// Close closes the handle. With the last one, the clients in the accept queue are reset.
func (l *listener) Close() error {
	l.net.mu.Lock()
	defer l.net.mu.Unlock()
	if l.closed {
		return net.ErrClosed
	}
	l.close()
	return nil
}

func (l *listener) close() {
	if l.closed {
		return
	}
	l.closed = true
	l.limit.stop()
	l.owner.remove(l)
	l.cond.Broadcast()
	if l.handles--; l.handles > 0 {
		return
	}
	for _, e := range l.waiting {
		e.in.closed = true
		e.out.sendReset()
	}
	l.waiting = nil
}

func (l *listener) Addr() net.Addr { return l.addr }

// dial connects to the queue. It fails if nobody listens any more, or the queue is full.
func (q *acceptQueue) dial(from net.Addr, window int, delay time.Duration, owner *process) (*handle, error) {
	q.net.mu.Lock()
	defer q.net.mu.Unlock()
	if q.handles == 0 || len(q.waiting) >= backlog {
		return nil, syscall.ECONNREFUSED
	}
	served, client := q.net.pair(q.addr, from, window, delay)
	q.waiting = append(q.waiting, served)
	q.cond.Broadcast()
	return client.open(owner), nil
}

// process owns handles, which the system closes when it dies.
type process struct {
	name string
	net  *network
	open map[closer]struct{} // guarded by net.mu
	dead bool                // guarded by net.mu
}

// closer is a handle or a listener. close is called with the network's lock held.
type closer interface{ close() }

func (n *network) process(name string) *process {
	return &process{name: name, net: n, open: make(map[closer]struct{})}
}

func (p *process) add(c closer)    { p.open[c] = struct{}{} }
func (p *process) remove(c closer) { delete(p.open, c) }

// kill ends the process: it closes everything that the process has open.
func (p *process) kill() {
	p.net.mu.Lock()
	defer p.net.mu.Unlock()
	p.die()
}

// die is kill. The caller holds the network's lock.
func (p *process) die() {
	p.dead = true
	for c := range p.open {
		c.close()
	}
}

func (p *process) isDead() bool {
	p.net.mu.Lock()
	defer p.net.mu.Unlock()
	return p.dead
}
