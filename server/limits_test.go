package server

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestClientsOverTheLimitWaitInTheQueueForAPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Limits: Limits{MaxConns: 2}})
		a, b := r.dial(t), r.dial(t)
		c, d := r.dial(t), r.dial(t)
		c.send(t, "x\n")
		pass(time.Hour)
		c.has(t, "")
		wantEqual(t, "accept queue", r.ln.queued(), 2)
		wantState(t, r.Server, StateRunning, 2)
		a.leave(t)
		c.has(t, "x\n")
		wantEqual(t, "accept queue", r.ln.queued(), 1)
		b.leave(t)
		d.send(t, "y\n")
		d.has(t, "y\n")
	})
}

// The place is taken until the connection is closed: lingering ones hold a file, too.
func TestLingeringConnectionsCountAgainstTheLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Limits: Limits{MaxConns: 1}})
		r.dial(t)
		_ = r.Kill(1)
		next := r.dial(t)
		next.send(t, "x\n")
		next.has(t, "")
		pass(lingerTimeout)
		next.has(t, "x\n")
	})
}

func TestClientsOverTheLimitAreToldBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Limits: Limits{MaxConns: 1, AtLimit: LimitReject}})
		a := r.dial(t)
		r.dial(t).ends(t, "BUSY\n")
		wantClosed(t, r.Server, map[Reason]uint64{ReasonRejectedLimit: 1})
		a.leave(t)
		b := r.dial(t)
		b.send(t, "x\n")
		b.has(t, "x\n")
	})
}

// A rejection lingers, and holds a file meanwhile: only so many may at a time.
func TestRejectionsThatLingerAreBoundedAndHoldNobodyUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Limits: Limits{MaxConns: 1, AtLimit: LimitReject}})
		r.dial(t)
		for range 32 + 8 {
			r.dial(t)
		}
		wantState(t, r.Server, StateRunning, 1+40)
		wantEqual(t, "accept queue", r.ln.queued(), 0)
		pass(lingerTimeout)
		wantState(t, r.Server, StateRunning, 1)
		wantClosed(t, r.Server, map[Reason]uint64{ReasonRejectedLimit: 32 + 8})
	})
}

func TestDrainLiftsTheLimitPerAddressForThoseInTheQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Limits: Limits{MaxConnsPerIP: 1}, Drain: DrainOptions{Grace: time.Second}})
		r.pause(t, PauseOptions{})
		first, second := r.dial(t), r.dial(t)
		r.StartDrain(DrainOptions{Grace: 0, Reason: "x"})
		pass(quietTime)
		first.has(t, "SHUTDOWN 1 x\n")
		second.has(t, "SHUTDOWN 1 x\n")
		first.leave(t)
		second.leave(t)
	})
}

func TestLimitPerAddressRejectsWhateverTheOtherLimitSays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Limits: Limits{MaxConnsPerIP: 2}})
		first, _ := r.dialFrom(t, "198.51.100.1"), r.dialFrom(t, "198.51.100.1")
		r.dialFrom(t, "198.51.100.1").ends(t, "BUSY\n")
		r.dialFrom(t, "::ffff:198.51.100.1").ends(t, "BUSY\n") // the same, written otherwise
		other := r.dialFrom(t, "2001:db8::1")
		other.send(t, "x\n")
		other.has(t, "x\n")
		first.leave(t)
		again := r.dialFrom(t, "198.51.100.1")
		again.send(t, "x\n")
		again.has(t, "x\n")
		again.leave(t)
		r.state.With(func(l *state) { wantEqual(t, "addresses kept", len(l.perClient), 2) })
		for info := range r.Conns() {
			_ = r.Kill(info.ID)
		}
		pass(lingerTimeout)
		r.state.With(func(l *state) { wantEqual(t, "addresses kept when all have left", len(l.perClient), 0) })
	})
}

func TestLimitPerAddressIsJudgedWhenThePauseIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Limits: Limits{MaxConnsPerIP: 1}})
		first := r.dial(t)
		r.ln.slip(1)
		h := r.pause(t, PauseOptions{})
		second := r.dial(t)
		second.send(t, "x\n")
		second.has(t, "")
		first.leave(t)
		h.Release()
		second.has(t, "x\n")
	})
}

func TestLimitPerAddressLeavesThoseWithoutAddressAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Limits: Limits{MaxConnsPerIP: 1}})
		for range 3 {
			served, far := newFakePair(r.ln.Addr(), unnamed{})
			r.ln.hand(served)
			c := &client{far}
			c.send(t, "x\n")
			c.has(t, "x\n")
		}
	})
}

// unnamed is the address of a client of a Unix socket.
type unnamed struct{}

func (unnamed) Network() string { return "unix" }
func (unnamed) String() string  { return "@" }

func TestKillReachesAConnectionThatWaitsAtTheGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		r.ln.slip(1)
		r.pause(t, PauseOptions{})
		c := r.dial(t)
		wantPhases(t, r.Server, PhaseWaiting)
		if n := r.KillFunc(func(ConnInfo) bool { return true }); n != 1 {
			t.Errorf("KillFunc killed %d, want 1", n)
		}
		if took := elapsed(func() { c.ends(t, "") }); took != 0 {
			t.Errorf("the killed client saw the end after %v, want at once", took)
		}
		wantClosed(t, r.Server, map[Reason]uint64{ReasonKilled: 1})
	})
}

func TestCloseOfAServerWithSomebodyAtTheGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		r.ln.slip(1)
		r.pause(t, PauseOptions{})
		r.dial(t)
		if took := elapsed(func() { _ = r.Close() }); took > abandonAfter {
			t.Errorf("Close took %v, want at most %v", took, abandonAfter)
		}
		wantState(t, r.Server, StateStopped, 0)
		if rep := reportOf(r.Report()); rep.Stuck != 0 {
			t.Errorf("report %+v, want none stuck", rep)
		}
	})
}
