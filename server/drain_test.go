package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

func TestDrain(t *testing.T) {
	t.Run("G4 clients in the accept queue are told and served",
		inBubble(Echo, Options{Limits: Limits{MaxConns: 1}}, func(t *testing.T, r *rig) {
			served := r.dial(t)
			queue := []*client{r.dial(t), r.dial(t), r.dial(t)} // the limit keeps them there
			r.drain(5*time.Second, "TERM")
			pass(acceptorsTimeout)
			for _, c := range append(queue, served) {
				c.has(t, "SHUTDOWN 5 TERM\n")
				c.echoes(t, "last words\n")
				c.leave(t)
			}
			<-r.Done()
			wantClosed(t, r.Server, map[Reason]uint64{ReasonClientLeft: 4})
			if rep := report(t, r.Server); rep.Notified != 4 || rep.NoticeFailed != 0 || rep.Left != 4 {
				t.Errorf("report %+v, want 4 notified, 0 failed, 4 left by themselves", rep)
			}
		}))

	t.Run("clients of a paused server are told and served", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		r.ln.slip(1)
		h := r.pause(t, PauseOptions{})
		accepted, queued := r.dial(t), r.dial(t)
		wantPhases(t, r.Server, PhaseWaiting)
		r.drain(5*time.Second, "TERM")
		pass(acceptorsTimeout)
		for _, c := range []*client{accepted, queued} {
			c.has(t, "SHUTDOWN 5 TERM\n")
			c.echoes(t, "x\n")
			c.leave(t)
		}
		<-r.Done()
		if _, ok := errors.AsType[*DrainingError](h.Cause()); !ok {
			t.Errorf("cause of the hold's end is %v, want a *DrainingError", h.Cause())
		}
	}))

	t.Run("a client that does not read delays no other notice",
		inBubble(Echo, Options{Timeouts: Timeouts{Stall: Off}}, func(t *testing.T, r *rig) {
			deaf := r.dial(t)
			deaf.SetWindow(0)
			deaf.send(t, "x") // its handler blocks in a write
			others := []*client{r.dial(t), r.dial(t)}
			r.drain(5*time.Second, "TERM")
			pass(acceptorsTimeout)
			for _, c := range others {
				c.has(t, "SHUTDOWN 5 TERM\n")
				c.leave(t)
			}
			deaf.SetWindow(100)
			deaf.has(t, "x\nSHUTDOWN 5 TERM\n")
		}))

	t.Run("a client that does not read delays no other notice on a real socket", func(t *testing.T) {
		onEachTransport(t, Options{}, func(t *testing.T, serve func(Handler) (*Server, func() stream)) {
			s, dial := serve(Echo)
			deaf := dial()
			var flood sync.WaitGroup
			flood.Go(func() {
				for {
					if _, err := deaf.Write(make([]byte, 64<<10)); err != nil {
						return
					}
				}
			})
			others := make([]stream, 50)
			for i := range others {
				others[i] = dial()
				echoed(t, others[i], "x")
			}
			s.StartDrain(DrainOptions{Grace: time.Minute, Reason: "x"})
			began := time.Now()
			for _, c := range others {
				receives(t, c, "\nSHUTDOWN 60 x\n")
				_ = c.CloseWrite()
				receivesAll(t, c, "")
			}
			if took := time.Since(began); took > 10*time.Second {
				t.Errorf("the others were told after %v", took)
			}
			_ = s.Close()
			flood.Wait()
		})
	})

	t.Run("each client is told exactly once", inBubble(Echo, Options{Limits: Limits{MaxConns: 20}}, func(t *testing.T, r *rig) {
		var clients []*client
		for range 40 { // half of them stay in the accept queue
			clients = append(clients, r.dial(t))
		}
		r.StartDrain(DrainOptions{Grace: 3 * time.Second, Reason: "a"})
		r.StartDrain(DrainOptions{Grace: 2 * time.Second, Reason: "b"})
		rep, _ := drainIn(r.Server, time.Second, "c")
		for i, c := range clients {
			wantEqual(t, fmt.Sprint("notices of client ", i), strings.Count(c.arrived(), "SHUTDOWN"), 1)
		}
		wantEqual(t, "notified", rep.Notified, len(clients))
	}))

	// The client is admitted before the notices go out, and its goroutine checks for a drain only afterwards.
	t.Run("a client that is admitted right before the notices is told once", bubbled(func(t *testing.T) {
		told := make(chan struct{})
		r := newRig(t, Echo, Options{Logger: blockingLog("connection opened", told)})
		c := r.dial(t)
		r.drain(time.Minute, "x")
		pass(2 * acceptorsTimeout)
		close(told)
		c.has(t, "SHUTDOWN 60 x\n")
		wantEqual(t, "notified", r.Status().Drain.Notified, 1)
	}))

	// A Notifier that blocks stops the round of notices in the middle.
	t.Run("a client that is admitted during the round of notices is told", bubbled(func(t *testing.T) {
		inRound, goOn := make(chan struct{}), make(chan struct{})
		line := DefaultLineNotifier()
		var first atomic.Bool
		r := newRig(t, Echo, Options{Limits: Limits{MaxConns: 1}, Notifier: NotifierFunc(func(n Notice) []byte {
			if n.Kind == NoticeDrain && !first.Swap(true) {
				close(inRound)
				<-goOn
			}
			return line.Notice(n)
		})})
		served := r.dial(t)
		var failing atomic.Bool
		failing.Store(true)
		r.ln.failWith(func() error {
			if failing.Load() {
				return temporary(true)
			}
			return nil
		})
		queued := r.dial(t)
		r.drain(time.Minute, "x")
		<-inRound
		failing.Store(false)
		pass(maxAcceptBackoff)
		close(goOn)
		queued.has(t, "SHUTDOWN 60 x\n")
		served.has(t, "SHUTDOWN 60 x\n")
	}))

	t.Run("G6 clients have the whole grace period", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		began := time.Now()
		r.drain(10*time.Second, "TERM")
		for time.Since(began) < 9*time.Second {
			pass(time.Second)
			c.send(t, "x")
		}
		pass(10*time.Second - time.Since(began) - time.Nanosecond)
		c.send(t, "y")
		c.ends(t, "SHUTDOWN 10 TERM\nxxxxxxxxxy")
		wantEqual(t, "duration", time.Since(began), 10*time.Second)
		wantClosed(t, r.Server, map[Reason]uint64{ReasonDeadline: 1})
	}))

	t.Run("the server stops when the last client has left", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		r.drain(time.Hour, "TERM")
		pass(time.Minute)
		c.leave(t)
		wantErr(t, "Serve", <-r.served, ErrServerClosed)
		wantState(t, r.Server, StateStopped, 0)
		wantEqual(t, "duration", report(t, r.Server).Took, time.Minute)
	}))

	t.Run("a handler is notified after its client was told", bubbled(func(t *testing.T) {
		r := newRig(t, HandlerFunc(func(_ context.Context, c *Conn) error {
			if deadline, ok := c.DrainDeadline(); ok || c.DrainReason() != "" {
				t.Errorf("before the drain the deadline is %v, reason %q", deadline, c.DrainReason())
			}
			<-c.Draining()
			deadline, ok := c.DrainDeadline()
			if left := time.Until(deadline); !ok || left > time.Minute || c.DrainReason() != "TERM" || c.Server().Status().State != StateDraining {
				t.Errorf("deadline in %v, %t, reason %q; want one within a minute, TERM", left, ok, c.DrainReason())
			}
			_, err := c.Write([]byte("bye\n"))
			return err
		}), Options{})
		clients := make([]*client, 300) // enough for a handler to be faster than the notice, if it could
		for i := range clients {
			clients[i] = r.dial(t)
		}
		r.drain(time.Minute, "TERM")
		for _, c := range clients {
			c.ends(t, "SHUTDOWN 60 TERM\nbye\n")
		}
		<-r.Done()
		wantClosed(t, r.Server, map[Reason]uint64{ReasonHandlerDone: uint64(len(clients))})
	}))

	t.Run("a reason with a newline is quoted", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		r.drain(time.Second, "two\nlines")
		c.ends(t, "SHUTDOWN 1 \"two\\nlines\"\n")
	}))

	t.Run("it counts down in the log", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		r.dial(t)
		drainIn(r.Server, 150*time.Second, "TERM")
		var seconds []int64
		for _, e := range r.messages("draining") {
			seconds = append(seconds, e.ContextMap()["seconds_left"].(int64))
			wantEqual(t, "connections", e.ContextMap()["connections"], any(int64(1)))
		}
		wantEqual(t, "countdown", seconds, []int64{150, 120, 60, 50, 40, 30, 20, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1})
	}))

	t.Run("it ends with one summary in the log",
		inBubble(Echo, Options{Timeouts: Timeouts{Stall: Off}}, func(t *testing.T, r *rig) {
			leaver, deaf := r.dial(t), r.dial(t)
			r.dial(t) // stays
			deaf.SetWindow(0)
			deaf.send(t, "x")
			r.drain(time.Second, "TERM")
			pass(acceptorsTimeout)
			leaver.leave(t)
			<-r.Done()
			entries := r.messages("drained")
			if len(entries) != 1 {
				t.Fatalf("%d summaries, want 1", len(entries))
			}
			fields := entries[0].ContextMap()
			delete(fields, "took")
			wantEqual(t, "summary", fields, map[string]any{
				"reason": "TERM", "notified": int64(2), "notices_failed": int64(1), "left_by_themselves": int64(1),
				"closed_at_deadline": int64(2), "forced": int64(0), "closed_otherwise": int64(0), "rejected": int64(0),
				"handlers_left_behind": int64(0),
			})
		}))

	t.Run("the report counts each connection once, however it ended", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		leaver := r.dial(t)
		r.dial(t) // is killed
		r.dial(t) // stays
		r.drain(time.Minute, "x")
		pass(acceptorsTimeout)
		leaver.leave(t)
		_ = r.Kill(2)
		<-r.Done()
		rep := report(t, r.Server)
		wantEqual(t, "left, closed at the deadline, otherwise", []int{rep.Left, rep.AtDeadline, rep.ClosedOtherwise}, []int{1, 1, 1})
	}))

	for name, late := range map[string]bool{"before it": false, "during it": true} {
		t.Run("a function that is registered "+name+" is called and waited for", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
			c := r.dial(t)
			var called atomic.Bool
			wait := func() {
				time.Sleep(time.Minute)
				called.Store(true)
			}
			if !late {
				r.RegisterOnShutdown(wait)
			}
			pass(time.Hour)
			wantEqual(t, "called before the drain", called.Load(), false)
			r.drain(time.Hour, "x")
			if late {
				r.RegisterOnShutdown(wait)
			}
			c.leave(t)
			<-r.Done()
			wantEqual(t, "called", called.Load(), true)
			wantEqual(t, "duration", report(t, r.Server).Took, time.Minute)
		}))
	}

	// Writes to a net.Pipe block until the client reads, and synctest cannot see through a sync.Mutex.
	t.Run("it ends in a bubble with a net.Pipe whose client never reads", bubbled(func(t *testing.T) {
		for _, h := range []Handler{untilDone, untilWriteFails, Echo} {
			r := newRig(t, h, Options{})
			near, far := net.Pipe()
			r.ln.hand(near)
			synctest.Wait()
			rep, took := drainIn(r.Server, time.Second, "x")
			if took > time.Second+budget || rep.Stuck != 0 {
				t.Errorf("drain took %v, report %+v; want at most %v and no handler left behind", took, rep, time.Second+budget)
			}
			_ = far.Close()
		}
	}))
}

