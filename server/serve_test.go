package server

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestDrainBeforeServe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := newServer(t, Echo, Options{})
		s.StartDrain(DrainOptions{Grace: time.Hour, Reason: "TERM"})
		<-s.Done()
		wantState(t, s, StateStopped, 0)
		ln := newFakeListener()
		wantErr(t, "Serve after the end", s.Serve(ln), ErrServerClosed)
		if !ln.isClosed() {
			t.Error("Serve after the end left its listener open")
		}
	})
}

func TestServeDuringADrainWaitsForItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		r.dial(t)
		r.StartDrain(DrainOptions{Grace: time.Minute, Reason: "TERM"})
		ln := newFakeListener()
		took := elapsed(func() { wantErr(t, "Serve", r.Serve(ln), ErrServerClosed) })
		wantEqual(t, "time that Serve took", took, time.Minute+lingerTimeout)
		if !ln.isClosed() {
			t.Error("Serve left its listener open")
		}
	})
}

func TestDrainStopsEveryListener(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		other := &rig{Server: r.Server, ln: newFakeListener()}
		other.served = serve(t, r.Server, other.ln)
		a, b := r.dial(t), other.dial(t)
		r.StartDrain(DrainOptions{Grace: time.Second, Reason: "TERM"})
		a.ends(t, "SHUTDOWN 1 TERM\n")
		b.ends(t, "SHUTDOWN 1 TERM\n")
		wantErr(t, "first Serve", <-r.served, ErrServerClosed)
		wantErr(t, "second Serve", <-other.served, ErrServerClosed)
		if !r.ln.isClosed() || !other.ln.isClosed() {
			t.Error("a listener was left open")
		}
	})
}

func TestDrainOfAListenerThatCannotBeWokenClosesIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := newFakeListener()
		r := newRigOn(t, plainListener{ln}, ln, Echo, Options{})
		c := r.dial(t)
		r.StartDrain(DrainOptions{Grace: time.Second, Reason: "TERM"})
		c.ends(t, "SHUTDOWN 1 TERM\n")
		wantErr(t, "Serve", <-r.served, ErrServerClosed)
	})
}

// Refused, with the deadline, is what every mutation of a pause is from the drain's begin on.
func TestDrainingIsFinal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		h := r.pause(t, PauseOptions{})
		c := r.dial(t)
		deadline := time.Now().Add(time.Minute)
		r.StartDrain(DrainOptions{Grace: time.Minute, Reason: "TERM"})
		for range 2 { // while draining, and when stopped
			_, pauseErr := r.Pause(PauseOptions{})
			_, resumeErr := r.Resume(Caller{})
			for what, err := range map[string]error{"Pause": pauseErr, "Resume": resumeErr, "ReleaseHold": r.ReleaseHold(h.ID(), Caller{})} {
				d, ok := errors.AsType[*DrainingError](err)
				if !ok {
					t.Errorf("%s: %v, want a *DrainingError", what, err)
				} else if !d.Deadline.Equal(deadline) {
					t.Errorf("%s says deadline %v, want %v", what, d.Deadline, deadline)
				}
				wantErrText(t, what, err, deadline.Format(time.RFC3339))
			}
			if h.Release() {
				t.Error("the hold still stood after the drain began")
			}
			c.leave(t)
			<-r.Done()
		}
	})
}
