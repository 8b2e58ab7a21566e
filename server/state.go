package server

import (
	"net"
	"time"
)

// state is what must be consistent at every instant: the server's phase, its holds, the connection table and the
// counters. All access goes through Server.state, under one lock. So accepted = open + closed at every instant, and
// no connection is admitted during a pause or a drain.
type state struct {
	lifecycle State  // never StatePaused, which follows from StateRunning and holds
	drain     *drain // nil until a drain begins

	holds    []*Hold
	lastHold uint64 // number in the id of the latest hold

	conns      table // open connections, from accept to close
	lastID     uint64
	admitted   int               // connections in conns that were admitted and are not closed
	rejecting  int               // connections in conns that are rejected and linger
	handshakes []handshake       // connections in conns that are in WrapConn or a TLS handshake, oldest first
	perClient  map[clientKey]int // number of admitted connections of each client

	accepted          uint64
	closed            [reasonEnd]uint64
	bytesIn, bytesOut uint64 // of closed connections
	recentClosed      ring[ClosedConn]

	noticesSent, noticesFailed uint64
	transitions                [StateStopped + 1]uint64 // how often each state was entered

	acceptors        []*acceptor    // accept loops that may still admit new connections
	pendingAcceptors []*acceptor    // from TakeOver; ServeListener takes each out
	closeOnServe     []net.Listener // closed by CloseListener before ServeListener was called; at most maxKnownListeners
	formerListeners  []net.Listener // the last listeners whose ServeListener has returned; at most maxKnownListeners
	tasks            int            // goroutines that accept connections or work for one; a drain waits for them
	sweeperStarted   bool

	handover        *handover               // the handover in progress; nil if there is none
	frozen          bool                    // a handover allows no accept, admission or change
	committing      bool                    // the commit was sent, and the successor has not acknowledged it
	reportEnds      bool                    // the successor has the list of open connections: collect unreportedEnds
	handedOver      bool                    // another process is the owner now
	successorPaused bool                    // it was paused when it became the owner
	unreportedEnds  []handoverEnd           // ends of connections that the successor does not know yet
	forwardDone     chan struct{}           // closed when forwardEnds returns; nil if nothing was handed over
	predecessorDone chan struct{}           // closed when receiveFromPredecessor returns; nil if nothing was taken over
	predecessor     Link                    // nil unless the predecessor of this server still runs
	keptConns       map[uint64]handoverKept // connections that the predecessor still serves; they count as open

	schedule         schedule
	schedulerStarted bool
	scheduleBusy     bool // the scheduler carries out entries that it has taken from the schedule
	told             int  // admitted connections whose clients were told to leave

	onShutdown  []func()
	subscribers []*Subscription
	history     history
	unpublished []Event // events since the successor received the state; see publish
}

// maxKnownListeners bounds closeOnServe and formerListeners.
const maxKnownListeners = 64

// recentConns is the number of closed connections in recentClosed.
const recentConns = 1024

// publicState returns the state that users see.
func (st *state) publicState() State {
	if st.lifecycle == StateRunning && len(st.holds) > 0 {
		return StatePaused
	}
	return st.lifecycle
}

// setLifecycle changes the state, and publishes the change if users see it.
func (st *state) setLifecycle(to State) {
	before := st.publicState()
	st.lifecycle = to
	st.publishChange(before)
}

// publishChange publishes the state that users see, if it differs from before.
func (st *state) publishChange(before State) {
	if now := st.publicState(); now != before {
		st.transitions[now]++
		st.publish(Event{Type: EventState, State: now})
	}
}

// open returns the number of open connections, including those that the predecessor still serves.
func (st *state) open() int { return st.conns.len() + len(st.keptConns) }

// addConn adds a connection that was just accepted to the table, and gives it its id.
func (st *state) addConn(c *Conn) {
	st.lastID++
	c.id = st.lastID
	st.conns.add(c)
	st.accepted++
}

// publishOpened publishes that c was opened. The caller calls it once, when the client's address is known.
func (st *state) publishOpened(c *Conn) {
	c.flags.set(flagSubmitted)
	switch {
	case st.conns.get(c.id) != c:
	case st.wantsEvents():
		st.publish(Event{Type: EventOpened, Conn: new(c.Info())})
	default:
		st.history.last++
	}
}

// removeConn removes c from the table, and counts it as closed. It reports whether c was in the table.
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
	if st.reportEnds {
		st.unreportedEnds = append(st.unreportedEnds, handoverEnd{
			ID: c.id, Reason: closed.Reason.String(), BytesIn: closed.BytesIn,
			BytesOut: closed.BytesOut,
		})
	}
	st.closed[closed.Reason]++
	st.bytesIn += closed.BytesIn
	st.bytesOut += closed.BytesOut
	if st.drain != nil && st.lifecycle != StateStopped { // a stopped server's report is final
		st.drain.countClosed(closed.Reason)
	}
	st.recentClosed.add(closed)
	st.publish(Event{Type: EventClosed, Closed: &closed})
	return true
}

// publish gives e its id and time, adds it to the history, and sends it to every subscriber. Once the successor of a
// handover has received the state, publish only collects events. A rollback publishes them; after the commit the
// successor publishes its own.
func (st *state) publish(e Event) {
	if st.reportEnds && !st.handedOver {
		st.unpublished = append(st.unpublished, e)
		return
	}
	st.history.last++
	if !st.wantsEvents() {
		return
	}
	e.ID, e.Time = st.history.last, time.Now()
	st.history.add(e)
	for _, sub := range st.subscribers {
		sub.enqueue(e)
	}
}

// endSubscriptions ends all subscriptions after a handover, with EventUpgraded as their last event.
func (st *state) endSubscriptions() {
	st.publish(Event{Type: EventUpgraded})
	for _, sub := range st.subscribers {
		sub.end()
	}
	st.subscribers, st.unpublished, st.history.events = nil, nil, nil
}
