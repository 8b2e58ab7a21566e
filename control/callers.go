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

// newCallerListener returns a listener that bounds the number of open connections of ln. At the limit, Accept closes
// the idlest connection for a new one.
func newCallerListener(ln net.Listener, limit int) *callerListener {
	l := &callerListener{
		Listener: ln, limit: limit, probeConns: make(chan net.Conn, 1), closed: make(chan struct{}),
	}
	l.deadlineSetter, _ = ln.(interface{ SetDeadline(time.Time) error })
	return l
}

// callerListener is a listener with at most limit open connections.
type callerListener struct {
	net.Listener
	limit          int
	deadlineSetter interface{ SetDeadline(time.Time) error } // nil if ln has no SetDeadline, so that Accept cannot be woken
	probeConns     chan net.Conn                             // connections from dialInProcess, which do not count
	closeOnce      sync.Once
	closed         chan struct{}

	mu   sync.Mutex
	open []*callerConn // the idlest first; guarded by mu
}

// callerConn is a connection of a callerListener.
type callerConn struct {
	net.Conn
	listener *callerListener

	received atomic.Bool // the caller has sent something

	// Guarded by listener.mu.
	serving  bool // a request is being answered
	answered bool // the last answer was sent, and net/http waits for the caller to close
	kept     bool // closeIdlest must not close it
}

// Accept returns the next connection.
func (l *callerListener) Accept() (net.Conn, error) {
	for {
		select {
		case <-l.closed:
			return nil, net.ErrClosed
		case c := <-l.probeConns:
			return c, nil
		default:
		}
		c, err := l.Listener.Accept()
		switch {
		case err == nil:
			return l.add(c), nil
		case l.deadlineSetter != nil && errors.Is(err, os.ErrDeadlineExceeded):
			// dialInProcess has woken Accept. The deadline is reset before probeConns is read, so that no probe is missed.
			_ = l.deadlineSetter.SetDeadline(time.Time{})
		case isOutOfFiles(err) && l.closeIdlest():
			runtime.Gosched() // lets the closed file be released
		default:
			return nil, asTemporary(err)
		}
	}
}

