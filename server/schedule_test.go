package server

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// arrivals notes when each client of a rig is told and when it sees the end, in a bubble.
type arrivals struct {
	began time.Time
	times lockedValue[[2][]time.Duration] // of each client, since began; 0 if not yet
}

func (a *arrivals) told() []time.Duration  { return a.all(0) }
func (a *arrivals) ended() []time.Duration { return a.all(1) }

func (a *arrivals) all(which int) (times []time.Duration) {
	a.times.With(func(t *[2][]time.Duration) { times = slices.Clone(t[which]) })
	return times
}

func (a *arrivals) note(which, client int) {
	a.times.With(func(t *[2][]time.Duration) { t[which][client] = time.Since(a.began) })
}

// watch reads what arrives at each client until its stream ends. A client that leaves half-closes when it is told.
func watch(clients []*client, leave bool) *arrivals {
	a := &arrivals{began: time.Now()}
	a.times.With(func(t *[2][]time.Duration) {
		t[0], t[1] = make([]time.Duration, len(clients)), make([]time.Duration, len(clients))
	})
	for i, c := range clients {
		go func() {
			buf := make([]byte, 1<<10)
			for {
				n, err := c.Read(buf)
				if strings.Contains(string(buf[:n]), "SHUTDOWN") {
					a.note(0, i)
					if leave {
						_ = c.CloseWrite()
					}
				}
				if err != nil {
					a.note(1, i)
					_ = c.Close()
					return
				}
			}
		}()
	}
	return a
}

// most returns how many of times fall into one window at most.
func most(times []time.Duration, window time.Duration) (n int) {
	times = slices.Sorted(slices.Values(times))
	for i, from := 0, 0; i < len(times); i++ {
		for times[i]-times[from] >= window {
			from++
		}
		n = max(n, i-from+1)
	}
	return n
}

func (r *rig) dialMany(t *testing.T, n int) (clients []*client) {
	t.Helper()
	for range n {
		clients = append(clients, r.dial(t))
	}
	return clients
}

