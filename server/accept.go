package server

import (
	"context"
	"errors"
	"net"
	"os"
	"slices"
	"time"

	"go.uber.org/zap"
)

// Bounds of the backoff after accept(2) failed for lack of descriptors or memory. It ends early when a connection
// closes.
const (
	minAcceptBackoff = 5 * time.Millisecond
	maxAcceptBackoff = 1 * time.Second
)

// An acceptor accepts connections from one listener, and submits each for admission. Its accept loop runs on the
// goroutine that called Serve.
type acceptor struct {
	srv           *Server
	ln            Listener
	source        acceptSource
	handler       Handler
	wrap          WrapConn // nil without WrapConn
	tls           WrapConn // nil without TLS
	baseContext   context.Context
	socketOptions socketOptions // of an inherited listener; its connections keep them
	backoff       time.Duration // 0 unless the last accept failed
	parked        []*Conn       // accepted because the accept queue was full, and not submitted yet; oldest first
	afterStop     bool          // the server had stopped before Serve was called: clients in the queue are rejected

	// Guarded by Server.state.
	interrupted bool   // source.interrupt was called, and source.resume was not called since
	iterations  uint64 // of the accept loop, for Probe
	waiting     bool   // the loop waits for the admission of a connection
	frozen      bool   // the loop has seen that the server is frozen, and does not accept
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
		a.baseContext = s.opts.BaseContext(ln.Listener)
	}
	if ln.Inherited {
		a.socketOptions = readSocketOptions(ln.Listener)
	} else if tcp, ok := ln.Listener.(*net.TCPListener); ok {
		if raw, err := tcp.SyscallConn(); err == nil {
			keepUrgentInline(raw)
		}
	}
	a.interrupted = true // the listener may come with a deadline
	return a
}

// hasHandshake reports whether WrapConn or TLS comes before the admission of a connection.
func (a *acceptor) hasHandshake() bool { return a.wrap != nil || a.tls != nil }

// interrupt makes accept return, also if it is called later, until awaitMayAccept. The caller holds the lock of s.state
// while it changes the state, so the accept loop cannot clear the interrupt before it sees the change.
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

// run accepts connections until the drain begins or the listener is closed. Then it empties the accept queue, unless
// another process has taken over. The error says why accepting failed; nil if it did not.
func (a *acceptor) run() error {
	err := a.loop()
	if err == nil && !a.srv.isHandedOver() {
		a.emptyQueue()
	}
	for nc := range a.source.close() {
		a.submitAccepted(nc)
	}
	a.unpark(len(a.parked))
	return err
}

