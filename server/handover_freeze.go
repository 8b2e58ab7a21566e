package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"
)

// The connections' side of a handover: handlers reach their safe points, connections are frozen, and a rollback resumes
// them.

// Handover returns the error that ServeConn of a Resumer returns at its safe point. state may be nil, and has at most
// 1 MiB.
func Handover(state []byte) error { return &handoverError{state} }

type handoverError struct{ state []byte }

func (e *handoverError) Error() string { return ErrHandover.Error() }

// handoverState returns the state in an error of Handover; ok is false for any other error.
func handoverState(err error) (state []byte, ok bool) {
	if err == nil {
		return nil, false
	}
	e, ok := errors.AsType[*handoverError](err)
	if !ok {
		return nil, false
	}
	return e.state, true
}

// safePointCount counts the interrupted connections that have reached their safe point or have ended.
type safePointCount struct {
	total  int
	echoes int // those of Echo
}

// connHandover is the state of a connection in a handover.
type connHandover struct {
	signal          chan struct{} // closed when the handover begins; nil until the handler calls HandingOver
	atSafePoint     bool          // the handler has returned Handover
	state           []byte        // the argument of Handover
	stateTooLarge   bool          // the handler has returned more than maxHandlerState
	noticeBlocked   bool          // finishMessage waits for the client to read a notice
	noticeSuspended bool          // the handover has interrupted finishMessage, which waits for the outcome
	unsentNotices   []byte        // bytes of notices that the next owner sends first
}

// HandingOver returns a channel that is closed when the server wants to hand the connection over to another process.
// The handler should reach its safe point and return Handover(state) within HandoverOptions.SafePointTimeout, which
// is usually 50 ms. Otherwise this process keeps the connection.
func (c *Conn) HandingOver() (signal <-chan struct{}) {
	c.closing.With(func(cl *closingState) {
		h := &cl.ensureRare().handover
		if h.signal == nil {
			h.signal = make(chan struct{})
			if c.flags.has(flagHandingOver) {
				close(h.signal)
			}
		}
		signal = h.signal
	})
	return signal
}

// finalState is the state that the predecessor sends during the freeze.
type finalState struct {
	conns   []*Conn // the connections that are handed over
	message handoverMessage
}

// freeze stops accepting, waits until each handler is at its safe point, freezes the connections, and collects what has
// changed since copyAhead.
func (p *predecessor) freeze() (final finalState, err error) {
	s := p.s
	s.state.With(func(st *state) {
		if st.drain != nil {
			err = &DrainingError{Deadline: st.drain.deadline}
			return
		}
		st.frozen = true
		st.interruptAcceptors()
	})
	if err != nil {
		return final, err
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), p.opts.FreezeTimeout/2, errWaitTimeout)
	defer cancel()
	if err := s.state.Await(ctx, func(st *state) bool {
		return !st.scheduleBusy && !slices.ContainsFunc(st.acceptors, func(a *acceptor) bool { return !a.frozen && !a.waiting })
	}); err != nil {
		return final, fmt.Errorf("waiting until accepting and notices stop: %w", err)
	}

	p.kept = make(map[*Conn]string)
	var serving []*Conn
	for _, c := range s.openConns() {
		switch why := p.keepReason(c); {
		case why != "":
			p.kept[c] = why
		case Phase(c.phase.Load()) == PhaseWaiting:
			if c.freezeWaiting() {
				final.conns = append(final.conns, c)
			} else {
				p.kept[c] = "closing"
			}
		case c.acceptor.handler == Echo && c.freezeEcho():
			final.conns = append(final.conns, c)
		default:
			serving = append(serving, c)
			c.interruptForHandover()
		}
	}
	p.awaitSafePoints(serving)
	ctx, cancel = context.WithTimeoutCause(context.Background(), p.opts.SafePointTimeout, errWaitTimeout)
	defer cancel()
	for _, c := range serving {
		if why := p.freezeAtSafePoint(ctx, c); why != "" {
			p.kept[c] = why
		} else {
			final.conns = append(final.conns, c)
		}
	}
	final.message = p.finalMessage(final.conns)
	return final, nil
}

