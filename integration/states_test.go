//go:build unix

package integration

import (
	"errors"
	"io"
	"strings"
	"syscall"
	"testing"
	"time"

	"echod/control"
)

// cell is a cell of the state table: an event, while the server is in a state.
type cell struct {
	event, while string
	test         func(t *testing.T, s *scene)
}

// scene is a server in a state, with one client.
type scene struct {
	*echod
	client *peer
	grace  string // as the notice says it
}

// TestStateTable has a subtest for each cell of the table of states and events in docs/design.md.
func TestStateTable(t *testing.T) {
	t.Parallel()
	int1, term1, quit1, hup := drains(syscall.SIGINT), drains(syscall.SIGTERM), drains(syscall.SIGQUIT), drains(syscall.SIGHUP)
	for _, c := range []cell{
		{"pause", "running", pauses},
		{"resume", "running", resumeChangesNothing},
		{"first INT", "running", int1},
		{"first TERM", "running", term1},
		{"first QUIT", "running", quit1},
		{"HUP", "running", hup},
		{"shutdown", "running", shutdownDrains},

		{"pause", "paused", pauseAddsAHold},
		{"resume", "paused", resumeReleasesEveryHold},
		{"first INT", "paused", int1},
		{"first TERM", "paused", term1},
		{"first QUIT", "paused", quit1},
		{"HUP", "paused", hup},
		{"shutdown", "paused", shutdownDrains},

		{"pause", "draining", pauseIsRefused},
		{"resume", "draining", resumeIsRefused},
		{"first INT", "draining by HUP", adopted(syscall.SIGINT)},
		{"first TERM", "draining by HUP", adopted(syscall.SIGTERM)},
		{"first QUIT", "draining by HUP", adopted(syscall.SIGQUIT)},
		{"first INT", "draining by control", adopted(syscall.SIGINT)},
		{"first TERM", "draining by control", adopted(syscall.SIGTERM)},
		{"first QUIT", "draining by control", adopted(syscall.SIGQUIT)},
		{"second INT", "draining", forces(syscall.SIGINT)},
		{"second TERM", "draining", forces(syscall.SIGTERM)},
		{"second QUIT", "draining", quitForcesAndShowsStacks},
		{"second TERM", "draining by HUP", adoptedThenForces},
		{"second TERM", "draining by control", adoptedThenForces},
		{"HUP", "draining", hangupChangesNothing},
		{"HUP", "draining by HUP", hangupChangesNothing},
		{"HUP", "draining by control", hangupChangesNothing},
		{"shutdown now", "draining", shutdownNowForces},
		{"shutdown with a shorter grace", "draining", shutdownShortens},
		{"shutdown with a longer grace", "draining", shutdownChangesNothing},
	} {
		t.Run(c.event+" while "+c.while, func(t *testing.T) {
			t.Parallel()
			s := &scene{echod: start(t, "--grace", "30s"), grace: "30"}
			s.client = s.served()
			switch c.while {
			case "paused":
				s.pause(control.PauseRequest{Reason: "the first"})
			case "draining":
				s.begin(syscall.SIGTERM)
			case "draining by HUP":
				s.begin(syscall.SIGHUP)
			case "draining by control":
				_, err := s.control.Shutdown(within(t, patience), control.ShutdownRequest{})
				check(t, err)
				check(t, s.client.expect("SHUTDOWN 30 control\n"))
			}
			state, _, _ := strings.Cut(c.while, " ")
			s.expectState(state)
			c.test(t, s)
		})
	}
}

// begin starts the drain with a signal.
func (s *scene) begin(sig syscall.Signal) {
	s.t.Helper()
	s.signal(sig)
	check(s.t, s.client.expect("SHUTDOWN "+s.grace+" "+control.SignalName(sig)+"\n"))
}

// goesOn checks that the drain has not changed, and that it ends with the last client.
func (s *scene) goesOn(deadline time.Time) {
	s.t.Helper()
	st := s.status()
	if st.State != "draining" || !st.Drain.Deadline.Equal(deadline) {
		s.t.Errorf("%s until %s, want draining until %s", st.State, st.Drain.Deadline, deadline)
	}
	check(s.t, s.client.echo("served in the drain\n"))
	check(s.t, s.client.leave())
	s.wait(0)
}

func pauses(t *testing.T, s *scene) {
	hold := s.pause(control.PauseRequest{Reason: "test"})
	if hold.ID == "" || hold.Reason != "test" || hold.Mode != "hold" || hold.PID == nil {
		t.Errorf("the hold is %+v", hold)
	}
	s.expectState("paused")
	late := s.dial()
	check(t, late.send("late\n"))
	check(t, s.client.echo("served during the pause\n"))
	if n := len(s.admitted()); n != 1 {
		t.Errorf("%d admitted during the pause", n-1)
	}
	s.resume()
	check(t, late.expect("late\n"))
}

func resumeChangesNothing(t *testing.T, s *scene) {
	if change := s.resume(); change.Changed || change.State != "running" || *change.Released != 0 {
		t.Errorf("resume answers %+v", change)
	}
	check(t, s.served().leave())
}

