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
	Listeners []Listener              // of the predecessor, with Inherited set; the caller sets the other fields
	Extra     map[string]net.Listener // HandoverOptions.Extra

	link Link
}

// ReceiveOffer receives the offer of a predecessor that called HandOver with the other end of link. The caller then
// makes a Server, decides how to serve each listener, and calls TakeOver. Or it refuses the offer with Refuse. The
// error is ErrHandoverFormat if the predecessor uses another version of the format.
func ReceiveOffer(ctx context.Context, link Link) (*Offer, error) {
	stop := context.AfterFunc(ctx, func() { _ = link.SetDeadline(aLongTimeAgo) })
	defer stop()
	m, files, err := receiveMessage(link)
	switch {
	case err != nil:
		return nil, fmt.Errorf("receiving the offer: %w", err)
	case m.Type != msgOffer:
		err = fmt.Errorf("receiving the offer: got message %q", m.Type)
	case m.Format != handoverFormat:
		err = fmt.Errorf("%w: the predecessor, %s, uses version %d, and this program version %d", ErrHandoverFormat, m.Program,
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
// Drain was called. listeners are those of the offer, in the same order. TakeOver returns nil when the server is the
// owner; the caller then calls ServeListener for each listener. After an error the predecessor remains the owner, and
// the server must not be used. TakeOver returns an error if the handler of a connection is not a Resumer.
//
// Connections that the predecessor keeps count as open until it reports their end. If it dies before that, they are
// counted with ReasonLost. TakeOver ignores the end of ctx after the commit.
func (s *Server) TakeOver(ctx context.Context, o *Offer, listeners []Listener) error {
	if s.log == nil {
		return errNotNew
	}
	if len(listeners) != len(o.Listeners) {
		err := fmt.Errorf("taking over: got %d listeners, want the %d of the offer", len(listeners), len(o.Listeners))
		o.Refuse(err)
		return err
	}
	t := &successor{s: s, link: o.link, conns: make(map[uint64]*incomingConn)}
	for _, l := range listeners {
		t.acceptors = append(t.acceptors, newAcceptor(s, l))
	}
	stop := context.AfterFunc(ctx, func() { _ = o.link.SetDeadline(aLongTimeAgo) })
	err := t.run()
	if !stop() && err == nil {
		_ = o.link.SetDeadline(time.Time{})
	}
	if err != nil {
		for _, r := range t.conns {
			r.closeCopy()
		}
		t.closeHoldConns()
		if cause := context.Cause(ctx); cause != nil {
			err = fmt.Errorf("%w: %w", cause, err)
		}
		o.Refuse(err)
		return fmt.Errorf("taking over: %w", err)
	}
	s.log.Info("took over", zap.Int("connections", t.count), zap.Int("behind", t.kept),
		zap.String("from", o.Program))
	return nil
}

// successor is the receiving side of a handover.
type successor struct {
	s         *Server
	link      Link
	acceptors []*acceptor
	conns     map[uint64]*incomingConn // by id
	recent    []handoverClosed         // oldest first
	events    []Event                  // oldest first
	count     int                      // connections that were taken over
	kept      int                      // number of connections that the predecessor keeps
	holdConns map[string]net.Conn      // connections of PauseOptions.Conn, by the hold's id
}

// incomingConn is a connection that was received and is served after the commit.
type incomingConn struct {
	c       *Conn
	record  handoverConn
	changed bool      // the final state has a newer record
	owned   chan bool // tells Conn.serve, which startAhead has started, whether to serve; nil if it was not started
}

func (t *successor) send(m handoverMessage) error { return m.send(t.link, nil) }

// run receives messages until the commit. After an error the predecessor remains the owner.
func (t *successor) run() error {
	if err := t.send(handoverMessage{Type: msgReady, KnowsSubmitted: true}); err != nil {
		return err
	}
	var final *handoverMessage
	for {
		m, files, err := receiveMessage(t.link)
		if err != nil {
			return err
		}
		if m.Type != msgConns && m.Type != msgHoldConns {
			closeFiles(files)
		}
		switch {
		case m.Type == msgConns:
			err = t.addConns(m, files)
		case m.Type == msgHoldConns:
			err = t.addHoldConns(m.HoldIDs, files)
		case m.Type == msgFinal:
			final, err = &m, t.applyFinal(m)
		case m.Type == msgCommit && final != nil:
			return t.commit(*final)
		default:
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

// addConns makes connections of the descriptors in m. It does not read or write them.
func (t *successor) addConns(m handoverMessage, files []any) error {
	t.addHistory(m)
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
		t.conns[r.ID] = &incomingConn{c: c, record: r}
		if err := t.conns[r.ID].startAhead(); err != nil {
			closeFiles(files[i+1:])
			return err
		}
	}
	return nil
}

// addHoldConns stores the connections on which holds depend.
func (t *successor) addHoldConns(ids []string, files []any) error {
	if t.holdConns == nil {
		t.holdConns = make(map[string]net.Conn)
	}
	for i, f := range files {
		nc, ok := f.(net.Conn)
		if !ok || i >= len(ids) || t.holdConns[ids[i]] != nil {
			closeFiles(files[i:])
			return fmt.Errorf("got %d descriptors for %d holds", len(files), len(ids))
		}
		t.holdConns[ids[i]] = nc
	}
	return nil
}

// closeHoldConns closes the connections in holdConns, which no hold uses.
func (t *successor) closeHoldConns() {
	for id, nc := range t.holdConns {
		_ = nc.Close()
		delete(t.holdConns, id)
	}
}

// startAhead restores the connection, and starts its goroutine if that is possible before the commit. Starting
// thousands of goroutines takes tens of milliseconds, which would lengthen the freeze.
func (r *incomingConn) startAhead() error {
	if _, ok := r.c.acceptor.handler.(Resumer); !ok && !r.record.Waiting {
		return fmt.Errorf("connection %d: the handler cannot resume it", r.record.ID)
	}
	r.c.restore(r.record)
	resume := r.record.Waiting || len(r.record.State) > 0 || r.c.acceptor.handler != Echo
	if r.owned == nil && !resume {
		r.owned = make(chan bool, 1)
		r.c.srv.startTask()
		go r.c.serve(r.owned) // for an echo without state, ServeConn does the same as ResumeConn
	} else if resume {
		r.stopAhead()
	}
	return nil
}

// stopAhead ends the goroutine that startAhead has started.
func (r *incomingConn) stopAhead() {
	if r.owned != nil {
		r.owned <- false
		r.owned = nil
	}
}

// addHistory adds the closed connections and the events of m.
func (t *successor) addHistory(m handoverMessage) {
	for _, c := range slices.Backward(m.Recent) { // newest first
		t.recent = append(t.recent, c)
	}
	for _, record := range m.Events {
		if e, err := parseEvent(record); err == nil { // an event of a newer version is left out, and leaves a gap
			t.events = append(t.events, e)
		}
	}
}

// applyFinal applies the final state m to the connections that were sent ahead. The error says which connection is
// missing or cannot be resumed.
func (t *successor) applyFinal(m handoverMessage) error {
	t.addHistory(m)
	for _, id := range m.Gone {
		if r := t.conns[id]; r != nil {
			r.closeCopy()
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
		r.record, r.changed = record, true
		if err := r.startAhead(); err != nil {
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
	var active, idle []*incomingConn
	s.state.With(func(st *state) {
		st.restore(m, t.events)
		for _, c := range t.recent {
			st.recentClosed.add(c.closedConn())
		}
		for _, id := range ids {
			r := t.conns[id]
			c := r.c
			st.conns.add(c)
			if r.record.Waiting {
				c.acceptor.parked = append(c.acceptor.parked, c)
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
				st.schedule.Push(scheduleEntry{at: r.record.DrainDeadline, conn: c})
			}
			if r.changed {
				active = append(active, r)
			} else {
				idle = append(idle, r)
			}
		}
		t.count, t.kept = len(ids), len(st.keptConns)
		st.pendingAcceptors = append(st.pendingAcceptors, t.acceptors...)
		st.predecessorDone, st.predecessor = make(chan struct{}), t.link
		heap.Init(&st.schedule)
		s.reschedule(st)
		for _, h := range m.Holds {
			s.restoreHold(st, h, t.holdConns[h.ID])
			delete(t.holdConns, h.ID)
		}
	})
	t.closeHoldConns()
	for _, r := range slices.Concat(active, idle) { // changed connections first, because their clients may be waiting
		r.serve()
	}
	go s.receiveFromPredecessor(t.link)
	return nil
}

// serve starts to serve the connection. Unsent notices are sent first.
func (r *incomingConn) serve() {
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
		return r.c.acceptor.handler.(Resumer).ResumeConn(ctx, r.c, r.record.State)
	})
}

// closeCopy closes this process's descriptor of a connection that the predecessor owns. That sends nothing to the
// client, because the predecessor has a descriptor, too.
func (r *incomingConn) closeCopy() {
	r.stopAhead()
	_ = r.c.sock.Close()
	connFiles.Add(-1)
}

// restore sets the counters and the history from the final state. events are the oldest first.
func (st *state) restore(m handoverMessage, events []Event) {
	if st.lifecycle == StateStarting {
		st.setLifecycle(StateRunning)
	}
	st.lastID, st.lastHold, st.accepted = m.LastID, m.LastHold, m.Accepted
	st.bytesIn, st.bytesOut = m.BytesIn, m.BytesOut
	st.noticesSent, st.noticesFailed = m.NoticesSent, m.NoticesFailed
	if m.LastEvent > 0 {
		st.history = history{first: m.FirstEvent, last: m.LastEvent, until: time.Now().Add(historyTime)}
		st.history.restore(events)
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
	st.transitions[StateRunning]-- // setLifecycle above has counted one that is not a new start
	st.keptConns = make(map[uint64]handoverKept, len(m.Kept))
	for _, b := range m.Kept {
		st.keptConns[b.ID] = b
	}
}

// restore sets the fields of a connection from its record. It is called again when a newer record arrives.
func (c *Conn) restore(r handoverConn) {
	c.opened, c.lastByte, c.writeClosed = c.srv.clockAt(r.Opened), r.LastByte, r.WriteClosed
	c.lastActive.Store(c.srv.clockAt(r.Active))
	c.bytesIn.Store(r.BytesIn)
	c.bytesOut.Store(r.BytesOut)
	c.flags.set(flagMayWait) // bytes that the predecessor has written may wait
	if r.Notified {
		c.flags.set(flagNotified)
	}
	if r.Submitted {
		c.flags.set(flagSubmitted)
	}
	c.told = !r.DrainDeadline.IsZero()
	plain := r.Remote == "" && len(r.Labels) == 0 && r.ReadDeadline.IsZero() && r.WriteDeadline.IsZero() && !c.told
	c.closing.With(func(cl *closingState) {
		if plain && cl.rare == nil {
			return
		}
		x := cl.ensureRare()
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

// restoreHold places a hold of the predecessor.
func (s *Server) restoreHold(st *state, info HoldInfo, conn net.Conn) {
	h := &Hold{srv: s, info: info, conn: conn, takenOver: conn != nil}
	h.ended, h.end = context.WithCancelCause(context.Background())
	if !info.Expires.IsZero() {
		h.timer = time.AfterFunc(time.Until(info.Expires), func() { s.release(h, ErrExpired, Caller{}) })
	}
	st.holds = append(st.holds, h) // not published, because the server was paused before
	s.evict(st, h)
}

// clockAt is the inverse of timeAt.
func (s *Server) clockAt(t time.Time) int64 { return int64(t.Sub(s.started)) + 1 }
