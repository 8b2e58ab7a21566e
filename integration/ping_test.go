//go:build unix

package integration

import (
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"echod/control"
)

func (e *echod) pingCommand(args ...string) *exec.Cmd {
	e.t.Helper()
	return exec.Command(built(e.t, echodBinary), append([]string{"ping", "--address", e.addr}, args...)...)
}

func matches(t *testing.T, got, pattern string) {
	t.Helper()
	if !regexp.MustCompile(`\A` + pattern + `\z`).MatchString(got) {
		t.Errorf("got\n%s\nwant it to match\n%s", got, pattern)
	}
}

func TestPing(t *testing.T) {
	t.Parallel()
	e := start(t)
	got := run(t, e.pingCommand())
	if got.code != 0 || got.stderr != "" {
		t.Errorf("%+v", got)
	}
	const time = `[\d.]+ (µs|ms|s)`
	line := `64 bytes from ` + regexp.QuoteMeta(e.addr) + `: seq=\d connect=` + time + ` echo=` + time + "\n"
	matches(t, got.stdout, line)

	got = run(t, e.pingCommand("-c", "3", "-i", "0.01"))
	const spread = `[\d.]+/[\d.]+/[\d.]+/[\d.]+ ms`
	matches(t, got.stdout, `(`+line+`){3}\n--- .* statistics ---\n3 sent, 3 returned, 0% lost, time .*\n`+
		`connect min/avg/max/mdev = `+spread+"\n   echo min/avg/max/mdev = "+spread+"\n")

	if got = run(t, e.pingCommand("--quiet")); got != (result{}) {
		t.Errorf("%+v, want no output", got)
	}
	if got = run(t, exec.Command(built(t, echodBinary), "ping", "-W", "20", "-4", e.addr)); got.code != 0 {
		t.Errorf("with HOST:PORT: %+v", got)
	}
	if st := e.status(); st.Accepted != 6 {
		t.Errorf("%d connections for 6 pings", st.Accepted)
	}
}

// A ping that fails says why.
func TestPingSaysWhyNot(t *testing.T) {
	t.Parallel()
	e := start(t, "--grace", "20s", "--drain-delay", "20s")
	says := func(want string, flags ...string) {
		t.Helper()
		got := run(t, e.pingCommand(flags...))
		if got.code != 1 || !strings.Contains(got.stderr+got.stdout, want) {
			t.Errorf("%+v, want code 1 and %q", got, want)
		}
	}
	_, err := e.control.Pause(t.Context(), control.PauseRequest{Mode: "reject"})
	check(t, err)
	says("server is paused")
	says("server is paused", "--quiet")
	says("3 sent, 0 returned, 100% lost, 3 paused", "--count", "3", "--interval", "1ms")
	says(`"result":"paused"`, "--json")
	_, err = e.control.Resume(t.Context())
	check(t, err)
	_, err = e.control.Pause(t.Context(), control.PauseRequest{})
	check(t, err)
	says("connected, but no echo within 50ms: the server may be paused", "--timeout", "50ms")
	e.signal(syscall.SIGKILL)
	e.wait(128 + int(syscall.SIGKILL))
	says("connection refused")
}

// An interrupt before the first ping is done is not a success.
func TestPingInterrupted(t *testing.T) {
	t.Parallel()
	e := start(t)
	_, err := e.control.Pause(t.Context(), control.PauseRequest{})
	check(t, err)
	cmd := e.pingCommand()
	check(t, cmd.Start())
	poll(t, "the ping to connect", func() bool { return e.queued(e.status()) > 0 })
	check(t, cmd.Process.Signal(syscall.SIGTERM))
	_ = cmd.Wait()
	if got := exitCode(cmd.ProcessState); got != 128+int(syscall.SIGTERM) {
		t.Errorf("exit code %d, want 143", got)
	}
}

func TestPingUntilCtrlC(t *testing.T) {
	t.Parallel()
	e := start(t)
	term, _ := openTerminal(t)
	term.types(`$ECHOD ping --address ` + e.addr + ` --count 0 --interval 1ms; echo "code=$?"` + "\n")
	term.awaits(`seq=3 `)
	term.types(ctrlC)
	term.awaits(`\d+ sent, \d+ returned, 0% lost`)
	term.awaits(`(?m)^code=0$`)
}

func TestPingUsage(t *testing.T) {
	t.Parallel()
	for _, flags := range []string{"--count -1", "--size 0", "--interval -1s", "--timeout 0s", "somewhere", "a:1 b:2", "-4 -6", "-i soon", "--bogus"} {
		got := run(t, exec.Command(built(t, echodBinary), append([]string{"ping"}, strings.Fields(flags)...)...))
		if got.code != 2 || got.stdout != "" || got.stderr == "" {
			t.Errorf("%s: %+v, want code 2", flags, got)
		}
	}
}
