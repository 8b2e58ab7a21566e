package server

import (
	"bytes"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// An in-memory network for tests in a synctest bubble. Every wait in it is on a sync.Cond, which is durably blocking.

// fakeListener has a bounded accept queue, like the kernel's.
type fakeListener struct {
	mu       sync.Mutex
	cond     *sync.Cond
	queue    []net.Conn
	deadline fakeDeadline
	closed   bool
	// fail, when not nil, is called before each connection is accepted, with the lock held. Its error is Accept's.
	fail func() error
	// slips is how many connections Accept returns although its deadline has passed. The kernel may do that.
	slips int
}

const fakeBacklog = 64

func newFakeListener() *fakeListener {
	l := &fakeListener{}
	l.cond = sync.NewCond(&l.mu)
	return l
}

func (l *fakeListener) Accept() (net.Conn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		switch {
		case l.closed:
			return nil, l.error(net.ErrClosed)
		case l.deadline.passed() && l.slips == 0:
			return nil, l.error(os.ErrDeadlineExceeded)
		case len(l.queue) > 0:
			if l.deadline.passed() {
				l.slips--
			}
			if l.fail != nil {
				if err := l.fail(); err != nil {
					return nil, l.error(err)
				}
			}
			nc := l.queue[0]
			l.queue = l.queue[1:]
			return nc, nil
		}
		l.cond.Wait()
	}
}

func (l *fakeListener) error(err error) error {
	return &net.OpError{Op: "accept", Net: "fake", Addr: l.Addr(), Err: err}
}

func (l *fakeListener) SetDeadline(t time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.deadline.set(t, l.cond)
	return nil
}

// Close resets the clients in the accept queue, as the kernel does.
func (l *fakeListener) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return net.ErrClosed
	}
	l.closed = true
	for _, nc := range l.queue {
		if nc, ok := nc.(*fakeConn); ok {
			nc.Reset()
		}
	}
	l.queue = nil
	l.cond.Broadcast()
	return nil
}

// slip lets Accept return n connections after its deadline.
func (l *fakeListener) slip(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.slips = n
	l.cond.Broadcast()
}

// failWith sets fail.
func (l *fakeListener) failWith(fail func() error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fail = fail
}

func (l *fakeListener) isClosed() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.closed
}

func (l *fakeListener) queued() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.queue)
}

func (l *fakeListener) Addr() net.Addr { return fakeAddr("192.0.2.1", 9999) }

// dialFrom connects a client from the given address. It fails if the listener is closed or the queue is full.
func (l *fakeListener) dialFrom(ip string) (*fakeConn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || len(l.queue) >= fakeBacklog {
		return nil, syscall.ECONNREFUSED
	}
	served, client := newFakePair(l.Addr(), fakeAddr(ip, 1+int(lastFakePort.Add(1)%65535)))
	l.queue = append(l.queue, served)
	l.cond.Broadcast()
	return client, nil
}

// hand puts nc into the accept queue.
func (l *fakeListener) hand(nc net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.queue = append(l.queue, nc)
	l.cond.Broadcast()
}

var lastFakePort atomic.Uint32

func fakeAddr(ip string, port int) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: port} }

// plainListener has no SetDeadline, like tls.NewListener's.
type plainListener struct{ ln *fakeListener }

func (l plainListener) Accept() (net.Conn, error) { return l.ln.Accept() }
func (l plainListener) Close() error              { return l.ln.Close() }
func (l plainListener) Addr() net.Addr            { return l.ln.Addr() }

// fakeConn is one end of a connection that behaves like TCP: it has receive windows and half-close, and it resets a
// peer that sends after the close, or whose data was not read before the close.
type fakeConn struct {
	*fakePair
	in, out       *fakeStream
	read, write   fakeDeadline
	closed        bool
	local, remote net.Addr
}

// fakePair is the state that both ends share.
type fakePair struct {
	mu    sync.Mutex
	cond  *sync.Cond
	reset bool
}