func TestSpread(t *testing.T) {
	const spread, grace = 10 * time.Second, 5 * time.Second
	opts := Options{Drain: DrainOptions{Spread: spread, Grace: grace}}

	t.Run("clients are told one after another, and each has the whole grace period", inBubble(Echo, opts, func(t *testing.T, r *rig) {
		clients := r.dialMany(t, 500)
		a := watch(clients, false)
		rep, took := drainIn(r.Server, 0, "x")
		synctest.Wait()
		if most := most(a.told(), time.Second); most > 2*500/10 {
			t.Errorf("%d of 500 clients were told in one second", most)
		}
		for i := range clients {
			if had := a.ended()[i] - a.told()[i]; a.told()[i] == 0 || had < grace-acceptorsTimeout || had > grace+lingerTimeout {
				t.Errorf("client %d was told after %v and had %v", i, a.told()[i], had)
			}
		}
		if last := slices.Max(a.told()); last < spread-time.Second || last > spread {
			t.Errorf("the last was told after %v", last)
		}
		if took < spread+grace-time.Second || took > spread+grace+lingerTimeout {
			t.Errorf("the drain took %v", took)
		}
		wantEqual(t, "told, notified, at the deadline", []int{rep.Told, rep.Notified, rep.AtDeadline}, []int{500, 500, 500})
	}))

	t.Run("a drain with a grace period of its own keeps the server's spread", inBubble(Echo, opts, func(t *testing.T, r *rig) {
		clients := r.dialMany(t, 50)
		a := watch(clients, false)
		_, took := drainIn(r.Server, time.Second, "x")
		synctest.Wait()
		if last := slices.Max(a.told()); last < spread/2 || last > spread || took < spread {
			t.Errorf("the last was told after %v, and the drain took %v; want a spread of %v", last, took, spread)
		}
	}))

	t.Run("the notice names the client's own time", inBubble(Echo, opts, func(t *testing.T, r *rig) {
		clients := r.dialMany(t, 20)
		r.drain(0, "x")
		pass(spread)
		for _, c := range clients {
			c.has(t, "SHUTDOWN 5 x\n")
		}
	}))

	t.Run("the status says how many were told so far", inBubble(Echo, opts, func(t *testing.T, r *rig) {
		r.dialMany(t, 100)
		began := time.Now()
		r.drain(0, "x")
		pass(acceptorsTimeout)
		info := r.Status().Drain
		wantEqual(t, "told until", info.TellUntil.Sub(began), spread)
		wantEqual(t, "deadline", info.Deadline.Sub(began), spread+grace)
		pass(grace - acceptorsTimeout - time.Millisecond) // no grace period has ended
		if info = r.Status().Drain; info.Told < 40 || info.Told > 60 || info.Untold != 100-info.Told || info.Notified != info.Told {
			t.Errorf("half-way: %+v, want about 50 of 100 told", info)
		}
		wantEqual(t, "told", r.Status().Told, info.Told)
	}))

	t.Run("clients from the accept queue take part",
		inBubble(Echo, Options{Drain: opts.Drain, Limits: Limits{MaxConns: 10}}, func(t *testing.T, r *rig) {
			a := watch(r.dialMany(t, 60), true) // the limit keeps 50 in the queue
			rep, _ := drainIn(r.Server, 0, "x")
			synctest.Wait()
			if most := most(a.told(), time.Second); most > 20 { // they come at random, not in shares
				t.Errorf("%d of 60 clients were told in one second", most)
			}
			wantEqual(t, "left by themselves", rep.Left, 60)
		}))

	t.Run("the server stops when the last client has left", inBubble(Echo, opts, func(t *testing.T, r *rig) {
		a := watch(r.dialMany(t, 1), true)
		_, took := drainIn(r.Server, 0, "x")
		wantEqual(t, "duration", took, a.told()[0])
	}))

	t.Run("Draining waits for the last notice", inBubble(Echo, opts, func(t *testing.T, r *rig) {
		a := watch(r.dialMany(t, 50), false)
		r.drain(0, "x")
		<-r.Draining()
		synctest.Wait()
		wantEqual(t, "not told", slices.Index(a.told(), 0), -1)
		wantState(t, r.Server, StateDraining, r.Status().Connections)
	}))

	t.Run("a handler is notified of the drain when its client is told", bubbled(func(t *testing.T) {
		heard := make(chan time.Time, 1)
		r := newRig(t, HandlerFunc(func(_ context.Context, c *Conn) error {
			<-c.Draining()
			heard <- time.Now()
			return nil
		}), opts)
		a := watch(r.dialMany(t, 1), false)
		_, _ = drainIn(r.Server, 0, "x")
		wantEqual(t, "heard", (<-heard).Sub(a.began), a.told()[0])
	}))

	t.Run("a shorter drain tells the rest at once", inBubble(Echo, opts, func(t *testing.T, r *rig) {
		a := watch(r.dialMany(t, 100), false)
		r.drain(0, "x")
		pass(3 * time.Second)
		wantEqual(t, "changed", r.StartDrain(DrainOptions{Grace: time.Second}), true)
		rep, took := drainIn(r.Server, 0, "y")
		wantEqual(t, "duration", took, time.Second)
		wantEqual(t, "told", rep.Told, 100)
		wantEqual(t, "the last was told after", slices.Max(a.told()), 3*time.Second)
	}))

	t.Run("a shorter drain can be spread again", inBubble(Echo, opts, func(t *testing.T, r *rig) {
		a := watch(r.dialMany(t, 100), false)
		r.drain(0, "x")
		pass(time.Second)
		wantEqual(t, "changed", r.StartDrain(DrainOptions{Grace: 3 * time.Second, Spread: 4 * time.Second}), true)
		<-r.Done()
		if last := slices.Max(a.told()); last < 4*time.Second || last > 5*time.Second {
			t.Errorf("the last was told after %v, want 4 to 5 s", last)
		}
		for i := range a.told() {
			if had := a.ended()[i] - a.told()[i]; a.told()[i] > time.Second && had < 3*time.Second {
				t.Errorf("client %d had %v", i, had)
			}
		}
	}))

	t.Run("Shutdown with a deadline keeps to it", inBubble(Echo, opts, func(t *testing.T, r *rig) {
		a := watch(r.dialMany(t, 50), false)
		ctx, cancel := context.WithTimeout(t.Context(), 8*time.Second)
		defer cancel()
		wantErr(t, "Shutdown", r.Shutdown(ctx), ErrDeadline) // the last client's deadline is a little before that of ctx
		if last := slices.Max(a.told()); last > 8*time.Second-grace {
			t.Errorf("the last was told after %v, want at most 3 s", last)
		}
	}))

	t.Run("Force sends no further notices", inBubble(Echo, opts, func(t *testing.T, r *rig) {
		a := watch(r.dialMany(t, 100), false)
		r.drain(0, "x")
		pass(2 * time.Second)
		_ = r.Close()
		synctest.Wait()
		told := len(a.told()) - len(slices.DeleteFunc(slices.Clone(a.told()), func(d time.Duration) bool { return d > 0 }))
		rep := report(t, r.Server)
		if told < 10 || told > 30 || rep.Notified != told || rep.NoticeFailed != 0 || rep.Forced != 100 {
			t.Errorf("%d clients were told; %+v", told, rep)
		}
	}))
}

