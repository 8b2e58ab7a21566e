package server

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// G8: at every instant accepted = open + closed, for every order of actions, and the events agree with the
// status.
func TestG8FiguresAgree(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		// A bubble needs a *testing.T, so rapid draws a script first.
		script := rapid.SliceOfN(rapid.SampledFrom(steps), 1, 60).Draw(rt, "script")
		opts := Options{
			Limits: Limits{
				MaxConns:      rapid.IntRange(0, 4).Draw(rt, "MaxConns"),
				MaxConnsPerIP: rapid.IntRange(0, 3).Draw(rt, "MaxConnsPerIP"),
				AtLimit:       rapid.SampledFrom([]LimitMode{LimitQueue, LimitReject}).Draw(rt, "AtLimit"),
			},
			Timeouts: Timeouts{Idle: rapid.SampledFrom([]time.Duration{0, time.Second}).Draw(rt, "Idle")},
		}
		picks := rapid.SliceOfN(rapid.IntRange(0, 1<<20), len(script), len(script)).Draw(rt, "picks")
		if !t.Run("", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { playScript(t, opts, script, picks) })
		}) {
			rt.Fatalf("failed; the reason is above")
		}
	})
}

// A step does something to the server, or to the client that a pick selects.
type step string

var steps = []step{
	"connect", "connect", "connect", "connect elsewhere", "send", "send", "leave", "reset", "close", "panic", "goexit",
	"kill", "kill idle", "pause", "pause rejecting", "pause for a second", "slip", "release", "resume",
	"notify", "a moment", "a second", "fail accept",
}

func playScript(t *testing.T, o Options, script []step, picks []int) {
	t.Helper()
	r := newRig(t, commanded, o)
	sub := r.Subscribe()
	var heard lockedValue[eventModel]
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for e := range sub.Events(context.Background()) {
			heard.With(func(m *eventModel) { m.add(t, e) })
		}
	}()
	var failing atomic.Bool
	r.ln.failWith(func() error {
		if failing.Swap(false) {
			return syscall.EMFILE
		}
		return nil
	})
	var clients []*client
	var holds []*Hold
	for i, st := range script {
		var c *client
		if len(clients) > 0 {
			c = clients[picks[i]%len(clients)]
		}
		switch {
		case st == "connect" || st == "connect elsewhere":
			ip := "198.51.100.1"
			if st == "connect elsewhere" {
				ip = fmt.Sprintf("198.51.100.%d", 2+picks[i]%250)
			}
			if nc, err := r.ln.dialFrom(ip); err == nil {
				clients = append(clients, &client{nc})
			}
		case st == "a moment":
			time.Sleep(100 * time.Millisecond)
		case st == "a second":
			time.Sleep(time.Second)
		case st == "pause" || st == "pause rejecting" || st == "pause for a second":
			po := PauseOptions{}
			if st == "pause rejecting" {
				po.Mode = PauseReject
			}
			if st == "pause for a second" {
				po.TTL = time.Second
			}
			if h, err := r.Pause(po); err == nil {
				holds = append(holds, h)
			}
		case st == "slip":
			r.ln.slip(1)
		case st == "release":
			if len(holds) > 0 {
				holds[picks[i]%len(holds)].Release()
			}
		case st == "resume":
			_, _ = r.ResumeAll(Caller{})
		case st == "fail accept":
			failing.Store(true)
		case st == "kill":
			_ = r.Kill(uint64(picks[i] % (len(clients) + 1)))
		case st == "kill idle":
			r.KillFunc(func(c ConnInfo) bool { return c.Idle > 500*time.Millisecond })
		case c == nil:
		case st == "notify":
			_, _, _ = r.Notify(t.Context(), "hello")
		case st == "send":
			_ = c.SetWriteDeadline(time.Now())
			_, _ = c.Write([]byte("x"))
		case st == "panic" || st == "goexit":
			_ = c.SetWriteDeadline(time.Now().Add(1))
			_, _ = c.Write([]byte(st))
		case st == "leave":
			_ = c.CloseWrite()
		case st == "close":
			_ = c.Close()
		case st == "reset":
			c.Reset()
		}
		wantFiguresAgree(t, r.Server)
		if picks[i]%2 == 0 { // else the next step comes before this one has taken effect
			synctest.Wait()
			wantFiguresAgree(t, r.Server)
			heard.With(func(m *eventModel) { m.wantStatus(t, r.Status()) })
		}
	}
	r.ln.slip(0)
	rep, took := drainIn(r.Server, time.Second, "TERM")
	if took > time.Second+budget {
		t.Errorf("drain took %v", took)
	}
	wantFiguresAgree(t, r.Server)
	st := r.Status()
	if st.Connections != 0 || rep.Stuck != 0 || st.State != StateStopped {
		t.Errorf("after the end: %v with %d connections, %d handlers left behind", st.State, st.Connections, rep.Stuck)
	}
	<-ended
	heard.With(func(m *eventModel) { m.wantStatus(t, st) })
	r.state.With(func(st *state) {
		if st.admitted != 0 || st.rejecting != 0 || len(st.perClient) != 0 || st.tasks != 0 || len(st.handshakes) != 0 {
			t.Errorf("left over: %d admitted, %d rejecting, %d addresses, %d tasks, %d handshakes",
				st.admitted, st.rejecting, len(st.perClient), st.tasks, len(st.handshakes))
		}
	})
	if t.Failed() {
		t.Logf("options %+v\nscript %q\npicks %v", o, script, picks)
	}
}

