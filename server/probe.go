package server

import (
	"context"
	"fmt"
	"time"
)

// drainOverdue is how long after its deadline a drain that has not ended counts as stuck. It is more than the
// promised two seconds, because machines may be busy.
const drainOverdue = 5 * time.Second

// Probe returns nil if the server is alive: if its state can be read, and each accept loop completes an iteration
// when it is woken. So it detects a stuck loop even if no client connects. A server that is paused, full, draining or
// stopped is alive; one whose drain has not ended some seconds after its deadline is not. The error wraps ErrStuck
// and says what is stuck. Probe waits until ctx ends before it gives up.
func (s *Server) Probe(ctx context.Context) error {
	if s.log == nil {
		return errNotNew
	}
	select {
	case s.probeToken <- struct{}{}:
	case <-ctx.Done():
		return stuckError(ctx, "an earlier probe still waits for the server's state")
	}
	found := make(chan probeResult, 1)
	go s.interruptForProbe(found)
	select {
	case r := <-found:
		if r.overdue > drainOverdue {
			return fmt.Errorf("%w: the drain has not ended %s after its deadline", ErrStuck,
				r.overdue.Round(time.Second))
		}
		return s.awaitIterations(ctx, r.before)
	case <-ctx.Done():
		return stuckError(ctx, "the server's state is locked")
	}
}

func stuckError(ctx context.Context, what string) error {
	return fmt.Errorf("%w: %s (%w)", ErrStuck, what, context.Cause(ctx))
}

type probeResult struct {
	before  map[*acceptor]uint64 // iterations of the accept loops that were interrupted
	overdue time.Duration        // time since the deadline of a drain in progress
}

// interruptForProbe is a goroutine that interrupts each accept loop. If the state is locked, it outlives the probe.
// There is one at most.
func (s *Server) interruptForProbe(found chan<- probeResult) {
	defer func() { <-s.probeToken }()
	r := probeResult{before: make(map[*acceptor]uint64)}
	s.state.With(func(st *state) {
		if st.lifecycle == StateDraining {
			r.overdue = time.Since(st.drain.deadline)
		}
		for _, a := range st.acceptors {
			if !a.waiting && !a.emptying && !st.notAccepting() {
				r.before[a] = a.iterations
				a.interrupt()
			}
		}
	})
	found <- r
}

// awaitIterations waits until the accept loops have completed an iteration, or have ended.
func (s *Server) awaitIterations(ctx context.Context, before map[*acceptor]uint64) error {
	var late *acceptor
	err := s.state.Await(ctx, func(st *state) bool {
		late = nil
		for _, a := range st.acceptors {
			if n, ok := before[a]; ok && a.iterations == n && !a.emptying && !st.notAccepting() {
				late = a
			}
		}
		return late == nil
	})
	if err != nil {
		return stuckError(ctx, "accepting from "+late.ln.Addr().String()+" is stuck")
	}
	return nil
}