// interruptForHandover asks the handler to reach its safe point. When the handler has reached it, or the connection has
// ended, countSafePoint is called once.
func (c *Conn) interruptForHandover() {
	c.closing.With(func(cl *closingState) {
		h := &cl.ensureRare().handover
		c.flags.set(flagHandingOver)
		if cl.reason == 0 {
			c.flags.set(flagSafePointPending)
		}
		if h.signal != nil {
			close(h.signal)
		}
		if cl.cause != nil {
			return
		}
		if c.flags.has(flagEchoing) {
			_ = c.nc.SetReadDeadline(aLongTimeAgo)
			_ = c.nc.SetWriteDeadline(aLongTimeAgo)
			return
		}
		if c.idle.CompareAndSwap(idleMarked, idleHandover) {
			_ = c.nc.SetReadDeadline(aLongTimeAgo)
		}
		if h.noticeBlocked {
			_ = c.nc.SetWriteDeadline(aLongTimeAgo)
		}
	})
}

// clearSafePointPending clears the flag, and reports whether it was set. The caller holds the lock of c.closing. If the
// flag was set, the caller calls countSafePoint after it has released the lock.
func (c *Conn) clearSafePointPending() (wasPending bool) {
	if wasPending = c.flags.has(flagSafePointPending); wasPending {
		c.flags.clear(flagSafePointPending)
	}
	return wasPending
}

// countSafePoint tells the handover in progress that c is at its safe point or has ended.
func (s *Server) countSafePoint(c *Conn) {
	s.updateSafePoints(func(n *safePointCount) {
		n.total++
		if c.acceptor.handler == Echo {
			n.echoes++
		}
	})
}

// wakeHandover makes the handover in progress check again whether connections can be frozen.
func (s *Server) wakeHandover() { s.updateSafePoints(func(*safePointCount) {}) }

// updateSafePoints calls f with the count of the handover in progress, if there is one.
func (s *Server) updateSafePoints(f func(*safePointCount)) {
	var h *handover
	s.state.With(func(st *state) { h = st.handover })
	if h != nil {
		h.safePoints.With(f)
	}
}

// awaitSafePoints waits until the handlers are at their safe points, for SafePointTimeout at most. It waits longer for
// echoes, half of FreezeTimeout, because an echo can stop anywhere and only a lack of CPU time delays it.
func (p *predecessor) awaitSafePoints(serving []*Conn) {
	echoes := 0
	for _, c := range serving {
		if c.acceptor.handler == Echo {
			echoes++
		}
	}
	wait := func(d time.Duration, done func(n *safePointCount) bool) {
		ctx, cancel := context.WithTimeoutCause(context.Background(), d, errWaitTimeout)
		defer cancel()
		_ = p.h.safePoints.Await(ctx, done)
	}
	wait(p.opts.SafePointTimeout, func(n *safePointCount) bool { return n.total >= len(serving) })
	wait(p.opts.FreezeTimeout/2, func(n *safePointCount) bool { return n.echoes >= echoes })
}

// freezeWaiting freezes a connection that is not admitted yet. It reports false if the connection has ended.
func (c *Conn) freezeWaiting() (frozen bool) {
	c.closing.With(func(cl *closingState) {
		if frozen = cl.reason == 0; frozen {
			c.flags.set(flagFrozen)
		}
	})
	return frozen
}

// freezeEcho freezes an echo that waits for its client, without waking its goroutine. It reports false if the echo does
// not wait.
func (c *Conn) freezeEcho() (frozen bool) {
	if c.echoToken.Load() != tokenFree || !c.writeLock.TryLock() {
		return false
	}
	c.closing.With(func(cl *closingState) {
		frozen = cl.reason == 0 && cl.cause == nil && c.echoToken.CompareAndSwap(tokenFree, tokenHandover)
		if frozen {
			c.flags.set(flagFrozen)
		}
	})
	if !frozen {
		c.unlockWrite()
		return false
	}
	c.writeHeld = true
	c.renderQueued()
	return true
}

