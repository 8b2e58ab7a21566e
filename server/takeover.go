package server

import (
	"container/heap"
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"time"

	"go.uber.org/zap"
)

// An Offer is what a predecessor offers to hand over; see ReceiveOffer.
type Offer struct {
	Program   string                  // HandoverOptions.Program
	Data      []byte                  // HandoverOptions.Data
	Listeners []Listener              // the predecessor's; Inherited is set, the rest is up to the caller
	Extra     map[string]net.Listener // HandoverOptions.Extra

	link Link
}

// ReceiveOffer receives the offer of a predecessor that called HandOver with the other end of link. The caller then
// makes a Server, decides how each of the listeners is served, and calls TakeOver, or refuses with Refuse. The error
// is ErrHandoverFormat if the predecessor speaks another format.
func ReceiveOffer(ctx context.Context, link Link) (*Offer, error) {
	stop := context.AfterFunc(ctx, func() { _ = link.SetDeadline(longAgo) })
	defer stop()
	m, files, err := receiveMessage(link)
	switch {
	case err != nil:
		return nil, fmt.Errorf("receiving the offer: %w", err)
	case m.Type != msgOffer:
		err = fmt.Errorf("receiving the offer: got message %q", m.Type)
	case m.Format != handoverFormat:
		err = fmt.Errorf("%w: the predecessor, %s, has %d, and this program %d", ErrHandoverFormat, m.Program,
			m.Format, handoverFormat)
	case len(files) != len(m.Listeners)+len(m.Extra):
		err = fmt.Errorf("receiving the offer: %d descriptors for %d listeners", len(files),
			len(m.Listeners)+len(m.Extra))
	}
	o := &Offer{Program: m.Program, Data: m.Data, Extra: make(map[string]net.Listener), link: link}
	for i, f := range files {
		ln, ok := f.(net.Listener)
		switch {
		case err != nil:
		case !ok:
			err = fmt.Errorf("receiving the offer: descriptor %d is not a listener", i)
		case i < len(m.Listeners):
			o.Listeners = append(o.Listeners, Listener{Listener: ln, Inherited: m.Listeners[i].Inherited})
		default:
			o.Extra[m.Extra[i-len(m.Listeners)]] = ln
		}
	}
	if err != nil {
		closeFiles(files)
		o.Refuse(err)
		return nil, err
	}
	return o, nil
}

// Refuse refuses the offer, tells the predecessor why, and closes the link. The predecessor continues to serve.
func (o *Offer) Refuse(why error) {
	_ = handoverMessage{Type: msgError, Error: why.Error()}.send(o.link, nil)
	_ = o.link.Close()
}

// TakeOver takes over the connections, holds and counters of a predecessor. The server must be new: neither Serve nor
// Drain was called. TakeOver returns nil when the server is the owner. After an error the predecessor remains the
// owner, and the server must not be used. The caller then calls ServeListener for each of the listeners, which are
// those of the offer in the same order. Connections whose handler is no Resumer are refused by the predecessor.
//
// Connections that stay with the predecessor count as open until it reports their end; those that it has not reported
// when it dies count as ReasonLost. TakeOver ignores the end of ctx after the commit.
func (s *Server) TakeOver(ctx context.Context, o *Offer, listeners []Listener) error {
	if s.log == nil {
		return errNotNew
	}
	if len(listeners) != len(o.Listeners) {
		err := fmt.Errorf("taking over: got %d listeners, want the %d of the offer", len(listeners), len(o.Listeners))
		o.Refuse(err)
		return err
	}
	t := &successor{s: s, link: o.link, conns: make(map[uint64]*resumption)}
	for _, l := range listeners {
		t.acceptors = append(t.acceptors, newAcceptor(s, l))
	}
	stop := context.AfterFunc(ctx, func() { _ = o.link.SetDeadline(longAgo) })
	err := t.run()
	if !stop() && err == nil {
		_ = o.link.SetDeadline(time.Time{})
	}
	if err != nil {
		for _, r := range t.conns {
			r.abandon()
		}
		t.closeHoldConns()
		if cause := context.Cause(ctx); cause != nil {
			err = fmt.Errorf("%w: %w", cause, err)
		}
		o.Refuse(err)
		return fmt.Errorf("taking over: %w", err)
	}
	s.log.Info("took over", zap.Int("connections", t.count), zap.Int("behind", t.behind),
		zap.String("from", o.Program))
	return nil
}

// successor is the receiving end of a handover.
type successor struct {
	s         *Server
	link      Link
	acceptors []*acceptor
	conns     map[uint64]*resumption // by id
	recent    []handoverClosed       // oldest first
	count     int                    // connections that were taken over
	behind    int
	holdConns map[string]net.Conn // of holds, by id
}

