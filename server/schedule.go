package server

import (
	"container/heap"
	"math/rand/v2"
	"slices"
	"time"
)

// drainCause is the reason for which connections are drained: a drain of the server, an eviction, or their age.
type drainCause struct {
	reason string // told to clients
	closed Reason // close reason of connections that are open when their grace period ends

	// Guarded by Server.state.
	grace   time.Duration // begins when a client is told
	pending int           // notices for this cause in the schedule
	stopped bool          // no more notices are sent
}

// scheduleEntry is an action on a connection at a given time: to send the notice, or to end the connection.
type scheduleEntry struct {
	at    time.Time
	conn  *Conn
	cause *drainCause // of the notice; nil means to end the connection if its deadline has passed
}

// schedule is a heap of entries with the next one first. One goroutine runs all entries, so that no connection needs a
// timer of its own. It is a part of state.
type schedule []scheduleEntry

func (q schedule) Len() int           { return len(q) }
func (q schedule) Less(i, j int) bool { return q[i].at.Before(q[j].at) }
func (q schedule) Swap(i, j int)      { q[i], q[j] = q[j], q[i] }
func (q *schedule) Push(x any)        { *q = append(*q, x.(scheduleEntry)) }
func (q *schedule) Pop() any {
	last := len(*q) - 1
	e := (*q)[last]
	(*q)[last] = scheduleEntry{} // for the garbage collector
	*q = (*q)[:last]
	return e
}

// scheduleNotices schedules notices to the clients of conns, for cause, between now and the given time. It divides
// the time into equal slots, one for each connection in random order, and picks a random moment in each slot. So no
// interval has more than about twice the average rate.
func (s *Server) scheduleNotices(st *state, cause *drainCause, conns []*Conn, until time.Time) {
	now := time.Now()
	spread := max(0, until.Sub(now))
	if spread > 0 {
		rand.Shuffle(len(conns), func(i, j int) { conns[i], conns[j] = conns[j], conns[i] })
	}
	share := float64(spread) / float64(max(1, len(conns)))
	for i, c := range conns {
		at := now.Add(time.Duration((float64(i) + rand.Float64()) * share))
		st.schedule = append(st.schedule, scheduleEntry{at, c, cause})
	}
	cause.pending += len(conns)
	heap.Init(&st.schedule)
	s.reschedule(st)
}

// cancelNotices removes the notices for cause from the schedule.
func (st *state) cancelNotices(cause *drainCause) {
	st.schedule = slices.DeleteFunc(st.schedule, func(e scheduleEntry) bool { return e.cause == cause })
	heap.Init(&st.schedule)
	cause.pending = 0
}

// reschedule wakes the goroutine of the schedule after a change, and starts it if necessary.
func (s *Server) reschedule(st *state) {
	if !st.schedulerStarted {
		st.schedulerStarted = true
		go s.runSchedule()
	}
	s.wakeSchedule()
}

// wakeSchedule wakes the goroutine of the schedule, if it was started.
func (s *Server) wakeSchedule() {
	select {
	case s.scheduleChanged <- struct{}{}:
	default:
	}
}

// untold returns the admitted connections whose clients were not told to leave.
func (st *state) untold() []*Conn {
	return slices.DeleteFunc(st.conns.all(), func(c *Conn) bool { return !c.admitted || c.told })
}

// runSchedule is the goroutine that runs the entries of the schedule. It ends when the server has stopped.
func (s *Server) runSchedule() {
	defer close(s.schedulerDone)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-s.scheduleChanged:
		case <-s.backgroundCtx.Done():
			return
		}
		if next, ok := s.runDueEntries(); ok {
			timer.Reset(time.Until(next))
		}
	}
}

// dueBatch bounds how many entries are taken from the schedule at once.
const dueBatch = 1024

// dueEntry is an entry whose time has come.
type dueEntry struct {
	scheduleEntry
	deadline  time.Time
	remaining time.Duration // until the deadline, as the notice says
}

// runDueEntries runs the entries that are due, and returns the time of the next entry. It does nothing while a handover
// has frozen the server.
func (s *Server) runDueEntries() (next time.Time, ok bool) {
	for {
		var due []dueEntry
		s.state.With(func(st *state) {
			if ok = !st.frozen && len(st.schedule) > 0; !ok {
				return
			}
			due = st.takeDue(time.Now())
			st.scheduleBusy = len(due) > 0
			if ok = len(st.schedule) > 0; ok {
				next = st.schedule[0].at
			}
		})
		if len(due) == 0 {
			return next, ok
		}
		var again []scheduleEntry
		for e := range paced(due, promptBurst) {
			if e.cause != nil {
				s.notifyDrain(e)
				again = append(again, scheduleEntry{at: e.deadline, conn: e.conn})
			} else if at, ok := e.conn.endAtDeadline(); !ok {
				again = append(again, scheduleEntry{at: at, conn: e.conn})
			}
		}
		s.state.With(func(st *state) {
			st.scheduleBusy = false
			for _, e := range again {
				st.scheduleEnd(e)
			}
		})
	}
}

// takeDue removes the entries that are due from the schedule, and marks the connections whose clients will be told.
func (st *state) takeDue(now time.Time) (due []dueEntry) {
	for len(due) < dueBatch && len(st.schedule) > 0 && !st.schedule[0].at.After(now) {
		e := heap.Pop(&st.schedule).(scheduleEntry)
		if e.cause != nil {
			e.cause.pending--
		}
		if st.conns.get(e.conn.id) != e.conn {
			continue
		}
		d := dueEntry{scheduleEntry: e}
		if e.cause != nil {
			if e.conn.told || e.cause.stopped {
				continue
			}
			e.conn.told = true
			st.told++
			d.deadline = now.Add(e.cause.grace)
			if st.drain != nil && st.drain.notifying {
				st.drain.told++
				if d.deadline.After(st.drain.deadline) {
					d.deadline = st.drain.deadline
				}
			}
			// Counted from the scheduled time, so that clients that are told together get the same number.
			d.remaining = min(e.cause.grace, d.deadline.Sub(e.at))
		}
		due = append(due, d)
	}
	return due
}

// scheduleEnd schedules the end of a connection whose client was told. If the connection's deadline is that of the
// server's drain, it needs no entry, because closeRemaining ends the connection.
func (st *state) scheduleEnd(e scheduleEntry) {
	if st.drain != nil && st.drain.notifying && !e.at.Before(st.drain.deadline) {
		return
	}
	heap.Push(&st.schedule, e)
}

// endAtDeadline ends a connection whose grace period is over. If its deadline was moved and has not passed, it returns
// the deadline, and ended is false.
func (c *Conn) endAtDeadline() (deadline time.Time, ended bool) {
	var why Reason
	c.closing.With(func(cl *closingState) {
		deadline, why = cl.rare.drain.deadline, cl.rare.drain.closed
	})
	if deadline.After(time.Now()) {
		return deadline, false
	}
	c.end(why, ErrDeadline)
	return deadline, true
}
