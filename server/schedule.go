package server

import (
	"container/heap"
	"math/rand/v2"
	"slices"
	"time"
)

// drainCause is why connections are drained: a drain of the server, an eviction, or their age.
type drainCause struct {
	reason string // told to clients
	closed Reason // of those that stay to the end of their grace period

	// Guarded by Server.state.
	grace   time.Duration // that each client has, from when it is told
	pending int           // clients in the schedule that are to be told
	ended   bool          // no more clients are told
}

// entry is an action on a connection at a given time: to tell its client, or to end the connection.
type entry struct {
	at   time.Time
	c    *Conn
	tell *drainCause // nil: the connection ends, if its deadline has passed
}

// schedule is a heap of entries, the next one first. One goroutine carries all of them out, so that no connection needs
// a timer of its own. It is a part of state.
type schedule []entry

func (q schedule) Len() int           { return len(q) }
func (q schedule) Less(i, j int) bool { return q[i].at.Before(q[j].at) }
func (q schedule) Swap(i, j int)      { q[i], q[j] = q[j], q[i] }
func (q *schedule) Push(x any)        { *q = append(*q, x.(entry)) }
func (q *schedule) Pop() any {
	last := len(*q) - 1
	e := (*q)[last]
	(*q)[last] = entry{} // for the garbage collector
	*q = (*q)[:last]
	return e
}

// tellAll schedules the notices of conns, for cause, from now until the given time. It divides the time into equal
// slots, one for each connection in random order, and picks a random moment in each slot. So no interval has more
// than about twice the average rate.
func (s *Server) tellAll(st *state, cause *drainCause, conns []*Conn, until time.Time) {
	now := time.Now()
	spread := max(0, until.Sub(now))
	if spread > 0 {
		rand.Shuffle(len(conns), func(i, j int) { conns[i], conns[j] = conns[j], conns[i] })
	}
	share := float64(spread) / float64(max(1, len(conns)))
	for i, c := range conns {
		at := now.Add(time.Duration((float64(i) + rand.Float64()) * share))
		st.schedule = append(st.schedule, entry{at, c, cause})
	}
	cause.pending += len(conns)
	heap.Init(&st.schedule)
	s.reschedule(st)
}

// unschedule removes the notices for cause.
func (st *state) unschedule(cause *drainCause) {
	st.schedule = slices.DeleteFunc(st.schedule, func(e entry) bool { return e.tell == cause })
	heap.Init(&st.schedule)
	cause.pending = 0
}

// reschedule makes the goroutine of the schedule look at it again, and starts it if necessary.
func (s *Server) reschedule(st *state) {
	if !st.scheduling {
		st.scheduling = true
		go s.runSchedule()
	}
	s.wakeSchedule()
}

// wakeSchedule makes the goroutine of the schedule, if there is one, look at it again.
func (s *Server) wakeSchedule() {
	select {
	case s.rescheduled <- struct{}{}:
	default:
	}
}

// untold returns the connections that are served and whose clients have not been told to leave.
func (st *state) untold() []*Conn {
	return slices.DeleteFunc(st.conns.all(), func(c *Conn) bool { return !c.admitted || c.told })
}

// runSchedule is the goroutine that carries out the schedule, until the server has stopped.
func (s *Server) runSchedule() {
	defer close(s.scheduler)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-s.rescheduled:
		case <-s.sweepCtx.Done():
			return
		}
		if next, ok := s.runDue(); ok {
			timer.Reset(time.Until(next))
		}
	}
}

// dueBatch bounds how many entries are taken from the schedule at once.
const dueBatch = 1024

// dueEntry is an entry whose time has come.
type dueEntry struct {
	entry
	deadline time.Time
	left     time.Duration // told to the client
}

// runDue carries out what is due, and returns when the next entry is. A handover freezes the schedule.
func (s *Server) runDue() (next time.Time, ok bool) {
	for {
		var due []dueEntry
		s.state.With(func(st *state) {
			if ok = !st.frozen && len(st.schedule) > 0; !ok {
				return
			}
			due = st.takeDue(time.Now())
			st.sending = len(due) > 0
			if ok = len(st.schedule) > 0; ok {
				next = st.schedule[0].at
			}
		})
		if len(due) == 0 {
			return next, ok
		}
		var again []entry
		for e := range inTurns(due, promptTurn) {
			if e.tell != nil {
				s.tell(e)
				again = append(again, entry{at: e.deadline, c: e.c})
			} else if at, ok := e.c.endAtDeadline(); !ok {
				again = append(again, entry{at: at, c: e.c})
			}
		}
		s.state.With(func(st *state) {
			st.sending = false
			for _, e := range again {
				st.scheduleEnd(e)
			}
		})
	}
}

// takeDue takes the entries that are due, and marks the connections whose clients will be told.
func (st *state) takeDue(now time.Time) (due []dueEntry) {
	for len(due) < dueBatch && len(st.schedule) > 0 && !st.schedule[0].at.After(now) {
		e := heap.Pop(&st.schedule).(entry)
		if e.tell != nil {
			e.tell.pending--
		}
		if st.conns.get(e.c.id) != e.c {
			continue
		}
		d := dueEntry{entry: e}
		if e.tell != nil {
			if e.c.told || e.tell.ended {
				continue
			}
			e.c.told = true
			st.told++
			d.deadline = now.Add(e.tell.grace)
			if st.drain != nil && st.drain.telling {
				st.drain.told++
				if d.deadline.After(st.drain.deadline) {
					d.deadline = st.drain.deadline
				}
			}
			// Counted from when it is due, so that clients that are told together are told the same.
			d.left = min(e.tell.grace, d.deadline.Sub(e.at))
		}
		due = append(due, d)
	}
	return due
}

// scheduleEnd schedules the end of a connection whose client was told. It needs no entry if the connection's deadline
// is that of the server's drain.
func (st *state) scheduleEnd(e entry) {
	if st.drain != nil && st.drain.telling && !e.at.Before(st.drain.deadline) {
		return
	}
	heap.Push(&st.schedule, e)
}

// endAtDeadline ends a connection whose grace period is over. If it is not, because it was extended, ended is false.
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
