package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestPause(t *testing.T) {
	t.Run("G2 no client is admitted until the hold is released", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		old := r.dial(t)
		h := r.pause(t, PauseOptions{Reason: "backup"})
		late := r.dial(t)
		late.send(t, "hello\n")
		pass(time.Hour)
		late.has(t, "")
		wantState(t, r.Server, StatePaused, 1)
		wantEqual(t, "accept queue", r.ln.queued(), 1)
		old.echoes(t, "still here\n")
		h.Release()
		late.has(t, "hello\n")
		wantState(t, r.Server, StateRunning, 2)
	}))

	// The kernel may return one more connection although Accept was interrupted.
	t.Run("a connection that is accepted during the pause waits", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		r.ln.slip(1)
		h := r.pause(t, PauseOptions{})
		c := r.dial(t)
		c.send(t, "x\n")
		wantEqual(t, "accept queue", r.ln.queued(), 0)
		wantState(t, r.Server, StatePaused, 1)
		wantPhases(t, r.Server, PhaseWaiting)
		c.has(t, "")
		h.Release()
		c.has(t, "x\n")
		wantPhases(t, r.Server, PhaseServing)
	}))

	t.Run("it works for a listener that only Close interrupts", bubbled(func(t *testing.T) {
		fake := newFakeListener()
		r := newRigOn(t, plainListener{fake}, fake, Echo, Options{})
		h := r.pause(t, PauseOptions{})
		ahead, queued := r.dial(t), r.dial(t)
		ahead.send(t, "x\n")
		wantEqual(t, "accept queue, while one connection is accepted ahead", r.ln.queued(), 1)
		wantState(t, r.Server, StatePaused, 0)
		ahead.has(t, "")
		h.Release()
		ahead.has(t, "x\n")
		queued.echoes(t, "y\n")
	}))

	// Pauses come and go while clients do. Between the return of Pause and the release of its hold, the number of
	// connections that were ever admitted must not change.
	t.Run("no client is admitted in a storm of pauses and clients", bubbled(func(t *testing.T) {
		r := newRig(t, returns(nil), Options{})
		r.ln.slip(1 << 20)
		defer r.ln.slip(0)
		admitted := func() (n int) {
			r.state.With(func(st *state) {
				n = int(st.accepted)
				for _, c := range st.conns.all() {
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
	}))

	t.Run("G3 clients that connected during it are served on resume, oldest first", func(t *testing.T) {
		const clients = 50
		s, addr := serveTCP(t, Echo, Options{})
		h, err := s.Pause(PauseOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var order []string
		var queue []*net.TCPConn
		for range clients {
			c := dialTCP(t, addr)
			send(t, c, c.LocalAddr().String())
			order = append(order, c.LocalAddr().String())
			queue = append(queue, c)
		}
		if n := s.Status().Accepted; n > 1 {
			t.Errorf("%d clients were accepted during the pause, want them in the queue", n)
		}
		h.Release()
		for i, c := range queue {
			receives(t, c, order[i])
		}
		var served []string
		for info := range s.Conns() {
			served = append(served, info.Remote.String())
		}
		wantEqual(t, "order of serving", served, order)
	})

	t.Run("with PauseReject clients are told PAUSED", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		h := r.pause(t, PauseOptions{Mode: PauseReject})
		r.dial(t).ends(t, "PAUSED\n")
		wantClosed(t, r.Server, map[Reason]uint64{ReasonRejectedPaused: 1})
		h.Release()
		r.dial(t).echoes(t, "x")
	}))

	for first, second := range map[PauseMode]PauseMode{PauseQueue: PauseReject, PauseReject: PauseQueue} {
		t.Run(fmt.Sprintf("of several holds the stricter mode wins: %v and then %v", first, second), inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
			holds := map[PauseMode]*Hold{first: r.pause(t, PauseOptions{Mode: first})}
			var waiting *client
			if first == PauseQueue {
				waiting = r.dial(t)
			}
			holds[second] = r.pause(t, PauseOptions{Mode: second})
			if waiting != nil {
				waiting.ends(t, "PAUSED\n")
			}
			r.dial(t).ends(t, "PAUSED\n")
			holds[PauseReject].Release()
			patient := r.dial(t)
			patient.send(t, "x\n")
			patient.has(t, "")
			wantState(t, r.Server, StatePaused, 0)
			holds[PauseQueue].Release()
			patient.has(t, "x\n")
		}))
	}

	t.Run("before Serve it is in force from the start", bubbled(func(t *testing.T) {
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
	}))

	for want, o := range map[string]PauseOptions{
		"control character": {Reason: "two\nlines"}, "TTL -2ns is negative": {TTL: -2}, "unknown mode 7": {Mode: 7},
	} {
		t.Run("bad options are refused: "+want, func(t *testing.T) {
			s, _ := newServer(t, Echo, Options{})
			h, err := s.Pause(o)
			wantErrText(t, "Pause", err, want)
			if h != nil {
				t.Error("Pause returned a hold beside its error")
			}
		})
	}

	t.Run("too many holds are refused", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		for range maxHolds {
			if _, err := r.Pause(PauseOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		_, err := r.Pause(PauseOptions{})
		wantErr(t, "Pause", err, ErrTooManyHolds)
	}))
}