// freezeAtSafePoint freezes a connection whose handler is at its safe point. It waits until ctx ends for a write in
// progress, such as the interrupted write of a notice. If the connection cannot be frozen, it returns the reason.
func (p *predecessor) freezeAtSafePoint(ctx context.Context, c *Conn) (why string) {
	var locked, suspended bool
	_ = p.h.safePoints.Await(ctx, func(*safePointCount) bool {
		c.closing.With(func(cl *closingState) {
			switch h := &cl.ensureRare().handover; {
			case cl.reason != 0:
				why = "closing"
			case h.stateTooLarge, p.totalState+len(h.state)+len(h.unsentNotices) > maxTotalState:
				why = "handler state is too large"
			case !h.atSafePoint:
				why = "handler did not reach its safe point"
			default:
				why, suspended = "", h.noticeSuspended
			}
		})
		if why == "" && !suspended {
			locked = c.writeLock.TryLock()
		}
		return why != "" || suspended || locked
	})
	if why == "" && !suspended && !locked {
		why = "write in progress"
	}
	if why != "" {
		return why
	}
	c.closing.With(func(cl *closingState) {
		if cl.reason != 0 {
			why = "closing"
			return
		}
		c.flags.set(flagFrozen)
		p.totalState += len(cl.rare.handover.state) + len(cl.rare.handover.unsentNotices)
		if !c.flags.has(flagEchoing) {
			_ = c.nc.SetReadDeadline(aLongTimeAgo) // so that no goroutine of the handler reads input that belongs to the successor
		}
	})
	switch {
	case why == "":
		c.writeHeld = locked
		c.renderQueued()
	case locked:
		c.unlockWrite()
	}
	return why
}

// renderQueued moves the queued messages to unsentNotices. The caller makes sure that nothing else writes.
func (c *Conn) renderQueued() {
	for m := c.nextMessage(); m != nil; m = c.nextMessage() {
		text := c.render(m)
		if len(text) == 0 {
			m.done(messageSilent)
			continue
		}
		c.closing.With(func(cl *closingState) {
			h := &cl.ensureRare().handover
			h.unsentNotices = append(h.unsentNotices, text...)
		})
		c.lastByte = text[len(text)-1]
		m.done(messageSent)
	}
}

// suspendNotice waits for the outcome of the handover that has interrupted the write of a notice; rest is the part that
// was not written. The caller keeps the write lock. If this process keeps the connection, suspendNotice returns the
// bytes to send.
func (c *Conn) suspendNotice(rest []byte) (unsent []byte, handedOver bool) {
	c.closing.With(func(cl *closingState) {
		h := &cl.ensureRare().handover
		h.unsentNotices, h.noticeSuspended = slices.Clone(rest), true
	})
	c.srv.wakeHandover()
	for again := true; again; {
		var h *handover
		c.srv.state.With(func(st *state) { h = st.handover })
		if h != nil {
			<-h.outcome
		}
		if c.flags.has(flagFrozen) {
			return nil, true
		}
		c.closing.With(func(cl *closingState) {
			if again = c.flags.has(flagHandingOver); again {
				return // interrupted by the next handover
			}
			h := &cl.rare.handover
			unsent, h.unsentNotices, h.noticeSuspended = h.unsentNotices, nil, false
		})
	}
	return unsent, false
}