// fakeStream is one direction.
type fakeStream struct {
	buf    bytes.Buffer
	window int  // how much buf may hold
	fin    bool // the sender will send no more
	deaf   bool // the receiver has closed
}

const fakeWindow = 64 << 10

func newFakePair(local, remote net.Addr) (served, client *fakeConn) {
	p := &fakePair{}
	p.cond = sync.NewCond(&p.mu)
	up, down := &fakeStream{window: fakeWindow}, &fakeStream{window: fakeWindow}
	served = &fakeConn{fakePair: p, in: up, out: down, local: local, remote: remote}
	client = &fakeConn{fakePair: p, in: down, out: up, local: remote, remote: local}
	return served, client
}

func (c *fakeConn) Read(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		switch {
		case c.in.deaf:
			return 0, net.ErrClosed
		case c.read.passed():
			return 0, os.ErrDeadlineExceeded
		case c.in.buf.Len() > 0:
			n, err := c.in.buf.Read(p)
			c.cond.Broadcast()
			return n, err
		case c.reset:
			return 0, syscall.ECONNRESET
		case c.in.fin:
			return 0, io.EOF
		}
		c.cond.Wait()
	}
}

func (c *fakeConn) Write(p []byte) (n int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		switch {
		case c.closed:
			return n, net.ErrClosed
		case c.write.passed():
			return n, os.ErrDeadlineExceeded
		case c.reset, c.out.fin:
			return n, syscall.EPIPE
		case n == len(p):
			return n, nil
		case c.out.deaf:
			c.abort()
			return len(p), nil // the kernel takes the data before the RST arrives
		}
		if room := c.out.window - c.out.buf.Len(); room > 0 {
			k := min(room, len(p)-n)
			c.out.buf.Write(p[n : n+k])
			n += k
			c.cond.Broadcast()
			continue
		}
		c.cond.Wait()
	}
}

func (c *fakeConn) CloseWrite() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || c.reset {
		return syscall.ENOTCONN
	}
	c.out.fin = true
	c.cond.Broadcast()
	return nil
}

// Close ends both directions. It resets the connection if input is unread.
func (c *fakeConn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	c.closed, c.in.deaf, c.out.fin = true, true, true
	if c.in.buf.Len() > 0 {
		c.abort()
	}
	c.cond.Broadcast()
	return nil
}

// Reset resets the connection, like a close with SO_LINGER 0.
func (c *fakeConn) Reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.abort()
}

// abort discards what either side has not read yet (RFC 1122, 4.2.2.13). The caller holds mu.
func (c *fakeConn) abort() {
	c.reset = true
	c.in.buf.Reset()
	c.out.buf.Reset()
	c.cond.Broadcast()
}

// SetWindow sets how many unread bytes this end accepts.
func (c *fakeConn) SetWindow(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.in.window = n
	c.cond.Broadcast()
}

func (c *fakeConn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.read.set(t, c.cond)
	return nil
}

func (c *fakeConn) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.write.set(t, c.cond)
	return nil
}

func (c *fakeConn) SetDeadline(t time.Time) error {
	_ = c.SetReadDeadline(t)
	return c.SetWriteDeadline(t)
}

func (c *fakeConn) LocalAddr() net.Addr  { return c.local }
func (c *fakeConn) RemoteAddr() net.Addr { return c.remote }

// fakeDeadline wakes the waiters of a cond when it passes.
type fakeDeadline struct {
	at    time.Time
	timer *time.Timer
}

func (d *fakeDeadline) set(t time.Time, cond *sync.Cond) {
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
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

func (d *fakeDeadline) passed() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }

// withoutDeadlines returns a view of c that only Close and Reset interrupt.
func (c *fakeConn) withoutDeadlines() *fakeConn {
	return &fakeConn{fakePair: c.fakePair, in: c.in, out: c.out, local: c.local, remote: c.remote}
}