func TestHold(t *testing.T) {
	t.Run("the server is paused while any hold exists", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		a := r.pause(t, PauseOptions{Reason: "backup", By: Caller{UID: 1000, PID: 42}})
		b := r.pause(t, PauseOptions{Reason: "upgrade", TTL: time.Minute})
		began := time.Now()
		wantEqual(t, "holds", r.Status().Holds, []HoldInfo{
			{ID: "h1", Reason: "backup", Since: began, By: Caller{UID: 1000, PID: 42}},
			{ID: "h2", Reason: "upgrade", Since: began, Expires: began.Add(time.Minute)},
		})
		wantEqual(t, "info", b.Info(), r.Status().Holds[1])
		wantEqual(t, "Release says that it existed", a.Release(), true)
		wantEqual(t, "a second Release", a.Release(), false)
		wantState(t, r.Server, StatePaused, 0)
		wantErr(t, "cause of the released hold", a.Cause(), ErrReleased)
		wantErr(t, "cause of the other hold", b.Cause(), nil)
		<-a.Done()
		wantErr(t, "ReleaseHold", r.ReleaseHold(b.ID(), Caller{UID: 7, PID: 8}), nil)
		wantState(t, r.Server, StateRunning, 0)
		wantErr(t, "ReleaseHold again", r.ReleaseHold(b.ID(), Caller{}), ErrNoHold)
		logged := r.messages("hold released")
		if len(logged) != 2 {
			t.Fatalf("%d releases logged, want 2", len(logged))
		}
		for i, by := range []int64{42, 8} { // Release is logged as the placer's
			wantEqual(t, "logged PID of who released it", logged[i].ContextMap()["released_by_pid"], any(by))
		}
	}))

	t.Run("it ends after its TTL", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		h := r.pause(t, PauseOptions{TTL: time.Minute})
		c := r.dial(t)
		c.send(t, "x\n")
		wantEqual(t, "duration", elapsed(func() { <-h.Done() }), time.Minute)
		wantErr(t, "cause", h.Cause(), ErrExpired)
		c.has(t, "x\n")
		wantEqual(t, "Release of an expired hold", h.Release(), false)
	}))

	t.Run("the timer of a released hold ends no other pause", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		r.pause(t, PauseOptions{TTL: time.Minute}).Release()
		r.pause(t, PauseOptions{})
		pass(time.Hour)
		wantState(t, r.Server, StatePaused, 0)
	}))

	t.Run("TTL and Release in the same instant end it once", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		for range 200 {
			h := r.pause(t, PauseOptions{TTL: time.Second})
			time.Sleep(time.Second) // the timer fires now, too
			existed := h.Release()
			synctest.Wait()
			if expired := errors.Is(h.Cause(), ErrExpired); existed == expired {
				t.Fatalf("Release said %t, and the cause is %v", existed, h.Cause())
			}
			wantState(t, r.Server, StateRunning, 0)
		}
	}))

	t.Run("Resume releases the only hold, and ResumeAll all", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		if n, err := r.Resume(Caller{}); n != 0 || err != nil {
			t.Errorf("Resume while running: %d, %v; want 0 and no error", n, err)
		}
		a, b := r.pause(t, PauseOptions{}), r.pause(t, PauseOptions{Mode: PauseReject})
		_, err := r.Resume(Caller{UID: 1, PID: 2})
		if several, ok := errors.AsType[*HoldsError](err); !ok || len(several.Holds) != 2 || several.Holds[1].ID != b.ID() {
			t.Errorf("Resume with two holds: %v, want a *HoldsError that lists them", err)
		}
		wantState(t, r.Server, StatePaused, 0)
		if n, err := r.ResumeAll(Caller{UID: 1, PID: 2}); n != 2 || err != nil {
			t.Errorf("ResumeAll: %d, %v; want 2 and no error", n, err)
		}
		wantErr(t, "first hold", a.Cause(), ErrResumed)
		wantErr(t, "second hold", b.Cause(), ErrResumed)
		wantState(t, r.Server, StateRunning, 0)
		r.pause(t, PauseOptions{})
		if n, err := r.Resume(Caller{}); n != 1 || err != nil {
			t.Errorf("Resume with one hold: %d, %v; want 1 and no error", n, err)
		}
	}))
}

func TestWhilePaused(t *testing.T) {
	t.Run("the hold is released whether the function returns or panics", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
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
	}))

	t.Run("the function's context ends when the pause does", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		awaitEnd := func(end func()) error {
			return r.WhilePaused(t.Context(), "", func(ctx context.Context) error {
				end()
				<-ctx.Done()
				return context.Cause(ctx)
			})
		}
		wantErr(t, "after Resume", awaitEnd(func() { _, _ = r.Resume(Caller{}) }), ErrResumed)
		r.dial(t) // keeps the drain from ending
		for _, when := range []string{"when a drain begins", "during a drain"} {
			err := awaitEnd(func() { r.StartDrain(DrainOptions{}) })
			if _, ok := errors.AsType[*DrainingError](err); !ok {
				t.Errorf("WhilePaused %s: %v, want a *DrainingError", when, err)
			}
		}
	}))
}