// resumption is a connection that is served once the server is its owner.
type resumption struct {
	c      *Conn
	record handoverConn
	active bool      // its record has changed since it was sent ahead
	owned  chan bool // for serve, which was started ahead; nil if it was not
}

func (t *successor) send(m handoverMessage) error { return m.send(t.link, nil) }

func (t *successor) run() error {
	if err := t.send(handoverMessage{Type: msgReady}); err != nil {
		return err
	}
	var final *handoverMessage
	for {
		m, files, err := receiveMessage(t.link)
		if err != nil {
			return err
		}
		switch {
		case m.Type == msgConns:
			err = t.adopt(m, files)
		case m.Type == msgHoldConns:
			err = t.adoptHoldConns(m.HoldIDs, files)
		case m.Type == msgFinal:
			final, err = &m, t.prepare(m)
		case m.Type == msgCommit && final != nil:
			return t.commit(*final)
		default:
			closeFiles(files)
			err = fmt.Errorf("got unexpected message %q", m.Type)
		}
		if err != nil {
			return err
		}
		if err := t.send(handoverMessage{Type: msgAck}); err != nil {
			return err
		}
	}
}

// adopt makes connections of descriptors, and does not touch them.
func (t *successor) adopt(m handoverMessage, files []any) error {
	t.addRecent(m.Recent)
	records, err := parseRecords(m.records)
	if err == nil && len(records) != len(files) {
		err = fmt.Errorf("got %d descriptors for %d connections", len(files), len(records))
	}
	if err != nil {
		closeFiles(files)
		return err
	}
	for i, r := range records {
		nc, ok := files[i].(net.Conn)
		if !ok || r.Listener < 0 || r.Listener >= len(t.acceptors) || t.conns[r.ID] != nil {
			closeFiles(files[i:])
			return fmt.Errorf("connection %d: not a connection of an offered listener", r.ID)
		}
		c := newConn(t.acceptors[r.Listener], nc)
		c.id = r.ID
		t.conns[r.ID] = &resumption{c: c, record: r}
		if err := t.conns[r.ID].prepare(); err != nil {
			closeFiles(files[i+1:])
			return err
		}
	}
	return nil
}

// adoptHoldConns keeps the connections of those who placed holds.
func (t *successor) adoptHoldConns(ids []string, files []any) error {
	t.holdConns = make(map[string]net.Conn)
	for i, f := range files {
		nc, ok := f.(net.Conn)
		if !ok || i >= len(ids) {
			closeFiles(files[i:])
			return fmt.Errorf("got %d descriptors for %d holds", len(files), len(ids))
		}
		t.holdConns[ids[i]] = nc
	}
	return nil
}

// closeHoldConns closes the connections of holds that this server does not have.
func (t *successor) closeHoldConns() {
	for id, nc := range t.holdConns {
		_ = nc.Close()
		delete(t.holdConns, id)
	}
}

// prepare does as much as is possible ahead of the commit. Starting thousands of goroutines takes tens of milliseconds.
func (r *resumption) prepare() error {
	if _, ok := r.c.from.handler.(Resumer); !ok && !r.record.Waiting {
		return fmt.Errorf("connection %d: the handler cannot resume it", r.record.ID)
	}
	r.c.restore(r.record)
	resume := r.record.Waiting || len(r.record.State) > 0 || r.c.from.handler != Echo
	if r.owned == nil && !resume {
		r.owned = make(chan bool, 1)
		r.c.srv.startTask()
		go r.c.serve(r.owned) // for an echo without state the same as to resume it
	} else if resume {
		r.discard()
	}
	return nil
}

// discard ends the goroutine that was started ahead.
func (r *resumption) discard() {
	if r.owned != nil {
		r.owned <- false
		r.owned = nil
	}
}

func (t *successor) addRecent(newestFirst []handoverClosed) {
	for _, c := range slices.Backward(newestFirst) {
		t.recent = append(t.recent, c)
	}
}

// prepare applies the final state to the connections that were sent ahead. The error says which connection is missing
// or cannot be served.
func (t *successor) prepare(m handoverMessage) error {
	t.addRecent(m.Recent)
	for _, id := range m.Gone {
		if r := t.conns[id]; r != nil {
			r.abandon()
			delete(t.conns, id)
		}
	}
	changed, err := parseRecords(m.records)
	if err != nil {
		return err
	}
	for _, record := range changed {
		r := t.conns[record.ID]
		if r == nil {
			return fmt.Errorf("connection %d came without a descriptor", record.ID)
		}
		r.record, r.active = record, true
		if err := r.prepare(); err != nil {
			return err
		}
	}
	if len(t.conns) != m.Count {
		return fmt.Errorf("got %d connections of %d", len(t.conns), m.Count)
	}
	return nil
}

