package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime/debug"
	"slices"
	"time"

	"go.uber.org/zap"
)

// Backoff after accept(2) failed for lack of descriptors or memory. It ends early when a connection closes.
const (
	minAcceptBackoff = 5 * time.Millisecond
	maxAcceptBackoff = 1 * time.Second
)

// An acceptor accepts connections from one listener and submits each for admission. It runs on the goroutine that
// called Serve.
type acceptor struct {
	srv     *Server
	ln      Listener
	source  source
	handler Handler
	wrap    WrapConn // nil when connections need no preparation but TLS
	tls     WrapConn // nil without TLS
	base    context.Context
	sockopt socketOptions // of an inherited listener: its connections keep them
	backoff time.Duration // zero while accepting works
	parked  []*Conn       // accepted because the accept queue was full, oldest first; see park
	late    bool          // the server had stopped before: the queue is only rejected

	// Guarded by Server.state.
	interrupted bool   // the source was interrupted and not resumed yet
	iterations  uint64 // of the accept loop; Probe watches it
	waiting     bool   // the loop waits with a connection that is not admitted yet
	quiet       bool   // the loop has seen that the server is frozen, and accepts nothing
	closing     bool   // CloseListener was called
	emptying    bool   // the accept queue is being emptied
}

func newAcceptor(s *Server, ln Listener) *acceptor {
	a := &acceptor{srv: s, ln: ln, handler: ln.Handler, wrap: ln.WrapConn, source: newSource(ln.Listener)}
	if a.handler == nil {
		a.handler = s.handler
	}
	if a.wrap == nil {
		a.wrap = s.opts.WrapConn
	}
	if ln.TLSConfig != nil {
		a.tls = TLS(ln.TLSConfig)
	}
	if s.opts.BaseContext != nil {
		a.base = s.opts.BaseContext(ln.Listener)
	}
	if ln.Inherited {
		a.sockopt = readSocketOptions(ln.Listener)
	} else if tcp, ok := ln.Listener.(*net.TCPListener); ok {
		if raw, err := tcp.SyscallConn(); err == nil {
			keepUrgentInline(raw)
		}
	}
	a.interrupted = true // the listener may come with a deadline
	return a
}

// prepares reports whether connections have a handshake before they are admitted.
func (a *acceptor) prepares() bool { return a.wrap != nil || a.tls != nil }

// interrupt makes a blocked accept return, and each later one until awaitMayAccept. The caller holds s.state, so the
// accept loop cannot clear the interrupt before it has seen why it was interrupted.
func (a *acceptor) interrupt() {
	if !a.emptying {
		a.interrupted = true
		a.source.interrupt()
	}
}

func (st *state) interruptAcceptors() {
	for _, a := range st.acceptors {
		a.interrupt()
	}
}

// run accepts until the drain begins or the listener is closed, and then empties the accept queue. A non-nil error
// says why accepting failed.
func (a *acceptor) run() error {
	err := a.loop()
	if err == nil && !a.srv.isHandedOver() {
		a.emptyQueue()
	}
	for nc := range a.source.close() {
		a.take(nc)
	}
	a.unpark(len(a.parked))
	return err
}

func (a *acceptor) loop() error {
	for a.awaitMayAccept() {
		if a.unpark(1) {
			continue
		}
		nc, err := a.source.accept()
		switch {
		case err == nil:
			a.take(nc)
		case errors.Is(err, os.ErrDeadlineExceeded): // interrupted
		case acceptRetryable(err):
			a.backOff(err)
		default:
			return err
		}
	}
	return nil
}

// awaitMayAccept waits until the loop may accept. It returns false when the accept loop must end.
func (a *acceptor) awaitMayAccept() bool {
	for {
		clear, stop, frozen := a.look()
		for !clear && !stop {
			if !frozen {
				a.park()
			}
			a.awaitChange(frozen)
			clear, stop, frozen = a.look()
		}
		if !stop && a.awaitRate() {
			continue
		}
		if stop || a.srv.hasFile(0) || a.srv.hasFile(a.spareFiles()) {
			return clear
		}
		a.backOff(errNoFiles) // another server in this process may have the files
	}
}

// awaitRate waits until Limits.MaxConnRateTotal has a place for the next client, or until that may have changed, and
// reports whether it waited.
func (a *acceptor) awaitRate() bool {
	set := a.srv.live()
	wait := set.rates.untilNext(time.Now())
	if wait == 0 || set.limits.AtLimit == LimitReject {
		return false
	}
	a.srv.awaitFor(wait, func(st *state) bool {
		clear, _, _ := a.next(st)
		return !clear || a.srv.live() != set
	})
	return true
}

