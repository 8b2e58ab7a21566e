package server

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestDrainDelayServesNewClientsUntilItIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{DrainDelay: 3 * time.Second})
		old := r.dial(t)
		began := time.Now()
		r.Drain(5*time.Second, "TERM")
		wantState(t, r.Server, Draining, 1)
		pass(2 * time.Second)
		late := r.dial(t)
		for _, c := range []*client{old, late} {
			c.send(t, "x\n")
			c.has(t, "x\n") // and nobody is told yet
		}
		pass(time.Second + acceptingStops)
		if !r.ln.isClosed() {
			t.Error("the listener is open after the delay")
		}
		for _, c := range []*client{old, late} {
			c.has(t, "SHUTDOWN 5 TERM\n") // the grace begins after the delay
		}
		old.leave(t)
		late.ends(t, "")
		wantEqual(t, "duration", time.Since(began), 8*time.Second)
		wantClosed(t, r.Server, map[Reason]uint64{ClientLeft: 1, Deadline: 1})
		info := r.Status().Drain
		wantEqual(t, "accepting until", info.AcceptUntil, began.Add(3*time.Second))
		wantEqual(t, "deadline", info.Deadline, began.Add(8*time.Second))
	})
}

func TestDrainDelayLastsWithoutAnyClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{DrainDelay: 3 * time.Second})
		_, took := shutdownIn(t, r.Server, time.Minute, "TERM") // a load balancer may still send one
		if took < 3*time.Second || took > 3*time.Second+acceptingStops {
			t.Errorf("the drain took %v, want the delay and no more", took)
		}
	})
}

func TestDrainDelayKeepsToLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{DrainDelay: 3 * time.Second, MaxConns: 1})
		r.dial(t)
		r.Drain(0, "TERM")
		queued := r.dial(t)
		pass(3*time.Second - 1)
		queued.has(t, "") // it still waits for a place
		pass(1 + acceptingStops)
		queued.has(t, "SHUTDOWN 5 TERM\n") // and is told, and served, with the others
		queued.send(t, "x\n")
		queued.has(t, "x\n")
	})
}

func TestDrainDelayResumesAPausedServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{DrainDelay: 3 * time.Second})
		r.pause(t, PauseOptions{})
		queued := r.dial(t)
		r.Drain(0, "TERM")
		queued.send(t, "x\n")
		queued.has(t, "x\n")
	})
}

func TestForceAndAShorterGraceCutTheDrainDelay(t *testing.T) {
	for name, tt := range map[string]struct {
		cut  func(*Server)
		want time.Duration
	}{
		"force":           {func(s *Server) { s.Force("x") }, time.Second},
		"a shorter drain": {func(s *Server) { s.drainBy(time.Now().Add(time.Second), "x", shorten) }, 2 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, Echo, Options{DrainDelay: time.Hour})
				r.dial(t)
				began := time.Now()
				r.Drain(0, "TERM")
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
	_, err := New(Echo, Options{DrainDelay: -1})
	wantErrText(t, "New", err, "DrainDelay")
}
