package server

import (
	"context"
	"fmt"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// Whatever happens in whatever order, at each look accepted = open + closed, and the events tell the
// same story.
func TestG8TheFiguresAgreeAlways(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		// A bubble needs a *testing.T: rapid's draws are made before, as a script.
		script := rapid.SliceOfN(rapid.SampledFrom(steps), 1, 60).Draw(rt, "script")
		opts := Options{
			Limits: Limits{
				MaxConns:      rapid.IntRange(0, 4).Draw(rt, "MaxConns"),
				MaxConnsPerIP: rapid.IntRange(0, 3).Draw(rt, "MaxConnsPerIP"),
				AtLimit:       rapid.SampledFrom([]LimitMode{LimitQueue, LimitReject}).Draw(rt, "AtLimit"),
			},
			Timeouts: Timeouts{Idle: rapid.SampledFrom([]time.Duration{0, time.Second}).Draw(rt, "IdleTimeout")},
		}
		picks := rapid.SliceOfN(rapid.IntRange(0, 1<<20), len(script), len(script)).Draw(rt, "picks")
		if !t.Run("", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { playScript(t, opts, script, picks) })
		}) {
			rt.Fatalf("failed; why is above")
		}
	})
}

// A step does something to the server or to the client picked by n.
type step string

var steps = []step{
	"connect", "connect", "connect", "connect elsewhere", "send", "send", "leave", "reset", "vanish", "panic", "goexit",
	"kill", "kill idle", "pause", "pause rejecting", "pause for a second", "slip", "release", "resume",
	"notify", "a moment", "a second", "fail accept",
}

func playScript(t *testing.T, o Options, script []step, picks []int) {
	t.Helper()
	r := newRig(t, commanded, o)
	sub := r.Subscribe()
	story := &story{}
	heard := make(chan struct{})
	go func() {
		defer close(heard)
		for e := range sub.Events(context.Background()) {
			story.With(func(s *told) { s.hear(t, e) })
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
			_, _ = r.Resume(Caller{})
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
		case st == "vanish":
			_ = c.Close()
		case st == "reset":
			c.Reset()
		}
		wantFiguresAgree(t, r)
		if picks[i]%2 == 0 { // else the next step comes while this one is still being dealt with
			synctest.Wait()
			wantFiguresAgree(t, r)
			story.With(func(s *told) { s.wantStatus(t, r.Status()) })
		}
	}
	r.ln.slip(0)
	rep, took := shutdownIn(t, r.Server, time.Second, "TERM")
	if took > time.Second+budget {
		t.Errorf("drain took %v", took)
	}
	wantFiguresAgree(t, r)
	st := r.Status()
	if st.Connections != 0 || rep.Stuck != 0 || st.State != StateStopped {
		t.Errorf("after the end: %v with %d connections, %d handlers stuck", st.State, st.Connections, rep.Stuck)
	}
	<-heard
	story.With(func(s *told) { s.wantStatus(t, st) })
	r.state.With(func(l *state) {
		if l.admitted != 0 || l.rejecting != 0 || len(l.perClient) != 0 || l.tasks != 0 {
			t.Errorf("left on the books: %d admitted, %d being rejected, %d addresses, %d tasks", l.admitted, l.rejecting, len(l.perClient), l.tasks)
		}
	})
	if t.Failed() {
		t.Logf("options %+v\nscript %q\npicks %v", o, script, picks)
	}
}

// A handler that was left behind returns after all, when its connection has long been booked.
func TestG8AConnectionLeftBehindIsBookedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		closed := 0
		r := newRig(t, HandlerFunc(func(context.Context, *Conn) error { <-release; return nil }), Options{
			OnClose: func(ClosedConn) { closed++ },
		})
		r.dial(t)
		rep, _ := shutdownIn(t, r.Server, time.Second, "x")
		close(release)
		synctest.Wait()
		wantFiguresAgree(t, r)
		wantClosed(t, r.Server, map[Reason]uint64{ReasonDeadline: 1})
		wantEqual(t, "report afterwards", reportOf(r.Report()), rep)
		wantEqual(t, "calls of OnClose", closed, 1)
	})
}

func wantFiguresAgree(t *testing.T, r *rig) {
	t.Helper()
	st := r.Status()
	sum := uint64(st.Connections)
	for _, n := range st.Closed {
		sum += n
	}
	if st.Accepted != sum {
		t.Errorf("accepted %d, but open %d and closed %v make %d", st.Accepted, st.Connections, st.Closed, sum)
	}
}

// story is what a subscriber knows of the server by its events alone.
type story = locked[told]

type told struct {
	state  State
	open   map[uint64]bool
	opened uint64
	closed map[Reason]uint64
	holds  map[string]bool
}

func (s *told) hear(t *testing.T, e Event) {
	t.Helper()
	if s.open == nil {
		s.state, s.open, s.closed, s.holds = StateRunning, make(map[uint64]bool), make(map[Reason]uint64), make(map[string]bool)
	}
	switch e.Type {
	case EventState:
		if e.State == s.state {
			t.Errorf("an event says that the state has become %v, which it was", e.State)
		}
		s.state = e.State
	case EventOpened:
		s.opened++
		s.open[e.Conn.ID] = true
	case EventClosed:
		if !s.open[e.Closed.ID] {
			t.Errorf("an event says that connection %d was closed, which was not open", e.Closed.ID)
		}
		delete(s.open, e.Closed.ID)
		s.closed[e.Closed.Reason]++
	case EventHoldPlaced:
		s.holds[e.Hold.ID] = true
	case EventHoldReleased:
		delete(s.holds, e.Hold.ID)
	case EventMissed:
		t.Errorf("%d events were missed", e.Missed)
	}
}

func (s *told) wantStatus(t *testing.T, st Status) {
	t.Helper()
	if s.open == nil {
		return // nothing has happened
	}
	if s.state != st.State || s.opened != st.Accepted || len(s.open) != st.Connections || len(s.holds) != len(st.Holds) {
		t.Errorf("events tell of %v, %d accepted, %d open, %d holds; status of %v, %d, %d, %d",
			s.state, s.opened, len(s.open), len(s.holds), st.State, st.Accepted, st.Connections, len(st.Holds))
	}
	wantEqual(t, "closed by reason, by status and by events", s.closed, st.Closed)
}