func drains(sig syscall.Signal) func(*testing.T, *scene) {
	return func(t *testing.T, s *scene) {
		waiting := s.dial() // during a pause, in the accept queue
		check(t, waiting.send("waiting\n"))
		if s.status().State == "running" {
			check(t, waiting.expect("waiting\n"))
			check(t, waiting.send("waiting\n"))
		}
		s.begin(sig)
		s.awaitLog("signal received", "signal", control.SignalName(sig))
		s.expectState("draining")
		got := make([]byte, len("waiting\nSHUTDOWN 30 ")+len(control.SignalName(sig))+1)
		_, err := io.ReadFull(waiting.in, got)
		check(t, err)
		if echoed, err := onlyOnce(string(got), "SHUTDOWN 30 "+control.SignalName(sig)+"\n"); err != nil || echoed != "waiting\n" {
			t.Errorf("the waiting client got %q: %v", got, err)
		}
		check(t, waiting.leave())
		s.goesOn(s.status().Drain.Deadline)
	}
}

func shutdownDrains(t *testing.T, s *scene) {
	waiting := s.dial()
	change, err := s.control.Shutdown(within(t, patience), control.ShutdownRequest{Reason: "upgrade", Grace: new(25 * time.Second)})
	check(t, err)
	if !change.Changed || change.State != "draining" || change.Drain.Reason != "upgrade" {
		t.Errorf("shutdown answers %+v", change)
	}
	check(t, s.client.expect("SHUTDOWN 25 upgrade\n"))
	check(t, waiting.expect("SHUTDOWN 25 upgrade\n"))
	check(t, waiting.leave())
	s.goesOn(change.Drain.Deadline)
}

func pauseAddsAHold(t *testing.T, s *scene) {
	second := s.pause(control.PauseRequest{Reason: "the second"})
	first := s.status().Holds[0]
	if st := s.status(); len(st.Holds) != 2 || first.Reason != "the first" {
		t.Fatalf("the holds are %+v", st.Holds)
	}
	change, err := s.control.ReleaseHold(within(t, patience), first.ID)
	check(t, err)
	if change.State != "paused" {
		t.Errorf("%s with a hold left", change.State)
	}
	change, err = s.control.ReleaseHold(within(t, patience), second.ID)
	check(t, err)
	if change.State != "running" {
		t.Errorf("%s with no hold left", change.State)
	}
	check(t, s.served().leave())
}

func resumeReleasesEveryHold(t *testing.T, s *scene) {
	s.pause(control.PauseRequest{Reason: "the second"})
	_, err := s.control.Resume(within(t, patience))
	if problem, ok := errors.AsType[*control.Problem](err); !ok || problem.Type != control.ProblemHolds || len(problem.Holds) != 2 {
		t.Errorf("resume with two holds: %v, want a conflict that lists them", err)
	}
	if change := s.resume(); !change.Changed || change.State != "running" || *change.Released != 2 {
		t.Errorf("resume answers %+v", change)
	}
	check(t, s.served().leave())
}

func pauseIsRefused(t *testing.T, s *scene) {
	_, err := s.control.Pause(within(t, patience), control.PauseRequest{})
	s.expectConflict(err)
}

func resumeIsRefused(t *testing.T, s *scene) {
	_, err := s.control.Resume(within(t, patience))
	s.expectConflict(err)
}

// expectConflict checks that err is a conflict that states the drain's deadline.
func (s *scene) expectConflict(err error) {
	s.t.Helper()
	deadline := s.status().Drain.Deadline
	problem, ok := errors.AsType[*control.Problem](err)
	if !ok || problem.Status != 409 || problem.Type != control.ProblemDraining || problem.State != "draining" ||
		problem.Deadline == nil || !problem.Deadline.Equal(deadline) || !strings.Contains(problem.Detail, deadline.Format(time.RFC3339)) {
		s.t.Errorf("got %+v, want a conflict that states %s", err, deadline)
	}
	s.goesOn(deadline)
}

func adopted(sig syscall.Signal) func(*testing.T, *scene) {
	return func(_ *testing.T, s *scene) {
		deadline := s.status().Drain.Deadline
		s.signal(sig)
		s.awaitLog("signal received", "signal", control.SignalName(sig))
		s.awaitLog("drain already in progress; its deadline is unchanged", "signal", control.SignalName(sig))
		s.goesOn(deadline)
	}
}

func forces(sig syscall.Signal) func(*testing.T, *scene) {
	return func(_ *testing.T, s *scene) { s.forced(sig) }
}

// forced sends a signal that must close everything.
func (s *scene) forced(sig syscall.Signal) {
	s.t.Helper()
	sent := s.signal(sig)
	s.wait(128 + int(sig))
	if took := s.gone.Sub(sent); took > 2*time.Second { // far less than the grace period
		s.t.Errorf("the process exited after %s", took)
	}
	s.awaitLog("second signal received; closing everything now", "signal", control.SignalName(sig))
	if sum := s.awaitLog("drained"); sum.num("forced") != 1 {
		s.t.Errorf("the summary is %s", sum.text)
	}
	if got, _ := s.client.rest(); got != "" { // a reset is fine here
		s.t.Errorf("the client got %q", got)
	}
}