// blockingLog returns a log that blocks at the given message until release is closed.
func blockingLog(message string, release <-chan struct{}) *zap.Logger {
	core, _ := observer.New(zap.DebugLevel)
	return zap.New(core, zap.Hooks(func(e zapcore.Entry) error {
		if e.Message == message {
			<-release
		}
		return nil
	}))
}

func TestGrace(t *testing.T) {
	for name, tt := range map[string]struct {
		option, grace, want time.Duration
		notice              string
	}{
		"is the drain's":          {option: time.Minute, grace: 1500 * time.Millisecond, want: 1500 * time.Millisecond, notice: "SHUTDOWN 2 x\n"},
		"is else the option's":    {option: time.Minute, want: time.Minute, notice: "SHUTDOWN 60 x\n"},
		"is else the default":     {want: DefaultGrace, notice: "SHUTDOWN 5 x\n"},
		"can be off":              {grace: Off, notice: "SHUTDOWN 0 x\n"},
		"can be off by an option": {option: Off, notice: "SHUTDOWN 0 x\n"},
	} {
		t.Run(name, inBubble(Echo, Options{Drain: DrainOptions{Grace: tt.option}}, func(t *testing.T, r *rig) {
			c := r.dial(t)
			began := time.Now()
			r.StartDrain(DrainOptions{Grace: tt.grace, Reason: "x"})
			wantEqual(t, "deadline", r.Status().Drain.Deadline.Sub(began), tt.want)
			c.ends(t, tt.notice)
			<-r.Done()
			wantEqual(t, "duration", time.Since(began), max(tt.want, quietTime))
			wantClosed(t, r.Server, map[Reason]uint64{ReasonDeadline: 1})
		}))
	}
}