// loop is the accept loop.
func (a *acceptor) loop() error {
	for a.awaitMayAccept() {
		if a.unpark(1) {
			continue
		}
		nc, err := a.source.accept()
		switch {
		case err == nil:
			a.submitAccepted(nc)
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
		status := a.checkStatus()
		for status != acceptNow && status != acceptStop {
			if status != acceptFrozen {
				a.park()
			}
			a.awaitChange(status)
			status = a.checkStatus()
		}
		if status == acceptNow && a.awaitRate() {
			continue
		}
		if status == acceptStop || a.srv.fileAvailable(0) || a.srv.fileAvailable(a.spareFiles()) {
			return status == acceptNow
		}
		a.backOff(errNoFiles) // another server in this process may have the files
	}
}

// awaitRate waits until Limits.MaxConnRateTotal allows the next client, or the settings or the state change. It reports
// whether it waited.
func (a *acceptor) awaitRate() bool {
	set := a.srv.activeSettings()
	wait := set.rates.untilNext(time.Now())
	if wait == 0 || set.limits.AtLimit == LimitReject {
		return false
	}
	a.srv.awaitFor(wait, func(st *state) bool {
		return a.status(st) != acceptNow || a.srv.activeSettings() != set
	})
	return true
}

// checkStatus returns the status, and records for a handover whether the loop is frozen. It runs once per connection,
// so it must not allocate.
func (a *acceptor) checkStatus() (status acceptStatus) {
	a.srv.state.With(func(st *state) {
		status = a.status(st)
		a.frozen = status == acceptFrozen
	})
	return status
}

// awaitChange waits until the loop may accept, must end, or is no longer in the given status, for parkInterval at most.
func (a *acceptor) awaitChange(from acceptStatus) {
	a.srv.awaitFor(parkInterval, func(st *state) bool { return a.status(st) != from })
}

var errNoFiles = errors.New("the limit on open files is reached")

// spareFiles returns how many of the reserved files the loop may use. At the connection limit these are the files for
// rejected connections; below it, none.
func (a *acceptor) spareFiles() int {
	var full bool
	a.srv.state.With(func(st *state) { full = st.admitted >= a.srv.activeSettings().limits.MaxConns })
	if full {
		return a.srv.activeSettings().limits.spareFiles()
	}
	return 0
}

// acceptStatus says what an accept loop may do.
type acceptStatus int

const (
	acceptNow    acceptStatus = iota + 1 // accept a connection
	acceptLater                          // wait: a pause or a limit is in force
	acceptFrozen                         // wait: a handover has frozen the server
	acceptStop                           // end the loop
)

// status returns what the loop may do now. If it may accept, status clears an interrupt.
func (a *acceptor) status(st *state) acceptStatus {
	a.iterations++
	switch {
	case st.handedOver:
		a.keepSocketPath()
		return acceptStop
	case st.frozen:
		return acceptFrozen
	case st.notAccepting(), a.closing:
		a.emptying = true
		return acceptStop
	case !a.srv.mayAccept(st), a.hasHandshake() && a.srv.handshakesFull(st):
		return acceptLater
	}
	if a.interrupted {
		a.interrupted = false
		a.source.resume() // under the lock: a pause after this interrupts again
	}
	return acceptNow
}

// submitAccepted makes a Conn of an accepted connection, and submits it.
func (a *acceptor) submitAccepted(nc net.Conn) { a.submit(a.newConn(nc), true) }

// newConn makes a Conn. Accepting works again, so it resets the backoff.
func (a *acceptor) newConn(nc net.Conn) *Conn {
	if a.backoff > 0 {
		a.srv.log.Info("accepting again", zap.Stringer("address", a.ln.Addr()))
		a.backoff = 0
	}
	a.socketOptions.apply(nc)
	return newConn(a, nc)
}

// submit adds c to the table if it is new, waits for the decision of admission, and applies it. If c has a handshake
// first, submit starts the goroutine for that, and does not wait.
func (a *acceptor) submit(c *Conn, isNew bool) {
	s := a.srv
	var d decision
	var why, refused Reason
	var oldest *Conn
	submitted := c.flags.has(flagSubmitted) // in the predecessor
	hasHandshake := a.hasHandshake() && !submitted
	if hasHandshake {
		c.flags.set(flagInHandshake)
	} else {
		refused = s.checkAccess(c)
	}
	s.state.With(func(st *state) {
		if isNew {
			st.addConn(c)
		}
		if hasHandshake {
			oldest = s.beginHandshake(st, c)
			return
		}
		if !submitted {
			st.publishOpened(c)
		}
		d, why = s.admit(st, c, refused)
		a.waiting = d == undecided // freeze waits for this
	})
	if isNew {
		s.connState(c, PhaseWaiting)
	}
	if oldest != nil {
		oldest.end(oldest.handshakeReason(), errHandshakeLimit)
	}
	if hasHandshake {
		go c.handshake()
		return
	}
	if d == undecided {
		d, why = s.awaitAdmission(c, refused, &a.waiting)
	}
	s.applyDecision(c, d, why)
}

// applyDecision starts the goroutine that serves, rejects or closes c.
func (s *Server) applyDecision(c *Conn, d decision, why Reason) {
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
		s.notifyIfDraining(c)
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
			c.detach()
		}()
	case undecided:
	}
}

