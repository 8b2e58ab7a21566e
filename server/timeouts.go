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

// progress is what the sweeper knows about data that waits for a client.
type progress struct {
	acked uint64 // bytes that the client has acknowledged, when that was last seen to change
	moved int64  // when acked was seen to change, or data began to wait, by Server.clock; 0 while nothing waits
	empty uint64 // Conn.bytesOut when nothing waited last
}

// sweep is the goroutine that finds idle, stalled and old connections. One goroutine checks all of them, so that
// reads and writes need not reset a timer. It acts at most an eighth of the timeout, or a second, late.
func (s *Server) sweep() {
	defer close(s.sweeper)
	tick := time.NewTicker(s.sweepInterval())
	defer tick.Stop()
	for {
		select {
		case <-s.sweepCtx.Done():
			return
		case <-s.resweep:
			tick.Reset(s.sweepInterval())
		case now := <-tick.C:
			for c := range inTurns(s.snapshot(), quietTurn) {
				s.inspect(c, now)
			}
		}
	}
}

// sweepInterval is the time between two sweeps. Without a timeout it is as good as for ever.
func (s *Server) sweepInterval() time.Duration {
	interval := time.Duration(math.MaxInt64)
	if s.opts.CancelWhenGone {
		interval = maxSweep
	}
	set := s.live()
	for _, t := range []time.Duration{set.timeouts.Idle, set.timeouts.Stall, set.timeouts.MaxAge} {
		if t > 0 {
			interval = min(interval, max(t/8, minSweep), maxSweep)
		}
	}
	return interval
}

// stopSweeper stops the sweeper and the goroutine of the schedule, if they were started, and waits for them.
func (s *Server) stopSweeper() {
	s.stopSweep(ErrServerClosed)
	var sweeping, scheduling bool
	s.state.With(func(st *state) { sweeping, scheduling = st.sweeping, st.scheduling })
	if sweeping {
		<-s.sweeper
	}
	if scheduling {
		<-s.scheduler
	}
}

// maxAgeJitter is the largest deviation from Timeouts.MaxAge, as a fraction of it.
const maxAgeJitter = 0.1

// maxAge is the age at which the connection's client is told to leave. The jitter comes from the connection's id:
// connections opened together end at different times, and a handover does not change it.
func (c *Conn) maxAge() time.Duration {
	random := rand.New(rand.NewPCG(c.id, 0)).Float64()
	return time.Duration(float64(c.srv.live().timeouts.MaxAge) * (1 - maxAgeJitter + 2*maxAgeJitter*random))
}

// isOld reports whether the connection has reached its maximum age.
func (c *Conn) isOld(now time.Time) bool {
	most := c.srv.live().timeouts.MaxAge
	if most == 0 {
		return false
	}
	age := now.Sub(c.srv.at(c.opened))
	return age >= time.Duration(float64(most)*(1-maxAgeJitter)) && age >= c.maxAge()
}

// inspect ends c if it is stalled or idle, and schedules its notice if it is old.
func (s *Server) inspect(c *Conn, now time.Time) {
	if Phase(c.phase.Load()) != PhaseServing {
		return
	}
	if !c.flags.has(flagOld) && c.isOld(now) {
		c.flags.set(flagOld)
		s.state.With(func(st *state) { s.tellAll(st, s.age, []*Conn{c}, now) })
	}
	timeouts := s.live().timeouts
	lastMove := s.at(c.active.Load())
	if moved, waiting := c.waitingSince(now); waiting {
		// A quarter more, because a kernel opens its receive window in large steps, and not at regular intervals.
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

// waitingSince reports whether data waits for the client, and since when the client has taken none of it. It measures
// what the client's kernel acknowledges. The progress of writes would not do: the send buffer takes megabytes at a
// time, and writes succeed for a client that has vanished. On systems that do not report acknowledgements, it
// measures blocked writes.
func (c *Conn) waitingSince(now time.Time) (since time.Time, waiting bool) {
	p := &c.progress
	blocked := c.blocked.Load()
	out := c.bytesOut.Load()
	if blocked == 0 && out == p.empty {
		return since, false // what most connections are: nothing was written since nothing waited
	}
	q, ok := sendQueue(c.sock)
	if !ok {
		return c.blockedSince(blocked)
	}
	if q.waiting == 0 && blocked == 0 {
		p.empty, p.moved = out, 0
		return since, false
	}
	if p.moved == 0 || q.acked != p.acked {
		p.acked, p.moved = q.acked, int64(now.Sub(c.srv.started))+1
	}
	return c.srv.at(p.moved), true
}

// blockedSince is waitingSince for a connection that is not a socket.
func (c *Conn) blockedSince(blocked int64) (since time.Time, waiting bool) {
	if blocked == 0 {
		return since, false
	}
	return c.srv.at(max(blocked, c.active.Load())), true
}

// sendQueueInfo is what the kernel knows about data on its way to a client.
type sendQueueInfo struct {
	waiting int    // bytes or segments that were sent or are to be sent, and are not acknowledged
	acked   uint64 // grows, or changes, when the client takes data
}

// cancelIfGone cancels the handler's context if the client has closed or reset the connection. It looks only while the
// handler uses its context.
func (c *Conn) cancelIfGone() {
	var used bool
	c.closing.With(func(cl *closingState) { used = cl.ctx != nil && cl.cause == nil })
	if !used || c.gone || !peerGone(c.sock) {
		return
	}
	c.gone = true
	c.closing.With(func(cl *closingState) { cl.ctx.cancel(ErrClientGone) })
}
