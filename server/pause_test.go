package server

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestG2NobodyIsAdmittedOncePauseHasReturned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		old := r.dial(t)
		h := r.pause(t, PauseOptions{Reason: "backup"})
		young := r.dial(t)
		young.send(t, "hello\n")
		pass(time.Hour)
		young.has(t, "")
		wantState(t, r.Server, StatePaused, 1)
		if n := r.ln.queued(); n != 1 {
			t.Errorf("%d clients in the accept queue, want 1: where they came", n)
		}

		old.send(t, "still here\n")
		old.has(t, "still here\n")

		h.Release()
		young.has(t, "hello\n")
		wantState(t, r.Server, StateRunning, 2)
	})
}

// The kernel may hand out one more connection although Accept was told to return.
func TestG2AConnectionThatSlipsThroughAcceptWaitsUnserved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		r.ln.slip(1)
		h := r.pause(t, PauseOptions{})
		wantUnservedUntilReleased(t, r, h)
	})
}

func TestG2HoldsForAListenerThatCannotBeWoken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := newFakeListener()
		r := newRigOn(t, plainListener{ln}, ln, Echo, Options{})
		h := r.pause(t, PauseOptions{})
		c := r.dial(t)
		c.send(t, "x\n")
		if n := r.ln.queued(); n != 0 {
			t.Fatalf("%d clients in the accept queue, want none: one is accepted ahead", n)
		}
		wantState(t, r.Server, StatePaused, 0)
		c.has(t, "")
		h.Release()
		c.has(t, "x\n")
		wantPhases(t, r.Server, PhaseServing)
	})
}

func wantUnservedUntilReleased(t *testing.T, r *rig, h *Hold) {
	t.Helper()
	c := r.dial(t)
	c.send(t, "x\n")
	if n := r.ln.queued(); n != 0 {
		t.Fatalf("%d clients in the accept queue, want none: one slips through", n)
	}
	wantState(t, r.Server, StatePaused, 1)
	wantPhases(t, r.Server, PhaseWaiting)
	c.has(t, "")
	h.Release()
	c.has(t, "x\n")
	wantPhases(t, r.Server, PhaseServing)
}

// Pauses come and go while clients do, some of whom slip through Accept: between the return of Pause and
// the release of its hold the number of those ever admitted must not change.
func TestG2HoldsInAStormOfPausesAndClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		done := HandlerFunc(func(context.Context, *Conn) error { return nil })
		r := newRig(t, done, Options{})
		r.ln.slip(1 << 20)
		t.Cleanup(func() { r.ln.slip(0) })
		admitted := func() (n int) {
			r.state.With(func(l *state) {
				n = int(l.accepted)
				for _, c := range l.conns.all() {
					if Phase(c.phase.Load()) == PhaseWaiting {
						n--
					}
				}
			})
			return n
		}
		stop := make(chan struct{})
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() {
				for {
					select {
					case <-stop:
						return
					case <-time.After(100 * time.Microsecond):
					}
					if nc, err := r.ln.dialFrom("198.51.100.1"); err == nil {
						_ = nc.Close()
					}
				}
			})
		}
		for range 300 {
			h, err := r.Pause(PauseOptions{})
			if err != nil {
				t.Fatalf("Pause: %v", err)
			}
			before := admitted()
			pass(time.Millisecond)
			if now := admitted(); now != before {
				t.Fatalf("%d connections were admitted during a pause", now-before)
			}
			h.Release()
			pass(time.Millisecond)
		}
		close(stop)
		all.Wait()
		if n := admitted(); n < 300 {
			t.Errorf("only %d clients were ever admitted: this was no storm", n)
		}
	})
}

func TestPauseStandsUntilTheLastHoldIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		a := r.pause(t, PauseOptions{Reason: "backup", By: Caller{UID: 1000, PID: 42}})
		b := r.pause(t, PauseOptions{Reason: "upgrade", TTL: time.Minute})
		began := time.Now()
		wantEqual(t, "holds", r.Status().Holds, []HoldInfo{
			{ID: "h1", Reason: "backup", Since: began, By: Caller{UID: 1000, PID: 42}},
			{ID: "h2", Reason: "upgrade", Since: began, Expires: began.Add(time.Minute)},
		})
		wantEqual(t, "info", b.Info(), r.Status().Holds[1])

		if !a.Release() || a.Release() {
			t.Error("the first Release must say that the hold stood, the second that it did not")
		}
		wantState(t, r.Server, StatePaused, 0)
		wantErr(t, "released hold", a.Cause(), ErrReleased)
		if b.Cause() != nil {
			t.Errorf("standing hold has cause %v", b.Cause())
		}
		<-a.Done()
		if err := r.ReleaseHold(b.ID(), Caller{}); err != nil {
			t.Errorf("ReleaseHold: %v", err)
		}
		wantState(t, r.Server, StateRunning, 0)
		wantErr(t, "releasing it again", r.ReleaseHold(b.ID(), Caller{}), ErrNoHold)
	})
}

func TestHoldExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		h := r.pause(t, PauseOptions{TTL: time.Minute})
		c := r.dial(t)
		c.send(t, "x\n")
		if took := elapsed(func() { <-h.Done() }); took != time.Minute {
			t.Errorf("hold ended after %v, want 1m", took)
		}
		wantErr(t, "hold", h.Cause(), ErrExpired)
		c.has(t, "x\n")
		if h.Release() {
			t.Error("Release of an expired hold says that it stood")
		}
	})
}