// Bounds of park.
const (
	parkInterval = 250 * time.Millisecond // between two checks of the accept queue
	maxParked    = 4096                   // connections of one listener
)

// park makes room in a full accept queue while the loop must not admit clients. It accepts the oldest clients, and
// closes those that left without sending anything. The others stay parked, and are the first to be admitted. Without
// park, health checks that connect and close during a long pause would fill the queue, and real clients would time
// out. A client that sent something and then half-closed stays parked, because it may still expect an answer.
func (a *acceptor) park() {
	if a.ln.Inherited {
		return
	}
	a.closeGone()
	length, limit, ok := acceptQueue(a.ln.Listener)
	if !ok || length < max(1, limit) {
		return
	}
	for room := max(1, limit/4); room > 0 && len(a.parked) < maxParked && a.srv.fileAvailable(0); room-- {
		nc, err := a.source.acceptWithin(time.Millisecond)
		if err != nil {
			break
		}
		c := a.newConn(nc)
		a.srv.state.With(func(st *state) { st.addConn(c) })
		a.srv.connState(c, PhaseWaiting)
		a.parked = append(a.parked, c)
	}
	a.closeGone()
}

// closeGone closes the parked connections whose clients have left.
func (a *acceptor) closeGone() {
	a.parked = slices.DeleteFunc(a.parked, func(c *Conn) bool {
		if c.closeReason() == 0 && !peerGone(c.sock) {
			return false
		}
		c.end(ReasonClientClosed, ErrConnClosed)
		a.submit(c, false)
		return true
	})
}

// unpark submits up to n parked connections for admission, and reports whether there were any.
func (a *acceptor) unpark(n int) bool {
	n = min(n, len(a.parked))
	for _, c := range a.parked[:n] {
		a.awaitHandshakePlace()
		a.submit(c, false)
	}
	a.parked = slices.Delete(a.parked, 0, n)
	return n > 0
}

// backOff waits before the next attempt to accept. It waits longer after each failure.
func (a *acceptor) backOff(err error) {
	if a.backoff == 0 {
		a.srv.log.Warn("cannot accept, retrying", zap.Stringer("address", a.ln.Addr()), zap.Error(err))
	}
	a.backoff = min(max(2*a.backoff, minAcceptBackoff), maxAcceptBackoff)
	a.sleep(a.backoff)
}

// sleep waits for d, or until a connection closes or the state of the server changes.
func (a *acceptor) sleep(d time.Duration) {
	type moment struct {
		closed int
		phase  State
		over   bool
		frozen bool
	}
	var begin *moment
	a.srv.awaitFor(d, func(st *state) bool {
		now := moment{int(st.accepted) - st.conns.len(), st.lifecycle, st.drain.over(), st.frozen}
		if begin == nil {
			begin = &now
		}
		return now != *begin
	})
}

// Times for emptying an accept queue.
const (
	quietTime     = 50 * time.Millisecond // a queue without a new connection for this long counts as empty
	handshakeTime = 3 * time.Second       // maximum time for TCP handshakes in progress
)

// maxEmptied bounds how many clients emptyQueue accepts on systems that cannot stop new handshakes, where the queue may
// keep filling. It is Linux's default net.core.somaxconn.
const maxEmptied = 4096

// emptyQueue ends accepting without resetting a client. It stops new TCP handshakes, and accepts the clients that are
// in the accept queue or in a handshake. Then run closes the listener.
func (a *acceptor) emptyQueue() {
	if a.ln.Inherited { // the queue belongs to the successor
		a.deregister()
		if a.ln.EmptyQueue {
			a.acceptWaiting()
		}
		return
	}
	shut := stopHandshakes(a.ln.Listener) == nil
	a.deregister()
	a.unpark(len(a.parked))
	until := time.Now().Add(a.handshakeTime())
	for taken := 0; shut || taken < maxEmptied; {
		if !a.awaitFile() {
			return
		}
		a.awaitHandshakePlace()
		nc, err := a.source.acceptWithin(quietTime)
		switch {
		case err == nil:
			taken++
			a.submitAccepted(nc)
		case errors.Is(err, os.ErrDeadlineExceeded):
			if !shut || !a.expectsClients(until) {
				return
			}
		case acceptRetryable(err) && !a.afterStop:
			a.backOff(err)
		default:
			return
		}
	}
}

