//go:build unix

package integration

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"echod/control"
)

// expect checks a result: stdout matches a pattern as a whole, stderr contains a text or is empty.
func (r result) expect(t testing.TB, code int, stdout, stderr string) {
	t.Helper()
	if r.code != code {
		t.Errorf("exit code %d, want %d; stdout %q, stderr %q", r.code, code, r.stdout, r.stderr)
	}
	if !regexp.MustCompile(`\A(?s:` + stdout + `)\z`).MatchString(r.stdout) {
		t.Errorf("stdout is %q, want %s", r.stdout, stdout)
	}
	if !strings.Contains(r.stderr, stderr) || stderr == "" && r.stderr != "" {
		t.Errorf("stderr is %q, want %q", r.stderr, stderr)
	}
}

// TestCtlEvents: events are printed until the server has stopped, or until SIGINT.
func TestCtlEvents(t *testing.T) {
	t.Parallel()
	e := start(t, "--grace", "20s")
	argv := e.ctlCommand("events").Args
	events, interrupted := startProgram(t, argv...), startProgram(t, argv...)
	// Nothing shows that they have subscribed: make events until each prints one.
	seen := make(chan struct{})
	go func() {
		defer close(seen)
		for _, p := range []*program{events, interrupted} {
			_, _ = p.stdout.ReadString('\n')
		}
	}()
	for subscribed := false; !subscribed; {
		e.pause(control.PauseRequest{Reason: "probe"})
		e.resume()
		select {
		case <-seen:
			subscribed = true
		default:
		}
	}
	check(t, interrupted.cmd.Process.Signal(syscall.SIGINT))
	interrupted.exits(0) // the usual way to end it

	e.pause(control.PauseRequest{Reason: "shift"})
	e.resume()
	events.readsUpTo("\"shift\", ")
	events.readsUpTo("  released  ")
	events.readsUpTo("\"shift\", ")
	events.readsUpTo(": the server was resumed by ")
	events.readsUpTo(fmt.Sprintf("uid %d, pid %d", os.Getuid(), os.Getpid()))

	p := e.served()
	check(t, p.leave())
	e.awaitOpen(0)
	e.pause(control.PauseRequest{Reason: "lunch"})
	e.signal(syscall.SIGTERM)
	e.wait(0)
	events.readsUpTo("opened    conn 1 from " + p.LocalAddr().String() + "\n")
	events.readsUpTo("closed    conn 1 from " + p.LocalAddr().String() + ": client-closed, 6 B in, 6 B out\n")
	events.readsUpTo(`"lunch", `)
	events.readsUpTo("state     paused\n")
	events.readsUpTo("state     draining\n")
	events.readsUpTo("the server is draining until")
	events.readsUpTo("state     stopped\n")
	events.ends("")
}

// job starts 'echod ctl pause -- sh -c SCRIPT'. The script prints begun first.
func (e *echod) job(script string) *program {
	e.t.Helper()
	p := startProgram(e.t, e.ctlCommand("pause", "--reason", "job", "--", require(e.t, "sh"), "-c", script).Args...)
	p.reads("begun\n")
	return p
}

// exits waits for the program to exit, and checks its exit code.
func (p *program) exits(code int) {
	p.t.Helper()
	_ = p.cmd.Wait()
	close(p.over)
	if got := exitCode(p.cmd.ProcessState); got != code {
		p.t.Errorf("exit code %d, want %d; stderr %q", got, code, p.stderr.String())
	}
}

func TestPauseCommand(t *testing.T) {
	t.Parallel()
	e := start(t)
	t.Run("ctl is killed: the pause ends, and the command continues", func(t *testing.T) {
		p := e.job("echo begun; read x; echo done")
		e.expectState("paused")
		waiting := e.dial()
		check(t, waiting.send("waiting\n"))
		check(t, p.cmd.Process.Kill())
		check(t, waiting.expect("waiting\n"))
		e.awaitState("running")
		if st := e.status(); len(st.Holds) != 0 {
			t.Errorf("holds left: %+v", st.Holds)
		}
		p.say("continue\n")
		p.reads("done\n")
		p.exits(137)
	})
	t.Run("SIGTERM is relayed", func(t *testing.T) {
		p := e.job(`trap "exit 5" TERM; echo begun; read x`)
		check(t, p.cmd.Process.Signal(syscall.SIGTERM))
		p.exits(5)
		e.expectState("running")
	})
}