// reachSafePoint records that the handler is at its safe point, with its state. It reports false if there is no outcome
// to wait for: the connection has ended, or the handover is over.
func (c *Conn) reachSafePoint(saved []byte) (recorded bool) {
	fits := len(saved) <= maxHandlerState
	if !fits {
		c.srv.log.Warn("handler state is too large to be handed over", zap.Uint64("conn", c.id),
			zap.Int("bytes", len(saved)))
	}
	var pending bool
	c.closing.With(func(cl *closingState) {
		if recorded = c.flags.has(flagHandingOver) && cl.reason == 0; recorded {
			h := &cl.ensureRare().handover
			if h.atSafePoint, h.stateTooLarge = fits, !fits; fits {
				h.state = saved
			}
		} else if cl.reason != 0 { // or the handler would return Handover again and again until the freeze ends
			c.flags.clear(flagHandingOver)
			if cl.rare != nil {
				cl.rare.handover.signal = nil
			}
		}
		pending = c.clearSafePointPending()
	})
	if pending {
		c.srv.countSafePoint(c)
	}
	return recorded
}

// awaitHandover waits for the outcome of the handover after the handler has returned Handover(saved). If this process
// keeps the connection, awaitHandover resumes the handler and returns its error. It is called on the connection's
// goroutine.
func (c *Conn) awaitHandover(saved []byte) (handedOver bool, err error) {
	resumer, ok := c.acceptor.handler.(Resumer)
	if !ok {
		return false, errNotResumer
	}
	for ok {
		var h *handover
		c.srv.state.With(func(st *state) { h = st.handover })
		if h != nil && (c.flags.has(flagFrozen) || c.reachSafePoint(saved)) {
			<-h.outcome
			if c.flags.has(flagFrozen) {
				return true, nil
			}
		}
		err = resumer.ResumeConn((*connContext)(c), c, saved)
		saved, ok = handoverState(err)
	}
	return false, err
}

var errNotResumer = errors.New("the handler returned Handover but is not a Resumer")

// resumeAfterHandover undoes the freeze of a connection. The caller then closes handover.outcome, so that goroutines
// waiting for it continue.
func (c *Conn) resumeAfterHandover() {
	var unsent []byte
	c.closing.With(func(cl *closingState) {
		interrupted := c.flags.has(flagHandingOver)
		c.flags.clear(flagHandingOver | flagSafePointPending | flagFrozen)
		c.echoToken.CompareAndSwap(tokenHandover, tokenFree)
		if cl.rare == nil {
			return
		}
		h := &cl.rare.handover
		if !h.noticeSuspended {
			unsent, h.unsentNotices = h.unsentNotices, nil // otherwise suspendNotice returns it
		}
		h.atSafePoint, h.stateTooLarge, h.state = false, false, nil
		if !interrupted {
			return
		}
		h.signal = nil
		if cl.cause != nil {
			return
		}
		// A Read that is being interrupted resets the deadline itself.
		if idle := c.idle.Load(); idle != idleHandover && idle != idleInterrupted {
			_ = c.nc.SetReadDeadline(cl.rare.readDeadline)
		}
		if c.flags.has(flagEchoing) || h.noticeBlocked {
			_ = c.nc.SetWriteDeadline(time.Time{})
		}
	})
	if !c.writeHeld {
		c.sendQueued()
		return
	}
	c.writeHeld = false
	if len(unsent) == 0 {
		c.unlockWrite()
		return
	}
	c.srv.startTask()
	go c.finishMessage(&message{done: func(messageResult) {}}, unsent)
}

// detach releases a connection that another process serves now, except its descriptor. closeHandedOver closes that.
func (c *Conn) detach() {
	c.closeMessages()
	c.closing.With(func(cl *closingState) {
		if cl.ctx != nil {
			cl.ctx.cancel(ErrHandover)
		}
	})
}

// AwaitOwner waits while the server is frozen by HandOver, because changes during a freeze would not reach the
// successor. It returns ErrHandedOver if the successor serves after that. Figures, such as a Status, that were read
// before AwaitOwner returned nil are those of the process that serves.
func (s *Server) AwaitOwner() error {
	var handedOver bool
	_ = s.state.Await(context.Background(), func(st *state) bool {
		handedOver = st.handedOver
		return handedOver || !st.frozen
	})
	if handedOver {
		return ErrHandedOver
	}
	return nil
}