// TestDeadline covers what happens to clients and handlers that are still there at the deadline.
func TestDeadline(t *testing.T) {
	t.Run("what was read is written back for a second", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		c.SetWindow(10)
		text := strings.Repeat("0123456789", 300)
		c.send(t, text)
		r.drain(time.Second, "TERM")
		pass(time.Second + 900*time.Millisecond)
		c.SetWindow(len(text) + 100)
		c.ends(t, text+"\nSHUTDOWN 1 TERM\n")
	}))

	t.Run("clients that never read are closed in time",
		inBubble(Echo, Options{Timeouts: Timeouts{Stall: Off}}, func(t *testing.T, r *rig) {
			for range 3 {
				c := r.dial(t)
				c.SetWindow(0)
				c.send(t, strings.Repeat("x", fakeWindow))
			}
			rep, took := drainIn(r.Server, time.Second, "TERM")
			if took > time.Second+budget {
				t.Errorf("drain took %v, want at most the grace period of 1s and %v", took, budget)
			}
			if rep.AtDeadline != 3 || rep.NoticeFailed != 3 || rep.Notified != 0 {
				t.Errorf("report %+v, want 3 closed at the deadline, 3 failed notices", rep)
			}
		}))

	t.Run("clients that flood and never read are closed in time", func(t *testing.T) {
		onEachTransport(t, Options{}, func(t *testing.T, serve func(Handler) (*Server, func() stream)) {
			const grace, flooders = 300 * time.Millisecond, 8
			s, dial := serve(Echo)
			var all sync.WaitGroup
			for range flooders {
				c := dial()
				all.Go(func() {
					for p := make([]byte, 64<<10); ; {
						if _, err := c.Write(p); err != nil {
							return
						}
					}
				})
			}
			awaitConns(t, s, flooders)
			rep, took := drainIn(s, grace, "x")
			if took < grace || took > grace+budget {
				t.Errorf("drain took %v, want the grace period of %v and at most %v more", took, grace, budget)
			}
			if rep.AtDeadline != flooders || rep.Stuck != 0 {
				t.Errorf("report %+v, want all closed at the deadline", rep)
			}
			all.Wait()
		})
	})

	// The handler reads nothing, so there is unread input when the server closes.
	t.Run("clients see a FIN and no RST", func(t *testing.T) {
		onEachTransport(t, Options{}, func(t *testing.T, serve func(Handler) (*Server, func() stream)) {
			s, dial := serve(untilDone)
			var stayers []stream
			for range 20 {
				c := dial()
				send(t, c, "never read")
				stayers = append(stayers, c)
			}
			awaitConns(t, s, len(stayers))
			var ended sync.WaitGroup
			ended.Go(func() {
				for _, c := range stayers {
					receivesAll(t, c, "SHUTDOWN 1 x\n")
				}
			})
			rep, _ := drainIn(s, 100*time.Millisecond, "x")
			ended.Wait()
			wantEqual(t, "closed at the deadline", rep.AtDeadline, len(stayers))
		})
	})

	t.Run("a handler that ignores its context is named and left behind", bubbled(func(t *testing.T) {
		r := newRig(t, stubborn(t), Options{})
		c := r.dial(t)
		rep, took := drainIn(r.Server, time.Second, "TERM")
		if want := time.Second + abortAfter + abandonAfter; took != want || took > time.Second+budget {
			t.Errorf("drain took %v, want %v", took, want)
		}
		if rep.Stuck != 1 || rep.AtDeadline != 1 {
			t.Errorf("report %+v, want 1 stuck and 1 closed at the deadline", rep)
		}
		entries := r.messages("handler ignores its context, stopping without it")
		if len(entries) != 1 {
			t.Fatalf("%d log lines name the handler, want 1", len(entries))
		}
		fields := entries[0].ContextMap()
		if name, _ := fields["handler"].(string); !strings.Contains(name, "stubborn") {
			t.Errorf("the log names handler %q, want the stubborn one", name)
		}
		wantEqual(t, "remote", fields["remote"], any(c.LocalAddr().String()))
		wantState(t, r.Server, StateStopped, 0)
		wantErr(t, "Serve", <-r.served, ErrServerClosed)
	}))

	t.Run("its OnClose cannot delay the end", bubbled(func(t *testing.T) {
		release := make(chan struct{})
		defer close(release)
		r := newRig(t, HandlerFunc(func(context.Context, *Conn) error { <-release; return nil }),
			Options{OnClose: func(ClosedConn) { <-release }})
		r.dial(t)
		if _, took := drainIn(r.Server, time.Second, "x"); took > time.Second+abortAfter+2*abandonAfter {
			t.Errorf("the drain took %v", took)
		}
		wantClosed(t, r.Server, map[Reason]uint64{ReasonDeadline: 1})
	}))

	t.Run("a handler that blocks below Conn is freed by the close of the socket", bubbled(func(t *testing.T) {
		r := newRig(t, HandlerFunc(func(_ context.Context, c *Conn) error {
			_, err := c.nc.(*fakeConn).withoutDeadlines().Write(make([]byte, 2*fakeWindow))
			return err
		}), Options{})
		r.dial(t)
		rep, took := drainIn(r.Server, time.Second, "TERM")
		wantEqual(t, "duration", took, time.Second+abortAfter)
		wantEqual(t, "handlers left behind", rep.Stuck, 0)
	}))
}