// add adds a connection. If there are too many, it closes the idlest first.
func (l *callerListener) add(nc net.Conn) net.Conn {
	c := &callerConn{Conn: nc, listener: l}
	l.mu.Lock()
	full := len(l.open) >= l.limit
	l.mu.Unlock()
	if full {
		l.closeIdlest()
		runtime.Gosched() // under a flood, lets net/http read the request of a connection before that becomes the idlest
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open = append(l.open, c)
	return c
}

// closeIdlest closes the connection with the lowest closePriority, and among these the one that was idle for the
// longest time. It reports whether it closed one.
func (l *callerListener) closeIdlest() bool {
	l.mu.Lock()
	var chosen *callerConn
	for _, c := range l.open {
		if !c.kept && (chosen == nil || c.closePriority() < chosen.closePriority()) {
			if chosen = c; c.closePriority() == 0 {
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

// closePriority returns 0 for a connection that has sent nothing or is answered, and 1 for one that has sent a part of a
// request. It returns 2 for one whose request is being answered.
func (c *callerConn) closePriority() int {
	switch {
	case c.answered:
		return 0
	case c.serving:
		return 2
	case c.received.Load():
		return 1
	case hasInput(c.Conn): // under a flood, net/http may not have read it yet
		c.received.Store(true)
		return 1
	default:
		return 0
	}
}

// remove removes c from open. The caller holds l.mu.
func (l *callerListener) remove(c *callerConn) {
	if i := slices.Index(l.open, c); i >= 0 {
		l.open = slices.Delete(l.open, i, i+1)
	}
}

// count returns the number of open connections.
func (l *callerListener) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.open)
}

// dialInProcess connects to the listener inside the process. The connection does not count for the limit. Accept
// returns it, so that an answer proves that the accept loop runs.
func (l *callerListener) dialInProcess(ctx context.Context) (net.Conn, error) {
	if l.deadlineSetter == nil {
		return nil, errors.New("the listener has no SetDeadline to wake it")
	}
	near, far := net.Pipe()
	select {
	case l.probeConns <- probeConn{far}:
	case <-l.closed:
		return nil, net.ErrClosed
	case <-ctx.Done(): // Accept has not returned the connection of an earlier probe
		return nil, context.Cause(ctx)
	}
	_ = l.deadlineSetter.SetDeadline(time.Unix(1, 0)) // after the send, so that Accept does not miss it
	return near, nil
}

// Close closes the listener. It may be called more than once.
func (l *callerListener) Close() error {
	l.closeOnce.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

// probeConn is the server's side of a connection made by dialInProcess.
type probeConn struct{ net.Conn }

// asTemporary marks errors of accept(2) as temporary unless the listener itself is broken, so that net/http tries
// again. net/http alone would stop when memory is short.
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

// update calls change under the lock. The connection is then the least idle one.
func (c *callerConn) update(change func()) {
	c.listener.mu.Lock()
	defer c.listener.mu.Unlock()
	change()
	if i := slices.Index(c.listener.open, c); i >= 0 {
		c.listener.open = append(slices.Delete(c.listener.open, i, i+1), c)
	}
}

// Read records that the caller has sent something.
func (c *callerConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.received.Store(true)
	}
	return n, err
}

// CloseWrite half-closes the connection. net/http calls it after the last answer.
func (c *callerConn) CloseWrite() error {
	c.update(func() { c.answered = true })
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}

// Close closes the connection, and removes it from the listener.
func (c *callerConn) Close() error {
	err := c.Conn.Close()
	c.listener.mu.Lock()
	defer c.listener.mu.Unlock()
	c.listener.remove(c)
	return err
}

// caller is the other end of a control connection. The zero value is an unknown caller.
type caller struct {
	uid, pid int // pid is 0 if both are unknown
	user     string
	claims   string // of the current request
	probe    bool
	raw      net.Conn    // nil if unknown
	conn     *callerConn // nil if no callerListener accepted it
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
			_ = raw.Control(func(fd uintptr) { who.uid, who.pid = peerOf(int(fd)) }) // an error means that the connection is closed
		}
	}
	return context.WithValue(ctx, callerKey{}, who)
}

// belowTLS returns the connection below a TLS session, or c itself if it is not one.
func belowTLS(c net.Conn) net.Conn {
	if session, ok := c.(*tls.Conn); ok {
		return session.NetConn()
	}
	return c
}

// peerOf returns the uid and pid of the other end of a Unix socket; pid is 0 if they are unknown. It is nil on systems
// that do not report both.
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

// markServing records that a request is being answered, until markIdle.
func (c *caller) markServing() { c.update(func() { c.conn.serving = true }) }

// markIdle is the ConnState callback of the http.Server. A connection is idle when its answer is written. That is later
// than the return of ServeHTTP, when a part of the answer may still be in a buffer.
func markIdle(conn net.Conn, state http.ConnState) {
	if c, ok := belowTLS(conn).(*callerConn); ok && state == http.StateIdle {
		c.update(func() { c.serving = false })
		c.received.Store(false)
	}
}

// markActive records that the server has sent something to the caller.
func (c *caller) markActive() { c.update(func() {}) }

// neverClose keeps closeIdlest from closing the connection.
func (c *caller) neverClose() { c.update(func() { c.conn.kept = true }) }

func (c *caller) update(change func()) {
	if c.conn != nil {
		c.conn.update(change)
	}
}

// hasLeft reports whether the caller has closed both directions. A caller that half-closed may still wait for its
// answer.
func (c *caller) hasLeft() bool { return c.raw != nil && hungUp(c.raw) }

// Probe returns nil if the Plane answers a request for the status on each of its listeners. It connects inside the
// process, because the process may not be allowed to open the listener's address. It does not count as a caller. The
// listeners must have a SetDeadline method, as those of package net have.
func (p *Plane) Probe(ctx context.Context) error {
	p.mu.Lock()
	listeners := append([]*callerListener(nil), p.listeners...)
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

func probe(ctx context.Context, l *callerListener) error {
	conn, err := l.dialInProcess(ctx)
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