// look calls next, and records for a handover whether the loop has stopped. It runs once per connection, so it must
// not allocate.
func (a *acceptor) look() (clear, stop, frozen bool) {
	a.srv.state.With(func(st *state) {
		clear, stop, frozen = a.next(st)
		a.quiet = frozen
	})
	return clear, stop, frozen
}

// awaitChange waits until the loop may accept, must end, or differs from frozen, for
// parkInterval at most.
func (a *acceptor) awaitChange(frozen bool) {
	a.srv.awaitFor(parkInterval, func(st *state) bool {
		clear, stop, now := a.next(st)
		return clear || stop || now != frozen
	})
}

var errNoFiles = errors.New("the limit on open files is reached")

// spareFiles returns how many reserved files the loop may use: none, or at the connection limit those for rejected
// clients.
func (a *acceptor) spareFiles() int {
	var full bool
	a.srv.state.With(func(st *state) { full = st.admitted >= a.srv.live().limits.MaxConns })
	if full {
		return a.srv.live().limits.spareFiles()
	}
	return 0
}

// next reports whether the loop may accept (clear), must end (stop), or is frozen by a handover. If it is clear,
// accept may block again.
func (a *acceptor) next(st *state) (clear, stop, frozen bool) {
	a.iterations++
	switch {
	case st.handedOver:
		a.keepPath()
		return false, true, false
	case st.frozen:
		return false, false, true
	case st.notAccepting(), a.closing:
		a.emptying = true
		return false, true, false
	case !a.srv.mayAccept(st), a.prepares() && a.srv.crowdedHandshakes(st):
		return false, false, false
	}
	if a.interrupted {
		a.interrupted = false
		a.source.resume() // under the lock: a pause after this interrupts again
	}
	return true, false, false
}

// take adds an accepted connection to the table, and waits until admission has decided about it.
func (a *acceptor) take(nc net.Conn) { a.enter(a.newConn(nc), true) }

func (a *acceptor) newConn(nc net.Conn) *Conn {
	if a.backoff > 0 {
		a.srv.log.Info("accepting again", zap.Stringer("address", a.ln.Addr()))
		a.backoff = 0
	}
	a.sockopt.apply(nc)
	return newConn(a, nc)
}

// enter submits a connection for admission, after WrapConn if there is one, and waits for the decision. It adds a new
// connection to the table first.
func (a *acceptor) enter(c *Conn, isNew bool) {
	s := a.srv
	var d decision
	var why, refused Reason
	var oldest *Conn
	if !a.prepares() {
		refused = s.screen(c)
	}
	s.state.With(func(st *state) {
		if isNew {
			st.addConn(c)
		}
		if a.prepares() {
			oldest = s.beginHandshake(st, c)
			return
		}
		st.publishOpened(c)
		d, why = s.admit(st, c, refused)
		a.waiting = d == undecided // a handover waits for that
	})
	if isNew {
		s.connState(c, PhaseWaiting)
	}
	if oldest != nil {
		oldest.end(oldest.handshakeReason(), errHandshakeCrowded)
	}
	if a.prepares() {
		go c.handshake()
		return
	}
	if d == undecided {
		d, why = s.awaitAdmission(c, refused, &a.waiting)
	}
	s.proceed(c, d, why)
}

// proceed carries out the decision of admission.
func (s *Server) proceed(c *Conn, d decision, why Reason) {
	switch d {
	case admit:
		if !s.opts.QuietConns {
			if entry := s.log.Check(zap.InfoLevel, "connection opened"); entry != nil {
				fields := []zap.Field{zap.Uint64("conn", c.id), zap.Stringer("remote", c.RemoteAddr())}
				if labels := c.Labels(); labels != nil {
					fields = append(fields, zap.Any("labels", labels))
				}
				entry.Write(fields...)
			}
		}
		s.connState(c, PhaseServing)
		s.tellIfDraining(c)
		go c.serve(nil)
	case reject:
		s.connState(c, PhaseRejecting)
		go c.reject(why)
	case rejectNow:
		s.connState(c, PhaseRejecting)
		go c.rejectNow(why)
	case closeUnserved:
		go c.closeUnserved()
	case handedOver:
		go func() {
			defer s.endTask()
			c.release()
		}()
	case undecided:
	}
}

var (
	errHandshakeTimeout = errors.New("the handshake took too long")
	errHandshakeCrowded = errors.New("the handshake was ended for a newer client: a limit on connections is reached")
)

// handshake is the goroutine of a connection that is prepared: it calls WrapConn, performs the TLS handshake, and
// waits for admission.
func (c *Conn) handshake() {
	s := c.srv
	defer s.endTask()
	refused, err := c.prepare()
	c.endHandshake(err)

	var waiting bool
	s.state.With(func(st *state) {
		st.removeHandshake(st.indexHandshake(c))
		st.publishOpened(c)
	})
	d, why := s.awaitAdmission(c, refused, &waiting)
	s.proceed(c, d, why)
}

