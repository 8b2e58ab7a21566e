package server

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestDrainDelayServesNewClientsUntilItIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Drain: DrainOptions{Delay: 3 * time.Second}})
		old := r.dial(t)
		began := time.Now()
		r.StartDrain(DrainOptions{Grace: 5 * time.Second, Reason: "TERM"})
		wantState(t, r.Server, StateDraining, 1)
		pass(2 * time.Second)
		late := r.dial(t)
		for _, c := range []*client{old, late} {
			c.send(t, "x\n")
			c.has(t, "x\n") // and nobody is told yet
		}
		pass(time.Second + acceptorsStop)
		if !r.ln.isClosed() {
			t.Error("the listener is open after the delay")
		}
		for _, c := range []*client{old, late} {
			c.has(t, "SHUTDOWN 5 TERM\n") // the grace begins after the delay
		}
		old.leave(t)
		late.ends(t, "")
		wantEqual(t, "duration", time.Since(began), 8*time.Second)
		wantClosed(t, r.Server, map[Reason]uint64{ReasonClientLeft: 1, ReasonDeadline: 1})
		info := r.Status().Drain
		wantEqual(t, "accepting until", info.AcceptUntil, began.Add(3*time.Second))
		wantEqual(t, "deadline", info.Deadline, began.Add(8*time.Second))
	})
}

func TestDrainDelayLastsWithoutAnyClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Drain: DrainOptions{Delay: 3 * time.Second}})
		_, took := shutdownIn(t, r.Server, time.Minute, "TERM") // a load balancer may still send one
		if took < 3*time.Second || took > 3*time.Second+acceptorsStop {
			t.Errorf("the drain took %v, want the delay and no more", took)
		}
	})
}

func TestDrainDelayKeepsToLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Drain: DrainOptions{Delay: 3 * time.Second}, Limits: Limits{MaxConns: 1}})
		r.dial(t)
		r.StartDrain(DrainOptions{Grace: 0, Reason: "TERM"})
		queued := r.dial(t)
		pass(3*time.Second - 1)
		queued.has(t, "") // it still waits for a place
		pass(1 + acceptorsStop)
		queued.has(t, "SHUTDOWN 5 TERM\n") // and is told, and served, with the others
		queued.send(t, "x\n")
		queued.has(t, "x\n")
	})
}

func TestG2ADrainsDelayDoesNotBreakAPause(t *testing.T) {
	for name, tt := range map[string]struct {
		mode PauseMode
		gets string // what a newcomer does at once
	}{"hold": {PauseQueue, ""}, "reject": {PauseReject, "PAUSED\n"}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, Echo, Options{Drain: DrainOptions{Delay: 3 * time.Second}})
				served := r.dial(t)
				h := r.pause(t, PauseOptions{Mode: tt.mode})
				r.StartDrain(DrainOptions{Grace: 0, Reason: "TERM"})
				wantState(t, r.Server, StateDraining, 1)
				queued := r.dial(t)
				queued.send(t, "x\n")
				queued.has(t, tt.gets)
				pass(3*time.Second - 1)
				queued.has(t, "")
				wantEqual(t, "holds", len(r.Status().Holds), 1)
				wantErr(t, "while it stands", h.Cause(), nil)
				served.send(t, "y\n")
				served.has(t, "y\n")
				pass(1 + acceptorsStop)
				if tt.mode == PauseQueue {
					// It is admitted while clients are told, so either may come first.
					wantEqual(t, "lines", slices.Sorted(strings.Lines(queued.arrived())), []string{"SHUTDOWN 5 TERM\n", "x\n"})
				}
				served.has(t, "SHUTDOWN 5 TERM\n")
				if _, ok := errors.AsType[*DrainingError](h.Cause()); !ok {
					t.Errorf("the hold has ended by %v, want a *DrainingError", h.Cause())
				}
			})
		})
	}
}

// Whoever has paused the server may be done before the delay is over.
func TestPauseThatEndsInADrainsDelayLetsClientsIn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Drain: DrainOptions{Delay: 3 * time.Second}})
		h := r.pause(t, PauseOptions{})
		r.pause(t, PauseOptions{TTL: 2 * time.Second})
		r.StartDrain(DrainOptions{Grace: 0, Reason: "TERM"})
		queued := r.dial(t)
		queued.send(t, "x\n")
		pass(time.Second)
		h.Release()
		pass(time.Second - 1)
		queued.has(t, "")
		pass(1)
		queued.has(t, "x\n")
	})
}

func TestForceEndsAPauseInADrainsDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Drain: DrainOptions{Delay: time.Hour}})
		h := r.pause(t, PauseOptions{})
		r.StartDrain(DrainOptions{Grace: 0, Reason: "TERM"})
		r.Force("x")
		<-h.Done()
		<-r.Done()
	})
}

// What is asked for is the grace, and the delay is over only once.
func TestDrainIsShortenedToTheGraceAskedFor(t *testing.T) {
	for name, after := range map[string]time.Duration{"in its delay": time.Second, "after its delay": 5 * time.Second} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const delay = 4 * time.Second
				r := newRig(t, Echo, Options{Drain: DrainOptions{Delay: delay, Grace: time.Minute}})
				r.dial(t)
				began := time.Now()
				r.StartDrain(DrainOptions{Grace: 0, Reason: "TERM"})
				pass(after)
				wantEqual(t, "changed", r.StartDrain(DrainOptions{Grace: 2 * time.Second, Reason: "ctl"}), true)
				wantEqual(t, "deadline", r.Status().Drain.Deadline, began.Add(max(delay, after)+2*time.Second))
				wantEqual(t, "changed", r.StartDrain(DrainOptions{Grace: 3 * time.Second, Reason: "ctl"}), false)
			})
		})
	}
}

func TestForceAndAShorterGraceCutTheDrainDelay(t *testing.T) {
	for name, tt := range map[string]struct {
		cut  func(*Server)
		want time.Duration
	}{
		"force": {func(s *Server) { s.Force("x") }, time.Second},
		"a shorter drain": {func(s *Server) {
			s.changeDrain(at(time.Now().Add(time.Second)), DrainOptions{Reason: "x"}, drainShorten)
		}, 2 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, Echo, Options{Drain: DrainOptions{Delay: time.Hour}})
				r.dial(t)
				began := time.Now()
				r.StartDrain(DrainOptions{Grace: 0, Reason: "TERM"})
				pass(time.Second)
				tt.cut(r.Server)
				<-r.Done()
				if took := time.Since(began); took < tt.want || took > tt.want+budget {
					t.Errorf("the drain took %v, want %v", took, tt.want)
				}
			})
		})
	}
}

func TestNegativeDrainDelayIsRefused(t *testing.T) {
	_, err := New(Echo, Options{Drain: DrainOptions{Delay: -2}})
	wantErrText(t, "New", err, "delay -2ns is negative")
}
