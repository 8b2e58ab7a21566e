package server

import (
	"slices"
	"time"
)

// ledger is all that must agree with itself at every instant: the state, the holds, the table of
// connections and the counters. It is only ever touched inside Server.book, so that at each instant
// accepted = open + closed, and nothing is admitted past a pause or a drain.
type ledger struct {
	state State // Paused is not kept here: it follows from Running and holds
	drain *drain

	holds    []*Hold
	lastHold uint64

	conns       table // open: from accept to close, whatever becomes of them
	lastID      uint64
	admitted    int      // of conns, those being served
	perIP       ipCounts // of admitted; only kept where there is a limit
	rejecting   int      // of conns, those being told why they are not served
	identifying int      // of conns, those whose client is not known yet, or waits at the gate since

	accepted          uint64
	closed            [reasonEnd]uint64
	bytesIn, bytesOut uint64 // of closed connections

	noticesSent, noticesFailed uint64
	transitions                [Stopped + 1]uint64 // into each state
	recent                     ring[ClosedConn]

	acceptors []*acceptor // those that let new connections in
	tasks     int         // goroutines that accept, or work for a connection
	sweeping  bool        // the sweeper was started

	subscribers []*Subscription
}

// status is the state as the world sees it.
func (l *ledger) status() State {
	if l.state == Running && len(l.holds) > 0 {
		return Paused
	}
	return l.state
}

// setState moves on to s, and tells the world if that shows.
func (l *ledger) setState(s State) {
	before := l.status()
	l.state = s
	l.announce(before)
}

// announce publishes a change of the visible state since before.
func (l *ledger) announce(before State) {
	if now := l.status(); now != before {
		l.transitions[now]++
		l.publish(Event{Type: StateChanged, State: now})
	}
}

// open puts a just accepted connection on the books. Once it is known whose it is, announceOpened follows.
func (l *ledger) open(c *Conn) {
	l.lastID++
	c.id = l.lastID
	l.conns.add(c)
	l.accepted++
}

// announceOpened tells the world of an open connection.
func (l *ledger) announceOpened(c *Conn) {
	if len(l.subscribers) > 0 && l.conns.get(c.id) == c { // it may have been left behind, and said to be closed
		l.publish(Event{Type: ConnOpened, Conn: new(c.Info())})
	}
}

// settle takes a closed connection off the books. It reports whether c was still on them.
func (l *ledger) settle(c *Conn, closed ClosedConn) bool {
	if !l.conns.remove(c.id) {
		return false
	}
	switch {
	case c.admitted:
		l.admitted--
		l.perIP.leave(c)
	case c.rejected:
		l.rejecting--
	}
	l.closed[closed.Reason]++
	l.bytesIn += closed.BytesIn
	l.bytesOut += closed.BytesOut
	if l.drain != nil {
		l.drain.count(closed.Reason)
	}
	l.recent.add(closed)
	l.publish(Event{Type: ConnClosed, Closed: &closed})
	return true
}

// publish gives e to every subscriber, stamped, in the order in which things happened.
func (l *ledger) publish(e Event) {
	if len(l.subscribers) == 0 {
		return
	}
	e.Time = time.Now()
	for _, sub := range l.subscribers {
		sub.offer(e)
	}
}

// ring keeps the last so many values.
type ring[T any] struct {
	values []T
	next   int
}

// recentConns is how many closed connections are remembered.
const recentConns = 1024

func (r *ring[T]) add(v T) {
	if len(r.values) < recentConns {
		r.values = append(r.values, v)
		return
	}
	r.values[r.next] = v
	r.next = (r.next + 1) % recentConns
}

// newestFirst returns a copy, the last added first.
func (r *ring[T]) newestFirst() []T {
	out := slices.Concat(r.values[r.next:], r.values[:r.next])
	slices.Reverse(out)
	return out
}