// commit makes this server the owner. It sends the acknowledgement before it reads or writes any connection.
func (t *successor) commit(m handoverMessage) error {
	s := t.s
	ids := slices.Sorted(maps.Keys(t.conns))
	if err := t.send(handoverMessage{Type: msgAck}); err != nil {
		return err
	}
	s.restoreSettings(m.Settings)
	var active, idle []*resumption
	s.state.With(func(st *state) {
		st.restore(m)
		for _, c := range t.recent {
			st.recent.add(c.conn())
		}
		for _, id := range ids {
			r := t.conns[id]
			c := r.c
			st.conns.add(c)
			if r.record.Waiting {
				c.from.parked = append(c.from.parked, c)
				continue
			}
			c.admitted = true
			c.phase.Store(int32(PhaseServing))
			st.admitted++
			st.countClient(c, +1)
			if r.owned == nil {
				st.tasks++
			}
			if c.told {
				st.told++
				st.schedule.Push(entry{at: r.record.DrainDeadline, c: c})
			}
			if r.active {
				active = append(active, r)
			} else {
				idle = append(idle, r)
			}
		}
		t.count, t.behind = len(ids), len(st.behind)
		st.adopted = append(st.adopted, t.acceptors...)
		st.following, st.predecessor = make(chan struct{}), t.link
		heap.Init(&st.schedule)
		s.reschedule(st)
		for _, h := range m.Holds {
			s.restoreHold(st, h, t.holdConns[h.ID])
			delete(t.holdConns, h.ID)
		}
	})
	t.closeHoldConns()
	for _, r := range slices.Concat(active, idle) { // those first whose clients wait
		r.start()
	}
	go s.followPredecessor(t.link)
	return nil
}

// start serves the connection.
func (r *resumption) start() {
	r.c.srv.connState(r.c, PhaseServing)
	if len(r.record.Unsent) > 0 {
		r.c.writeLock.Lock()
		r.c.srv.startTask()
		go r.c.finishMessage(&message{done: func(messageResult) {}}, r.record.Unsent)
	}
	if r.owned != nil {
		r.owned <- true
		return
	}
	go r.c.serveWith(func(ctx context.Context) error {
		return r.c.from.handler.(Resumer).ResumeConn(ctx, r.c, r.record.State)
	})
}

// abandon closes the descriptor of a connection that this server does not own. That sends nothing on the wire, because
// the predecessor has it, too.
func (r *resumption) abandon() {
	r.discard()
	_ = r.c.sock.Close()
	connFiles.Add(-1)
}

// restore takes over the counters.
func (st *state) restore(m handoverMessage) {
	if st.phase == StateStarting {
		st.enter(StateRunning)
	}
	st.lastID, st.lastHold, st.accepted = m.LastID, m.LastHold, m.Accepted
	st.bytesIn, st.bytesOut = m.BytesIn, m.BytesOut
	st.noticesSent, st.noticesFailed = m.NoticesSent, m.NoticesFailed
	if m.LastEvent > 0 {
		st.history = history{first: m.FirstEvent, last: m.LastEvent, until: time.Now().Add(historyTime)}
	}
	st.publish(Event{Type: EventUpgraded})
	for name, n := range m.Closed {
		st.closed[parseReason(name)] += n
	}
	for name, n := range m.Transitions {
		if phase, err := ParseState(name); err == nil {
			st.transitions[phase] += n
		}
	}
	st.transitions[StateRunning]-- // the handover is not a new start
	st.behind = make(map[uint64]handoverBehind, len(m.Behind))
	for _, b := range m.Behind {
		st.behind[b.ID] = b
	}
}

// restore takes over what is known of a connection: first ahead of the freeze, and again if that has changed.
func (c *Conn) restore(r handoverConn) {
	c.opened, c.lastByte, c.writeClosed = c.srv.clockAt(r.Opened), r.LastByte, r.WriteClosed
	c.active.Store(c.srv.clockAt(r.Active))
	c.bytesIn.Store(r.BytesIn)
	c.bytesOut.Store(r.BytesOut)
	if r.Notified {
		c.flags.set(flagNotified)
	}
	c.told = !r.DrainDeadline.IsZero()
	plain := r.Remote == "" && len(r.Labels) == 0 && r.ReadDeadline.IsZero() && r.WriteDeadline.IsZero() && !c.told
	c.closing.With(func(cl *closingState) {
		if plain && cl.rare == nil {
			return
		}
		x := cl.extra()
		x.labels = maps.Clone(r.Labels)
		if r.Remote != "" {
			x.remote = parseAddr(r.Remote)
		}
		x.readDeadline, x.writeDeadline = r.ReadDeadline, r.WriteDeadline
		if !r.WriteDeadline.IsZero() {
			c.flags.set(flagHasWriteDeadline)
		}
		if c.told {
			x.drain = connDrain{begun: true, deadline: r.DrainDeadline, reason: r.DrainReason, closed: parseReason(r.DrainClosed)}
		}
		_ = c.nc.SetReadDeadline(r.ReadDeadline)
	})
}

