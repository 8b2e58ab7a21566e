package server

import (
	"math"
	"math/rand/v2"
	"time"
)

// Bounds on the time between two sweeps.
const (
	minSweep = 10 * time.Millisecond
	maxSweep = 1 * time.Second
)

// sendProgress is the progress of data that waits for the client to acknowledge it, as a sweep saw it. It is zero if no
// data waits.
type sendProgress struct {
	acked     uint64    // bytes acknowledged by the client
	changedAt time.Time // time of the sweep that saw acked change or data begin to wait
}

func (p sendProgress) waiting() bool { return !p.changedAt.IsZero() }

// A sweeper finds idle, stalled and old connections.
type sweeper struct {
	srv    *Server
	queues *sendQueueReader
	conns  []*Conn // scratch space of sweep, reused so that a sweep of idle connections allocates nothing
	// progress holds only the connections that had waiting data at the last sweep. Most have none.
	progress map[*Conn]sendProgress
}

func newSweeper(s *Server) *sweeper { return &sweeper{srv: s, queues: newSendQueueReader()} }

// sweepConns is the goroutine of the sweeper. One goroutine checks all connections, so that reads and writes need not
// reset a timer. It is late by at most an eighth of the timeout, or a second if that is less.
func (s *Server) sweepConns() {
	defer close(s.sweeperDone)
	sw := newSweeper(s)
	tick := time.NewTicker(s.sweepInterval())
	defer tick.Stop()
	for {
		select {
		case <-s.backgroundCtx.Done():
			return
		case <-s.timeoutsChanged:
			tick.Reset(s.sweepInterval())
		case now := <-tick.C:
			sw.sweep(now)
		}
	}
}

// sweep checks all connections once.
func (sw *sweeper) sweep(now time.Time) {
	before := sw.progress
	sw.progress = make(map[*Conn]sendProgress)
	sw.srv.state.With(func(st *state) { sw.conns = st.conns.appendAll(sw.conns[:0]) })
	for c := range paced(sw.conns, backgroundBurst) {
		sw.checkTimeouts(c, now, before[c])
	}
	clear(sw.conns) // so that closed connections do not stay in memory until the next sweep
}

// sweepInterval returns the time between two sweeps. Without a timeout that is the longest possible time.
func (s *Server) sweepInterval() time.Duration {
	interval := time.Duration(math.MaxInt64)
	if s.opts.CancelWhenGone {
		interval = maxSweep
	}
	set := s.activeSettings()
	for _, t := range []time.Duration{set.timeouts.Idle, set.timeouts.Stall, set.timeouts.MaxAge} {
		if t > 0 {
			interval = min(interval, max(t/8, minSweep), maxSweep)
		}
	}
	return interval
}

// stopBackground stops the sweeper and the goroutine of the schedule, and waits for those that were started.
func (s *Server) stopBackground() {
	s.cancelBackground(ErrServerClosed)
	var sweeping, scheduling bool
	s.state.With(func(st *state) { sweeping, scheduling = st.sweeperStarted, st.schedulerStarted })
	if sweeping {
		<-s.sweeperDone
	}
	if scheduling {
		<-s.schedulerDone
	}
}

// maxAgeJitter is the largest deviation from Timeouts.MaxAge, as a fraction of it.
const maxAgeJitter = 0.1

// maxAge returns the age at which the connection's client is told to leave. The jitter follows from the connection's
// id, so that a handover does not change it. With jitter, connections that were opened together end at different
// times.
func (c *Conn) maxAge() time.Duration {
	random := rand.New(rand.NewPCG(c.id, 0)).Float64()
	return time.Duration(float64(c.srv.activeSettings().timeouts.MaxAge) * (1 - maxAgeJitter + 2*maxAgeJitter*random))
}

// reachedMaxAge reports whether the connection has reached its maximum age.
func (c *Conn) reachedMaxAge(now time.Time) bool {
	most := c.srv.activeSettings().timeouts.MaxAge
	if most == 0 {
		return false
	}
	age := now.Sub(c.srv.timeAt(c.opened))
	return age >= time.Duration(float64(most)*(1-maxAgeJitter)) && age >= c.maxAge()
}

// checkTimeouts ends c if it is stalled or idle, and schedules its notice if it has reached its maximum age. before is
// the progress at the last sweep.
func (sw *sweeper) checkTimeouts(c *Conn, now time.Time, before sendProgress) {
	s := sw.srv
	if Phase(c.phase.Load()) != PhaseServing {
		return
	}
	if !c.flags.has(flagMaxAgeScheduled) && c.reachedMaxAge(now) {
		c.flags.set(flagMaxAgeScheduled)
		s.state.With(func(st *state) { s.scheduleNotices(st, s.maxAgeCause, []*Conn{c}, now) })
	}
	timeouts := s.activeSettings().timeouts
	lastMove := s.timeAt(c.lastActive.Load())
	if p := sw.sendProgress(c, now, before); p.waiting() {
		sw.progress[c] = p
		// A quarter is added, because a kernel opens its receive window in large steps at irregular intervals.
		if stall := timeouts.Stall; stall > 0 {
			if now.Sub(p.changedAt) >= stall+stall/4 {
				c.end(ReasonStalled, ErrStalled)
			}
			return
		}
		if p.changedAt.After(lastMove) {
			lastMove = p.changedAt
		}
	}
	if idle := timeouts.Idle; idle > 0 && now.Sub(lastMove) >= idle {
		c.end(ReasonIdleTimeout, ErrIdle)
		return
	}
	if s.opts.CancelWhenGone {
		c.cancelIfGone()
	}
}

// sendProgress returns what the client's kernel has acknowledged of the data that waits for it. Completed writes do not
// show progress, because the send buffer takes megabytes at a time, and writes succeed for a client that has vanished.
// On systems that do not report acknowledgements, blocked writes count as waiting data.
func (sw *sweeper) sendProgress(c *Conn, now time.Time, before sendProgress) sendProgress {
	blocked := c.writeStarted.Load()
	if blocked == 0 && !c.flags.has(flagMayWait) {
		return sendProgress{} // the usual case: nothing was written since the last sweep that saw nothing waiting
	}
	c.flags.clear(flagMayWait) // before the queue is read, so that the next sweep sees data that is written meanwhile
	q, ok := sw.queues.read(c.sock)
	switch {
	case !ok && blocked != 0: // not a socket, or the system does not report it
		return sendProgress{changedAt: c.srv.timeAt(max(blocked, c.lastActive.Load()))}
	case !ok || q.waiting == 0 && blocked == 0:
		return sendProgress{}
	}
	c.flags.set(flagMayWait)
	if !before.waiting() || q.acked != before.acked {
		return sendProgress{acked: q.acked, changedAt: now}
	}
	return before
}

// sendQueueInfo is what the kernel reports about data on its way to a client.
type sendQueueInfo struct {
	waiting int    // bytes or segments that the client has not acknowledged
	acked   uint64 // changes when the client acknowledges data
}

// cancelIfGone cancels the handler's context if the client has closed or reset the connection. It checks only
// connections whose handler uses its context.
func (c *Conn) cancelIfGone() {
	var used bool
	c.closing.With(func(cl *closingState) { used = cl.ctx != nil && cl.cause == nil })
	if !used || c.flags.has(flagClientGone) || !peerGone(c.sock) {
		return
	}
	c.flags.set(flagClientGone)
	c.closing.With(func(cl *closingState) { cl.ctx.cancel(ErrClientGone) })
}
