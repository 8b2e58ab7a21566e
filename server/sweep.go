package server

import "time"

// Bounds of the time between two looks at the connections.
const (
	minSweep = 10 * time.Millisecond
	maxSweep = 1 * time.Second
)

// sweep is the goroutine that looks for idle and stalled connections: one for all of them, so that no
// read or write pays for a timer. A timeout is kept to within an eighth of it, or a second.
func (s *Server) sweep() {
	defer close(s.sweeper)
	shortest := time.Duration(0)
	for _, t := range []time.Duration{s.opts.IdleTimeout, s.opts.StallTimeout} {
		if t > 0 && (shortest == 0 || t < shortest) {
			shortest = t
		}
	}
	if shortest == 0 {
		<-s.sweepCtx.Done()
		return
	}
	tick := time.NewTicker(min(max(shortest/8, minSweep), maxSweep))
	defer tick.Stop()
	for {
		select {
		case <-s.sweepCtx.Done():
			return
		case now := <-tick.C:
			s.inspectAll(now)
		}
	}
}

// endSweep stops the sweeper, if it was started, and waits for it.
func (s *Server) endSweep() {
	s.stopSweep(ErrServerClosed)
	var started bool
	s.book.With(func(l *ledger) { started = l.sweeping })
	if started {
		<-s.sweeper
	}
}

func (s *Server) inspectAll(now time.Time) {
	for c := range inTurns(s.snapshot(), quietTurn) {
		s.inspect(c, now)
	}
}

// inspect ends c if it is idle or stalled.
func (s *Server) inspect(c *Conn, now time.Time) {
	if Phase(c.phase.Load()) != Serving {
		return
	}
	if since, blocked := c.blockedSince(); blocked {
		if s.opts.StallTimeout > 0 && c.stalledFor(since, now) >= s.opts.StallTimeout {
			c.end(Stalled, ErrStalled)
		}
		return
	}
	if s.opts.IdleTimeout > 0 && now.Sub(c.srv.at(c.active.Load())) >= s.opts.IdleTimeout {
		c.end(IdleTimeout, ErrIdle)
	}
}

// stalledFor says for how long the client has taken nothing, of a connection blocked in a write since
// since. What counts is what the client's kernel has acknowledged, where that can be known: how
// much our kernel takes comes in steps of megabytes.
func (c *Conn) stalledFor(since, now time.Time) time.Duration {
	if active := c.srv.at(c.active.Load()); active.After(since) {
		since = active
	}
	if raw := rawConn(c.nc); raw != nil && now.Sub(since) >= minSweep {
		if acked, ok := acknowledged(raw); ok && acked != c.acked {
			c.acked, c.progressed = acked, int64(now.Sub(c.srv.started))+1
		}
		if progressed := c.srv.at(c.progressed); c.progressed != 0 && progressed.After(since) {
			since = progressed
		}
	}
	return now.Sub(since)
}
