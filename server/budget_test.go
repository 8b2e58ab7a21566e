package server

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// budget is how long after the deadline a drain may take, whatever clients and handlers do.
const budget = 2 * time.Second

func TestG6ClientsHaveTheWholeGracePeriod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		c := r.dial(t)
		began := time.Now()
		r.StartDrain(DrainOptions{Grace: 10 * time.Second, Reason: "TERM"})
		for time.Since(began) < 9*time.Second {
			pass(time.Second)
			c.send(t, "x")
		}
		pass(10*time.Second - time.Since(began) - time.Nanosecond)
		c.send(t, "y")
		c.ends(t, "SHUTDOWN 10 TERM\nxxxxxxxxxy")
		wantEqual(t, "duration", time.Since(began), 10*time.Second)
		wantClosed(t, r.Server, map[Reason]uint64{ReasonDeadline: 1})
	})
}

// A client whose window is shut has a second to open it, in which it gets all that was read from it.
func TestG6WhatWasReadIsWrittenBackAfterTheDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		c := r.dial(t)
		c.SetWindow(10)
		text := strings.Repeat("0123456789", 300)
		c.send(t, text)
		r.StartDrain(DrainOptions{Grace: time.Second, Reason: "TERM"})
		pass(time.Second + 900*time.Millisecond) // of the second that it has
		c.SetWindow(len(text) + 100)
		c.ends(t, text+"\nSHUTDOWN 1 TERM\n")
	})
}

func TestG6AClientThatNeverReadsIsClosedWithinTheBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Timeouts: Timeouts{Stall: -1}})
		for range 3 {
			c := r.dial(t)
			c.SetWindow(0)
			c.send(t, strings.Repeat("x", fakeWindow))
		}
		_, took := shutdownIn(t, r.Server, time.Second, "TERM")
		if took > time.Second+budget {
			t.Errorf("drain took %v, want at most the grace of 1s and %v", took, budget)
		}
		if rep := reportOf(r.Report()); rep.AtDeadline != 3 || rep.NoticeFailed != 3 || rep.Notified != 0 {
			t.Errorf("report %+v, want 3 closed at the deadline, 3 notices failed, none sent", rep)
		}
	})
}

func TestG6AHandlerThatIgnoresItsContextIsNamedAndLeftBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, stubborn(t), Options{})
		c := r.dial(t)
		rep, took := shutdownIn(t, r.Server, time.Second, "TERM")
		if want := time.Second + abortAfter + abandonAfter; took != want || took > time.Second+budget {
			t.Errorf("drain took %v, want %v", took, want)
		}
		if rep.Stuck != 1 || rep.AtDeadline != 1 {
			t.Errorf("report %+v, want 1 stuck and 1 closed at the deadline", rep)
		}
		entries := r.messages("handler ignores its context and is left behind")
		if len(entries) != 1 {
			t.Fatalf("%d log lines name the handler, want 1", len(entries))
		}
		fields := entries[0].ContextMap()
		if name, _ := fields["handler"].(string); !strings.Contains(name, "stubborn") {
			t.Errorf("the log names handler %q, want the stubborn one", name)
		}
		wantEqual(t, "remote", fields["remote"], c.LocalAddr().String())
		wantState(t, r.Server, StateStopped, 0)
		wantErr(t, "Serve", <-r.served, ErrServerClosed)
	})
}

func TestG6AHandlerStuckInAWriteIsFreedByTheAbort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// Its deadline is the handler's own doing: it calls past the Conn.
		h := HandlerFunc(func(_ context.Context, c *Conn) error {
			_, err := c.nc.(*fakeConn).deafToDeadlines().Write(make([]byte, 2*fakeWindow))
			return err
		})
		r := newRig(t, h, Options{})
		r.dial(t)
		rep, took := shutdownIn(t, r.Server, time.Second, "TERM")
		if want := time.Second + abortAfter; took != want {
			t.Errorf("drain took %v, want %v", took, want)
		}
		if rep.Stuck != 0 {
			t.Errorf("report %+v, want none stuck", rep)
		}
	})
}

func TestCloseLeavesStubbornHandlersBehindAfterAMoment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, stubborn(t), Options{})
		r.dial(t)
		wantEqual(t, "time that Close took", elapsed(func() { _ = r.Close() }), abandonAfter)
		wantClosed(t, r.Server, map[Reason]uint64{ReasonForced: 1})
	})
}

func TestForceDuringTheFlushCutsItShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		c := r.dial(t)
		c.SetWindow(0)
		c.send(t, "x")
		r.StartDrain(DrainOptions{Grace: Off, Reason: "TERM"})
		pass(500 * time.Millisecond)
		if took := elapsed(func() { _ = r.Close() }); took != 0 {
			t.Errorf("Close took %v, want no time", took)
		}
		wantClosed(t, r.Server, map[Reason]uint64{ReasonDeadline: 1}) // the first cause
	})
}

func TestDrainCountsDownInTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		r.dial(t)
		shutdownIn(t, r.Server, 150*time.Second, "TERM")
		var seconds []int64
		for _, e := range r.messages("draining") {
			seconds = append(seconds, e.ContextMap()["seconds_left"].(int64))
			wantEqual(t, "connections", e.ContextMap()["connections"], int64(1))
		}
		wantEqual(t, "countdown", seconds, []int64{150, 120, 60, 50, 40, 30, 20, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1})
	})
}

func TestCloseCallbackOfAHandlerLeftBehindCannotProlongTheDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		stuck := func(context.Context, *Conn) error { <-release; return nil }
		r := newRig(t, HandlerFunc(stuck), Options{Drain: DrainOptions{Grace: time.Second}, OnClose: func(ClosedConn) { <-release }})
		r.dial(t)
		r.StartDrain(DrainOptions{Grace: 0, Reason: "x"})
		if took := elapsed(func() { <-r.Done() }); took > time.Second+abortAfter+2*abandonAfter {
			t.Errorf("the drain took %v", took)
		}
		wantClosed(t, r.Server, map[Reason]uint64{ReasonDeadline: 1})
		close(release)
	})
}

func TestDrainEndsWithOneSummary(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Timeouts: Timeouts{Stall: -1}})
		leaver, deaf := r.dial(t), r.dial(t)
		r.dial(t) // who stays
		deaf.SetWindow(0)
		deaf.send(t, "x")
		r.StartDrain(DrainOptions{Grace: time.Second, Reason: "TERM"})
		pass(acceptorsStop)
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
			"closed_at_deadline": int64(2), "forced": int64(0), "closed_otherwise": int64(0), "rejected": int64(0), "handlers_left_behind": int64(0),
		})
	})
}