func TestDrainAgain(t *testing.T) {
	t.Run("a second drain brings the deadline forward and never back", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		began := time.Now()
		start := func(grace time.Duration, reason string, want bool) {
			t.Helper()
			wantEqual(t, reason+" changed something", r.StartDrain(DrainOptions{Grace: grace, Reason: reason}), want)
		}
		start(time.Minute, "first", true)
		pass(time.Second)
		start(time.Hour, "longer", false)
		start(0, "adopted", false)
		start(10*time.Second, "shorter", true)
		info := r.Status().Drain
		wantEqual(t, "deadline", info.Deadline.Sub(began), 11*time.Second)
		wantEqual(t, "reason", info.Reason, "first")
		rep, took := drainIn(r.Server, time.Second, "third")
		wantEqual(t, "duration", took, time.Second+lingerTimeout)
		wantEqual(t, "reason", rep.Reason, "first")
		c.has(t, "SHUTDOWN 60 first\n") // told once, of the deadline at that time
	}))

	t.Run("handlers see the new deadline", bubbled(func(t *testing.T) {
		conns := make(chan *Conn, 1)
		r := newRig(t, HandlerFunc(func(ctx context.Context, c *Conn) error { conns <- c; return untilDone(ctx, c) }), Options{})
		r.dial(t)
		r.drain(time.Hour, "x")
		pass(acceptorsTimeout)
		r.StartDrain(DrainOptions{Grace: time.Second})
		deadline, _ := (<-conns).DrainDeadline()
		wantEqual(t, "time left", time.Until(deadline), time.Second)
	}))

	t.Run("a drain after the end changes nothing and reports the same", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		r.dial(t)
		first, _ := drainIn(r.Server, time.Second, "a")
		second, took := drainIn(r.Server, time.Hour, "b")
		wantEqual(t, "second report", second, first)
		wantEqual(t, "duration of the second", took, time.Duration(0))
		wantEqual(t, "StartDrain changed something", r.StartDrain(DrainOptions{Grace: Off, Reason: "c"}), false)
		wantEqual(t, "Force changed something", r.Force("d"), false)
		wantErr(t, "Close", r.Close(), nil)
	}))

	t.Run("a drain before Serve is over at once", bubbled(func(t *testing.T) {
		s, _ := newServer(t, Echo, Options{})
		s.StartDrain(DrainOptions{Grace: time.Hour, Reason: "TERM"})
		<-s.Done()
		wantState(t, s, StateStopped, 0)
	}))

	t.Run("it is final: pauses are refused with the deadline", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		h := r.pause(t, PauseOptions{})
		c := r.dial(t)
		deadline := time.Now().Add(time.Minute)
		r.drain(time.Minute, "TERM")
		for range 2 { // while draining, and when stopped
			_, pauseErr := r.Pause(PauseOptions{})
			_, resumeErr := r.Resume(Caller{})
			for what, err := range map[string]error{"Pause": pauseErr, "Resume": resumeErr, "ReleaseHold": r.ReleaseHold(h.ID(), Caller{})} {
				d, ok := errors.AsType[*DrainingError](err)
				if !ok || !d.Deadline.Equal(deadline) {
					t.Errorf("%s: %v, want a *DrainingError with deadline %v", what, err, deadline)
				}
				wantErrText(t, what, err, deadline.Format(time.RFC3339))
			}
			wantEqual(t, "the hold existed", h.Release(), false)
			c.leave(t)
			<-r.Done()
		}
	}))
}

