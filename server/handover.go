package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"net"
	"os"
	"slices"
	"time"

	"go.uber.org/zap"
)

// Bounds of a handover. The freeze is what clients can notice.
const (
	DefaultFreezeTimeout    = 500 * time.Millisecond
	DefaultSafePointTimeout = 50 * time.Millisecond

	commitTimeout   = 5 * time.Second
	maxHandlerState = 1 << 20 // bytes of one handler's state
	copyRounds      = 8       // of sending descriptors ahead; each sends the connections opened during the last
)

// Errors of a handover.
var (
	// ErrHandoverInProgress means that another handover of the same server is in progress.
	ErrHandoverInProgress = errors.New("a handover is in progress")
	// ErrHandoverFormat means that the two processes do not speak the same format.
	ErrHandoverFormat = errors.New("the handover format is not supported")
	// ErrHandedOver means that the server was handed over: the successor has the holds, and answers what is asked now.
	ErrHandedOver = errors.New("the server was handed over")
	// ErrNoPredecessor means that the server was not taken over, or that the process that handed over has ended.
	ErrNoPredecessor = errors.New("there is no predecessor")
)

// HandoverOptions configures HandOver.
type HandoverOptions struct {
	// Program names the program and its version, for the successor's log.
	Program string
	// Data is passed to the successor unchanged, for example settings.
	Data []byte
	// Extra has further listeners to pass to the successor by name, such as that of a control plane. The server does
	// not use them.
	Extra map[string]net.Listener
	// Kill ends the successor. The server calls it if the successor does not acknowledge the commit in time, and then
	// continues to serve. So the successor must have ended when Kill returns. Kill is required.
	Kill func()
	// Committed, when not nil, is called once the successor is the owner, before this server drains the connections
	// that it keeps.
	Committed func()
	// FreezeTimeout bounds the time in which no connection is served, from the freeze to the successor's acknowledgement.
	// After it the handover is rolled back. Zero means DefaultFreezeTimeout.
	FreezeTimeout time.Duration
	// SafePointTimeout is the part of FreezeTimeout that handlers have to reach their safe point. Zero means
	// DefaultSafePointTimeout.
	SafePointTimeout time.Duration
	// Keep is the time for which this server serves the connections that it cannot hand over, before it drains them.
	// Zero means that it drains them at once.
	Keep time.Duration
	// Drain configures the drain of those connections. Zero fields mean those of Options.Drain.
	Drain DrainOptions
}

// HandoverReport sums up a handover.
type HandoverReport struct {
	HandedOver int            // connections that the successor serves now
	Behind     map[string]int // connections that stayed with the predecessor, by why
	Frozen     time.Duration  // from the freeze to the commit
	Took       time.Duration
}

// Handover is what ServeConn of a Resumer returns at its safe point. state is at most 1 MiB; it may be nil.
func Handover(state []byte) error { return &handoverError{state} }

type handoverError struct{ state []byte }

func (e *handoverError) Error() string { return ErrHandover.Error() }

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

// handover is the predecessor's side of a handover in progress.
type handover struct {
	settled  awaited[settled]
	outcome  chan struct{}           // closed at the end
	cancel   context.CancelCauseFunc // ends it, unless it has committed
	deferred []deferredDrain         // guarded by Server.state
}

// settled counts the connections that were interrupted, and are at their safe point or end.
type settled struct{ all, echoes int }

// connHandover is a connection's part in a handover.
type connHandover struct {
	signal    chan struct{} // of HandingOver; nil until the handler asks for it
	parked    bool          // the handler has returned Handover
	state     []byte        // and this is its state
	finishing bool          // a goroutine waits for the client to take a notice
	stopped   bool          // it was interrupted, and waits for the outcome
	unsent    []byte        // what is left of notices
}