func TestCancelDrain(t *testing.T) {
	opts := Options{Drain: DrainOptions{Delay: 10 * time.Second, Grace: 5 * time.Second}}

	t.Run("the server continues to serve", inBubble(Echo, opts, func(t *testing.T, r *rig) {
		c := r.dial(t)
		r.drain(0, "x")
		pass(10*time.Second - 1)
		wantErr(t, "CancelDrain", r.CancelDrain(Caller{UID: 7, PID: 8}), nil)
		wantState(t, r.Server, StateRunning, 1)
		pass(time.Hour)
		c.echoes(t, "x\n")
		r.dial(t).echoes(t, "y\n")
		if st := r.Status(); st.Drain != nil {
			t.Errorf("status has a drain: %+v", st.Drain)
		}
		entries := r.messages("drain cancelled")
		if len(entries) != 1 || entries[0].ContextMap()["uid"] != int64(7) || entries[0].ContextMap()["pid"] != int64(8) {
			t.Errorf("log: %v", entries)
		}
	}))

	t.Run("a paused server is paused again", inBubble(Echo, opts, func(t *testing.T, r *rig) {
		h := r.pause(t, PauseOptions{})
		r.drain(0, "x")
		wantErr(t, "CancelDrain", r.CancelDrain(Caller{}), nil)
		wantState(t, r.Server, StatePaused, 0)
		queued := r.dial(t)
		queued.send(t, "x\n")
		queued.has(t, "")
		h.Release()
		queued.has(t, "x\n")
	}))

	t.Run("the server can be drained again", inBubble(Echo, opts, func(t *testing.T, r *rig) {
		var called atomic.Int64
		r.RegisterOnShutdown(func() { called.Add(1) })
		c := r.dial(t)
		r.drain(0, "first")
		wantErr(t, "CancelDrain", r.CancelDrain(Caller{}), nil)
		began := time.Now()
		r.drain(0, "second") // at once, while the goroutine of the first may still run
		<-r.Done()
		wantEqual(t, "duration", time.Since(began), 15*time.Second+lingerTimeout)
		c.has(t, "SHUTDOWN 5 second\n")
		wantEqual(t, "calls on shutdown", called.Load(), int64(2))
	}))

	t.Run("refuses", inBubble(Echo, opts, func(t *testing.T, r *rig) {
		c := r.dial(t)
		wantErr(t, "CancelDrain of a running server", r.CancelDrain(Caller{}), ErrNotDraining)
		r.drain(0, "x")
		pass(10 * time.Second)
		wantErr(t, "CancelDrain once clients are told", r.CancelDrain(Caller{}), ErrDrainFinal)
		c.leave(t)
		<-r.Done()
		wantErr(t, "CancelDrain of a stopped server", r.CancelDrain(Caller{}), ErrDrainFinal)
	}))

	for name, begin := range map[string]func(*Server){
		"a final drain":                     func(s *Server) { s.StartDrain(DrainOptions{Final: true}) },
		"a drain that became final":         func(s *Server) { s.StartDrain(DrainOptions{}); s.StartDrain(DrainOptions{Final: true}) },
		"Drain, which waits for the stop":   func(s *Server) { go s.Drain(DrainOptions{}) },
		"Shutdown, which waits for the end": func(s *Server) { go func() { _ = s.Shutdown(context.Background()) }() },
		"Force":                             func(s *Server) { s.StartDrain(DrainOptions{}); s.Force("x") },
	} {
		t.Run("refuses "+name, inBubble(Echo, opts, func(t *testing.T, r *rig) {
			begin(r.Server)
			synctest.Wait()
			wantErr(t, "CancelDrain", r.CancelDrain(Caller{}), ErrDrainFinal)
			<-r.Done()
		}))
	}
}

