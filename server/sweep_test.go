package server

import (
	"testing"
	"testing/synctest"
	"time"
)

// wantClosesAfter checks that the only connection is closed after d, give or take the sweeper's step.
func wantClosesAfter(t *testing.T, r *rig, d time.Duration) {
	t.Helper()
	began := time.Now()
	_ = r.AwaitStatus(t.Context(), func(_ State, n int) bool { return n == 0 })
	if took := time.Since(began); took < d || took > d+min(d/8, maxSweep)+flushTimeout {
		t.Errorf("connection was closed after %v, want %v, at most an eighth and the linger later", took, d)
	}
}

func TestIdleConnectionIsClosed(t *testing.T) {
	t.Run("", bubbled(Echo, Options{Timeouts: Timeouts{Idle: time.Minute}}, func(t *testing.T, r *rig, c *client) {
		for range 3 { // bytes keep it open
			pass(50 * time.Second)
			c.send(t, "x")
			for info := range r.Conns() {
				wantEqual(t, "idle", info.Idle, time.Duration(0))
			}
		}
		wantClosesAfter(t, r, time.Minute)
		c.ends(t, "xxx")
		wantClosed(t, r.Server, map[Reason]uint64{ReasonIdleTimeout: 1})
	}))
}

func TestConnectionsAreNeverIdleByDefault(t *testing.T) {
	t.Run("", bubbled(Echo, Options{}, func(t *testing.T, r *rig, c *client) {
		pass(10 * time.Hour)
		c.send(t, "x")
		c.has(t, "x")
	}))
}

func TestStalledConnectionIsClosed(t *testing.T) {
	for name, o := range map[string]Options{"by default": {}, "as set": {Timeouts: Timeouts{Stall: DefaultStallTimeout, Idle: time.Second}}} {
		t.Run(name, bubbled(Echo, o, func(t *testing.T, r *rig, c *client) {
			c.SetWindow(0)
			c.send(t, "x")
			wantClosesAfter(t, r, DefaultStallTimeout+DefaultStallTimeout/4)
			wantClosed(t, r.Server, map[Reason]uint64{ReasonStalled: 1})
		}))
	}
}

func TestNegativeStallTimeoutNeverCloses(t *testing.T) {
	t.Run("", bubbled(Echo, Options{Timeouts: Timeouts{Stall: -1}}, func(t *testing.T, r *rig, c *client) {
		c.SetWindow(0)
		c.send(t, "x")
		pass(time.Hour)
		c.SetWindow(1)
		c.has(t, "x")
	}))
}

// Each chunk that the client takes gives it the whole time again.
func TestSlowReaderIsNotStalled(t *testing.T) {
	t.Run("", bubbled(Echo, Options{Timeouts: Timeouts{Stall: time.Second}}, func(t *testing.T, r *rig, c *client) {
		c.SetWindow(1)
		c.send(t, "abcdefgh")
		for _, want := range "abcdefgh" {
			pass(100 * time.Millisecond)
			c.has(t, string(want))
		}
		wantState(t, r.Server, StateRunning, 1)
	}))
}

// In real time, and not in a bubble: closing waits for the notice's write on a mutex, in which a
// bubble's time does not pass.
func TestUnreadNoticeStalls(t *testing.T) {
	t.Parallel()
	s, _ := newServer(t, untilDone, Options{Timeouts: Timeouts{Stall: 50 * time.Millisecond}})
	ln := newFakeListener()
	c, err := ln.dialFrom("198.51.100.1")
	if err != nil {
		t.Fatal(err)
	}
	c.SetWindow(3)
	serve(t, s, ln)
	if err := s.AwaitStatus(t.Context(), func(_ State, n int) bool { return n == 1 }); err != nil {
		t.Fatal(err)
	}
	rep, took := shutdownIn(t, s, time.Minute, "x")
	if took > budget {
		t.Errorf("drain took %v, want the stall timeout and a second for the flush", took)
	}
	wantClosed(t, s, map[Reason]uint64{ReasonStalled: 1})
	if rep.NoticeFailed != 1 || rep.Notified != 0 {
		t.Errorf("report %+v, want one notice failed", rep)
	}
}

// The sweeper leaves a lingering connection alone: its end has been decided.
func TestSweeperOnlyLooksAtServedConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Timeouts: Timeouts{Idle: 40 * time.Millisecond}})
		r.ln.slip(1)
		h := r.pause(t, PauseOptions{})
		c := r.dial(t)
		pass(time.Minute)
		wantPhases(t, r.Server, PhaseWaiting)
		h.Release()
		c.send(t, "x")
		c.ends(t, "x")
	})
}
