package server

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// drainOverdue is how long after its deadline a drain that has not ended is taken for stuck: promised are two seconds, and
// machines are busy.
const drainOverdue = 5 * time.Second

// ErrWedged says that the server does not do what it has to any more, and will not by itself.
var ErrWedged = errors.New("the server is wedged")

// Probe returns nil when the server is alive: its books can be had, and each accept loop comes round, which is tried,
// and not concluded from whether anybody connects. A server that is paused, full, draining or stopped is alive; one whose drain has
// not ended some seconds after its deadline is not. The error, which comes once ctx ends where it takes time to tell, wraps
// ErrWedged and says what is stuck.
func (s *Server) Probe(ctx context.Context) error {
	select {
	case s.probing <- struct{}{}:
	case <-ctx.Done():
		return s.wedged(ctx, "an earlier probe still waits for the books")
	}
	roused := make(chan rousing, 1)
	go s.rouseAll(roused)
	select {
	case r := <-roused:
		if r.late > drainOverdue {
			return fmt.Errorf("%w: the drain has not ended %s after its deadline", ErrWedged, r.late.Round(time.Second))
		}
		return s.awaitLaps(ctx, r.before)
	case <-ctx.Done():
		return s.wedged(ctx, "the books are not to be had")
	}
}

func (s *Server) wedged(ctx context.Context, what string) error {
	return fmt.Errorf("%w: %s (%w)", ErrWedged, what, context.Cause(ctx))
}

// rousing is what a probe finds in the books.
type rousing struct {
	before map[*acceptor]uint64 // laps of the accept loops that were made to come round
	late   time.Duration        // since the deadline of a drain under way
}

// rouseAll makes each accept loop come round. It is the goroutine of a probe, and outlives that where the books
// are stuck; there is never more than one.
func (s *Server) rouseAll(roused chan<- rousing) {
	defer func() { <-s.probing }()
	r := rousing{before: make(map[*acceptor]uint64)}
	s.book.With(func(l *ledger) {
		if l.state == Draining {
			r.late = time.Since(l.drain.deadline)
		}
		if l.closing() {
			return // the accept queue is being emptied, which a deadline would end
		}
		for _, a := range l.acceptors {
			if a.waker != nil && !a.atGate {
				r.before[a] = a.laps
				a.wake(l)
			}
		}
	})
	roused <- r
}

// awaitLaps waits until the accept loops have come round, or ended.
func (s *Server) awaitLaps(ctx context.Context, before map[*acceptor]uint64) error {
	var stuck *acceptor
	err := s.book.Await(ctx, func(l *ledger) bool {
		stuck = nil
		for _, a := range l.acceptors {
			if lap, ok := before[a]; ok && a.laps == lap && !l.closing() {
				stuck = a
			}
		}
		return stuck == nil
	})
	if err != nil {
		return s.wedged(ctx, "accepting from "+stuck.ln.Addr().String()+" is stuck")
	}
	return nil
}
