package server

import (
	"context"
	"errors"
	"fmt"
)

// ErrWedged says that the server does not do what it has to any more, and will not by itself.
var ErrWedged = errors.New("the server is wedged")

// Probe returns nil when the server is alive: its books can be had, and each accept loop comes round, which is tried,
// and not concluded from whether anybody connects. A server that is paused, full, draining or stopped is alive. The error,
// once ctx ends, wraps ErrWedged and says what is stuck.
func (s *Server) Probe(ctx context.Context) error {
	if !s.probing.CompareAndSwap(false, true) {
		return s.wedged(ctx, "an earlier probe still waits for the books")
	}
	laps := make(chan map[*acceptor]uint64, 1)
	go s.rouseAll(laps)
	select {
	case before := <-laps:
		return s.awaitLaps(ctx, before)
	case <-ctx.Done():
		return s.wedged(ctx, "the books are not to be had")
	}
}

func (s *Server) wedged(ctx context.Context, what string) error {
	return fmt.Errorf("%w: %s (%w)", ErrWedged, what, context.Cause(ctx))
}

// rouseAll makes each accept loop come round. It is the goroutine of a probe, and outlives that where the books
// are stuck; there is never more than one.
func (s *Server) rouseAll(laps chan<- map[*acceptor]uint64) {
	defer s.probing.Store(false)
	before := make(map[*acceptor]uint64)
	s.book.With(func(l *ledger) {
		if l.closing() {
			return // the accept queue is being emptied, which a deadline would end
		}
		for _, a := range l.acceptors {
			if a.waker != nil && !a.atGate {
				before[a] = a.laps
				a.wake(l)
			}
		}
	})
	laps <- before
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
