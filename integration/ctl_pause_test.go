//go:build unix

package integration

import (
	"syscall"
	"testing"

	"echod/control"
)

// TestPauseWhileACommandRuns: its exit code is passed on, and the server is paused exactly while it runs.
func TestPauseWhileACommandRuns(t *testing.T) {
	t.Parallel()
	sh := require(t, "sh")
	e := start(t)
	for _, tt := range []struct {
		name    string
		command []string
		code    int
		stdout  string
		stderr  string
	}{
		{"success", []string{sh, "-c", `"$0" ctl --control "$1" status | head -n 1`, built(t, echodBinary), e.socket}, 0, `state +paused\n`, ""},
		{"its output and exit code", []string{sh, "-c", "echo out; echo err >&2; exit 7"}, 7, `out\n`, "err\n"},
		{"killed by a signal", []string{sh, "-c", "kill -KILL $$"}, 137, ``, ""},
		{"ended by a signal", []string{sh, "-c", "kill -TERM $$"}, 143, ``, ""},
		{"not found", []string{"no-such-command-anywhere"}, 127, ``, "running no-such-command-anywhere: command not found"},
		{"not there", []string{"/no/such/file"}, 127, ``, "command not found"},
		{"not executable", []string{"/dev/null"}, 126, ``, "running /dev/null: permission denied"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e.ctl(append([]string{"pause", "--reason", "job", "--"}, tt.command...)...).expect(t, tt.code, tt.stdout, tt.stderr)
			e.expectState("running") // by the time that it has exited
		})
	}
}

// job is 'echod ctl pause -- sh', which reads a script from the test.
func (e *echod) job(script string) *program {
	e.t.Helper()
	p := startProgram(e.t, e.ctlCommand("pause", "--reason", "job", "--", require(e.t, "sh"), "-c", script).Args...)
	p.reads("begun\n")
	return p
}

// exits waits for a program's end.
func (p *program) exits(code int) {
	p.t.Helper()
	_ = p.cmd.Wait()
	close(p.over)
	if got := exitCode(p.cmd.ProcessState); got != code {
		p.t.Errorf("exit code %d, want %d; stderr %q", got, code, p.stderr.String())
	}
}

// TestPauseEndsWithItsOwner: a hold that belongs to a process cannot outlive it.
func TestPauseEndsWithItsOwner(t *testing.T) {
	t.Parallel()
	e := start(t)
	p := e.job("echo begun; read x")
	e.expectState("paused")
	waiting := e.dial()
	check(t, waiting.send("waiting\n"))
	check(t, p.cmd.Process.Kill())
	check(t, waiting.expect("waiting\n"))
	e.awaitState("running")
	check(t, p.stdin.Close()) // for the command, which nobody has ended
	p.exits(137)
	if st := e.status(); len(st.Holds) != 0 {
		t.Errorf("left over: %+v", st.Holds)
	}
}

func TestPauseCommandIsToldOfTermination(t *testing.T) {
	t.Parallel()
	e := start(t)
	p := e.job(`trap "exit 5" TERM; echo begun; read x`)
	check(t, p.cmd.Process.Signal(syscall.SIGTERM))
	p.exits(5)
	e.expectState("running")
}

// TestPauseResumedByAnother: the command goes on, and whoever runs it is warned.
func TestPauseResumedByAnother(t *testing.T) {
	t.Parallel()
	e := start(t)
	p := e.job("echo begun; read x; exit 3")
	e.resume()
	check(t, e.served().leave())
	check(t, p.stderr.awaitText(within(t, patience), "echod: the pause ended before the command did: the server was resumed"))
	p.say("go on\n")
	p.exits(3)
}

// TestPauseOvertakenByADrain: the same when the server stops, and even when it has gone.
func TestPauseOvertakenByADrain(t *testing.T) {
	t.Parallel()
	e := start(t, "--grace", "20s")
	p := e.job("echo begun; read x; exit 4")
	waiting := e.dial()
	e.signal(syscall.SIGTERM)
	check(t, waiting.expect("SHUTDOWN 20 SIGTERM\n"))
	check(t, waiting.leave())
	e.wait(0)
	check(t, p.stderr.awaitText(within(t, patience), "the pause ended before the command did: the server is draining until"))
	p.say("go on\n")
	p.exits(4)
}

// TestPauseOfTwoOperators: one cannot resume the other by accident.
func TestPauseOfTwoOperators(t *testing.T) {
	t.Parallel()
	e := start(t)
	own := e.pause(control.PauseRequest{Reason: "operator"})
	e.ctl("pause", "--", "true").expect(t, 0, ``, "")
	if st := e.status(); st.State != "paused" || len(st.Holds) != 1 || st.Holds[0].ID != own.ID {
		t.Errorf("%s with %+v", st.State, st.Holds)
	}
}