// restoreHold places a hold that the predecessor had.
func (s *Server) restoreHold(st *state, info HoldInfo, conn net.Conn) {
	h := &Hold{srv: s, info: info, conn: conn, taken: conn != nil}
	h.ended, h.end = context.WithCancelCause(context.Background())
	if !info.Expires.IsZero() {
		h.timer = time.AfterFunc(time.Until(info.Expires), func() { s.release(h, ErrExpired, Caller{}) })
	}
	st.holds = append(st.holds, h) // no change is published: the server was paused before
	s.evict(st, h)
}

// followPredecessor receives the ends of the connections that stayed behind. It ends when the predecessor closes its
// end of the link, or when this server drains, which waits for it.
func (s *Server) followPredecessor(link Link) {
	defer close(s.follower())
	defer link.Close()
	stop := context.AfterFunc(s.sweepCtx, func() { _ = link.SetDeadline(longAgo) })
	defer stop()
	for {
		m, files, err := receiveMessage(link)
		closeFiles(files)
		if err != nil {
			break
		}
		switch m.Type {
		case msgEnded:
			s.endedBehind(m.Ends)
		case msgDrain:
			if m.Force {
				s.Force("upgrade")
			} else if m.Drain != nil {
				s.StartDrain(*m.Drain)
			}
		}
	}
	s.endBehind()
}

// DrainPredecessor makes the process that handed over drain what stayed with it now, without waiting for
// HandoverOptions.Keep, or close it at once. The error is ErrNoPredecessor if that process has ended.
func (s *Server) DrainPredecessor(o DrainOptions, force bool) error {
	if err := CheckText(o.Reason); err != nil {
		return fmt.Errorf("draining the predecessor: reason: %w", err)
	}
	var link Link
	s.state.With(func(st *state) { link = st.predecessor })
	if link == nil {
		return ErrNoPredecessor
	}
	s.toPredecessor.Lock()
	defer s.toPredecessor.Unlock()
	if err := (handoverMessage{Type: msgDrain, Drain: &o, Force: force}).send(link, nil); err != nil {
		return fmt.Errorf("draining the predecessor: %w", err)
	}
	return nil
}

// follower returns the channel that followPredecessor closes; nil if nothing was taken over.
func (s *Server) follower() (done chan struct{}) {
	s.state.With(func(st *state) { done = st.following })
	return done
}

// endedBehind counts connections that ended in the predecessor.
func (s *Server) endedBehind(ends []handoverEnd) {
	s.state.With(func(st *state) {
		for _, e := range ends {
			b, ok := st.behind[e.ID]
			if !ok {
				continue
			}
			delete(st.behind, e.ID)
			if st.recordEnds { // this server's successor, or the one that it is being handed over to, counts it as open
				st.ends = append(st.ends, e)
			}
			st.closed[parseReason(e.Reason)]++
			st.bytesIn += e.BytesIn
			st.bytesOut += e.BytesOut
			st.publish(Event{Type: EventClosed, Closed: &ClosedConn{
				ID: e.ID, Remote: parseAddr(b.Remote), Local: wireAddr(""), Opened: b.Opened, Closed: time.Now(),
				Reason: parseReason(e.Reason), BytesIn: e.BytesIn, BytesOut: e.BytesOut,
			}})
		}
	})
}

// endBehind counts the connections as lost whose end the predecessor did not report.
func (s *Server) endBehind() {
	var lost int
	s.state.With(func(st *state) {
		lost = len(st.behind)
		st.predecessor = nil
		st.closed[ReasonLost] += uint64(lost)
		for _, b := range st.behind {
			st.bytesIn += b.BytesIn
			st.bytesOut += b.BytesOut
		}
		clear(st.behind)
	})
	if lost == 0 {
		s.log.Info("the predecessor has ended")
	} else {
		s.log.Warn("the predecessor ended without reporting its connections", zap.Int("lost", lost))
	}
}

// clockAt is the inverse of at.
func (s *Server) clockAt(t time.Time) int64 { return int64(t.Sub(s.started)) + 1 }
