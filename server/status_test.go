package server

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestStatus(t *testing.T) {
	t.Run("shows the server at one instant", bubbled(func(t *testing.T) {
		began := time.Now()
		r := newRig(t, Echo, Options{Limits: Limits{MaxConns: 7}})
		a, b := r.dial(t), r.dial(t)
		a.send(t, "abc")
		a.leave(t)
		b.send(t, "de")
		wantEqual(t, "status", r.Status(), Status{
			State: StateRunning, Started: began,
			Listeners:   []ListenerInfo{{Address: r.ln.Addr(), AcceptQueue: -1, AcceptQueueLimit: -1}},
			Connections: 1, Phases: map[Phase]int{PhaseServing: 1}, MaxConns: 7, Accepted: 2,
			Closed: map[Reason]uint64{ReasonClientClosed: 1}, BytesIn: 5, BytesOut: 5,
			Transitions: map[State]uint64{StateRunning: 1}, Grace: DefaultGrace,
		})
		r.drain(time.Minute, "TERM")
		pass(acceptorsTimeout)
		st := r.Status()
		if st.State != StateDraining || st.Listeners != nil {
			t.Errorf("status %+v, want draining without listeners", st)
		}
		wantEqual(t, "drain", st.Drain, &DrainInfo{
			Since: began, AcceptUntil: began, TellUntil: began, Deadline: began.Add(time.Minute),
			Reason: "TERM", Told: 1, Notified: 1,
		})
		if _, _, err := r.Notify(t.Context(), "hello"); err != nil {
			t.Fatal(err)
		}
		st = r.Status()
		wantEqual(t, "notices", [2]uint64{st.NoticesSent, st.NoticesFailed}, [2]uint64{2, 0})
		wantEqual(t, "transitions", st.Transitions, map[State]uint64{StateRunning: 1, StateDraining: 1})
	}))

	t.Run("says when MaxConns are served", inBubble(Echo, Options{Limits: Limits{MaxConns: 1, AtLimit: LimitReject}}, func(t *testing.T, r *rig) {
		wantEqual(t, "full", r.Status().Full, false)
		c := r.dial(t)
		st := r.Status()
		wantEqual(t, "full", st.Full, true)
		wantEqual(t, "limit mode", st.AtLimit, LimitReject)
		c.leave(t)
		wantEqual(t, "full", r.Status().Full, false)
	}))
}

func TestConns(t *testing.T) {
	t.Run("lists open connections, oldest first", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		began := time.Now()
		a := r.dial(t)
		pass(time.Second)
		b := r.dial(t)
		b.send(t, "abc")
		pass(time.Minute)
		var got []ConnInfo
		for info := range r.Conns() {
			got = append(got, info)
		}
		wantEqual(t, "connections", got, []ConnInfo{
			{ID: 1, Remote: a.LocalAddr(), Local: r.ln.Addr(), Phase: PhaseServing, Opened: began, Active: began, Idle: 61 * time.Second},
			{ID: 2, Remote: b.LocalAddr(), Local: r.ln.Addr(), Phase: PhaseServing, Opened: began.Add(time.Second), Active: began.Add(time.Second), Idle: time.Minute, BytesIn: 3, BytesOut: 3},
		})
		for range r.Conns() {
			break // the caller may stop early
		}
	}))
}

func TestClosed(t *testing.T) {
	t.Run("lists the last closed connections, latest first", inBubble(returns(nil), Options{}, func(t *testing.T, r *rig) {
		const n = recentConns + 10
		for range n {
			_ = r.dial(t).Close()
		}
		pass(lingerTimeout)
		closed := r.Closed()
		wantEqual(t, "connections remembered", len(closed), recentConns)
		for i, c := range closed {
			if want := uint64(n - i); c.ID != want {
				t.Fatalf("closed connection %d has id %d, want %d", i, c.ID, want)
			}
		}
		if diff := cmp.Diff(ClosedConn{ID: n, Reason: ReasonHandlerDone, Local: r.ln.Addr()}, closed[0],
			cmpopts.IgnoreFields(ClosedConn{}, "Remote", "Opened", "Closed")); diff != "" {
			t.Errorf("closed connection (-want +got):\n%s", diff)
		}
	}))
}