// prepare returns the reason if the client is not to be served. Then there is no TLS handshake.
func (c *Conn) prepare() (refused Reason, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("WrapConn or a TLS callback panicked: %v\n%s", p, debug.Stack())
		}
	}()
	if c.from.base != nil {
		c.closing.With(func(cl *closingState) { cl.extra().parent = c.from.base })
	}
	timeout := c.srv.live().timeouts.Handshake
	ctx, cancel := context.WithTimeoutCause((*connContext)(c), timeout, errHandshakeTimeout)
	defer cancel()
	c.boundHandshake(time.Now().Add(timeout))
	if c.from.wrap != nil {
		wrapped, err := c.from.wrap(ctx, c.nc)
		switch {
		case err != nil && ctx.Err() != nil:
			return 0, fmt.Errorf("%w: %w", context.Cause(ctx), err)
		case err != nil:
			return 0, err
		}
		c.setStream(wrapped)
	}
	if refused = c.srv.screen(c); refused == 0 && c.from.tls != nil {
		c.flags.set(flagTLSBegun)
		if oldest := c.srv.boundHandshakesOf(c); oldest != nil {
			oldest.end(oldest.handshakeReason(), errHandshakeCrowded)
		}
		// Without a Done channel crypto/tls needs no goroutine. The connection's deadline and end interrupt the handshake.
		if err := c.replaceStream(context.WithoutCancel(ctx), c.from.tls); err != nil {
			return 0, err
		}
		c.labelIdentity()
	}
	return refused, nil
}

// Bounds of parking.
const (
	parkInterval = 250 * time.Millisecond // between looks at the accept queue
	maxParked    = 4096
)

// park makes room in a full accept queue while no client is admitted. It accepts the oldest clients, in order, and
// closes those that left without sending anything. Otherwise health checks that connect and close during a long pause
// would fill the queue, and real clients would time out. The others stay parked, and are the first to be admitted. A
// client that sent something and then half-closed stays parked, because it may still expect an answer.
func (a *acceptor) park() {
	if a.ln.Inherited {
		return
	}
	a.dropGone()
	length, limit, ok := acceptQueue(a.ln.Listener)
	if !ok || length < max(1, limit) {
		return
	}
	for room := max(1, limit/4); room > 0 && len(a.parked) < maxParked && a.srv.hasFile(0); room-- {
		nc, err := a.source.acceptWithin(time.Millisecond)
		if err != nil {
			break
		}
		c := a.newConn(nc)
		a.srv.state.With(func(st *state) { st.addConn(c) })
		a.srv.connState(c, PhaseWaiting)
		a.parked = append(a.parked, c)
	}
	a.dropGone()
}

// dropGone closes the parked connections whose clients have gone.
func (a *acceptor) dropGone() {
	a.parked = slices.DeleteFunc(a.parked, func(c *Conn) bool {
		if c.endReason() == 0 && !peerGone(c.sock) {
			return false
		}
		c.end(ReasonClientClosed, ErrConnClosed)
		a.enter(c, false)
		return true
	})
}

// unpark submits up to n parked connections for admission, and reports whether there were any.
func (a *acceptor) unpark(n int) bool {
	n = min(n, len(a.parked))
	for _, c := range a.parked[:n] {
		a.awaitHandshakes()
		a.enter(c, false)
	}
	a.parked = slices.Delete(a.parked, 0, n)
	return n > 0
}

// backOff waits before accepting is tried again, longer each time.
func (a *acceptor) backOff(err error) {
	if a.backoff == 0 {
		a.srv.log.Warn("cannot accept, retrying", zap.Stringer("address", a.ln.Addr()), zap.Error(err))
	}
	a.backoff = min(max(2*a.backoff, minAcceptBackoff), maxAcceptBackoff)
	a.sleep(a.backoff)
}

// sleep waits for d, or until a connection has closed or the drain has changed.
func (a *acceptor) sleep(d time.Duration) {
	type moment struct {
		closed int
		phase  State
		over   bool
		frozen bool
	}
	var begin *moment
	a.srv.awaitFor(d, func(st *state) bool {
		now := moment{int(st.accepted) - st.conns.len(), st.phase, st.drain.over(), st.frozen}
		if begin == nil {
			begin = &now
		}
		return now != *begin
	})
}

// Times for emptying an accept queue.
const (
	quietTime     = 50 * time.Millisecond // without a new connection, after which a queue counts as empty
	handshakeTime = 3 * time.Second       // for TCP handshakes that are in progress, at most
)

