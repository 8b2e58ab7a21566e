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

// Bounds of a handover. Clients can notice only the freeze.
const (
	DefaultFreezeTimeout    = 500 * time.Millisecond
	DefaultSafePointTimeout = 50 * time.Millisecond

	commitTimeout   = 5 * time.Second
	maxHandlerState = 1 << 20   // bytes, for each connection
	maxTotalState   = 128 << 20 // bytes, for all connections, because one message has the states
	copyRounds      = 8         // of copyAhead; each round sends the connections that were opened during the last one
)

// Errors of a handover.
var (
	// ErrHandoverInProgress means that another handover of the same server is in progress.
	ErrHandoverInProgress = errors.New("a handover is in progress")
	// ErrHandoverFormat means that the two processes use different versions of the format.
	ErrHandoverFormat = errors.New("the handover format is not supported")
	// ErrHandedOver means that the server was handed over. The request must be made to the successor.
	ErrHandedOver = errors.New("the server was handed over")
	// ErrNoPredecessor means that the server has no predecessor: it took nothing over, or the predecessor has ended.
	ErrNoPredecessor = errors.New("there is no predecessor")
)

// HandoverOptions configures HandOver.
type HandoverOptions struct {
	// Program names the program and its version, for the successor's log.
	Program string
	// Data is passed to the successor unchanged. It can hold settings, for example.
	Data []byte
	// Extra has further listeners to pass to the successor by name, such as that of a control plane. The server does
	// not use them.
	Extra map[string]net.Listener
	// Kill kills the successor's process. The server calls it if the successor does not acknowledge the commit in time,
	// and then serves the connections again. So the process must have ended when Kill returns. Kill is required.
	Kill func()
	// Committed, when not nil, is called once the successor is the owner, before this server drains the connections
	// that it keeps.
	Committed func()
	// FreezeTimeout bounds the freeze, in which no connection is served. When it is over, the handover is rolled back.
	// Zero means DefaultFreezeTimeout.
	FreezeTimeout time.Duration
	// SafePointTimeout is the part of FreezeTimeout that handlers have to reach their safe point. Zero means
	// DefaultSafePointTimeout.
	SafePointTimeout time.Duration
	// Keep is the time for which this server continues to serve the connections that it cannot hand over. Then it
	// drains them. Zero means that it drains them at once.
	Keep time.Duration
	// Drain configures the drain of those connections. Zero fields mean those of Options.Drain.
	Drain DrainOptions
}

// HandoverReport sums up a handover.
type HandoverReport struct {
	HandedOver int            // connections that the successor serves now
	Kept       map[string]int // connections that this server keeps, by the reason
	Frozen     time.Duration  // from the freeze to the commit
	Took       time.Duration
}

// handover is a handover in progress, on the predecessor's side.
type handover struct {
	safePoints monitor[safePointCount]
	outcome    chan struct{}           // closed after the commit or the rollback
	cancel     context.CancelCauseFunc // ends the handover with a cause; no effect after the commit
	deferred   []deferredDrain         // guarded by Server.state
}

// HandOver passes the server's listeners, connections, holds and counters over link to another process, where
// TakeOver receives them. This server serves its connections until the freeze, which lasts at most half a second.
// After the commit the successor serves them. If anything fails before the successor has acknowledged the commit,
// everything stays as it was, and the error says why. After that HandOver returns a report and no error. The server
// then drains the connections that it keeps, and stops.
//
// The server keeps connections whose handler is not a Resumer or does not reach its safe point. It also keeps those with a
// stream on top of their socket, such as TLS. The error is a *DrainingError if the server drains, and ErrHandoverInProgress if
// another handover is in progress. HandOver closes link; on success it does so when the last connection that the server
// keeps has ended.
func (s *Server) HandOver(ctx context.Context, link Link, o HandoverOptions) (report HandoverReport, err error) {
	began := time.Now()
	if s.log == nil {
		return report, errNotNew
	}
	if o.Kill == nil {
		_ = link.Close()
		return report, errors.New("handing over: HandoverOptions.Kill is nil")
	}
	o.FreezeTimeout = cmp.Or(o.FreezeTimeout, DefaultFreezeTimeout)
	o.SafePointTimeout = cmp.Or(o.SafePointTimeout, DefaultSafePointTimeout)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	h := &handover{outcome: make(chan struct{}), cancel: cancel}
	if err := s.beginHandover(h); err != nil {
		_ = link.Close()
		return report, err
	}
	p := &predecessor{s: s, h: h, link: link, opts: o, sentRecords: make(map[uint64]uint64), seed: maphash.MakeSeed()}
	p.stop = context.AfterFunc(ctx, func() { _ = link.SetDeadline(aLongTimeAgo) })
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
	s.log.Info("handed over", zap.Int("connections", report.HandedOver), zap.Any("behind", report.Kept),
		zap.Duration("frozen", report.Frozen), zap.Duration("took", report.Took))
	return report, nil
}

