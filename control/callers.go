package control

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/user"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.uber.org/zap"

	"echod/server"
)

// limitCallers bounds the number of open connections of ln. At the limit, Accept closes the idlest one instead of
// waiting.
func limitCallers(ln net.Listener, limit int) *callers {
	l := &callers{
		Listener: ln, limit: limit, probes: make(chan net.Conn, 1), closed: make(chan struct{}),
	}
	l.waker, _ = ln.(interface{ SetDeadline(time.Time) error })
	return l
}

// callers is a listener with at most limit open connections.
type callers struct {
	net.Listener
	limit     int
	waker     interface{ SetDeadline(time.Time) error } // nil if Accept cannot be woken
	probes    chan net.Conn                             // connections from dial, which do not count
	closeOnce sync.Once
	closed    chan struct{}

	mu   sync.Mutex
	open []*callerConn // the idlest first; guarded by mu
}

// callerConn is a connection of callers.
type callerConn struct {
	net.Conn
	from *callers

	asked atomic.Bool // something was received

	// Guarded by from.mu.
	serving bool // a request is being answered
	ended   bool // everything is answered, and net/http waits for the caller to close
	kept    bool // never closed for a new connection
}

// Accept returns the next connection.
func (l *callers) Accept() (net.Conn, error) {
	for {
		select {
		case <-l.closed:
			return nil, net.ErrClosed
		case c := <-l.probes:
			return c, nil
		default:
		}
		c, err := l.Listener.Accept()
		switch {
		case err == nil:
			return l.admit(c), nil
		case l.waker != nil && errors.Is(err, os.ErrDeadlineExceeded):
			_ = l.waker.SetDeadline(time.Time{}) // woken by dial. Reset it before looking at probes, or one is missed
		case isOutOfFiles(err) && l.closeIdlest():
			runtime.Gosched() // one file is free again
		default:
			return nil, asTemporary(err)
		}
	}
}

// admit adds a connection, and closes the idlest if there are too many.
func (l *callers) admit(nc net.Conn) net.Conn {
	c := &callerConn{Conn: nc, from: l}
	l.mu.Lock()
	full := len(l.open) >= l.limit
	l.mu.Unlock()
	if full {
		l.closeIdlest()
		runtime.Gosched() // under a flood, let a connection's request be read before it becomes the idlest
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open = append(l.open, c)
	return c
}

// closeIdlest closes the connection that has been idle for longest, and reports whether there was one. It prefers
// connections that sent nothing, then those without a whole request, then those with one.
func (l *callers) closeIdlest() bool {
	l.mu.Lock()
	var chosen *callerConn
	for _, c := range l.open {
		if !c.kept && (chosen == nil || c.rank() < chosen.rank()) {
			if chosen = c; c.rank() == 0 {
				break
			}
		}
	}
	l.remove(chosen)
	l.mu.Unlock()
	if chosen == nil {
		return false
	}
	_ = chosen.Conn.Close()
	return true
}

func (c *callerConn) rank() int {
	switch {
	case c.ended:
		return 0
	case c.serving:
		return 2
	case c.asked.Load():
		return 1
	case hasInput(c.Conn): // under a flood, net/http may not have come to read it
		c.asked.Store(true)
		return 1
	default:
		return 0
	}
}

// remove takes c out of open; l.mu is held.
func (l *callers) remove(c *callerConn) {
	if i := slices.Index(l.open, c); i >= 0 {
		l.open = slices.Delete(l.open, i, i+1)
	}
}

// count returns the number of open connections.
func (l *callers) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.open)
}

// dial connects from within the process, without the kernel and the limit. It wakes Accept, so that an
// answer proves that the accept loop is alive.
func (l *callers) dial(ctx context.Context) (net.Conn, error) {
	if l.waker == nil {
		return nil, errors.New("the listener has no SetDeadline to wake it")
	}
	near, far := net.Pipe()
	select {
	case l.probes <- probeConn{far}:
	case <-l.closed:
		return nil, net.ErrClosed
	case <-ctx.Done(): // Accept has not taken an earlier one
		return nil, context.Cause(ctx)
	}
	_ = l.waker.SetDeadline(time.Unix(1, 0)) // after the send, or Accept could miss it
	return near, nil
}

// Close closes the listener. It may be called more than once.
func (l *callers) Close() error {
	l.closeOnce.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

// probeConn is the server's side of a connection made by dial.
type probeConn struct{ net.Conn }

// asTemporary marks errors of accept(2) that concern the system and not the listener as temporary, so that
// net/http tries again. It recognises fewer of them itself, and would stop when memory is short.
func asTemporary(err error) error {
	errno, ok := errors.AsType[syscall.Errno](err)
	if !ok || errno == syscall.EBADF || errno == syscall.EINVAL || errno == syscall.ENOTSOCK {
		return err
	}
	return temporaryError{err}
}

type temporaryError struct{ error }

func (e temporaryError) Unwrap() error   { return e.error }
func (e temporaryError) Timeout() bool   { return false }
func (e temporaryError) Temporary() bool { return true }

func (c *callerConn) set(change func()) {
	c.from.mu.Lock()
	defer c.from.mu.Unlock()
	change()
	if i := slices.Index(c.from.open, c); i >= 0 { // it is not idle now
		c.from.open = append(slices.Delete(c.from.open, i, i+1), c)
	}
}

// Read notes that the caller has sent something.
func (c *callerConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.asked.Store(true)
	}
	return n, err
}