func wantFiguresAgree(t *testing.T, s *Server) {
	t.Helper()
	st := s.Status()
	sum := uint64(st.Connections)
	for _, n := range st.Closed {
		sum += n
	}
	if st.Accepted != sum {
		t.Errorf("accepted %d, but open %d and closed %v add up to %d", st.Accepted, st.Connections, st.Closed, sum)
	}
}

// eventModel is what a subscriber knows of a server from its events alone.
type eventModel struct {
	state  State
	open   map[uint64]bool
	opened uint64
	closed map[Reason]uint64
	holds  map[string]bool
}

func (m *eventModel) add(t *testing.T, e Event) {
	t.Helper()
	if m.open == nil {
		m.state, m.open, m.closed, m.holds = StateRunning, make(map[uint64]bool), make(map[Reason]uint64), make(map[string]bool)
	}
	switch e.Type {
	case EventState:
		if e.State == m.state {
			t.Errorf("an event says that the state is now %v, as it was before", e.State)
		}
		m.state = e.State
	case EventOpened:
		m.opened++
		m.open[e.Conn.ID] = true
	case EventClosed:
		if !m.open[e.Closed.ID] {
			t.Errorf("an event says that connection %d was closed, which was not open", e.Closed.ID)
		}
		delete(m.open, e.Closed.ID)
		m.closed[e.Closed.Reason]++
	case EventHoldPlaced:
		m.holds[e.Hold.ID] = true
	case EventHoldReleased:
		delete(m.holds, e.Hold.ID)
	case EventMissed:
		t.Errorf("%d events were missed", e.Missed)
	}
}

func (m *eventModel) wantStatus(t *testing.T, st Status) {
	t.Helper()
	if m.open == nil {
		return // nothing has happened
	}
	if m.state != st.State || m.opened != st.Accepted || len(m.open) != st.Connections || len(m.holds) != len(st.Holds) {
		t.Errorf("by its events the server is %v, with %d accepted, %d open, %d holds; by its status %v, %d, %d, %d",
			m.state, m.opened, len(m.open), len(m.holds), st.State, st.Accepted, st.Connections, len(st.Holds))
	}
	wantEqual(t, "closed by reason, by events and by status", m.closed, st.Closed)
}

func TestConnectionLeftBehind(t *testing.T) {
	t.Run("is counted once, although its handler returns later", bubbled(func(t *testing.T) {
		release := make(chan struct{})
		closed := 0
		r := newRig(t, HandlerFunc(func(context.Context, *Conn) error { <-release; return nil }), Options{
			OnClose: func(ClosedConn) { closed++ },
		})
		r.dial(t)
		rep, _ := drainIn(r.Server, time.Second, "x")
		close(release)
		synctest.Wait()
		wantFiguresAgree(t, r.Server)
		wantClosed(t, r.Server, map[Reason]uint64{ReasonDeadline: 1})
		wantEqual(t, "report afterwards", report(t, r.Server), rep)
		wantEqual(t, "calls of OnClose", closed, 1)
	}))
}

func TestEnums(t *testing.T) {
	t.Run("states have names", func(t *testing.T) {
		for s, want := range map[State]string{
			StateStarting: "starting", StateRunning: "running", StatePaused: "paused", StateDraining: "draining", StateStopped: "stopped",
		} {
			wantEqual(t, "name", s.String(), want)
			got, err := ParseState(want)
			if got != s || err != nil {
				t.Errorf("ParseState(%q) = %v, %v; want %v", want, got, err, s)
			}
		}
		for _, bad := range []string{"State(0)", ""} {
			_, err := ParseState(bad)
			wantErrText(t, "ParseState", err, "unknown state")
		}
	})

	t.Run("pause modes have names", func(t *testing.T) {
		for name, want := range map[string]PauseMode{"": PauseQueue, "hold": PauseQueue, "reject": PauseReject} {
			got, err := ParsePauseMode(name)
			if got != want || err != nil || name != "" && got.String() != name {
				t.Errorf("ParsePauseMode(%q) = %v, %v; want %v", name, got, err, want)
			}
		}
		_, err := ParsePauseMode("stop")
		wantErrText(t, "ParsePauseMode", err, `"stop"`)
	})

	t.Run("limit modes have names", func(t *testing.T) {
		for name, want := range map[string]LimitMode{"wait": LimitQueue, "reject": LimitReject} {
			got, err := ParseLimitMode(name)
			if got != want || err != nil || got.String() != name {
				t.Errorf("ParseLimitMode(%q) = %v, %v; want %v", name, got, err, want)
			}
		}
		_, err := ParseLimitMode("")
		wantErrText(t, "ParseLimitMode", err, "want wait or reject")
	})

	t.Run("close reasons have distinct names", func(t *testing.T) {
		seen := make(map[string]bool)
		for _, why := range Reasons() {
			if name := why.String(); name == "" || strings.Contains(name, "(") || seen[name] {
				t.Errorf("reason %d has the name %q", int(why), name)
			}
			seen[why.String()] = true
		}
		wantEqual(t, "number of reasons", len(seen), 22)
	})

	t.Run("unknown values show their number", func(t *testing.T) {
		for got, want := range map[string]string{
			State(0).String(): "State(0)", Reason(0).String(): "Reason(0)", Reason(99).String(): "Reason(99)",
			Phase(0).String(): "Phase(0)", Phase(99).String(): "Phase(99)",
			PauseMode(9).String(): "PauseMode(9)", LimitMode(-1).String(): "LimitMode(-1)",
		} {
			wantEqual(t, "name", got, want)
		}
	})
}