func TestForce(t *testing.T) {
	t.Run("closes everything now and sends no notices", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		wantEqual(t, "time that Close took", elapsed(func() { _ = r.Close() }), time.Duration(0))
		c.ends(t, "")
		rep := report(t, r.Server)
		if rep.Notified+rep.NoticeFailed != 0 || rep.Forced != 1 {
			t.Errorf("report %+v, want one forced and no notice", rep)
		}
	}))

	t.Run("ends a drain", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		r.drain(time.Hour, "TERM")
		pass(time.Second)
		wantEqual(t, "time that Close took", elapsed(func() { _ = r.Close() }), time.Duration(0))
		wantClosed(t, r.Server, map[Reason]uint64{ReasonForced: 1})
		c.has(t, "SHUTDOWN 3600 TERM\n")
	}))

	t.Run("returns at once", bubbled(func(t *testing.T) {
		r := newRig(t, stubborn(t), Options{})
		r.dial(t)
		took := elapsed(func() { wantEqual(t, "Force changed something", r.Force("now"), true) })
		wantEqual(t, "time that Force took", took, time.Duration(0))
		wantEqual(t, "Force changed something again", r.Force("again"), false)
		wantEqual(t, "reason", r.Status().Drain.Reason, "now")
		wantState(t, r.Server, StateDraining, 1)
		<-r.Done()
	}))

	t.Run("leaves handlers behind that do not return", bubbled(func(t *testing.T) {
		r := newRig(t, stubborn(t), Options{})
		r.dial(t)
		wantEqual(t, "time that Close took", elapsed(func() { _ = r.Close() }), abandonAfter)
		wantClosed(t, r.Server, map[Reason]uint64{ReasonForced: 1})
	}))

	t.Run("cuts the flush after the deadline short", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		c.SetWindow(0)
		c.send(t, "x")
		r.drain(Off, "TERM")
		pass(500 * time.Millisecond)
		wantEqual(t, "time that Close took", elapsed(func() { _ = r.Close() }), time.Duration(0))
		wantClosed(t, r.Server, map[Reason]uint64{ReasonDeadline: 1}) // the first cause
	}))
}