func TestExtendDrain(t *testing.T) {
	t.Run("clients have more time, and are not told again", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		began := time.Now()
		r.drain(5*time.Second, "x")
		pass(4 * time.Second)
		extended, err := r.ExtendDrain(10*time.Second, Caller{})
		if extended != 10*time.Second || err != nil {
			t.Errorf("extended by %v, %v", extended, err)
		}
		wantEqual(t, "deadline", r.Status().Drain.Deadline.Sub(began), 15*time.Second)
		for info := range r.Conns() {
			wantEqual(t, "the connection's deadline", info.DrainDeadline.Sub(began), 15*time.Second)
		}
		c.ends(t, "SHUTDOWN 5 x\n")
		wantEqual(t, "duration", time.Since(began), 15*time.Second)
	}))

	t.Run("each client of a spread drain has more time", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		const grace = 5 * time.Second
		a := watch(r.dialMany(t, 50), false)
		r.StartDrain(DrainOptions{Grace: grace, Spread: 10 * time.Second})
		pass(4 * time.Second)
		if _, err := r.ExtendDrain(3*time.Second, Caller{}); err != nil {
			t.Error(err)
		}
		<-r.Done()
		for i := range a.told() {
			if had := a.ended()[i] - a.told()[i]; had < grace+3*time.Second-acceptorsTimeout {
				t.Errorf("client %d was told after %v and had %v", i, a.told()[i], had)
			}
		}
	}))

	t.Run("never beyond the supervisor's stop timeout",
		inBubble(Echo, Options{Drain: DrainOptions{StopTimeout: 20 * time.Second}}, func(t *testing.T, r *rig) {
			r.dial(t)
			began := time.Now()
			r.drain(5*time.Second, "x")
			extended, err := r.ExtendDrain(time.Minute, Caller{})
			if extended != 13*time.Second || err != nil {
				t.Errorf("extended by %v, %v, want 13s", extended, err)
			}
			extended, err = r.ExtendDrain(time.Minute, Caller{})
			if extended != 0 || err != nil {
				t.Errorf("extended again by %v, %v, want 0", extended, err)
			}
			<-r.Done()
			if took := time.Since(began); took > 20*time.Second {
				t.Errorf("the drain took %v", took)
			}
		}))

	t.Run("refuses", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		extend := func() error { _, err := r.ExtendDrain(time.Minute, Caller{}); return err }
		wantErr(t, "a running server", extend(), ErrNotDraining)
		r.dial(t)
		r.drain(time.Second, "x")
		_, err := r.ExtendDrain(0, Caller{})
		wantErrText(t, "no time", err, "0s is not more than 0")
		pass(time.Second + 1)
		wantErr(t, "after the deadline", extend(), ErrDrainFinal)
		<-r.Done()
		wantErr(t, "a stopped server", extend(), ErrDrainFinal)
	}))
}

