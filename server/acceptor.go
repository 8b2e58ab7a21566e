package server

import (
	"context"
	"errors"
	"net"
	"slices"
	"time"

	"go.uber.org/zap"
)

// Backoff when the process or the system is out of something that accept(2) needs. Retrying is also
// prompted by each connection that closes.
const (
	minAcceptBackoff = 5 * time.Millisecond
	maxAcceptBackoff = 1 * time.Second
)

// An acceptor takes connections from one listener to the gate. It runs on Serve's goroutine.
type acceptor struct {
	srv       *Server
	ln        net.Listener
	waker     interface{ SetDeadline(time.Time) error } // nil when ln cannot be woken but by closing it
	inherited bool
	backoff   time.Duration // zero while accepting works

	// Guarded by the lock of Server.book.
	roused bool   // Accept is kept from blocking
	laps   uint64 // how often the loop has come round
	atGate bool   // it waits with a connection at the gate
}

func newAcceptor(s *Server, ln net.Listener) *acceptor {
	a := &acceptor{srv: s, ln: ln}
	if in, ok := ln.(inheritedListener); ok {
		a.inherited, a.ln = true, in.Listener
	}
	a.waker, _ = a.ln.(interface{ SetDeadline(time.Time) error })
	a.roused = a.waker != nil // it may come with a deadline
	return a
}

// longAgo as a deadline makes a blocked Accept return at once.
var longAgo = time.Unix(1, 0)

// wake makes a blocked Accept return, and every one after it until the next clearance. Called
// under the lock of the book, so that it cannot be undone by a clearance that did not know of its cause.
func (a *acceptor) wake(l *ledger) {
	switch {
	case a.waker != nil:
		a.roused = true
		_ = a.waker.SetDeadline(longAgo)
	case l.closing():
		_ = a.ln.Close()
	}
}

func (l *ledger) wakeAcceptors() {
	for _, a := range l.acceptors {
		a.wake(l)
	}
}

// run accepts until the drain, and then empties the queue. A non-nil error is why it had to end before.
func (a *acceptor) run() error {
	defer a.leave()
	defer a.ln.Close()
	for a.awaitClearance() {
		nc, err := a.ln.Accept()
		switch {
		case err == nil:
			a.take(nc)
		case a.woken(err):
		case acceptRetryable(err):
			a.backOff(err)
		default:
			if a.srv.isClosing() {
				return nil // closed by wake
			}
			return err
		}
	}
	a.empty()
	return nil
}

func (a *acceptor) woken(err error) bool {
	ne, ok := errors.AsType[net.Error](err)
	return ok && ne.Timeout()
}

// awaitClearance waits until accepting leads somewhere. False means that a drain lets nobody in.
func (a *acceptor) awaitClearance() bool {
	var clear, draining bool
	a.srv.book.With(func(l *ledger) { clear, draining = a.clearance(l) })
	if clear || draining { // mostly so, and then no waiter is made
		return clear
	}
	return a.awaitChange()
}

func (a *acceptor) awaitChange() (clear bool) {
	var draining bool
	_ = a.srv.book.Await(context.Background(), func(l *ledger) bool {
		clear, draining = a.clearance(l)
		return clear || draining
	})
	return clear
}

// clearance says whether accepting leads somewhere, and if so lets Accept block again.
func (a *acceptor) clearance(l *ledger) (clear, draining bool) {
	a.laps++
	switch {
	case l.closing():
		return false, true
	case !a.srv.mayAccept(l):
		return false, false
	}
	if a.roused {
		a.roused = false
		_ = a.waker.SetDeadline(time.Time{}) // under the lock: a pause after this wakes Accept
	}
	return true, false
}