func quitForcesAndShowsStacks(t *testing.T, s *scene) {
	s.forced(syscall.SIGQUIT)
	log := s.log.String()
	for _, want := range []string{"goroutine ", "server.(*Conn).serve", "main.main()"} {
		if !strings.Contains(log, want) {
			t.Errorf("the stacks on stderr do not have %q", want)
		}
	}
	if strings.Index(log, "\ngoroutine ") > strings.Index(log, `"closing all connections now"`) {
		t.Error("the stacks were written after the connections had been closed")
	}
}

func adoptedThenForces(_ *testing.T, s *scene) {
	s.signal(syscall.SIGTERM)
	s.awaitLog("drain already in progress; its deadline is unchanged", "signal", "SIGTERM")
	s.forced(syscall.SIGTERM)
}

func hangupChangesNothing(_ *testing.T, s *scene) {
	deadline := s.status().Drain.Deadline
	before := len(s.log.find("signal received", "signal", "SIGHUP"))
	for n := range 3 { // one after the other: pending standard signals merge
		s.signal(syscall.SIGHUP)
		s.awaitNth(before+n+1, "signal received", "signal", "SIGHUP")
	}
	s.goesOn(deadline)
}

func shutdownNowForces(t *testing.T, s *scene) {
	change, err := s.control.Shutdown(within(t, patience), control.ShutdownRequest{Now: true})
	check(t, err)
	if !change.Changed {
		t.Errorf("shutdown answers %+v", change)
	}
	s.wait(0)
	if sum := s.awaitLog("drained"); sum.num("forced") != 1 {
		t.Errorf("the summary is %s", sum.text)
	}
}

func shutdownShortens(t *testing.T, s *scene) {
	change, err := s.control.Shutdown(within(t, patience), control.ShutdownRequest{Grace: new(200 * time.Millisecond)})
	check(t, err)
	if left := time.Until(change.Drain.Deadline); !change.Changed || left > time.Second {
		t.Errorf("shutdown answers %+v, with %s left", change, left)
	}
	check(t, s.client.expectRest(""))
	s.wait(0)
	if sum := s.awaitLog("drained"); sum.num("closed_at_deadline") != 1 {
		t.Errorf("the summary is %s", sum.text)
	}
}

func shutdownChangesNothing(t *testing.T, s *scene) {
	deadline := s.status().Drain.Deadline
	change, err := s.control.Shutdown(within(t, patience), control.ShutdownRequest{Grace: new(time.Hour), Reason: "other"})
	check(t, err)
	if change.Changed || change.State != "draining" || change.Drain.Reason != "SIGTERM" {
		t.Errorf("shutdown answers %+v", change)
	}
	s.goesOn(deadline)
}

// TestSignals has what the state table has not: signals that are ignored, and signals that come in pairs.
func TestSignals(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		wrapper func(t *testing.T) []string
	}{
		{"under nohup a hangup is ignored", func(t *testing.T) []string { return []string{require(t, "nohup")} }},
		{"after trap in a shell a hangup is ignored", func(t *testing.T) []string {
			return []string{require(t, "sh"), "-c", `trap "" HUP; exec "$0" "$@"`}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			e := startAs(t, tt.wrapper(t), "--grace", "20s")
			p := e.served()
			e.signal(syscall.SIGHUP)
			e.signal(syscall.SIGTERM)
			check(t, p.expect("SHUTDOWN 20 SIGTERM\n"))
			check(t, p.leave())
			e.wait(0)
			if seen := e.log.find("signal received", "signal", "SIGHUP"); len(seen) > 0 {
				t.Errorf("the hangup was received: %s", seen[0].text)
			}
		})
	}

	// Supervisors and terminals send TERM and HUP together.
	for _, pair := range [][2]syscall.Signal{{syscall.SIGTERM, syscall.SIGHUP}, {syscall.SIGHUP, syscall.SIGTERM}} {
		first, second := control.SignalName(pair[0]), control.SignalName(pair[1])
		t.Run(first+" and "+second+" force nothing", func(t *testing.T) {
			t.Parallel()
			e := start(t, "--grace", "20s")
			p := e.served()
			e.signal(pair[0])
			e.awaitLog("signal received", "signal", first)
			e.signal(pair[1])
			e.awaitLog("signal received", "signal", second)
			check(t, p.expect("SHUTDOWN 20 "+first+"\n"))
			check(t, p.echo("served in the drain\n"))
			check(t, p.leave())
			e.wait(0)
		})
	}
}

// pass waits for d on the server's clock, for tests of what the server does in that time.
func (e *echod) pass(d time.Duration) {
	e.t.Helper()
	_, err := e.control.Wait(within(e.t, patience), control.WaitRequest{Connections: new(1 << 30), Timeout: &d})
	if problem, ok := errors.AsType[*control.Problem](err); !ok || problem.Type != control.ProblemTimeout {
		e.t.Fatalf("waiting for a time: %v", err)
	}
}
