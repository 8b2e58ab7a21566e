//go:build unix

package integration

import (
	"bufio"
	"bytes"
	"io"
	"math/rand/v2"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func (e *echod) sendCommand(args ...string) *exec.Cmd {
	e.t.Helper()
	return exec.Command(built(e.t, echodBinary), append([]string{"send", "--address", e.addr}, args...)...)
}

// sending is an echod send whose standard input the test writes.
type sending struct {
	*exec.Cmd
	in     io.WriteCloser
	out    *bufio.Reader
	stderr bytes.Buffer
}

func (e *echod) startSending(args ...string) *sending {
	e.t.Helper()
	s := &sending{Cmd: e.sendCommand(args...)}
	s.Env = environment()
	var err error
	s.in, err = s.StdinPipe()
	check(e.t, err)
	out, err := s.StdoutPipe()
	check(e.t, err)
	s.out = bufio.NewReader(out)
	s.Stderr = &s.stderr
	check(e.t, s.Start())
	overdue := time.AfterFunc(patience, func() { _ = s.Process.Kill() })
	e.t.Cleanup(func() {
		overdue.Stop()
		_ = s.Process.Kill()
		_ = s.Wait()
	})
	return s
}

// echo writes a line and reads its echo.
func (s *sending) echo(t *testing.T, line string) {
	t.Helper()
	_, err := io.WriteString(s.in, line)
	check(t, err)
	if got, err := s.out.ReadString('\n'); got != line {
		t.Fatalf("got %q (%v), want %q; stderr: %s", got, err, line, s.stderr.String())
	}
}

// end reads the rest of stdout, and returns it with the exit code.
func (s *sending) end() (rest string, code int) {
	all, _ := io.ReadAll(s.out)
	_ = s.Wait()
	return string(all), exitCode(s.ProcessState)
}

func TestSendOneMessage(t *testing.T) {
	t.Parallel()
	e := start(t)
	got := run(t, e.sendCommand("hello", "world"))
	if want := (result{stdout: "hello world\n"}); got != want {
		t.Fatalf("got %+v, want %+v", got, want)
	}
}

func TestSendStandardInput(t *testing.T) {
	t.Parallel()
	e := start(t)
	noise := make([]byte, 1<<20)
	_, _ = rand.NewChaCha8([32]byte{7}).Read(noise)
	for name, input := range map[string]string{
		"lines":                   "one\ntwo\n\nfour\n",
		"no newline at end":       "one\ntwo",
		"nothing":                 "",
		"what looks like notices": "SHUTDOWN 5 SIGTERM\nPAUSED\nBUSY\nNOTICE hi\n",
		"any bytes":               string(noise),
		"a long line":             strings.Repeat("x", 1<<20) + "\nshort\n",
	} {
		for _, flags := range [][]string{nil, {"--reconnect"}} {
			t.Run(name+strings.Join(flags, ""), func(t *testing.T) {
				t.Parallel()
				cmd := e.sendCommand(flags...)
				cmd.Stdin = strings.NewReader(input)
				got := run(t, cmd)
				if got.stdout != input || got.code != 0 || got.stderr != "" {
					t.Errorf("code %d, stderr %q, and %d bytes for %d: %s", got.code, got.stderr,
						len(got.stdout), len(input),
						cmp.Diff(input[:min(len(input), 200)], got.stdout[:min(len(got.stdout), 200)]))
				}
			})
		}
	}
}

func TestSendSeparatesNoticesFromEchoes(t *testing.T) {
	t.Parallel()
	e := start(t, "--grace", "20s")
	s := e.startSending()
	s.echo(t, "before\n")
	if got := e.ctl("notify", "maintenance", "at", "noon"); got.code != 0 {
		t.Fatal(got)
	}
	s.echo(t, "after\n")
	e.signal(syscall.SIGTERM)
	e.wait(0) // long before the grace is over, since the client leaves
	rest, code := s.end()
	if rest != "" {
		t.Errorf("%q on stdout: want the echoes alone", rest)
	}
	for _, want := range []string{"notice: maintenance at noon\n", "the server stops in 20s: SIGTERM\n", "not all of the input was sent"} {
		if !strings.Contains(s.stderr.String(), want) {
			t.Errorf("stderr lacks %q:\n%s", want, s.stderr.String())
		}
	}
	if code != 1 {
		t.Errorf("exit code %d, want 1: not all was sent", code)
	}
}

func TestSendReconnectsToTheSuccessor(t *testing.T) {
	t.Parallel()
	e := start(t)
	s := e.startSending("--reconnect")
	s.echo(t, "first\n")
	e.signal(syscall.SIGKILL)
	e.wait(128 + int(syscall.SIGKILL))
	start(t, "--listen", e.addr)
	s.echo(t, "second\n")
	_ = s.in.Close()
	if rest, code := s.end(); rest != "" || code != 0 {
		t.Errorf("code %d, and %q on stdout: want each line once; stderr: %s", code, rest, s.stderr.String())
	}
}

func TestSendTextErrors(t *testing.T) {
	t.Parallel()
	paused := start(t)
	if got := paused.ctl("pause", "--mode", "reject"); got.code != 0 {
		t.Fatal(got)
	}
	full := start(t, "--max-conns", "1", "--at-limit", "reject")
	full.served()
	gone := start(t)
	gone.signal(syscall.SIGTERM)
	gone.wait(0)
	for name, c := range map[string]struct {
		to   *echod
		args []string
		code int
		want string
	}{
		"paused":   {paused, []string{"x"}, 1, "server is paused"},
		"full":     {full, []string{"x"}, 1, "server is at its connection limit"},
		"gone":     {gone, []string{"x"}, 1, "connection refused"},
		"too slow": {paused, []string{"--reconnect", "--timeout", "200ms", "x"}, 1, "nothing within 200ms"},
		"usage":    {paused, []string{"--timeout", "-1s", "x"}, 2, "--timeout -1s: must not be negative"},
	} {
		got := run(t, c.to.sendCommand(c.args...))
		if got.code != c.code || !strings.Contains(got.stderr, c.want) || got.stdout != "" {
			t.Errorf("%s: got %+v, want code %d and %q on stderr", name, got, c.code, c.want)
		}
	}
}