// beginHandover makes h the handover in progress.
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
		st.handover, st.frozen, st.committing, st.reportEnds, st.unreportedEnds = nil, false, false, false, nil
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

// deferredDrain is a call of changeDrain during the freeze. It takes effect after the commit or the rollback.
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
	opts   HandoverOptions
	stop   func() bool // detaches the handover from the context; see context.AfterFunc
	report HandoverReport

	acceptors   []*acceptor
	seed        maphash.Seed
	sentRecords map[uint64]uint64 // hash of the last record that was sent, by the connection's id
	closedSent  int               // number of closed connections that were sent
	lastEvent   uint64            // id of the last event that was sent
	recordBuf   []byte            // buffer for one record, for reuse
	kept        map[*Conn]string  // connections that this process keeps, and why
	totalState  int               // bytes of handler state and of unsent notices

	knowsSubmitted bool // see handoverMessage
}

// run makes the steps of the handover, up to the commit. After an error nothing was committed.
func (p *predecessor) run(ctx context.Context) error {
	if err := p.offer(); err != nil {
		return fmt.Errorf("offering: %w", err)
	}
	ready, err := p.receive(msgReady)
	if err != nil {
		return fmt.Errorf("waiting until the successor is ready: %w", err)
	}
	p.knowsSubmitted = ready.KnowsSubmitted
	if err := p.copyAhead(ctx); err != nil {
		return fmt.Errorf("copying ahead: %w", err)
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	frozen := time.Now()
	if err := p.link.SetDeadline(frozen.Add(p.opts.FreezeTimeout)); err != nil {
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

// receive waits for a message of the given type.
func (p *predecessor) receive(want string) (m handoverMessage, err error) {
	m, files, err := receiveMessage(p.link)
	closeFiles(files)
	switch {
	case err != nil:
		return m, err
	case m.Type == msgError:
		return m, fmt.Errorf("the successor refused: %s", m.Error)
	case m.Type != want:
		return m, fmt.Errorf("got message %q, want %q", m.Type, want)
	}
	return m, nil
}

// await is receive for a message whose content does not matter.
func (p *predecessor) await(want string) error {
	_, err := p.receive(want)
	return err
}

// offer sends the listeners and the options to the successor.
func (p *predecessor) offer() error {
	p.s.state.With(func(st *state) { p.acceptors = slices.Concat(st.acceptors, st.pendingAcceptors) })
	m := handoverMessage{Type: msgOffer, Format: handoverFormat, Program: p.opts.Program, Data: p.opts.Data}
	var files []any
	for _, a := range p.acceptors {
		if !p.link.Carries(a.ln.Listener) {
			return fmt.Errorf("listener %s has no descriptor", a.ln.Addr())
		}
		m.Listeners = append(m.Listeners, handoverListener{Address: a.ln.Addr().String(), Inherited: a.ln.Inherited})
		files = append(files, a.ln.Listener)
	}
	for name, ln := range p.opts.Extra {
		if !p.link.Carries(ln) {
			return fmt.Errorf("listener %s has no descriptor", name)
		}
		m.Extra = append(m.Extra, name)
		files = append(files, ln)
	}
	return p.send(m, files...)
}

// copyAhead sends the descriptors and records of all connections while they are served. This is the slow part, so it
// comes before the freeze.
func (p *predecessor) copyAhead(ctx context.Context) error {
	history := handoverMessage{Type: msgConns}
	var events []Event
	p.s.state.With(func(st *state) { history.Recent, events = p.unsentClosed(st), p.unsentEvents(st) })
	history.Events = recordEvents(events)
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
		for c := range paced(p.s.openConns(), backgroundBurst) {
			if _, copied := p.sentRecords[c.id]; copied || p.keepReason(c) != "" {
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

// unsentClosed returns the closed connections that were not sent yet, newest first. They then count as sent.
func (p *predecessor) unsentClosed(st *state) (closed []handoverClosed) {
	n := min(st.recentClosed.added-p.closedSent, len(st.recentClosed.values))
	p.closedSent = st.recentClosed.added
	for _, c := range st.recentClosed.newestFirst()[:n] {
		closed = append(closed, newHandoverClosed(c))
	}
	return closed
}

// unsentEvents returns the kept events that were not sent yet.
func (p *predecessor) unsentEvents(st *state) []Event {
	if !st.wantsEvents() {
		return nil
	}
	events := st.history.since(p.lastEvent)
	p.lastEvent = st.history.last
	return events
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
		p.addRecord(&m, c)
		files = append(files, c.sock)
	}
	err := p.send(m, files...)
	if errors.Is(err, net.ErrClosed) {
		left := slices.DeleteFunc(slices.Clone(conns), func(c *Conn) bool { return c.closeReason() != 0 })
		if len(left) < len(conns) {
			for _, c := range conns {
				delete(p.sentRecords, c.id)
			}
			return p.sendConns(left) // nothing was sent, because some connections have ended
		}
	}
	if err != nil {
		return err
	}
	return p.await(msgAck)
}

// addRecord adds the record of c to m, unless the successor already has an equal one.
func (p *predecessor) addRecord(m *handoverMessage, c *Conn) {
	r := p.describe(c)
	p.recordBuf = r.append(p.recordBuf[:0])
	sum := maphash.Bytes(p.seed, p.recordBuf)
	if sent, copied := p.sentRecords[c.id]; copied && sent == sum {
		return
	}
	p.sentRecords[c.id] = sum
	m.records = appendRecord(m.records, p.recordBuf)
}

// keepReason returns the reason why this process keeps c. It is empty if c can be handed over.
func (p *predecessor) keepReason(c *Conn) string {
	phase := Phase(c.phase.Load())
	_, resumes := c.acceptor.handler.(Resumer)
	_, copied := p.sentRecords[c.id]
	switch {
	case phase != PhaseServing && phase != PhaseWaiting:
		return "closing"
	case c.NetConn() != c.sock:
		return "stream on top of the socket"
	case phase == PhaseWaiting && c.flags.has(flagInHandshake),
		phase == PhaseWaiting && c.acceptor.hasHandshake() && c.flags.has(flagSubmitted) && !p.knowsSubmitted:
		return "handshake"
	case !resumes:
		return "handler cannot be resumed"
	case !copied && !p.link.Carries(c.sock):
		return "no descriptor"
	case !slices.Contains(p.acceptors, c.acceptor):
		return "listener is closed"
	}
	return ""
}

// describe returns the record of a connection as it is now.
func (p *predecessor) describe(c *Conn) handoverConn {
	r := handoverConn{
		ID: c.id, Listener: slices.Index(p.acceptors, c.acceptor), Opened: c.srv.timeAt(c.opened),
		Active:  c.srv.timeAt(c.lastActive.Load()),
		BytesIn: c.BytesIn(), BytesOut: c.BytesOut(), Notified: c.flags.has(flagNotified),
		Waiting: Phase(c.phase.Load()) == PhaseWaiting, Submitted: c.flags.has(flagSubmitted),
	}
	if held := c.writeHeld; held || c.writeLock.TryLock() { // otherwise the record in the final state has these fields
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
		if _, asked := cl.rare.remote.(Credentials); cl.rare.remote != nil && !asked { // the successor asks the socket again
			r.Remote = cl.rare.remote.String()
		}
		r.ReadDeadline, r.WriteDeadline = cl.rare.readDeadline, cl.rare.writeDeadline
		r.State, r.Unsent = cl.rare.handover.state, cl.rare.handover.unsentNotices
		if cl.rare.drain.begun {
			d := cl.rare.drain
			r.DrainDeadline, r.DrainReason, r.DrainClosed = d.deadline, d.reason, d.closed.String()
		}
	})
	return r
}

// finalMessage returns the final state: the counters, the holds, and the records that changed since copyAhead.
func (p *predecessor) finalMessage(conns []*Conn) handoverMessage {
	m := handoverMessage{Type: msgFinal, Count: len(conns), Settings: p.s.handoverSettings()}
	known := 0 // number of conns that were sent ahead
	for _, c := range conns {
		if _, copied := p.sentRecords[c.id]; copied {
			p.addRecord(&m, c)
			known++
		}
	}
	if known < len(p.sentRecords) {
		m.Gone = p.notHandedOver(conns)
	}
	var events []Event
	p.s.state.With(func(st *state) {
		st.reportEnds = true
		for c, why := range p.kept {
			if st.conns.get(c.id) == c { // still open
				m.Kept = append(m.Kept, handoverKept{
					ID: c.id, Remote: c.RemoteAddr().String(), Opened: c.srv.timeAt(c.opened), Why: why,
					BytesIn: c.BytesIn(), BytesOut: c.BytesOut(),
				})
			}
		}
		for _, b := range st.keptConns { // those that this server's own predecessor still serves
			m.Kept = append(m.Kept, b)
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
		m.Recent, events = p.unsentClosed(st), p.unsentEvents(st)
	})
	m.Events = recordEvents(events)
	return m
}

// notHandedOver returns the ids of connections that were sent ahead and are not in conns.
func (p *predecessor) notHandedOver(conns []*Conn) (gone []uint64) {
	handed := make(map[uint64]bool, len(conns))
	for _, c := range conns {
		handed[c.id] = true
	}
	for id := range p.sentRecords {
		if !handed[id] {
			gone = append(gone, id)
		}
	}
	return gone
}

// sendFinal sends the connections that were not sent ahead, with their descriptors, and then the final state.
func (p *predecessor) sendFinal(final finalState) error {
	var missing []*Conn
	for _, c := range final.conns {
		if _, copied := p.sentRecords[c.id]; !copied {
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

// sendHoldConns sends the connections of PauseOptions.Conn, on which holds depend.
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

// commit makes the successor the owner. An error means that it is not.
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
	// A successor that has acknowledged may have read from a client. Waiting longer is better than killing it then.
	_ = p.link.SetDeadline(time.Now().Add(max(p.opts.FreezeTimeout, commitTimeout)))
	err := p.send(handoverMessage{Type: msgCommit})
	if err == nil {
		err = p.await(msgAck)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) { // a SIGSTOP may have stopped this process while the answer came
		_ = p.link.SetDeadline(time.Now().Add(p.opts.SafePointTimeout))
		err = p.await(msgAck)
	}
	if err == nil {
		return nil
	}
	p.opts.Kill()
	_ = p.link.SetDeadline(time.Now().Add(p.opts.SafePointTimeout))
	if p.await(msgAck) == nil {
		p.s.log.Error("the successor was killed after it had taken over; its connections are lost")
		return nil
	}
	return fmt.Errorf("committing: %w", err)
}

// complete does the predecessor's work after the commit: it releases the connections that it has handed over, and
// drains those that it keeps.
func (p *predecessor) complete(final finalState) {
	s := p.s
	p.report.HandedOver, p.report.Kept = len(final.conns), make(map[string]int)
	for c, why := range p.kept {
		p.report.Kept[why]++
		c.resumeAfterHandover()
	}
	_ = p.link.SetDeadline(time.Time{})
	var deferred []deferredDrain
	s.state.With(func(st *state) {
		st.handedOver, st.committing = true, false
		st.endSubscriptions()
		for _, c := range final.conns {
			st.removeHandedOver(c)
		}
		st.accepted = uint64(st.open())
		st.closed, st.bytesIn, st.bytesOut, st.recentClosed.values = [reasonEnd]uint64{}, 0, 0, nil
		st.successorPaused = len(st.holds) > 0
		for len(st.holds) > 0 {
			st.endHold(0, ErrHandedOver, Caller{})
		}
		st.forwardDone = make(chan struct{})
		deferred, p.h.deferred = p.h.deferred, nil
		close(p.h.outcome)
	})
	for _, d := range deferred { // before forwardEnds, which sends on the same link and closes it
		o := d.o
		m := handoverMessage{Type: msgDrain, Drain: &o, Force: d.mode == drainForce}
		spread, grace := d.plan(time.Now(), true)
		o.Spread, o.Grace = cmp.Or(spread, Off), cmp.Or(max(0, grace), Off)
		if err := p.send(m); err != nil {
			s.log.Error("cannot forward a drain to the successor", zap.Error(err))
		}
	}
	s.startTask()
	go s.closeHandedOver(final.conns)
	go s.forwardEnds(p.link)
	if p.opts.Committed != nil {
		p.opts.Committed()
	}
	o := p.opts.Drain
	o.Delay, o.Final = cmp.Or(p.opts.Keep, Off), true
	o.Reason = cmp.Or(o.Reason, "upgrade")
	s.StartDrain(o)
	s.state.With(func(st *state) { st.frozen = false }) // last, so that no pause is placed in this process instead of the successor
	s.wakeSchedule()
	for _, d := range deferred {
		s.changeDrain(d.plan, d.o, d.mode)
	}
}

// closeHandedOver closes this process's descriptors of connections that another process serves now. That ends the
// goroutines that still wait for their clients. It yields often, because the successor needs the CPUs.
func (s *Server) closeHandedOver(conns []*Conn) {
	defer s.endTask()
	for c := range paced(conns, backgroundBurst) {
		if c.writeHeld {
			c.writeHeld = false
			c.writeLock.Unlock()
		}
		_ = c.sock.Close()
		connFiles.Add(-1)
	}
}

// removeHandedOver removes a connection that another process serves now. It does not count the connection as closed.
func (st *state) removeHandedOver(c *Conn) {
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

// HandedOver reports whether another process serves now, after a successful HandOver.
func (s *Server) HandedOver() bool { return s.isHandedOver() }

func (s *Server) isHandedOver() (yes bool) {
	s.state.With(func(st *state) { yes = st.handedOver })
	return yes
}