// take puts an accepted connection on the books and waits with it, unserved, until the gate has judged it.
func (a *acceptor) take(nc net.Conn) {
	s := a.srv
	if a.backoff > 0 {
		s.log.Info("accepting again", zap.Stringer("address", a.ln.Addr()))
		a.backoff = 0
	}
	c := newConn(s, nc)
	var v verdict
	var why Reason
	unknown := s.opts.Identify != nil
	s.book.With(func(l *ledger) {
		l.open(c)
		if unknown {
			l.identifying++
			l.tasks++
			return
		}
		l.announceOpened(c)
		v, why = s.judge(l, c)
	})
	switch {
	case unknown:
		go a.enterIdentified(c)
		return
	case v == wait:
		v, why = s.awaitVerdict(c, &a.atGate)
	}
	s.enter(c, v, why)
}

// enter does with a connection what the gate has said of it.
func (s *Server) enter(c *Conn, v verdict, why Reason) {
	switch v {
	case admit:
		if entry := s.log.Check(zap.InfoLevel, "connection opened"); entry != nil { // mostly sampled away under load
			entry.Write(zap.Uint64("conn", c.id), zap.Stringer("remote", c.RemoteAddr()))
		}
		s.tellIfDraining(c)
		go c.serve()
	case refuse:
		go c.refuse(why)
	case dismiss:
		go c.dismiss(why)
	case gone:
		go c.depart()
	case wait:
	}
}

// backOff waits before accepting is tried again, longer each time.
func (a *acceptor) backOff(err error) {
	if a.backoff == 0 {
		a.srv.log.Warn("accepting is held up", zap.Stringer("address", a.ln.Addr()), zap.Error(err))
	}
	a.backoff = min(max(2*a.backoff, minAcceptBackoff), maxAcceptBackoff)
	a.sleep(a.backoff)
}

// sleep waits for d, or until a connection has closed or the drain has changed.
func (a *acceptor) sleep(d time.Duration) {
	ctx, cancel := context.WithTimeoutCause(context.Background(), d, errBackoffOver)
	defer cancel()
	var first bool
	var closed, state int
	_ = a.srv.book.Await(ctx, func(l *ledger) bool {
		c, st := int(l.accepted)-l.conns.len(), int(l.state)
		if !first {
			first, closed, state = true, c, st
		}
		return c != closed || st != state || l.drain.over()
	})
}

var errBackoffOver = errors.New("backoff over")

// handshakeWait is how long a drain waits for handshakes under way, whose clients believe themselves
// connected: the round trip of a near network. Nothing else prolongs it, since new ones are dropped.
const handshakeWait = 50 * time.Millisecond

// emptyAtMost bounds what a drain takes from a queue that goes on filling because the system
// cannot keep new handshakes out: Linux's default net.core.somaxconn.
const emptyAtMost = 4096

// empty ends accepting so that nobody is reset: no new handshake is let in, those who already are in
// the accept queue are taken to the gate, and only then run closes the listener.
func (a *acceptor) empty() {
	if a.inherited || a.waker == nil {
		return // the queue is the successor's; or it cannot be looked at
	}
	shut := dropHandshakes(a.ln) == nil
	for taken := 0; shut || taken < emptyAtMost; {
		if !a.awaitRoom() {
			return
		}
		_ = a.waker.SetDeadline(time.Now().Add(handshakeWait))
		nc, err := a.ln.Accept()
		switch {
		case err == nil:
			taken++
			a.take(nc)
		case a.woken(err):
			return // empty
		case acceptRetryable(err):
			a.stopped() // notices need not wait until files are free again
			a.backOff(err)
		default:
			return
		}
	}
}

// awaitRoom waits until one more from the queue leaves files for others. False means that the drain is over.
func (a *acceptor) awaitRoom() bool {
	var over bool
	_ = a.srv.book.Await(context.Background(), func(l *ledger) bool {
		over = l.drain.over()
		return over || !a.srv.crowded(l)
	})
	return !over
}

// stopped books, once, that this listener lets nobody new in.
func (a *acceptor) stopped() {
	a.srv.book.With(func(l *ledger) {
		if i := slices.Index(l.acceptors, a); i >= 0 {
			l.acceptors = slices.Delete(l.acceptors, i, i+1)
		}
	})
}

func (a *acceptor) leave() {
	a.stopped()
	a.srv.endTask()
}
