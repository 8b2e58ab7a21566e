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

// sendProgress is what the sweeper knows about data that waits for the client to acknowledge it.
type sendProgress struct {
	acked             uint64 // bytes acknowledged by the client, at the last sweep that saw a change
	changedAt         int64  // when acked changed or data began to wait, by Server.clock; 0 while nothing waits
	bytesOutWhenEmpty uint64 // Conn.bytesOut at the last sweep that saw nothing waiting
}

// sweep is the goroutine that finds idle, stalled and old connections. One goroutine checks all of them, so that
// reads and writes need not reset a timer. It is late by at most an eighth of the timeout, or a second if that is less.
func (s *Server) sweep() {
	defer close(s.sweeperDone)
	tick := time.NewTicker(s.sweepInterval())
	defer tick.Stop()
	for {
		select {
		case <-s.backgroundCtx.Done():
			return
		case <-s.timeoutsChanged:
			tick.Reset(s.sweepInterval())
		case now := <-tick.C:
			for c := range paced(s.openConns(), backgroundBurst) {
				s.checkTimeouts(c, now)
			}
		}
	}
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

// checkTimeouts ends c if it is stalled or idle, and schedules its notice if it has reached its maximum age.
func (s *Server) checkTimeouts(c *Conn, now time.Time) {
	if Phase(c.phase.Load()) != PhaseServing {
		return
	}
	if !c.flags.has(flagMaxAgeScheduled) && c.reachedMaxAge(now) {
		c.flags.set(flagMaxAgeScheduled)
		s.state.With(func(st *state) { s.scheduleNotices(st, s.maxAgeCause, []*Conn{c}, now) })
	}
	timeouts := s.activeSettings().timeouts
	lastMove := s.timeAt(c.lastActive.Load())
	if moved, waiting := c.waitingSince(now); waiting {
		// A quarter is added, because a kernel opens its receive window in large steps at irregular intervals.
		if stall := timeouts.Stall; stall > 0 {
			if now.Sub(moved) >= stall+stall/4 {
				c.end(ReasonStalled, ErrStalled)
			}
			return
		}
		if moved.After(lastMove) {
			lastMove = moved
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

// waitingSince reports whether data waits for the client, and since when the client's kernel has acknowledged none of
// it. Completed writes do not show progress, because the send buffer takes megabytes at a time, and writes succeed
// for a client that has vanished. On systems that do not report acknowledgements, waitingSince uses blocked writes.
func (c *Conn) waitingSince(now time.Time) (since time.Time, waiting bool) {
	p := &c.sendProgress
	blocked := c.writeStarted.Load()
	out := c.bytesOut.Load()
	if blocked == 0 && out == p.bytesOutWhenEmpty {
		return since, false // the usual case: nothing was written since the last sweep that saw nothing waiting
	}
	q, ok := sendQueue(c.sock)
	if !ok {
		return c.blockedSince(blocked)
	}
	if q.waiting == 0 && blocked == 0 {
		p.bytesOutWhenEmpty, p.changedAt = out, 0
		return since, false
	}
	if p.changedAt == 0 || q.acked != p.acked {
		p.acked, p.changedAt = q.acked, int64(now.Sub(c.srv.started))+1
	}
	return c.srv.timeAt(p.changedAt), true
}

// blockedSince is waitingSince for a connection that is not a socket.
func (c *Conn) blockedSince(blocked int64) (since time.Time, waiting bool) {
	if blocked == 0 {
		return since, false
	}
	return c.srv.timeAt(max(blocked, c.lastActive.Load())), true
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
	if !used || c.clientGone || !peerGone(c.sock) {
		return
	}
	c.clientGone = true
	c.closing.With(func(cl *closingState) { cl.ctx.cancel(ErrClientGone) })
}
