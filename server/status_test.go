package server

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestStatusShowsTheServerAtOneInstant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		r := newRig(t, Echo, Options{Limits: Limits{MaxConns: 7}})
		a, b := r.dial(t), r.dial(t)
		a.send(t, "abc")
		a.leave(t)
		b.send(t, "de")
		wantEqual(t, "status", r.Status(), Status{
			State: StateRunning, Started: began,
			Listeners:   []ListenerInfo{{Address: r.ln.Addr(), AcceptQueue: -1, AcceptQueueLimit: -1}},
			Connections: 1, Phases: map[Phase]int{PhaseServing: 1}, MaxConns: 7, Accepted: 2, Closed: map[Reason]uint64{ReasonClientClosed: 1}, BytesIn: 5, BytesOut: 5,
			Transitions: map[State]uint64{StateRunning: 1},
			Grace:       DefaultGrace,
		})
		r.StartDrain(DrainOptions{Grace: time.Minute, Reason: "TERM"})
		pass(acceptorsStop)
		st := r.Status()
		if st.State != StateDraining || st.Listeners != nil {
			t.Errorf("status %+v, want draining without listeners", st)
		}
		wantEqual(t, "drain", st.Drain, &DrainInfo{
			Since: began, AcceptUntil: began, Deadline: began.Add(time.Minute), Reason: "TERM", Notified: 1,
		})
		_, _, err := r.Notify(t.Context(), "hello")
		if err != nil {
			t.Fatal(err)
		}
		st = r.Status()
		wantEqual(t, "notices", [2]uint64{st.NoticesSent, st.NoticesFailed}, [2]uint64{2, 0})
		wantEqual(t, "transitions", st.Transitions, map[State]uint64{StateRunning: 1, StateDraining: 1})
	})
}

func TestConnsListsTheOpenOnesOldestFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
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
			{ID: 1, Remote: a.LocalAddr(), Local: r.ln.Addr(), Phase: PhaseServing, Opened: began, Idle: 61 * time.Second},
			{ID: 2, Remote: b.LocalAddr(), Local: r.ln.Addr(), Phase: PhaseServing, Opened: began.Add(time.Second), Idle: time.Minute, BytesIn: 3, BytesOut: 3},
		})
		for range r.Conns() {
			break // an early end is fine
		}
	})
}

func TestClosedListsTheLastOnesLatestFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, HandlerFunc(func(context.Context, *Conn) error { return nil }), Options{})
		const n = recentConns + 10
		for range n {
			_ = r.dial(t).Close()
		}
		pass(lingerTimeout)
		closed := r.Closed()
		wantEqual(t, "how many are remembered", len(closed), recentConns)
		for i, c := range closed {
			if want := uint64(n - i); c.ID != want {
				t.Fatalf("closed connection %d has id %d, want %d", i, c.ID, want)
			}
		}
		if diff := cmp.Diff(ClosedConn{ID: n, Reason: ReasonHandlerDone, Local: r.ln.Addr()}, closed[0],
			cmpopts.IgnoreFields(ClosedConn{}, "Remote", "Opened", "Closed")); diff != "" {
			t.Errorf("closed connection (-want +got):\n%s", diff)
		}
	})
}

func TestAwaitStatusReturnsWhenItHoldsOrWithTheCause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		paused := func(s State, _ int) bool { return s == StatePaused }
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, errors.New("no pause came"))
		defer cancel()
		wantErrText(t, "AwaitStatus", r.AwaitStatus(ctx, paused), "no pause came")
		got := make(chan error, 1)
		go func() { got <- r.AwaitStatus(t.Context(), paused) }()
		synctest.Wait()
		h, _ := r.Pause(PauseOptions{})
		h.Release()
		if err := <-got; err != nil {
			t.Errorf("AwaitStatus for a brief pause: %v", err)
		}
	})
}

func TestKillOfUnknownOrClosedConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		r.dial(t).leave(t)
		for _, id := range []uint64{0, 1, 2} {
			wantErr(t, "Kill", r.Kill(id), ErrNoConn)
		}
	})
}

func TestKillFuncKillsThoseThatMatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		idle, busy := r.dial(t), r.dial(t)
		pass(time.Minute)
		busy.send(t, "x")
		n := r.KillFunc(func(c ConnInfo) bool { return c.Idle >= time.Minute })
		wantEqual(t, "killed", n, 1)
		idle.ends(t, "")
		busy.send(t, "y")
		busy.has(t, "xy")
		wantEqual(t, "killed of all", r.KillFunc(func(ConnInfo) bool { return true }), 1)
		wantEqual(t, "killed again", r.KillFunc(func(ConnInfo) bool { return true }), 0)
	})
}

func TestNotifySendsALineToEveryClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Timeouts: Timeouts{Stall: -1}})
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
	})
}

func TestNotifyRefusesWhatIsNoLine(t *testing.T) {
	s, _ := newServer(t, Echo, Options{})
	for text, want := range map[string]string{"": "empty", "a\nb": "control character", strings.Repeat("x", 2000): "at most 1024"} {
		_, _, err := s.Notify(t.Context(), text)
		wantErrText(t, "Notify", err, want)
	}
	if sent, failed, err := s.Notify(t.Context(), "hello"); sent+failed != 0 || err != nil {
		t.Errorf("Notify without clients: %d, %d, %v", sent, failed, err)
	}
}

func TestStatesHaveNames(t *testing.T) {
	for s, want := range map[State]string{StateStarting: "starting", StateRunning: "running", StatePaused: "paused", StateDraining: "draining", StateStopped: "stopped"} {
		wantEqual(t, "name", s.String(), want)
		got, err := ParseState(want)
		if got != s || err != nil {
			t.Errorf("ParseState(%q) = %v, %v; want %v", want, got, err, s)
		}
	}
	wantEqual(t, "name", State(0).String(), "State(0)")
	_, err := ParseState("State(0)")
	wantErrText(t, "ParseState", err, "unknown state")
}