// expectsClients reports whether emptyQueue must wait for more clients, because there are TCP handshakes in progress or
// clients in the accept queue. It checks handshakes first. A handshake that completes meanwhile is then found in the
// queue.
func (a *acceptor) expectsClients(until time.Time) bool {
	if time.Now().Before(until) && handshakesInProgress(a.ln.Listener) {
		return true
	}
	length, _, ok := acceptQueue(a.ln.Listener)
	return ok && length > 0
}

// acceptWaiting accepts the clients that are now in the accept queue of an inherited listener. It leaves later ones to
// the successor.
func (a *acceptor) acceptWaiting() {
	waiting, _, ok := acceptQueue(a.ln.Listener)
	if !ok {
		waiting = maxEmptied
	}
	for ; waiting > 0 && a.awaitFile(); waiting-- {
		a.awaitHandshakePlace()
		nc, err := a.source.acceptWithin(time.Millisecond)
		if err != nil {
			return
		}
		a.submitAccepted(nc)
	}
}

// handshakeTime returns the maximum time to wait for TCP handshakes in progress. It is short, because a client that
// connects while the filter drops SYNs sees a timeout instead of a refusal.
func (a *acceptor) handshakeTime() (d time.Duration) {
	d = handshakeTime
	a.srv.state.With(func(st *state) {
		if st.drain != nil {
			d = min(d, time.Until(st.drain.deadline))
		}
	})
	return d
}

// awaitHandshakePlace waits until there is a place for one more handshake, or the drain closes the connections.
func (a *acceptor) awaitHandshakePlace() {
	if !a.hasHandshake() {
		return
	}
	for full := true; full; {
		a.srv.awaitFor(parkInterval, func(st *state) bool {
			full = a.srv.handshakesFull(st) && !st.drain.over()
			return !full
		})
	}
}

// awaitFile waits until there is a file for one more connection from the queue. It returns false if the drain leaves no
// time for that.
func (a *acceptor) awaitFile() bool {
	for {
		var over bool
		a.srv.state.With(func(st *state) { over = st.drain != nil && (st.drain.forced || st.drain.aborting) })
		switch {
		case over && !a.afterStop:
			return false
		case a.srv.fileAvailable(a.srv.activeSettings().limits.spareFiles()):
			return true
		case a.afterStop:
			return false
		}
		a.sleep(minAcceptBackoff)
	}
}

// deregister records that this listener accepts no new connections, and reports whether it was the last one. Later
// calls change nothing.
func (a *acceptor) deregister() (last bool) {
	a.srv.state.With(func(st *state) {
		if i := slices.Index(st.acceptors, a); i >= 0 {
			st.acceptors = slices.Delete(st.acceptors, i, i+1)
			st.formerListeners = append(st.formerListeners[max(0, len(st.formerListeners)+1-maxKnownListeners):], a.ln.Listener)
		}
		last = len(st.acceptors) == 0
	})
	return last
}

// isTemporary reports whether Accept may be called again after err, by the rule of net/http.
func isTemporary(err error) bool {
	temporary, ok := errors.AsType[interface {
		error
		Temporary() bool
	}](err)
	return ok && temporary.Temporary()
}

// keepSocketPath makes Close leave the file of a Unix socket, because the successor uses it.
func (a *acceptor) keepSocketPath() {
	if ln, ok := a.ln.Listener.(interface{ SetUnlinkOnClose(unlink bool) }); ok {
		ln.SetUnlinkOnClose(false)
	}
}
