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

// cell is one of the state table: an event, while the server is in a state.
type cell struct {
	event, while string
	test         func(t *testing.T, s *scene)
}

// scene is a server with a client, brought to a state.
type scene struct {
	*echod
	client *peer
	grace  string // as the notice has it
}

// TestStateTable has a test for each cell of the table of states and events, but those that cannot be: a second signal
// comes while draining, because of the first.
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

// begin begins the drain with a signal.
func (s *scene) begin(sig syscall.Signal) {
	s.t.Helper()
	s.signal(sig)
	check(s.t, s.client.expect("SHUTDOWN "+s.grace+" "+control.SignalName(sig)+"\n"))
}

// goesOn checks that the drain is still the same, and ends with the last client.
func (s *scene) goesOn(deadline time.Time) {
	s.t.Helper()
	st := s.status()
	if st.State != "draining" || !st.Drain.Deadline.Equal(deadline) {
		s.t.Errorf("%s until %s, want draining until %s", st.State, st.Drain.Deadline, deadline)
	}
	check(s.t, s.client.echo("served on\n"))
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
	check(t, s.client.echo("I notice nothing\n"))
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
		waiting := s.dial() // in a pause: in the kernel's queue
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
			t.Errorf("who waited got %q: %v", got, err)
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

// expectConflict checks that err is a refusal that says until when the drain lasts.
func (s *scene) expectConflict(err error) {
	s.t.Helper()
	deadline := s.status().Drain.Deadline
	problem, ok := errors.AsType[*control.Problem](err)
	if !ok || problem.Status != 409 || problem.Type != control.ProblemDraining || problem.State != "draining" ||
		problem.Deadline == nil || !problem.Deadline.Equal(deadline) || !strings.Contains(problem.Detail, deadline.Format(time.RFC3339)) {
		s.t.Errorf("refused with %+v, want a conflict that says %s", err, deadline)
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

// forced sends the signal that is one too many.
func (s *scene) forced(sig syscall.Signal) {
	s.t.Helper()
	sent := s.signal(sig)
	s.wait(128 + int(sig))
	// Far less than the grace. What is promised after a deadline is enough when there is none.
	if took := s.gone.Sub(sent); took > 2*time.Second {
		s.t.Errorf("it was gone after %s", took)
	}
	s.awaitLog("second signal received; closing everything now", "signal", control.SignalName(sig))
	if sum := s.awaitLog("drained"); sum.num("forced") != 1 {
		s.t.Errorf("the summary is %s", sum.text)
	}
	if got, _ := s.client.rest(); got != "" { // a reset will do here
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
	if strings.Index(log, "\ngoroutine ") > strings.Index(log, `"closing everything now"`) {
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
	for n := range 3 { // standard signals do not queue up: one after the other
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