// emptyAtMost bounds how many clients are accepted from a queue that keeps filling, on systems that cannot stop new
// handshakes. It is Linux's default net.core.somaxconn.
const emptyAtMost = 4096

// emptyQueue ends accepting without resetting a client. It stops new TCP handshakes, and accepts the clients that are
// in the accept queue or in a handshake. Then run closes the listener.
func (a *acceptor) emptyQueue() {
	if a.ln.Inherited { // the queue belongs to the successor
		a.deregister()
		if a.ln.EmptyQueue {
			a.takeWaiting()
		}
		return
	}
	shut := stopHandshakes(a.ln.Listener) == nil
	a.deregister()
	a.unpark(len(a.parked))
	until := time.Now().Add(a.handshakeTime())
	for taken := 0; shut || taken < emptyAtMost; {
		if !a.awaitFile() {
			return
		}
		a.awaitHandshakes()
		nc, err := a.source.acceptWithin(quietTime)
		switch {
		case err == nil:
			taken++
			a.take(nc)
		case errors.Is(err, os.ErrDeadlineExceeded):
			if !shut || !a.expectsMore(until) {
				return
			}
		case acceptRetryable(err) && !a.late:
			a.backOff(err)
		default:
			return
		}
	}
}

// expectsMore reports whether emptyQueue must still wait for clients: in a handshake or in the accept queue. It looks
// for handshakes first, because one that completes meanwhile is in the queue at the second look.
func (a *acceptor) expectsMore(until time.Time) bool {
	if time.Now().Before(until) && handshakesInProgress(a.ln.Listener) {
		return true
	}
	length, _, ok := acceptQueue(a.ln.Listener)
	return ok && length > 0
}

// takeWaiting accepts the clients that are in the accept queue of an inherited listener now, and leaves later ones to
// the successor.
func (a *acceptor) takeWaiting() {
	waiting, _, ok := acceptQueue(a.ln.Listener)
	if !ok {
		waiting = emptyAtMost
	}
	for ; waiting > 0 && a.awaitFile(); waiting-- {
		a.awaitHandshakes()
		nc, err := a.source.acceptWithin(time.Millisecond)
		if err != nil {
			return
		}
		a.take(nc)
	}
}

// handshakeTime returns how long to wait for TCP handshakes in progress. It is bounded, because clients that connect
// while the filter drops SYNs see a timeout instead of a refusal.
func (a *acceptor) handshakeTime() (d time.Duration) {
	d = handshakeTime
	a.srv.state.With(func(st *state) {
		if st.drain != nil {
			d = min(d, time.Until(st.drain.deadline))
		}
	})
	return d
}

// awaitHandshakes waits until there may be one more handshake, or until the drain is over.
func (a *acceptor) awaitHandshakes() {
	if !a.prepares() {
		return
	}
	for crowded := true; crowded; {
		a.srv.awaitFor(parkInterval, func(st *state) bool {
			crowded = a.srv.crowdedHandshakes(st) && !st.drain.over()
			return !crowded
		})
	}
}

// awaitFile waits until there is a file for one more connection from the queue. It returns false when time is up.
func (a *acceptor) awaitFile() bool {
	for {
		var over bool
		a.srv.state.With(func(st *state) { over = st.drain != nil && (st.drain.forced || st.drain.aborting) })
		switch {
		case over && !a.late:
			return false
		case a.srv.hasFile(a.srv.live().limits.spareFiles()):
			return true
		case a.late:
			return false
		}
		a.sleep(minAcceptBackoff)
	}
}

// deregister records that this listener accepts no new connections. Repeated calls do nothing.
func (a *acceptor) deregister() (last bool) {
	a.srv.state.With(func(st *state) {
		if i := slices.Index(st.acceptors, a); i >= 0 {
			st.acceptors = slices.Delete(st.acceptors, i, i+1)
			st.served = append(st.served[max(0, len(st.served)+1-maxListenersNoted):], a.ln.Listener)
		}
		last = len(st.acceptors) == 0
	})
	return last
}

// isTemporary applies net/http's rule for errors of Accept.
func isTemporary(err error) bool {
	temporary, ok := errors.AsType[interface {
		error
		Temporary() bool
	}](err)
	return ok && temporary.Temporary()
}

// resetOnClose makes the close send an RST and discard what is unsent.
func resetOnClose(nc net.Conn) {
	if tcp, ok := nc.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
}

// keepPath keeps the path of a Unix socket when this process closes its descriptor: the successor uses it.
func (a *acceptor) keepPath() {
	if ln, ok := a.ln.Listener.(interface{ SetUnlinkOnClose(unlink bool) }); ok {
		ln.SetUnlinkOnClose(false)
	}
}

func (s *Server) isHandedOver() (yes bool) {
	s.state.With(func(st *state) { yes = st.handedOver })
	return yes
}