func TestEvict(t *testing.T) {
	opts := Options{Drain: DrainOptions{Grace: 5 * time.Second}}

	t.Run("clients are told and closed, and the server stays up", inBubble(Echo, opts, func(t *testing.T, r *rig) {
		stays, leaves := r.dial(t), r.dial(t)
		stays.send(t, "abc")
		stays.has(t, "abc")
		began := time.Now()
		h := r.pause(t, PauseOptions{Reason: "maintenance", Evict: true})
		leaves.has(t, "SHUTDOWN 5 maintenance\n")
		stays.send(t, "def")
		wantEqual(t, "told", r.Status().Told, 2)
		leaves.leave(t)
		stays.ends(t, "\nSHUTDOWN 5 maintenance\ndef")
		wantEqual(t, "duration", time.Since(began), 5*time.Second)
		wantState(t, r.Server, StatePaused, 0)
		wantClosed(t, r.Server, map[Reason]uint64{ReasonClientLeft: 1, ReasonEvicted: 1})
		wantEqual(t, "notices sent", r.Status().NoticesSent, uint64(2))
		queued := r.dial(t)
		queued.send(t, "x\n")
		pass(time.Minute)
		queued.has(t, "")
		h.Release()
		queued.has(t, "x\n")
		pass(time.Hour)
		queued.echoes(t, "y\n")
	}))

	t.Run("its notices can be spread", inBubble(Echo, opts, func(t *testing.T, r *rig) {
		a := watch(r.dialMany(t, 100), false)
		r.pause(t, PauseOptions{Evict: true, Spread: 10 * time.Second})
		pass(20 * time.Second)
		if most := most(a.told(), time.Second); most > 20 {
			t.Errorf("%d of 100 clients were told in one second", most)
		}
		for i := range a.told() {
			if had := a.ended()[i] - a.told()[i]; had < 5*time.Second || had > 5*time.Second+lingerTimeout {
				t.Errorf("client %d had %v", i, had)
			}
		}
	}))

	t.Run("a resume ends it: clients that were not told stay", inBubble(Echo, opts, func(t *testing.T, r *rig) {
		r.dialMany(t, 100)
		h := r.pause(t, PauseOptions{Evict: true, Spread: 10 * time.Second})
		pass(5 * time.Second)
		h.Release()
		told := r.Status().Told
		pass(time.Hour)
		wantState(t, r.Server, StateRunning, 100-told)
		wantClosed(t, r.Server, map[Reason]uint64{ReasonEvicted: uint64(told)})
	}))

	t.Run("handlers see why", bubbled(func(t *testing.T) {
		conns := make(chan *Conn, 1)
		r := newRig(t, HandlerFunc(func(ctx context.Context, c *Conn) error {
			conns <- c
			<-c.Draining()
			return untilDone(ctx, c)
		}), opts)
		c := r.dial(t)
		r.pause(t, PauseOptions{Evict: true})
		conn := <-conns
		deadline, ok := conn.DrainDeadline()
		wantEqual(t, "draining", ok, true)
		wantEqual(t, "time left", time.Until(deadline), 5*time.Second)
		wantEqual(t, "reason", conn.DrainReason(), "evicted")
		c.ends(t, "SHUTDOWN 5 evicted\n")
	}))

	t.Run("a drain does not tell evicted clients again, nor gives them more time", inBubble(Echo, opts, func(t *testing.T, r *rig) {
		told := r.dial(t)
		r.pause(t, PauseOptions{Evict: true})
		pass(3 * time.Second)
		began := time.Now()
		rep, _ := drainIn(r.Server, time.Minute, "TERM")
		wantEqual(t, "duration", time.Since(began), 2*time.Second+lingerTimeout)
		told.has(t, "SHUTDOWN 5 evicted\n")
		wantEqual(t, "told by the drain, at the deadline", []int{rep.Told, rep.AtDeadline}, []int{0, 1})
	}))

	t.Run("a drain takes over clients that were not told", inBubble(Echo, opts, func(t *testing.T, r *rig) {
		clients := r.dialMany(t, 100)
		r.pause(t, PauseOptions{Evict: true, Spread: time.Hour})
		pass(time.Minute)
		rep, took := drainIn(r.Server, time.Second, "TERM")
		wantEqual(t, "duration", took, time.Second+lingerTimeout)
		for i, c := range clients {
			wantEqual(t, fmt.Sprint("notices of client ", i), strings.Count(c.arrived(), "SHUTDOWN"), 1)
		}
		if rep.Told < 90 {
			t.Errorf("the drain told %d, want nearly all of 100", rep.Told)
		}
	}))

	t.Run("no grace period closes at once", inBubble(Echo, Options{Drain: DrainOptions{Grace: Off}}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		r.pause(t, PauseOptions{Evict: true})
		c.ends(t, "SHUTDOWN 0 evicted\n")
	}))

	t.Run("it can have a grace period of its own", inBubble(Echo, opts, func(t *testing.T, r *rig) {
		c := r.dial(t)
		began := time.Now()
		h := r.pause(t, PauseOptions{Evict: true, Grace: time.Minute})
		wantEqual(t, "grace of the hold", h.Info().Grace, time.Minute)
		c.ends(t, "SHUTDOWN 60 evicted\n")
		wantEqual(t, "duration", time.Since(began), time.Minute)
		h.Release()
		c = r.dial(t)
		r.pause(t, PauseOptions{Evict: true, Grace: Off})
		c.ends(t, "SHUTDOWN 0 evicted\n")
	}))

	for name, o := range map[string]PauseOptions{
		"spread -2ns is negative":   {Evict: true, Spread: -2},
		"grace -2ns is negative":    {Evict: true, Grace: -2},
		"a spread needs Evict":      {Spread: time.Second},
		"a grace period needs Ev":   {Grace: Off},
		"reason: \"a\\nb\" has a c": {Evict: true, Reason: "a\nb"},
	} {
		t.Run("refuses: "+name, inBubble(Echo, opts, func(t *testing.T, r *rig) {
			_, err := r.Pause(o)
			wantErrText(t, "Pause", err, name)
		}))
	}
}

