package server

import "context"

// verdict is what the gate says of a connection.
type verdict int

const (
	admit   verdict = iota + 1 // serve it
	refuse                     // tell it why not, linger, and close
	dismiss                    // the same without lingering, since too many linger already
	gone                       // it was ended while it waited: only close
	wait                       // neither yet
)

// judge is the gate: the one place that decides whether an accepted connection may start being
// served. A connection that is let in or turned away is booked as such in the same step, under the
// same lock as every pause and drain, so that nothing slips past them.
func (s *Server) judge(l *ledger, c *Conn) (verdict, Reason) {
	v, why := s.weigh(l, c)
	switch v {
	case admit:
		c.admitted = true
		c.setPhase(Serving)
		l.admitted++
		l.perIP.enter(c)
		l.tasks++
	case refuse:
		c.setPhase(Rejecting)
		l.tasks++
		if l.rejecting >= maxRejecting {
			return dismiss, why // and not wait: a flood of those would hold up the others
		}
		c.rejected = true
		l.rejecting++
	case gone:
		l.tasks++
	case wait, dismiss:
	}
	return v, why
}

// awaitVerdict waits until the gate has made up its mind. Meanwhile waiting is true, under the lock of the book.
func (s *Server) awaitVerdict(c *Conn, waiting *bool) (v verdict, why Reason) {
	_ = s.book.Await(context.Background(), func(l *ledger) bool {
		v, why = s.judge(l, c)
		*waiting = v == wait
		return v != wait
	})
	return v, why
}

func (s *Server) weigh(l *ledger, c *Conn) (verdict, Reason) {
	switch {
	case c.ended():
		return gone, 0
	case l.closing():
		if l.drain.over() || filesShort(l) {
			return refuse, RejectedDraining
		}
		return admit, 0 // from the accept queue: it is told, and has its time like the others
	case l.rejectingPause():
		return refuse, RejectedPaused
	case l.holding():
		return wait, 0
	case s.opts.MaxConnsPerIP > 0 && l.perIP.of(c) >= s.opts.MaxConnsPerIP:
		return refuse, RejectedLimit
	case !s.full(l):
		return admit, 0
	case s.opts.AtLimit == Reject:
		return refuse, RejectedLimit
	default:
		return wait, 0
	}
}

// mayAccept says whether taking a connection off the kernel's queue leads anywhere just now.
func (s *Server) mayAccept(l *ledger) bool {
	switch {
	case l.closing():
		return true
	case s.crowded(l):
		return false
	case len(l.holds) > 0:
		return l.rejectingPause()
	default:
		return !s.full(l) || s.opts.AtLimit == Reject
	}
}

// crowded says that of those who are to be turned away so many are under way that more would eat up the reserve of files. Only
// where it takes time to learn who they are: others are dismissed at once.
func (s *Server) crowded(l *ledger) bool {
	if s.opts.Identify == nil || !s.full(l) {
		return false
	}
	within := max(0, s.opts.MaxConns-l.admitted)
	return l.identifying-within+l.rejecting >= maxRejecting
}

func (s *Server) full(l *ledger) bool {
	return s.opts.MaxConns > 0 && l.admitted+l.identifying >= s.opts.MaxConns
}

// filesShort says that admitting still more, as a drain does, would eat up the reserve of files.
func filesShort(l *ledger) bool {
	ceiling, extra, ok := files()
	return ok && l.admitted >= ceiling+extra
}

// holding says that new connections are to wait for the end of a pause.
func (l *ledger) holding() bool {
	return len(l.holds) > 0 && !l.rejectingPause()
}

// rejectingPause says that a pause stands and turns clients away: the stricter mode counts.
func (l *ledger) rejectingPause() bool {
	for _, h := range l.holds {
		if h.info.Mode == RejectNew {
			return true
		}
	}
	return false
}