// A timer of a hold that is gone must not end another's pause.
func TestReleasedHoldsTimerTouchesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		r.pause(t, PauseOptions{TTL: time.Minute}).Release()
		r.pause(t, PauseOptions{})
		pass(time.Hour)
		wantState(t, r.Server, StatePaused, 0)
	})
}

func TestExpiryAndReleaseAtTheSameInstantEndTheHoldOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		for range 200 {
			h := r.pause(t, PauseOptions{TTL: time.Second})
			time.Sleep(time.Second) // the timer fires now, too
			stood := h.Release()
			synctest.Wait()
			if expired := errors.Is(h.Cause(), ErrExpired); stood == expired {
				t.Fatalf("Release said %t, and the cause is %v", stood, h.Cause())
			}
			wantState(t, r.Server, StateRunning, 0)
		}
	})
}

func TestResumeReleasesEveryHold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		if n, err := r.Resume(Caller{}); n != 0 || err != nil {
			t.Errorf("Resume while running: %d, %v; want 0 and no error", n, err)
		}
		a, b := r.pause(t, PauseOptions{}), r.pause(t, PauseOptions{Mode: PauseReject})
		if n, err := r.Resume(Caller{}); n != 2 || err != nil {
			t.Errorf("Resume: %d, %v; want 2 and no error", n, err)
		}
		wantErr(t, "first hold", a.Cause(), ErrResumed)
		wantErr(t, "second hold", b.Cause(), ErrResumed)
		wantState(t, r.Server, StateRunning, 0)
	})
}

func TestRejectingPauseTurnsClientsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		r.pause(t, PauseOptions{})
		waiting := r.dial(t)
		strict := r.pause(t, PauseOptions{Mode: PauseReject}) // the stricter of two counts
		waiting.ends(t, "PAUSED\n")
		r.dial(t).ends(t, "PAUSED\n")
		wantClosed(t, r.Server, map[Reason]uint64{ReasonRejectedPaused: 2})
		strict.Release()
		patient := r.dial(t)
		patient.send(t, "x\n")
		patient.has(t, "")
		wantState(t, r.Server, StatePaused, 0)
	})
}

func TestPauseBeforeServeIsInForceFromTheStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := newServer(t, Echo, Options{})
		r := &rig{Server: s, ln: newFakeListener()}
		h := r.pause(t, PauseOptions{})
		wantState(t, s, StateStarting, 0)
		serve(t, s, r.ln)
		c := r.dial(t)
		c.send(t, "x\n")
		c.has(t, "")
		wantState(t, s, StatePaused, 0)
		h.Release()
		c.has(t, "x\n")
	})
}

func TestPauseRefusesWhatMakesNoSense(t *testing.T) {
	s, _ := newServer(t, Echo, Options{})
	for want, o := range map[string]PauseOptions{
		"control character": {Reason: "two\nlines"},
		"negative":          {TTL: -2},
		"unknown mode 7":    {Mode: 7},
	} {
		h, err := s.Pause(o)
		wantErrText(t, "Pause", err, want)
		if h != nil {
			t.Errorf("Pause(%+v) returned a hold beside its error", o)
		}
	}
}

func TestPauseModesHaveNames(t *testing.T) {
	for name, want := range map[string]PauseMode{"": PauseQueue, "hold": PauseQueue, "reject": PauseReject} {
		got, err := ParsePauseMode(name)
		if got != want || err != nil {
			t.Errorf("ParsePauseMode(%q) = %v, %v; want %v", name, got, err, want)
		}
		if name != "" && got.String() != name {
			t.Errorf("%v.String() = %q, want %q", got, got.String(), name)
		}
	}
	_, err := ParsePauseMode("stop")
	wantErrText(t, "ParsePauseMode", err, `"stop"`)
	if got := PauseMode(9).String(); got != "PauseMode(9)" {
		t.Errorf("unknown mode is %q", got)
	}
}

func TestWhilePausedReleasesWhateverBecomesOfTheFunction(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		failed := errors.New("failed")
		err := r.WhilePaused(t.Context(), "backup", func(context.Context) error {
			wantState(t, r.Server, StatePaused, 0)
			return failed
		})
		wantErr(t, "WhilePaused", err, failed)
		wantState(t, r.Server, StateRunning, 0)

		func() {
			defer func() { _ = recover() }()
			_ = r.WhilePaused(t.Context(), "", func(context.Context) error { panic("oh") })
		}()
		wantState(t, r.Server, StateRunning, 0)
	})
}

func TestWhilePausedTellsTheFunctionThatThePauseIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		err := r.WhilePaused(t.Context(), "", func(ctx context.Context) error {
			_, _ = r.Resume(Caller{})
			<-ctx.Done()
			return context.Cause(ctx)
		})
		wantErr(t, "WhilePaused", err, ErrResumed)

		err = r.WhilePaused(t.Context(), "", func(ctx context.Context) error {
			r.StartDrain(DrainOptions{Grace: 0, Reason: "test"})
			<-ctx.Done()
			return context.Cause(ctx)
		})
		if _, ok := errors.AsType[*DrainingError](err); !ok {
			t.Errorf("WhilePaused when the server drained: %v, want a *DrainingError", err)
		}
		err = r.WhilePaused(t.Context(), "", func(context.Context) error {
			t.Error("called although the server is draining")
			return nil
		})
		if _, ok := errors.AsType[*DrainingError](err); !ok {
			t.Errorf("WhilePaused while draining: %v, want a *DrainingError", err)
		}
	})
}