func TestShutdown(t *testing.T) {
	leaves := func(t *testing.T, r *rig) {
		c := r.dial(t)
		go func() {
			_, _ = c.Read(make([]byte, 1<<10))
			_ = c.CloseWrite()
		}()
	}
	within := func(t *testing.T, d time.Duration) context.Context {
		ctx, cancel := context.WithTimeout(t.Context(), d)
		t.Cleanup(cancel)
		return ctx
	}

	t.Run("returns nil when all clients have left", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		leaves(t, r)
		wantErr(t, "Shutdown", r.Shutdown(within(t, 3*time.Second)), nil)
		wantErr(t, "second Shutdown", r.Shutdown(t.Context()), nil)
	}))

	t.Run("closes the rest at the context's deadline and returns its error", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		leaves(t, r)
		stayer := r.dial(t)
		began := time.Now()
		wantErr(t, "Shutdown", r.Shutdown(within(t, 3*time.Second)), context.DeadlineExceeded)
		took := time.Since(began)
		wantEqual(t, "duration: the grace period and the linger", took, 3*time.Second+lingerTimeout)
		stayer.ends(t, "SHUTDOWN 3 shutdown\n")
		rep := report(t, r.Server)
		wantEqual(t, "report", rep, Report{
			DrainInfo: DrainInfo{
				Since: began, Ended: began.Add(took), AcceptUntil: began, TellUntil: began, Deadline: began.Add(3 * time.Second),
				Reason: "shutdown", Told: 2, Notified: 2,
			},
			Took: took, Left: 1, AtDeadline: 1,
		})
	}))

	t.Run("returns ErrDeadline if the context has no deadline", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		r.dial(t)
		took := elapsed(func() { wantErr(t, "Shutdown", r.Shutdown(t.Context()), ErrDeadline) })
		wantEqual(t, "duration", took, DefaultGrace+lingerTimeout)
	}))

	t.Run("closes everything at once when the context is cancelled", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		r.dial(t)
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		took := elapsed(func() { wantErr(t, "Shutdown", r.Shutdown(ctx), context.Canceled) })
		wantEqual(t, "duration", took, time.Second)
		wantClosed(t, r.Server, map[Reason]uint64{ReasonForced: 1})
	}))

	t.Run("reports handlers that were left behind", bubbled(func(t *testing.T) {
		r := newRig(t, stubborn(t), Options{})
		r.dial(t)
		wantErr(t, "Shutdown", r.Shutdown(within(t, time.Second)), context.DeadlineExceeded)
	}))
}