func TestMaxAge(t *testing.T) {
	const age = time.Hour
	opts := Options{Drain: DrainOptions{Grace: 5 * time.Second}, Timeouts: Timeouts{MaxAge: age}}

	t.Run("old clients are told and closed, ten percent around the age", inBubble(Echo, opts, func(t *testing.T, r *rig) {
		clients := r.dialMany(t, 200)
		a := watch(clients, false)
		pass(age*9/10 - time.Second)
		wantEqual(t, "told too early", slices.Max(a.told()), time.Duration(0))
		pass(age * 2 / 10)
		for range 100 { // one that sends is old, too
			pass(time.Second)
		}
		for i := range clients {
			had := a.ended()[i] - a.told()[i]
			if a.told()[i] < age*9/10 || a.told()[i] > age*11/10+2*time.Second || had < 5*time.Second || had > 6*time.Second {
				t.Errorf("client %d was told after %v and had %v", i, a.told()[i], had)
			}
		}
		if most := most(a.told(), time.Minute); most > 2*200/12 {
			t.Errorf("%d of 200 clients were told in one minute", most)
		}
		wantClosed(t, r.Server, map[Reason]uint64{ReasonMaxAge: 200})
		wantState(t, r.Server, StateRunning, 0)
	}))

	slow := Options{Drain: DrainOptions{Grace: age / 2}, Timeouts: opts.Timeouts}
	t.Run("the client reads why, and may leave", inBubble(Echo, slow, func(t *testing.T, r *rig) {
		c := r.dial(t)
		pass(age*11/10 + 2*time.Second)
		c.has(t, "SHUTDOWN 1800 max-age\n")
		c.echoes(t, "last words\n")
		c.leave(t)
		wantClosed(t, r.Server, map[Reason]uint64{ReasonClientLeft: 1})
	}))

	t.Run("the Notifier is told that only the connection ends", bubbled(func(t *testing.T) {
		notices := make(chan Notice, 1)
		r := newRig(t, Echo, Options{
			Drain: opts.Drain, Timeouts: opts.Timeouts,
			Notifier: NotifierFunc(func(n Notice) []byte { notices <- n; return nil }),
		})
		r.dial(t)
		got := <-notices
		wantEqual(t, "kind, reason, close reason, time left", fmt.Sprint(got.Kind, got.Reason, got.Closed, got.Left),
			fmt.Sprint(NoticeDrain, "max-age", ReasonMaxAge, 5*time.Second))
	}))

	t.Run("without it connections stay open", inBubble(Echo, Options{Timeouts: Timeouts{MaxAge: Off}}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		pass(50 * time.Hour)
		c.echoes(t, "x\n")
	}))

	t.Run("a negative age is refused", func(t *testing.T) {
		_, err := New(Echo, Options{Timeouts: Timeouts{MaxAge: -2}})
		wantErrText(t, "New", err, "Timeouts.MaxAge: -2ns is negative")
	})
}