// CloseWrite lets net/http end an answer before it closes the connection.
func (c *callerConn) CloseWrite() error {
	c.set(func() { c.ended = true })
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}

// Close frees the connection's place.
func (c *callerConn) Close() error {
	err := c.Conn.Close()
	c.from.mu.Lock()
	defer c.from.mu.Unlock()
	c.from.remove(c)
	return err
}

// caller is the other end of a control connection. The zero value is an unknown caller.
type caller struct {
	uid, pid int // pid is 0 if they are not known
	user     string
	claims   string // of the current request
	probe    bool
	raw      net.Conn    // nil if not known
	conn     *callerConn // nil unless accepted by callers
}

type callerKey struct{}

// ConnContext is for the ConnContext field of an http.Server that serves a Plane. Without it, the log does not show
// the caller's uid and pid.
func ConnContext(ctx context.Context, c net.Conn) context.Context {
	who := &caller{raw: c}
	switch outer := belowTLS(c).(type) {
	case probeConn:
		who.probe = true
	case *callerConn:
		who.conn, who.raw = outer, outer.Conn
	}
	if unixConn, ok := who.raw.(*net.UnixConn); ok && peerOf != nil {
		if raw, err := unixConn.SyscallConn(); err == nil {
			_ = raw.Control(func(fd uintptr) { who.uid, who.pid = peerOf(int(fd)) }) // fails only once closed
		}
	}
	return context.WithValue(ctx, callerKey{}, who)
}

// belowTLS returns the connection under a TLS session, or c itself if it is none.
func belowTLS(c net.Conn) net.Conn {
	if session, ok := c.(*tls.Conn); ok {
		return session.NetConn()
	}
	return c
}

// peerOf returns the uid and pid of the other end of a Unix socket; pid is 0 if they are not known. It is nil on
// systems that do not report both.
var peerOf func(fd int) (uid, pid int)

// identity returns the caller for the server's log and events.
func (c *caller) identity() server.Caller {
	return server.Caller{UID: c.uid, PID: c.pid, User: c.user, Claims: c.claims}
}

// claimsHeader is the header in which a caller names the user that it acts for.
const claimsHeader = "Echod-Claims"

// maxClaims bounds claims, in bytes.
const maxClaims = 256

// identify adds the user's name and the caller's claims, for a request that may change something. Claims are not
// verified; identify ignores them unless they are one line of printable text.
func (c *caller) identify(r *http.Request) {
	if c.pid == 0 {
		return
	}
	if claims := r.Header.Get(claimsHeader); len(claims) <= maxClaims && server.CheckText(claims) == nil {
		c.claims = claims
	}
	if u, err := user.LookupId(strconv.Itoa(c.uid)); err == nil && c.user == "" {
		c.user = u.Username
	}
}

func callerFrom(ctx context.Context) *caller {
	if who, ok := ctx.Value(callerKey{}).(*caller); ok {
		return who
	}
	return &caller{}
}

func (c *caller) fields() []zap.Field {
	if c.pid == 0 {
		return nil
	}
	fields := []zap.Field{zap.Int("uid", c.uid), zap.Int("pid", c.pid)}
	if c.user != "" {
		fields = append(fields, zap.String("user", c.user))
	}
	if c.claims != "" {
		fields = append(fields, zap.String("claims", c.claims))
	}
	return fields
}

// begin marks the connection as serving a request. noteIdle removes the mark.
func (c *caller) begin() { c.set(func() { c.conn.serving = true }) }

// noteIdle is the http.Server's ConnState. A connection becomes idle only when its answer is written: when ServeHTTP
// returns, part of it is still in a buffer.
func noteIdle(conn net.Conn, state http.ConnState) {
	if c, ok := belowTLS(conn).(*callerConn); ok && state == http.StateIdle {
		c.set(func() { c.serving = false })
		c.asked.Store(false)
	}
}

// touch records that the server has sent something to the caller.
func (c *caller) touch() { c.set(func() {}) }

// keep protects the connection from being closed for a new one.
func (c *caller) keep() { c.set(func() { c.conn.kept = true }) }

func (c *caller) set(change func()) {
	if c.conn != nil {
		c.conn.set(change)
	}
}

// gone reports whether the caller has closed both directions. A caller that half-closed still waits for its answer.
func (c *caller) gone() bool { return c.raw != nil && hungUp(c.raw) }

// Probe returns nil if the Plane answers on all of its listeners: each accept loop runs, and a request for the
// status is answered. It does not go through the listener's address, which this process may not be allowed to
// open, and it does not count as a caller. The listeners must have a SetDeadline, as those of package net do.
func (p *Plane) Probe(ctx context.Context) error {
	p.mu.Lock()
	listeners := append([]*callers(nil), p.listeners...)
	p.mu.Unlock()
	if len(listeners) == 0 {
		return errors.New("probing the control plane: it is not served")
	}
	for _, l := range listeners {
		if err := probe(ctx, l); err != nil {
			return fmt.Errorf("probing the control plane: %w", err)
		}
	}
	return nil
}

func probe(ctx context.Context, l *callers) error {
	conn, err := l.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://echod/v1/status", nil)
	if err != nil {
		return err
	}
	request.Close = true
	var answer *http.Response
	if err = request.Write(conn); err == nil {
		answer, err = http.ReadResponse(bufio.NewReader(conn), request)
	}
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return err
	}
	_ = answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return errors.New(answer.Status)
	}
	return nil
}