func TestDrainDelay(t *testing.T) {
	delay := func(d time.Duration) Options { return Options{Drain: DrainOptions{Delay: d}} }

	t.Run("new clients are served until it is over", inBubble(Echo, delay(3*time.Second), func(t *testing.T, r *rig) {
		old := r.dial(t)
		began := time.Now()
		r.drain(5*time.Second, "TERM")
		wantState(t, r.Server, StateDraining, 1)
		pass(2 * time.Second)
		late := r.dial(t)
		for _, c := range []*client{old, late} {
			c.echoes(t, "x\n") // no client is told yet
		}
		pass(time.Second + acceptorsTimeout)
		if !r.ln.isClosed() {
			t.Error("the listener is open after the delay")
		}
		for _, c := range []*client{old, late} {
			c.has(t, "SHUTDOWN 5 TERM\n") // the grace period begins after the delay
		}
		old.leave(t)
		late.ends(t, "")
		wantEqual(t, "duration", time.Since(began), 8*time.Second)
		wantClosed(t, r.Server, map[Reason]uint64{ReasonClientLeft: 1, ReasonDeadline: 1})
		info := r.Status().Drain
		wantEqual(t, "accepting until", info.AcceptUntil, began.Add(3*time.Second))
		wantEqual(t, "deadline", info.Deadline, began.Add(8*time.Second))
	}))

	t.Run("it lasts even without clients", inBubble(Echo, delay(3*time.Second), func(t *testing.T, r *rig) {
		_, took := drainIn(r.Server, time.Minute, "TERM") // a load balancer may still send one
		if took < 3*time.Second || took > 3*time.Second+acceptorsTimeout {
			t.Errorf("the drain took %v, want the delay", took)
		}
	}))

	t.Run("limits apply until it is over",
		inBubble(Echo, Options{Drain: DrainOptions{Delay: 3 * time.Second}, Limits: Limits{MaxConns: 1}}, func(t *testing.T, r *rig) {
			r.dial(t)
			r.drain(0, "TERM")
			queued := r.dial(t)
			pass(3*time.Second - 1)
			queued.has(t, "") // it waits for a place
			pass(1 + acceptorsTimeout)
			queued.has(t, "SHUTDOWN 5 TERM\n")
			queued.echoes(t, "x\n")
		}))

	for mode, gets := range map[PauseMode]string{PauseQueue: "", PauseReject: "PAUSED\n"} {
		t.Run("a pause stays in force until it is over, in mode "+mode.String(), inBubble(Echo, delay(3*time.Second), func(t *testing.T, r *rig) {
			served := r.dial(t)
			h := r.pause(t, PauseOptions{Mode: mode})
			r.drain(0, "TERM")
			wantState(t, r.Server, StateDraining, 1)
			queued := r.dial(t)
			queued.send(t, "x\n")
			queued.has(t, gets)
			pass(3*time.Second - 1)
			queued.has(t, "")
			wantEqual(t, "holds", len(r.Status().Holds), 1)
			wantErr(t, "cause while the hold exists", h.Cause(), nil)
			served.echoes(t, "y\n")
			pass(1 + acceptorsTimeout)
			if mode == PauseQueue {
				// It is admitted while clients are told, so either may come first.
				wantEqual(t, "lines", slices.Sorted(strings.Lines(queued.arrived())), []string{"SHUTDOWN 5 TERM\n", "x\n"})
			}
			served.has(t, "SHUTDOWN 5 TERM\n")
			if _, ok := errors.AsType[*DrainingError](h.Cause()); !ok {
				t.Errorf("the hold ended with %v, want a *DrainingError", h.Cause())
			}
		}))
	}

	t.Run("a pause that ends before lets clients in", inBubble(Echo, delay(3*time.Second), func(t *testing.T, r *rig) {
		h := r.pause(t, PauseOptions{})
		r.pause(t, PauseOptions{TTL: 2 * time.Second})
		r.drain(0, "TERM")
		queued := r.dial(t)
		queued.send(t, "x\n")
		pass(time.Second)
		h.Release()
		pass(time.Second - 1)
		queued.has(t, "")
		pass(1)
		queued.has(t, "x\n")
	}))

	t.Run("Force ends a pause", inBubble(Echo, delay(time.Hour), func(t *testing.T, r *rig) {
		h := r.pause(t, PauseOptions{})
		r.drain(0, "TERM")
		r.Force("x")
		<-h.Done()
		<-r.Done()
	}))

	for name, after := range map[string]time.Duration{"during it": time.Second, "after it": 5 * time.Second} {
		t.Run("a shorter grace period counts from its end: "+name,
			inBubble(Echo, Options{Drain: DrainOptions{Delay: 4 * time.Second, Grace: time.Minute}}, func(t *testing.T, r *rig) {
				r.dial(t)
				began := time.Now()
				r.drain(0, "TERM")
				pass(after)
				wantEqual(t, "changed", r.StartDrain(DrainOptions{Grace: 2 * time.Second}), true)
				wantEqual(t, "deadline", r.Status().Drain.Deadline, began.Add(max(4*time.Second, after)+2*time.Second))
				wantEqual(t, "changed", r.StartDrain(DrainOptions{Grace: 3 * time.Second}), false)
			}))
	}

	for name, tt := range map[string]struct {
		cut  func(*testing.T, *Server)
		want time.Duration
	}{
		"Force cuts it short": {func(_ *testing.T, s *Server) { s.Force("x") }, time.Second},
		"a Shutdown with an earlier deadline cuts it short": {func(t *testing.T, s *Server) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			wantErr(t, "Shutdown", s.Shutdown(ctx), context.DeadlineExceeded)
		}, 2 * time.Second},
	} {
		t.Run(name, inBubble(Echo, delay(time.Hour), func(t *testing.T, r *rig) {
			r.dial(t)
			began := time.Now()
			r.drain(0, "TERM")
			pass(time.Second)
			tt.cut(t, r.Server)
			<-r.Done()
			if took := time.Since(began); took < tt.want || took > tt.want+budget {
				t.Errorf("the drain took %v, want %v", took, tt.want)
			}
		}))
	}
}

// Clients that stream, stop when they are told, and read to the end.
func TestDrainLosesNoByte(t *testing.T) {
	const clients = 200
	s, addr := serveTCP(t, Echo, Options{})
	var warm, all sync.WaitGroup
	warm.Add(clients)
	rng := rand.New(rand.NewPCG(1, 2))
	data := [][]byte{randomBytes(rng, 1<<20, true), randomBytes(rng, 1<<20, false)}
	streamers := make([]*streamer, clients)
	for i := range streamers {
		streamers[i] = newStreamer(dialTCP(t, addr))
	}
	for i, c := range streamers {
		rng := rand.New(rand.NewPCG(uint64(i), 0))
		all.Go(func() { c.stream(rng, data[i%2]) })
		all.Go(func() { c.receive(t, &warm) })
	}
	warm.Wait()
	rep, took := drainIn(s, 20*time.Second, "upgrade")
	all.Wait()
	if rep.Notified != clients || rep.NoticeFailed != 0 || rep.Left != clients || took > 19*time.Second {
		t.Errorf("after %v: %+v, want %d notified, and all of them left by themselves", took, rep, clients)
	}
	wantClosed(t, s, map[Reason]uint64{ReasonClientLeft: clients})
}