// HandingOver returns a channel that is closed when the connection is to be handed over to another process: the handler
// should reach its safe point, and return Handover(state), within 50 ms. Otherwise the connection stays behind.
func (c *Conn) HandingOver() (signal <-chan struct{}) {
	c.closing.With(func(cl *closingState) {
		h := &cl.extra().handover
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

// interruptForHandover asks the handler to reach its safe point. countSettled is called when it has, or when the
// connection ends.
func (c *Conn) interruptForHandover() {
	c.closing.With(func(cl *closingState) {
		h := &cl.extra().handover
		c.flags.set(flagHandingOver)
		if cl.reason == 0 {
			c.flags.set(flagAwaited)
		}
		if h.signal != nil {
			close(h.signal)
		}
		if cl.cause != nil {
			return
		}
		if c.flags.has(flagEchoing) {
			_ = c.nc.SetReadDeadline(longAgo)
			_ = c.nc.SetWriteDeadline(longAgo)
			return
		}
		if c.idle.CompareAndSwap(idleMarked, idleHandover) {
			_ = c.nc.SetReadDeadline(longAgo)
		}
		if h.finishing {
			_ = c.nc.SetWriteDeadline(longAgo)
		}
	})
}

// endAwaited reports, once, that the handover need no longer wait for the connection. Then the caller, which holds the
// lock of c.closing, calls countSettled without it.
func (c *Conn) endAwaited() (awaited bool) {
	if awaited = c.flags.has(flagAwaited); awaited {
		c.flags.clear(flagAwaited)
	}
	return awaited
}

func (s *Server) countSettled(c *Conn) {
	s.changeSettled(func(n *settled) {
		n.all++
		if c.from.handler == Echo {
			n.echoes++
		}
	})
}

// wakeHandover makes a handover look again whether a connection can be frozen.
func (s *Server) wakeHandover() { s.changeSettled(func(*settled) {}) }

func (s *Server) changeSettled(f func(*settled)) {
	var h *handover
	s.state.With(func(st *state) { h = st.handover })
	if h != nil {
		h.settled.With(f)
	}
}

// freezeEcho freezes the state of an echo that waits for its client, without waking it.
func (c *Conn) freezeEcho() (frozen bool) {
	if c.turn.Load() != turnFree || !c.writeLock.TryLock() {
		return false
	}
	c.closing.With(func(cl *closingState) {
		frozen = cl.reason == 0 && cl.cause == nil && c.turn.CompareAndSwap(turnFree, turnFrozen)
		if frozen {
			c.flags.set(flagSent)
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

// resumeAfterHandover undoes the freeze of a connection. Goroutines that wait for the outcome continue after it.
func (c *Conn) resumeAfterHandover() {
	var unsent []byte
	c.closing.With(func(cl *closingState) {
		interrupted := c.flags.has(flagHandingOver)
		c.flags.clear(flagHandingOver | flagAwaited | flagSent)
		c.turn.CompareAndSwap(turnFrozen, turnFree)
		if cl.rare == nil {
			return
		}
		h := &cl.rare.handover
		if !h.stopped {
			unsent, h.unsent = h.unsent, nil // otherwise its goroutine sends it
		}
		h.parked, h.state = false, nil
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
		if c.flags.has(flagEchoing) || h.finishing {
			_ = c.nc.SetWriteDeadline(time.Time{})
		}
	})
	if !c.writeHeld {
		c.deliver()
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

// awaitHandover is called on the goroutine of a connection whose handler returned Handover. It waits for the outcome.
// If the connection stays here, it resumes the handler, and returns its error.
func (c *Conn) awaitHandover(saved []byte) (handedOver bool, err error) {
	resumer, ok := c.from.handler.(Resumer)
	if !ok {
		return false, errNotResumer
	}
	for ok {
		var h *handover
		c.srv.state.With(func(st *state) { h = st.handover })
		if h != nil && (c.flags.has(flagSent) || c.park(saved)) {
			<-h.outcome
			if c.flags.has(flagSent) {
				return true, nil
			}
		}
		err = resumer.ResumeConn((*connContext)(c), c, saved)
		saved, ok = handoverState(err)
	}
	return false, err
}

// park records that the handler is at its safe point. It reports false if the handover no longer waits for it.
func (c *Conn) park(saved []byte) (parked bool) {
	fits := len(saved) <= maxHandlerState
	if !fits {
		c.srv.log.Warn("handler state is too large to be handed over", zap.Uint64("conn", c.id),
			zap.Int("bytes", len(saved)))
	}
	var awaited bool
	c.closing.With(func(cl *closingState) {
		if parked = fits && c.flags.has(flagHandingOver) && cl.reason == 0; parked {
			h := &cl.extra().handover
			h.parked, h.state = true, saved
		}
		awaited = c.endAwaited()
	})
	if awaited {
		c.srv.countSettled(c)
	}
	return parked
}

var errNotResumer = errors.New("the handler returned Handover and has no ResumeConn")

// release ends this process's part in a connection that another process serves now. The predecessor closes the
// descriptor.
func (c *Conn) release() {
	c.closeMessages()
	c.closing.With(func(cl *closingState) {
		if cl.ctx != nil {
			cl.ctx.cancel(ErrHandover)
		}
	})
}

// HandOver passes the server's listeners, connections, holds and counters over link to another process, in which
// TakeOver receives them. Connections are served until the freeze, which lasts at most half a second; then the
// successor serves them. Until the successor has acknowledged the commit, any failure leaves everything as it was,
// and the error says why. After that HandOver returns a report and no error; the server drains what stayed behind and
// stops.
//
// Connections whose handler is no Resumer or does not reach its safe point, and those with a stream on top of their
// socket such as TLS, stay behind. The error is a *DrainingError if the server drains, and ErrHandoverInProgress if
// another handover is in progress. HandOver closes link, on success when the last connection that stayed behind has
// ended.
func (s *Server) HandOver(ctx context.Context, link Link, o HandoverOptions) (report HandoverReport, err error) {
	began := time.Now()
	if s.log == nil {
		return report, errNotNew
	}
	if o.Kill == nil {
		return report, errors.New("handing over: HandoverOptions.Kill is nil")
	}
	o.FreezeTimeout = cmp.Or(o.FreezeTimeout, DefaultFreezeTimeout)
	o.SafePointTimeout = cmp.Or(o.SafePointTimeout, DefaultSafePointTimeout)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	h := &handover{outcome: make(chan struct{}), cancel: cancel}
	if err := s.beginHandover(h); err != nil {
		return report, err
	}
	p := &predecessor{s: s, h: h, link: link, o: o, copied: make(map[uint64]uint64), seed: maphash.MakeSeed()}
	p.stop = context.AfterFunc(ctx, func() { _ = link.SetDeadline(longAgo) })
	defer p.stop()
	if err = p.run(ctx); err != nil {
		s.rollBack(h)
		_ = link.Close()
		if cause := context.Cause(ctx); cause != nil {
			err = fmt.Errorf("%w: %w", cause, err)
		}
		s.log.Warn("handover rolled back", zap.Error(err))
		return report, fmt.Errorf("handing over: %w", err)
	}
	report = p.report
	report.Took = time.Since(began)
	s.log.Info("handed over", zap.Int("connections", report.HandedOver), zap.Any("behind", report.Behind),
		zap.Duration("frozen", report.Frozen), zap.Duration("took", report.Took))
	return report, nil
}

func (s *Server) beginHandover(h *handover) (err error) {
	s.state.With(func(st *state) {
		switch {
		case st.drain != nil:
			err = &DrainingError{Deadline: st.drain.deadline}
		case st.handover != nil:
			err = ErrHandoverInProgress
		default:
			st.handover = h
		}
	})
	return err
}

// rollBack lets the server continue as before the handover.
func (s *Server) rollBack(h *handover) {
	var conns []*Conn
	s.state.With(func(st *state) { conns = st.conns.all() })
	for _, c := range conns {
		c.resumeAfterHandover()
	}
	var deferred []deferredDrain
	s.state.With(func(st *state) {
		st.handover, st.frozen, st.committing, st.recordEnds, st.ends = nil, false, false, false, nil
		unpublished := st.unpublished
		st.unpublished = nil
		for _, e := range unpublished {
			st.publish(e)
		}
		deferred, h.deferred = h.deferred, nil
		close(h.outcome)
		s.wakeSchedule()
	})
	for _, d := range deferred {
		s.changeDrain(d.plan, d.o, d.mode)
	}
}

// deferredDrain is a drain that was asked for during the freeze.
type deferredDrain struct {
	plan drainPlan
	o    DrainOptions
	mode drainMode
}

// predecessor is the sending side of a handover.
type predecessor struct {
	s      *Server
	h      *handover
	link   Link
	o      HandoverOptions
	stop   func() bool // the end of the context no longer ends the handover
	report HandoverReport

	acceptors []*acceptor
	seed      maphash.Seed
	copied    map[uint64]uint64 // the hash of the last record that was sent, by the connection's id
	recent    int               // how many closed connections were sent
	record    []byte            // space for one
	behind    map[*Conn]string  // connections that stay, and why
}

func (p *predecessor) run(ctx context.Context) error {
	if err := p.offer(); err != nil {
		return fmt.Errorf("offering: %w", err)
	}
	if err := p.await(msgReady); err != nil {
		return fmt.Errorf("waiting until the successor is ready: %w", err)
	}
	if err := p.copyAhead(ctx); err != nil {
		return fmt.Errorf("copying ahead: %w", err)
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	frozen := time.Now()
	if err := p.link.SetDeadline(frozen.Add(p.o.FreezeTimeout)); err != nil {
		return err
	}
	final, err := p.freeze()
	if err != nil {
		return fmt.Errorf("freezing: %w", err)
	}
	if err := p.sendFinal(final); err != nil {
		return fmt.Errorf("sending the final state: %w", err)
	}
	if err := p.commit(ctx); err != nil {
		return err
	}
	p.report.Frozen = time.Since(frozen)
	p.complete(final)
	return nil
}

func (p *predecessor) send(m handoverMessage, files ...any) error { return m.send(p.link, files) }

// await waits for a message of the given type.
func (p *predecessor) await(want string) error {
	m, _, err := receiveMessage(p.link)
	switch {
	case err != nil:
		return err
	case m.Type == msgError:
		return fmt.Errorf("the successor says: %s", m.Error)
	case m.Type != want:
		return fmt.Errorf("got message %q, want %q", m.Type, want)
	}
	return nil
}

// offer sends the listeners and the options that the successor needs to get ready.
func (p *predecessor) offer() error {
	p.s.state.With(func(st *state) { p.acceptors = slices.Concat(st.acceptors, st.adopted) })
	m := handoverMessage{Type: msgOffer, Format: handoverFormat, Program: p.o.Program, Data: p.o.Data}
	var files []any
	for _, a := range p.acceptors {
		if !p.link.Carries(a.ln.Listener) {
			return fmt.Errorf("listener %s has no descriptor", a.ln.Addr())
		}
		m.Listeners = append(m.Listeners, handoverListener{Address: a.ln.Addr().String(), Inherited: a.ln.Inherited})
		files = append(files, a.ln.Listener)
	}
	for name, ln := range p.o.Extra {
		m.Extra = append(m.Extra, name)
		files = append(files, ln)
	}
	return p.send(m, files...)
}

// copyAhead sends the descriptors of all connections while they are served. This is the slow part, so it is done
// before the freeze.
func (p *predecessor) copyAhead(ctx context.Context) error {
	history := handoverMessage{Type: msgConns}
	p.s.state.With(func(st *state) { history.Recent = p.closedSince(st) })
	if err := p.send(history); err != nil {
		return err
	}
	if err := p.await(msgAck); err != nil {
		return err
	}
	for range copyRounds {
		var batch []*Conn
		sent := 0
		flush := func() error {
			if len(batch) == 0 {
				return nil
			}
			err := p.sendConns(batch)
			sent += len(batch)
			batch = batch[:0]
			return err
		}
		for c := range inTurns(p.s.snapshot(), quietTurn) {
			if _, copied := p.copied[c.id]; copied || p.whyBehind(c) != "" {
				continue
			}
			if batch = append(batch, c); len(batch) == handoverBatch {
				if err := flush(); err != nil {
					return err
				}
			}
			if err := context.Cause(ctx); err != nil {
				return err
			}
		}
		if err := flush(); err != nil {
			return err
		}
		if sent < handoverBatch {
			return nil
		}
	}
	return nil
}

// closedSince returns the closed connections that were not sent yet, newest first.
func (p *predecessor) closedSince(st *state) (closed []handoverClosed) {
	n := min(st.recent.added-p.recent, len(st.recent.values))
	p.recent = st.recent.added
	for _, c := range st.recent.newestFirst()[:n] {
		closed = append(closed, recordClosed(c))
	}
	return closed
}

// sendConns sends connections, and waits for the acknowledgement: descriptors in flight are limited (unix(7),
// ETOOMANYREFS).
func (p *predecessor) sendConns(conns []*Conn) error {
	if len(conns) == 0 {
		return nil
	}
	m := handoverMessage{Type: msgConns}
	var files []any
	for _, c := range conns {
		p.addChanged(&m, c)
		files = append(files, c.sock)
	}
	err := p.send(m, files...)
	if errors.Is(err, net.ErrClosed) {
		left := slices.DeleteFunc(slices.Clone(conns), func(c *Conn) bool { return c.endReason() != 0 })
		if len(left) < len(conns) {
			for _, c := range conns {
				delete(p.copied, c.id)
			}
			return p.sendConns(left) // nothing was sent, because some have ended
		}
	}
	if err != nil {
		return err
	}
	return p.await(msgAck)
}

// addChanged adds the record of c to m, unless the successor has the same already.
func (p *predecessor) addChanged(m *handoverMessage, c *Conn) {
	r := p.describe(c)
	p.record = r.append(p.record[:0])
	sum := maphash.Bytes(p.seed, p.record)
	if sent, copied := p.copied[c.id]; copied && sent == sum {
		return
	}
	p.copied[c.id] = sum
	m.records = appendRecord(m.records, p.record)
}

// whyBehind returns why c cannot be handed over; empty if it can.
func (p *predecessor) whyBehind(c *Conn) string {
	phase := Phase(c.phase.Load())
	_, resumes := c.from.handler.(Resumer)
	_, copied := p.copied[c.id]
	switch {
	case phase != PhaseServing && phase != PhaseWaiting:
		return "closing"
	case c.NetConn() != c.sock:
		return "stream on top of the socket"
	case phase == PhaseWaiting && c.from.prepares():
		return "handshake"
	case !resumes:
		return "handler cannot be resumed"
	case !copied && !p.link.Carries(c.sock):
		return "no descriptor"
	case !slices.Contains(p.acceptors, c.from):
		return "listener is closed"
	}
	return ""
}

// describe returns the record of a connection as it is now.
func (p *predecessor) describe(c *Conn) handoverConn {
	r := handoverConn{
		ID: c.id, Listener: slices.Index(p.acceptors, c.from), Opened: c.srv.at(c.opened),
		Active:  c.srv.at(c.active.Load()),
		BytesIn: c.BytesIn(), BytesOut: c.BytesOut(), Notified: c.flags.has(flagNotified),
		Waiting: Phase(c.phase.Load()) == PhaseWaiting,
	}
	if held := c.writeHeld; held || c.writeLock.TryLock() { // otherwise the record that is sent at the end has it
		r.LastByte, r.WriteClosed = c.lastByte, c.writeClosed
		if !held {
			c.unlockWrite()
		}
	}
	c.closing.With(func(cl *closingState) {
		if cl.rare == nil {
			return
		}
		r.Labels = cl.rare.labels
		if _, asked := cl.rare.remote.(Credentials); cl.rare.remote != nil && !asked { // the socket tells them again
			r.Remote = cl.rare.remote.String()
		}
		r.ReadDeadline, r.WriteDeadline = cl.rare.readDeadline, cl.rare.writeDeadline
		r.State, r.Unsent = cl.rare.handover.state, cl.rare.handover.unsent
		if cl.rare.drain.begun {
			d := cl.rare.drain
			r.DrainDeadline, r.DrainReason, r.DrainClosed = d.deadline, d.reason, d.closed.String()
		}
	})
	return r
}

// finalState is what is sent during the freeze.
type finalState struct {
	conns   []*Conn // that are handed over
	message handoverMessage
}

// freeze stops accepting, brings each handler to its safe point, and collects what has changed.
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
	ctx, cancel := context.WithTimeoutCause(context.Background(), p.o.FreezeTimeout/2, errWaitOver)
	defer cancel()
	if err := s.state.Await(ctx, func(st *state) bool {
		return !st.sending && !slices.ContainsFunc(st.acceptors, func(a *acceptor) bool { return !a.quiet && !a.waiting })
	}); err != nil {
		return final, fmt.Errorf("accepting and notices do not stop: %w", err)
	}

	p.behind = make(map[*Conn]string)
	var serving []*Conn
	for _, c := range s.snapshot() {
		switch why := p.whyBehind(c); {
		case why != "":
			p.behind[c] = why
		case Phase(c.phase.Load()) == PhaseWaiting:
			if c.freezeWaiting() {
				final.conns = append(final.conns, c)
			}
		case c.from.handler == Echo && c.freezeEcho():
			final.conns = append(final.conns, c)
		default:
			serving = append(serving, c)
			c.interruptForHandover()
		}
	}
	p.awaitSettled(serving)
	ctx, cancel = context.WithTimeoutCause(context.Background(), p.o.SafePointTimeout, errWaitOver)
	defer cancel()
	for _, c := range serving {
		if why := p.freezeParked(ctx, c); why != "" {
			p.behind[c] = why
		} else {
			final.conns = append(final.conns, c)
		}
	}
	final.message = p.collect(final.conns)
	return final, nil
}

// awaitSettled waits until the handlers are at their safe points. An echo is at one at any time, so that only a lack
// of CPU time delays it: it is given half of the freeze.
func (p *predecessor) awaitSettled(serving []*Conn) {
	echoes := 0
	for _, c := range serving {
		if c.from.handler == Echo {
			echoes++
		}
	}
	wait := func(d time.Duration, done func(n *settled) bool) {
		ctx, cancel := context.WithTimeoutCause(context.Background(), d, errWaitOver)
		defer cancel()
		_ = p.h.settled.Await(ctx, done)
	}
	wait(p.o.SafePointTimeout, func(n *settled) bool { return n.all >= len(serving) })
	wait(p.o.FreezeTimeout/2, func(n *settled) bool { return n.echoes >= echoes })
}

// freezeWaiting freezes a connection that is not admitted yet, unless it ends.
func (c *Conn) freezeWaiting() (frozen bool) {
	c.closing.With(func(cl *closingState) {
		if frozen = cl.reason == 0; frozen {
			c.flags.set(flagSent)
		}
	})
	return frozen
}

// freezeParked freezes a connection whose handler is at its safe point. Otherwise it returns why it stays behind. It
// waits for writes that are in progress, such as that of a notice, which was interrupted.
func (p *predecessor) freezeParked(ctx context.Context, c *Conn) (why string) {
	var locked, stopped bool
	_ = p.h.settled.Await(ctx, func(*settled) bool {
		c.closing.With(func(cl *closingState) {
			switch h := &cl.extra().handover; {
			case cl.reason != 0:
				why = "closing"
			case !h.parked:
				why = "handler did not reach its safe point"
			default:
				why, stopped = "", h.stopped
			}
		})
		if why == "" && !stopped {
			locked = c.writeLock.TryLock()
		}
		return why != "" || stopped || locked
	})
	if why == "" && !stopped && !locked {
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
		c.flags.set(flagSent)
		if !c.flags.has(flagEchoing) {
			_ = c.nc.SetReadDeadline(longAgo) // no goroutine of the handler may read what belongs to the successor
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

// renderQueued renders the queued messages for the successor. The caller makes sure that nothing else writes.
func (c *Conn) renderQueued() {
	if c.posted.Load() == 0 {
		return
	}
	for m := c.nextMessage(); m != nil; m = c.nextMessage() {
		text := c.render(m)
		if len(text) == 0 {
			m.done(messageSilent)
			continue
		}
		c.closing.With(func(cl *closingState) {
			h := &cl.extra().handover
			h.unsent = append(h.unsent, text...)
		})
		c.lastByte = text[len(text)-1]
		m.done(messageSent)
	}
}

// stopNotice is called when the write of a notice was interrupted by a handover, with what is left of it. The write
// lock stays taken. If the connection is not handed over, it returns what is to be sent here.
func (c *Conn) stopNotice(rest []byte) (left []byte, handedOver bool) {
	c.closing.With(func(cl *closingState) {
		h := &cl.extra().handover
		h.unsent, h.stopped = slices.Clone(rest), true
	})
	c.srv.wakeHandover()
	for again := true; again; {
		var h *handover
		c.srv.state.With(func(st *state) { h = st.handover })
		if h != nil {
			<-h.outcome
		}
		if c.flags.has(flagSent) {
			return nil, true
		}
		c.closing.With(func(cl *closingState) {
			if again = c.flags.has(flagHandingOver); again {
				return // by the next handover
			}
			h := &cl.rare.handover
			left, h.unsent, h.stopped = h.unsent, nil, false
		})
	}
	return left, false
}

// collect describes everything but the descriptors that were sent ahead.
func (p *predecessor) collect(conns []*Conn) handoverMessage {
	m := handoverMessage{Type: msgFinal, Count: len(conns), Settings: p.s.handoverSettings()}
	known := 0 // of the connections that were sent ahead
	for _, c := range conns {
		if _, copied := p.copied[c.id]; copied {
			p.addChanged(&m, c)
			known++
		}
	}
	if known < len(p.copied) {
		m.Gone = p.goneOf(conns)
	}
	p.s.state.With(func(st *state) {
		st.recordEnds = true
		for c, why := range p.behind {
			if st.conns.get(c.id) == c { // it is still open
				m.Behind = append(m.Behind, handoverBehind{
					ID: c.id, Remote: c.RemoteAddr().String(), Opened: c.srv.at(c.opened), Why: why,
					BytesIn: c.BytesIn(), BytesOut: c.BytesOut(),
				})
			}
		}
		for _, b := range st.behind { // with this server's own predecessor
			m.Behind = append(m.Behind, b)
		}
		m.LastID, m.LastHold = st.lastID, st.lastHold
		m.Accepted, m.BytesIn, m.BytesOut = st.accepted, st.bytesIn, st.bytesOut
		m.NoticesSent, m.NoticesFailed = st.noticesSent, st.noticesFailed
		m.Closed = make(map[string]uint64)
		for why, n := range st.closed {
			if n > 0 {
				m.Closed[Reason(why).String()] = n
			}
		}
		m.Transitions = make(map[string]uint64)
		for state, n := range st.transitions {
			if n > 0 {
				m.Transitions[State(state).String()] = n
			}
		}
		m.Holds = st.holdInfos()
		m.FirstEvent, m.LastEvent = st.history.first, st.history.last
		m.Recent = p.closedSince(st)
	})
	return m
}

// goneOf returns the connections that were sent ahead and are not in conns.
func (p *predecessor) goneOf(conns []*Conn) (gone []uint64) {
	handed := make(map[uint64]bool, len(conns))
	for _, c := range conns {
		handed[c.id] = true
	}
	for id := range p.copied {
		if !handed[id] {
			gone = append(gone, id)
		}
	}
	return gone
}

// sendFinal sends the final state: first, with their descriptors, the connections that were not sent ahead.
func (p *predecessor) sendFinal(final finalState) error {
	var missing []*Conn
	for _, c := range final.conns {
		if _, copied := p.copied[c.id]; !copied {
			missing = append(missing, c)
		}
	}
	for batch := range slices.Chunk(missing, handoverBatch) {
		if err := p.sendConns(batch); err != nil {
			return err
		}
	}
	if err := p.sendHoldConns(); err != nil {
		return err
	}
	if err := p.send(final.message); err != nil {
		return err
	}
	return p.await(msgAck)
}

// sendHoldConns sends the connections of those who placed holds that last as long as they do.
func (p *predecessor) sendHoldConns() error {
	m := handoverMessage{Type: msgHoldConns}
	var files []any
	p.s.state.With(func(st *state) {
		for _, h := range st.holds {
			if h.conn != nil && p.link.Carries(h.conn) && len(files) < handoverBatch {
				m.HoldIDs = append(m.HoldIDs, h.info.ID)
				files = append(files, h.conn)
			}
		}
	})
	if len(files) == 0 {
		return nil
	}
	if err := p.send(m, files...); err != nil {
		return err
	}
	return p.await(msgAck)
}

// commit makes the successor the owner.
func (p *predecessor) commit(ctx context.Context) error {
	if !p.stop() {
		return context.Cause(ctx)
	}
	var refused error
	p.s.state.With(func(st *state) {
		switch {
		case st.drain != nil:
			refused = &DrainingError{Deadline: st.drain.deadline}
		case len(p.h.deferred) > 0:
			spread, grace := p.h.deferred[0].plan(time.Now(), true)
			refused = &DrainingError{Deadline: time.Now().Add(spread + grace)}
		default:
			st.committing = true
		}
	})
	if refused != nil {
		return refused
	}
	// A successor that has acknowledged may have read from a client. Waiting longer is better than to kill it then.
	_ = p.link.SetDeadline(time.Now().Add(max(p.o.FreezeTimeout, commitTimeout)))
	err := p.send(handoverMessage{Type: msgCommit})
	if err == nil {
		err = p.await(msgAck)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) { // this process may have been stopped while the answer came
		_ = p.link.SetDeadline(time.Now().Add(p.o.SafePointTimeout))
		err = p.await(msgAck)
	}
	if err == nil {
		return nil
	}
	p.o.Kill()
	_ = p.link.SetDeadline(time.Now().Add(p.o.SafePointTimeout))
	if p.await(msgAck) == nil {
		p.s.log.Error("the successor was killed just after it had taken over; its connections are lost")
		return nil
	}
	return fmt.Errorf("committing: %w", err)
}

// complete does the predecessor's part after the commit: it removes the connections that it has handed over, and
// drains the rest.
func (p *predecessor) complete(final finalState) {
	s := p.s
	p.report.HandedOver, p.report.Behind = len(final.conns), make(map[string]int)
	for c, why := range p.behind {
		p.report.Behind[why]++
		c.resumeAfterHandover()
	}
	_ = p.link.SetDeadline(time.Time{})
	var deferred []deferredDrain
	s.state.With(func(st *state) {
		st.handedOver, st.committing = true, false
		st.endSubscriptions()
		for _, c := range final.conns {
			st.forget(c)
		}
		st.accepted = uint64(st.open())
		st.closed, st.bytesIn, st.bytesOut, st.recent.values = [reasonEnd]uint64{}, 0, 0, nil
		for len(st.holds) > 0 {
			st.endHold(0, ErrHandedOver, Caller{})
		}
		st.forwarding = make(chan struct{})
		deferred, p.h.deferred = p.h.deferred, nil
		close(p.h.outcome)
	})
	for _, d := range deferred { // before forwardEnds, which sends too, and which closes the link at the end
		o := d.o
		m := handoverMessage{Type: msgDrain, Drain: &o, Force: d.mode == drainForce}
		spread, grace := d.plan(time.Now(), true)
		o.Spread, o.Grace = cmp.Or(spread, Off), cmp.Or(max(0, grace), Off)
		if err := p.send(m); err != nil {
			s.log.Error("cannot pass a drain on to the successor", zap.Error(err))
		}
	}
	s.startTask()
	go s.closeHandedOver(final.conns)
	go s.forwardEnds(p.link)
	if p.o.Committed != nil {
		p.o.Committed()
	}
	o := p.o.Drain
	o.Delay, o.Final = cmp.Or(p.o.Keep, Off), true
	o.Reason = cmp.Or(o.Reason, "upgrade")
	s.StartDrain(o)
	s.state.With(func(st *state) { st.frozen = false }) // not earlier, or a pause would be placed here and not there
	s.wakeSchedule()
	for _, d := range deferred {
		s.changeDrain(d.plan, d.o, d.mode)
	}
}

// closeHandedOver closes this process's descriptors of connections that another process serves now. Goroutines that
// still wait for their clients end with that. It takes its time, because the successor needs the CPUs.
func (s *Server) closeHandedOver(conns []*Conn) {
	defer s.endTask()
	for c := range inTurns(conns, quietTurn) {
		if c.writeHeld {
			c.writeHeld = false
			c.writeLock.Unlock()
		}
		_ = c.sock.Close()
		connFiles.Add(-1)
	}
}

// forget removes a connection that another process serves now. It does not count as closed.
func (st *state) forget(c *Conn) {
	if !st.conns.remove(c.id) {
		return
	}
	if c.admitted {
		st.admitted--
		st.countClient(c, -1)
		if c.told {
			st.told--
		}
	}
}

// forwardEnds reports to the successor how the connections ended that stayed behind. It ends with the server, and the
// drain waits for it.
func (s *Server) forwardEnds(link Link) {
	defer close(s.forwarder())
	obeyed := make(chan struct{})
	go s.obeySuccessor(link, obeyed)
	defer func() {
		_ = link.Close()
		<-obeyed
	}()
	for {
		var ends []handoverEnd
		var stopped bool
		_ = s.state.Await(context.Background(), func(st *state) bool {
			ends, st.ends = st.ends, nil
			stopped = st.phase == StateStopped
			return len(ends) > 0 || stopped
		})
		if len(ends) > 0 {
			if err := (handoverMessage{Type: msgEnded, Ends: ends}).send(link, nil); err != nil {
				s.log.Warn("cannot tell the successor which connections have ended", zap.Error(err))
				return
			}
		}
		if stopped {
			return
		}
	}
}

// obeySuccessor carries out what the successor asks for, see DrainPredecessor. forwardEnds starts it and waits for it.
func (s *Server) obeySuccessor(link Link, obeyed chan<- struct{}) {
	defer close(obeyed)
	for {
		m, files, err := receiveMessage(link)
		closeFiles(files)
		if err != nil {
			return
		}
		if m.Type != msgDrain || m.Drain == nil {
			continue
		}
		_ = s.DrainPredecessor(*m.Drain, m.Force) // if there is one
		if m.Force {
			s.Force(m.Drain.Reason)
		} else {
			s.StartDrain(*m.Drain)
		}
	}
}

// forwarder returns the channel that forwardEnds closes; nil if nothing was handed over.
func (s *Server) forwarder() (done chan struct{}) {
	s.state.With(func(st *state) { done = st.forwarding })
	return done
}

// awaitThaw waits while the server is frozen, so that state which was sent to the successor does not change. The error is
// ErrHandedOver if the successor has it now.
func (s *Server) awaitThaw() error {
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

// HandedOver reports whether another process serves now, after HandOver.
func (s *Server) HandedOver() bool { return s.isHandedOver() }