func TestAwaitStatus(t *testing.T) {
	t.Run("returns when the condition holds, or the cause of its context", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		paused := func(s State, _ int) bool { return s == StatePaused }
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, errors.New("no pause came"))
		defer cancel()
		wantErrText(t, "AwaitStatus", r.AwaitStatus(ctx, paused), "no pause came")
		got := make(chan error, 1)
		go func() { got <- r.AwaitStatus(t.Context(), paused) }()
		synctest.Wait()
		h, _ := r.Pause(PauseOptions{})
		h.Release()
		wantErr(t, "AwaitStatus for a brief pause", <-got, nil)
	}))
}

func TestKill(t *testing.T) {
	t.Run("an unknown or closed connection is an error", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		r.dial(t).leave(t)
		for _, id := range []uint64{0, 1, 2} {
			wantErr(t, "Kill", r.Kill(id), ErrNoConn)
		}
	}))

	t.Run("a client that is still sending gets back what was read, and then a FIN", func(t *testing.T) {
		s, addr := serveTCP(t, Echo, Options{})
		c := dialTCP(t, addr)
		want := bytes.Repeat([]byte("sent before the kill\n"), 5_000)
		send(t, c, string(want))
		await(t, "the echo to be on its way", func() bool { return s.Status().BytesOut == uint64(len(want)) })
		if err := s.Kill(1); err != nil {
			t.Fatal(err)
		}
		send(t, c, strings.Repeat("sent after the kill\n", 200_000)) // a close that does not wait for it sends a reset
		_ = c.CloseWrite()
		got, err := io.ReadAll(c)
		if err != nil || len(got) < len(want) {
			t.Errorf("read %d bytes of %d that were echoed, and %v", len(got), len(want), err)
		}
		awaitConns(t, s, 0)
		wantClosed(t, s, map[Reason]uint64{ReasonKilled: 1})
		wantEqual(t, "bytes out", s.Status().BytesOut, uint64(len(got)))
	})

	t.Run("KillFunc kills those that match", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		idle, busy := r.dial(t), r.dial(t)
		pass(time.Minute)
		busy.send(t, "x")
		wantEqual(t, "killed", r.KillFunc(func(c ConnInfo) bool { return c.Idle >= time.Minute }), 1)
		idle.ends(t, "")
		busy.send(t, "y")
		busy.has(t, "xy")
		all := func(ConnInfo) bool { return true }
		wantEqual(t, "killed of all", r.KillFunc(all), 1)
		wantEqual(t, "killed again", r.KillFunc(all), 0)
	}))
}

func TestNotify(t *testing.T) {
	t.Run("sends a line to every client", inBubble(Echo, Options{Timeouts: Timeouts{Stall: Off}}, func(t *testing.T, r *rig) {
		a, deaf, gone := r.dial(t), r.dial(t), r.dial(t)
		a.send(t, "abc")
		deaf.SetWindow(0)
		deaf.send(t, "x")
		_ = r.Kill(3) // it lingers: nothing can be sent to it any more
		synctest.Wait()
		var sent, failed int
		took := elapsed(func() { sent, failed, _ = r.Notify(t.Context(), "maintenance at noon") })
		if sent != 1 || failed != 1 || took != messageTimeout {
			t.Errorf("Notify: %d sent, %d failed after %v; want 1 and 1 after %v", sent, failed, took, messageTimeout)
		}
		a.has(t, "abc\nNOTICE maintenance at noon\n")
		gone.ends(t, "")
		deaf.SetWindow(fakeWindow)
		deaf.has(t, "x\nNOTICE maintenance at noon\n")
	}))

	t.Run("refuses what is not one line of text", func(t *testing.T) {
		s, _ := newServer(t, Echo, Options{})
		for text, want := range map[string]string{"": "empty", "a\nb": "control character", strings.Repeat("x", 2000): "at most 1024"} {
			_, _, err := s.Notify(t.Context(), text)
			wantErrText(t, "Notify", err, want)
		}
		if sent, failed, err := s.Notify(t.Context(), "hello"); sent+failed != 0 || err != nil {
			t.Errorf("Notify without clients: %d, %d, %v", sent, failed, err)
		}
	})
}