// streamer sends pieces of random bytes until it is told of the drain.
type streamer struct {
	*net.TCPConn
	told     chan struct{}
	flight   chan struct{} // a token for each piece in flight, so that the kernel buffers no megabytes
	sent     []byte        // may be read when streamed is closed
	streamed chan struct{}
}

func newStreamer(c *net.TCPConn) *streamer {
	return &streamer{TCPConn: c, told: make(chan struct{}), flight: make(chan struct{}, 30), streamed: make(chan struct{})}
}

// streamPiece is the size of no buffer.
const streamPiece = 1021

func (c *streamer) stream(rng *rand.Rand, data []byte) {
	defer close(c.streamed)
	defer c.CloseWrite()
	for {
		select {
		case <-c.told:
			return
		case c.flight <- struct{}{}:
		}
		at := rng.IntN(len(data) - streamPiece)
		n, err := c.Write(data[at : at+streamPiece])
		c.sent = append(c.sent, data[at:at+n]...)
		if err != nil {
			return
		}
	}
}

// receive checks that the echo is what was sent, with one notice in it, on a separate line.
func (c *streamer) receive(t *testing.T, warm *sync.WaitGroup) {
	notice := []byte("SHUTDOWN 20 upgrade\n")
	var got []byte
	isWarm, told, landed := false, false, 0
	buf := make([]byte, 16<<10)
	for {
		n, err := c.Read(buf)
		from := max(0, len(got)-len(notice))
		got = append(got, buf[:n]...)
		for ; (landed+1)*streamPiece <= len(got); landed++ {
			select {
			case <-c.flight:
			default: // the notice completed the piece
			}
		}
		if !isWarm && (len(got) > 20_000 || err != nil) {
			isWarm = true
			warm.Done()
		}
		if !told && (bytes.Contains(got[from:], notice) || err != nil) {
			told = true
			close(c.told)
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Errorf("client received %d bytes and then: %v", len(got), err)
			return
		}
	}
	before, after, found := bytes.Cut(got, notice)
	if !found {
		t.Error("client was not told")
		return
	}
	if len(before) > 0 && before[len(before)-1] != '\n' {
		t.Errorf("the notice is not a line of its own: it follows %q", before[max(0, len(before)-10):])
	}
	<-c.streamed
	withoutNewline := bytes.TrimSuffix(before, []byte("\n"))
	if !bytes.Equal(slices.Concat(before, after), c.sent) && !bytes.Equal(slices.Concat(withoutNewline, after), c.sent) {
		t.Errorf("of %d bytes %d came back around the notice, equal up to byte %d",
			len(c.sent), len(before)+len(after), commonPrefix(before, c.sent))
	}
}

func TestInTurns(t *testing.T) {
	t.Run("it visits all in order", func(t *testing.T) {
		conns := make([]*Conn, 100)
		for i := range conns {
			conns[i] = new(Conn)
		}
		if got := slices.Collect(paced(conns, promptBurst)); !slices.Equal(got, conns) {
			t.Error("the connections are not those given")
		}
		for c := range paced(conns, promptBurst) {
			if c != conns[0] {
				t.Error("it went on after a break")
			}
			break
		}
	})

	// On one CPU, clients that have become readable do not wait for the end of the work on all connections.
	t.Run("it lets other goroutines run", func(t *testing.T) {
		const readers = 64
		ln := listen(t)
		var reading sync.WaitGroup
		defer reading.Wait()
		var served atomic.Int64
		var clients []net.Conn
		for range readers {
			client := dialTCP(t, ln.Addr())
			nc, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			clients = append(clients, client)
			reading.Go(func() {
				defer nc.Close()
				for buf := make([]byte, 1); ; {
					if _, err := io.ReadFull(nc, buf); err != nil {
						return
					}
					served.Add(1)
				}
			})
		}
		defer func() {
			for _, c := range clients {
				_ = c.Close()
			}
		}()
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))

		const turn = time.Millisecond
		const work = 4 * turn // the scheduler preempts after 10 ms
		for _, c := range clients {
			send(t, c, "x")
		}
		began := time.Now()
		var during int64
		for range paced(make([]*Conn, 1000), turn) {
			for each := time.Now(); time.Since(each) < work/1000; {
			}
			during = served.Load()
		}
		if during != readers {
			t.Errorf("%d of %d readers were served in the %v that it took", during, readers, time.Since(began))
		}
	})
}
