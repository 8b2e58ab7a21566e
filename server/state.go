package server

import (
	"net"
	"time"
)

// state is what must be consistent at every instant: the server's phase, its holds, the connection table and the
// counters. All access goes through Server.state, under one lock. So accepted = open + closed at every instant, and
// no connection is admitted during a pause or a drain.
type state struct {
	phase State  // StatePaused is not kept here: it follows from StateRunning and holds
	drain *drain // nil until a drain begins

	holds    []*Hold
	lastHold uint64 // number in the last hold's id

	conns      table // open connections, from accept to close
	lastID     uint64
	admitted   int               // of conns, those being served or closing after that
	rejecting  int               // of conns, those that are rejected and linger
	handshakes []handshake       // of conns, those in WrapConn or in a TLS handshake, oldest first
	perClient  map[clientKey]int // of admitted

	accepted          uint64
	closed            [reasonEnd]uint64
	bytesIn, bytesOut uint64 // of closed connections
	recent            ring[ClosedConn]

	noticesSent, noticesFailed uint64
	transitions                [StateStopped + 1]uint64 // how often each state was entered

	adopted   []*acceptor    // from TakeOver, until ServeListener is called for them
	acceptors []*acceptor    // those that may still let new connections in
	toClose   []net.Listener // given to CloseListener before ServeListener; at most maxListenersNoted
	served    []net.Listener // the last for which ServeListener has ended; at most maxListenersNoted
	tasks     int            // goroutines that accept, or that work for a connection
	sweeping  bool           // the sweeper was started

	handover    *handover                 // in progress; nil otherwise
	frozen      bool                      // nothing is accepted, admitted or changed
	committing  bool                      // the successor was told to take over, and has not answered yet
	recordEnds  bool                      // the successor knows the open connections: tell it which have ended
	handedOver  bool                      // another process is the owner now
	ends        []handoverEnd             // of connections that stayed behind, to be forwarded
	forwarding  chan struct{}             // closed when the last was forwarded; nil if nothing was handed over
	following   chan struct{}             // closed when the predecessor's end was seen; nil if nothing was taken over
	predecessor Link                      // for following; nil before and after
	behind      map[uint64]handoverBehind // with the predecessor of this server; they count as open

	schedule   schedule
	scheduling bool // the goroutine of the schedule was started
	sending    bool // and carries out entries that it has taken from it
	told       int  // of admitted, those whose clients were told to leave

	onShutdown  []func()
	subscribers []*Subscription
	history     history
	unpublished []Event // those that happened since the successor was sent the state; see publish
}

// maxListenersNoted bounds the lists of listeners that are not being served.
const maxListenersNoted = 64

// recentConns is how many closed connections are remembered.
const recentConns = 1024

// visible is the state as users see it.
func (st *state) visible() State {
	if st.phase == StateRunning && len(st.holds) > 0 {
		return StatePaused
	}
	return st.phase
}

// enter moves on to phase, and publishes the change if it is visible.
func (st *state) enter(phase State) {
	before := st.visible()
	st.phase = phase
	st.publishChange(before)
}

// publishChange publishes a change of the visible state since before.
func (st *state) publishChange(before State) {
	if now := st.visible(); now != before {
		st.transitions[now]++
		st.publish(Event{Type: EventState, State: now})
	}
}

// open is how many connections are open, with those that stayed with a predecessor.
func (st *state) open() int { return st.conns.len() + len(st.behind) }

// addConn enters a connection that was just accepted into the table.
func (st *state) addConn(c *Conn) {
	st.lastID++
	c.id = st.lastID
	st.conns.add(c)
	st.accepted++
}

// publishOpened publishes that c was opened, once its client's address is known.
func (st *state) publishOpened(c *Conn) {
	switch {
	case st.conns.get(c.id) != c:
	case st.observed():
		st.publish(Event{Type: EventOpened, Conn: new(c.Info())})
	default:
		st.history.last++
	}
}

// removeConn moves a connection from the table to the counters of closed ones. It reports whether c was open.
func (st *state) removeConn(c *Conn, closed ClosedConn) bool {
	if !st.conns.remove(c.id) {
		return false
	}
	switch {
	case c.admitted:
		st.admitted--
		st.countClient(c, -1)
		if c.told {
			st.told--
		}
	case c.rejected:
		st.rejecting--
	}
	if st.recordEnds {
		st.ends = append(st.ends, handoverEnd{
			ID: c.id, Reason: closed.Reason.String(), BytesIn: closed.BytesIn,
			BytesOut: closed.BytesOut,
		})
	}
	st.closed[closed.Reason]++
	st.bytesIn += closed.BytesIn
	st.bytesOut += closed.BytesOut
	if st.drain != nil && st.phase != StateStopped { // then the report is final
		st.drain.count(closed.Reason)
	}
	st.recent.add(closed)
	st.publish(Event{Type: EventClosed, Closed: &closed})
	return true
}

// publish stamps e, keeps it, and gives it to every subscriber, in the order in which things happened. Once the successor
// of a handover has the state, an event waits for the outcome: if the successor becomes the owner, it will tell the event
// itself.
func (st *state) publish(e Event) {
	if st.recordEnds && !st.handedOver {
		st.unpublished = append(st.unpublished, e)
		return
	}
	st.history.last++
	if !st.observed() {
		return
	}
	e.ID, e.Time = st.history.last, time.Now()
	st.history.add(e)
	for _, sub := range st.subscribers {
		sub.offer(e)
	}
}

// endSubscriptions tells the subscribers that another process serves now, which tells its own the same.
func (st *state) endSubscriptions() {
	st.publish(Event{Type: EventUpgraded})
	for _, sub := range st.subscribers {
		sub.end()
	}
	st.subscribers, st.unpublished, st.history.events = nil, nil, nil
}
