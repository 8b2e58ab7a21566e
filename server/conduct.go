package server

import (
	"context"
	"errors"
	"time"

	"go.uber.org/zap"
)

// awaitDelay goes on accepting for Options.DrainDelay.
func (s *Server) awaitDelay() {
	for {
		var until time.Time
		var done bool
		s.book.With(func(l *ledger) {
			until = l.drain.acceptUntil
			if done = l.drain.shut || l.drain.forced || !time.Now().Before(until); done && !l.drain.shut {
				l.stopAccepting()
			}
		})
		if done {
			return
		}
		s.awaitFor(time.Until(until), func(l *ledger) bool { return l.drain.forced || !l.drain.acceptUntil.Equal(until) })
	}
}

// conductDrain leads the drain from its begin to the stop.
func (s *Server) conductDrain() {
	s.awaitDelay()
	s.awaitFor(acceptingStops, func(l *ledger) bool { return len(l.acceptors) == 0 || l.drain.over() })
	s.tellAll()
	close(s.draining)
	s.awaitDeadline()

	var conns []*Conn
	var forced bool
	s.book.With(func(l *ledger) {
		l.drain.expired = true
		conns, forced = l.conns.all(), l.drain.forced
	})
	stuck := s.closeRest(conns, forced)
	s.endSweep()
	s.book.With(func(l *ledger) {
		l.drain.stuck = stuck
		l.drain.ended = time.Now()
		l.setState(Stopped)
		for _, sub := range l.subscribers {
			sub.end()
		}
		l.subscribers = nil
	})
	s.summarize(s.report())
	close(s.stopped)
}

// tellAll notifies every client that is being served.
func (s *Server) tellAll() {
	var conns []*Conn
	s.book.With(func(l *ledger) {
		l.drain.telling = true
		if l.drain.forced {
			return
		}
		conns = make([]*Conn, 0, l.conns.len())
		for _, c := range l.conns.all() {
			if c.admitted && !c.told {
				c.told = true
				conns = append(conns, c)
			}
		}
	})
	d := s.drainInfo()
	notice := s.opts.Notice.render(d.Reason, time.Now(), d.Deadline)
	for c := range inTurns(conns, promptTurn) {
		s.tell(c, notice, s.tooLateToTell())
	}
}

// tellIfDraining notifies a client that was admitted after the others had been told.
func (s *Server) tellIfDraining(c *Conn) {
	var d DrainInfo
	var tell bool
	s.book.With(func(l *ledger) {
		if tell = l.drain != nil && l.drain.telling && !l.drain.forced && !c.told; tell {
			c.told = true
			d = l.drain.info()
		}
	})
	if tell {
		s.tell(c, s.opts.Notice.render(d.Reason, time.Now(), d.Deadline), false)
	}
}

// tellAfterDeadline is for how long after a deadline clients may still be told, of a crowd that was given no time.
const tellAfterDeadline = 200 * time.Millisecond

func (s *Server) tooLateToTell() (yes bool) {
	s.book.With(func(l *ledger) { yes = l.drain.forced || time.Since(l.drain.deadline) > tellAfterDeadline })
	return yes
}

// tell sends the notice, or books it as failed.
func (s *Server) tell(c *Conn, notice []byte, tooLate bool) {
	if len(notice) == 0 {
		return
	}
	settled := func(sent bool) {
		if sent {
			c.notified.Store(true)
		}
		s.book.With(func(l *ledger) {
			if sent {
				l.drain.notified++
				l.noticesSent++
			} else {
				l.drain.noticeFailed++
				l.noticesFailed++
			}
		})
	}
	if tooLate {
		settled(false)
		return
	}
	c.post(&posting{text: notice, settled: settled})
}

// awaitDeadline counts down until the last connection is closed, the deadline has passed, or all is forced.
func (s *Server) awaitDeadline() {
	for {
		now := time.Now()
		var deadline time.Time
		var open int
		var done bool
		s.book.With(func(l *ledger) {
			deadline, open = l.drain.deadline, l.conns.len()
			done = l.tasks == 0 || l.drain.forced
		})
		left := deadline.Sub(now)
		if done || left <= 0 {
			return
		}
		s.log.Info("draining", zap.Int("seconds_left", int((left+time.Second-1)/time.Second)), zap.Int("connections", open))
		s.awaitFor(left-nextLine(left), func(l *ledger) bool {
			return l.tasks == 0 || l.drain.forced || !l.drain.deadline.Equal(deadline)
		})
	}
}

// nextLine is the time left at which the countdown is next logged: every second of the last ten,
// every ten seconds of the last minute, every minute before.
func nextLine(left time.Duration) time.Duration {
	step := time.Minute
	switch {
	case left <= 10*time.Second:
		step = time.Second
	case left <= time.Minute:
		step = 10 * time.Second
	}
	return (left - 1).Truncate(step)
}

// closeRest ends what the deadline or force has left, within abortAfter and abandonAfter, and returns
// how many handlers had to be left behind.
func (s *Server) closeRest(conns []*Conn, forced bool) (stuck int) {
	if !forced {
		for c := range inTurns(conns, promptTurn) {
			if s.forced() {
				break
			}
			c.end(Deadline, ErrDeadline)
		}
		s.awaitFor(abortAfter, func(l *ledger) bool { return l.tasks == 0 || l.drain.forced })
	}
	s.book.With(func(l *ledger) { conns = l.conns.all() })
	for _, c := range conns {
		c.end(Forced, ErrForced)
		c.abort()
	}
	s.awaitFor(abandonAfter, func(l *ledger) bool { return l.tasks == 0 })

	s.book.With(func(l *ledger) { conns = l.conns.all() })
	for _, c := range conns {
		s.log.Error("handler ignores its context and is left behind", zap.String("handler", handlerName(s.handler)),
			zap.Uint64("conn", c.id), zap.Stringer("remote", c.RemoteAddr()), zap.Duration("open_for", time.Since(c.opened).Round(time.Millisecond)))
		c.outbox.shut()
		go s.settle(c, c.reason()) // books it, and then calls OnClose, which may be no better
	}
	s.awaitFor(abandonAfter, func(l *ledger) bool { return l.conns.len() == 0 })
	return len(conns)
}

// awaitFor waits for cond, at most for d.
func (s *Server) awaitFor(d time.Duration, cond func(*ledger) bool) {
	ctx, cancel := context.WithTimeoutCause(context.Background(), d, errWaitOver)
	defer cancel()
	_ = s.book.Await(ctx, cond)
}

var errWaitOver = errors.New("the wait is over")

func (s *Server) summarize(r Report) {
	s.log.Info("drained", zap.String("reason", r.Reason), zap.Duration("took", r.Took.Round(time.Millisecond)),
		zap.Int("notified", r.Notified), zap.Int("notices_failed", r.NoticeFailed),
		zap.Int("left_by_themselves", r.Left), zap.Int("closed_at_deadline", r.Deadline), zap.Int("forced", r.Forced),
		zap.Int("rejected", r.Rejected), zap.Int("closed_otherwise", r.Otherwise), zap.Int("handlers_left_behind", r.Stuck))
}
