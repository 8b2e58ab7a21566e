//go:build unix

package integration

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// program is a client somebody else has written, run with pipes.
type program struct {
	t      testing.TB
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stdout *bufio.Reader
	stderr *journal
	over   chan struct{} // closed when it has exited
}

// startProgram runs a program until it ends by itself, or the test does.
func startProgram(t testing.TB, argv ...string) *program {
	t.Helper()
	p := &program{t: t, cmd: commandOf(argv...), stderr: newJournal(), over: make(chan struct{})}
	p.cmd.Env = environment("LC_ALL=C", "TERM=dumb")
	var err error
	p.stdin, err = p.cmd.StdinPipe()
	check(t, err)
	stdout, err := p.cmd.StdoutPipe()
	check(t, err)
	p.stdout = bufio.NewReader(stdout)
	p.cmd.Stderr = p.stderr
	p.cmd.WaitDelay = patience
	check(t, p.cmd.Start())
	overdue := time.AfterFunc(patience, func() { _ = p.cmd.Process.Kill() })
	t.Cleanup(func() {
		overdue.Stop()
		_ = p.stdin.Close()
		select {
		case <-p.over:
		default:
			_ = p.cmd.Process.Kill()
			_ = p.cmd.Wait()
		}
	})
	return p
}

func (p *program) say(text string) {
	p.t.Helper()
	_, err := io.WriteString(p.stdin, text)
	check(p.t, err)
}

// reads reads exactly this text from the program.
func (p *program) reads(want string) {
	p.t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(p.stdout, got); string(got[:n]) != want {
		p.t.Fatalf("%s shows %q (%v, stderr %q), want %q", p.cmd.Args[0], got[:n], err, p.stderr.String(), want)
	}
}

// readsUpTo reads up to this text, whatever is before it.
func (p *program) readsUpTo(want string) {
	p.t.Helper()
	var got strings.Builder
	for !strings.HasSuffix(got.String(), want) {
		b, err := p.stdout.ReadByte()
		if err != nil {
			p.t.Fatalf("%s shows %q (%v, stderr %q), want %q", p.cmd.Args[0], got.String(), err, p.stderr.String(), want)
		}
		got.WriteByte(b)
	}
}

// ends reads the rest, and expects the program to exit by itself, its standard input still open.
func (p *program) ends(rest string) {
	p.t.Helper()
	got, err := io.ReadAll(p.stdout)
	_ = p.cmd.Wait()
	close(p.over)
	if err != nil || string(got) != rest || p.cmd.ProcessState.ExitCode() != 0 {
		p.t.Errorf("%s ends with %q (%v, %v, stderr %q), want %q and exit code 0",
			p.cmd.Args[0], got, err, p.cmd.ProcessState, p.stderr.String(), rest)
	}
}

// hostPort splits the server's address as most programs want it.
func (e *echod) hostPort() (host, port string) {
	e.t.Helper()
	host, port, err := net.SplitHostPort(e.addr)
	check(e.t, err)
	return host, port
}

// TestInteractivePrograms show the echo and the notice, and stay until the server's end of stream. From then on nc and
// ncat wait only for their own input to end, which in a terminal it does with the next line; socat does not wait.
func TestInteractivePrograms(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		names    []string
		args     func(host, port string) []string
		endInput bool
	}{
		{[]string{"nc.openbsd", "nc"}, func(host, port string) []string { return []string{host, port} }, true},
		{[]string{"ncat"}, func(host, port string) []string { return []string{host, port} }, true},
		{[]string{"socat"}, func(host, port string) []string { return []string{"-", "TCP:" + host + ":" + port} }, false},
	} {
		t.Run(tt.names[0], func(t *testing.T) {
			path := require(t, tt.names...)
			e := start(t, "--grace", "500ms")
			host, port := e.hostPort()
			p := startProgram(t, append([]string{path}, tt.args(host, port)...)...)
			p.say("hello\n")
			p.reads("hello\n")
			p.say("a line and\na half")
			p.reads("a line and\na half")
			e.signal(syscall.SIGTERM)
			p.reads("\nSHUTDOWN 1 SIGTERM\n")
			p.say("one more\n")
			p.reads("one more\n")
			e.wait(0)
			e.awaitLog("connection closed", "reason", "deadline")
			if tt.endInput {
				check(t, p.stdin.Close())
			}
			p.ends("")
		})
	}
}

// TestListeningPrograms have no input, and end by themselves, in success, when the server says so.
func TestListeningPrograms(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ names, options []string }{
		{[]string{"nc.openbsd", "nc"}, []string{"-d"}},
		{[]string{"ncat"}, []string{"--recv-only"}},
	} {
		t.Run(tt.names[0], func(t *testing.T) {
			path := require(t, tt.names...)
			e := start(t, "--grace", "500ms")
			host, port := e.hostPort()
			p := startProgram(t, append(append([]string{path}, tt.options...), host, port)...)
			e.awaitOpen(1)
			e.signal(syscall.SIGTERM)
			p.reads("SHUTDOWN 1 SIGTERM\n")
			p.ends("")
			e.wait(0)
		})
	}
}

func TestTelnet(t *testing.T) {
	t.Parallel()
	telnet := require(t, "telnet")
	e := start(t, "--grace", "500ms")
	host, port := e.hostPort()
	p := startProgram(t, telnet, host, port)
	p.readsUpTo("Escape character is '^]'.\n")
	p.say("hello\n")
	p.readsUpTo("hello\n")
	e.signal(syscall.SIGINT)
	p.readsUpTo("SHUTDOWN 1 SIGINT\n")
	_, err := io.ReadAll(p.stdout) // its exit code differs between versions, and so do its words
	check(t, err)
	e.wait(0)
}

// TestHalfClosingPrograms send all they have, half-close, and read to the end, while the server drains.
func TestHalfClosingPrograms(t *testing.T) {
	t.Parallel()
	const lines = 20_000
	var input strings.Builder
	for n := range lines {
		fmt.Fprintf(&input, "line %d\n", n)
	}
	for _, tt := range []struct {
		names []string
		args  func(host, port string) []string
	}{
		{[]string{"nc.openbsd", "nc"}, func(host, port string) []string { return []string{"-N", host, port} }},
		{[]string{"ncat"}, func(host, port string) []string { return []string{host, port} }},
		{[]string{"socat"}, func(host, port string) []string {
			return []string{"-t", "20", "-", "TCP:" + host + ":" + port}
		}},
	} {
		t.Run(tt.names[0], func(t *testing.T) {
			path := require(t, tt.names...)
			e := start(t, "--grace", "20s")
			host, port := e.hostPort()
			p := startProgram(t, append([]string{path}, tt.args(host, port)...)...)
			p.say("first\n")
			p.reads("first\n")
			const notice = "SHUTDOWN 20 SIGTERM\n"
			half := input.Len() / 2
			e.signal(syscall.SIGTERM)
			told := make(chan struct{})
			fed := make(chan error, 1)
			go func() {
				_, first := io.WriteString(p.stdin, input.String()[:half])
				<-told
				_, second := io.WriteString(p.stdin, input.String()[half:])
				fed <- errors.Join(first, second, p.stdin.Close())
			}()
			var got []byte
			for !bytes.HasSuffix(got, []byte(notice)) {
				line, err := p.stdout.ReadBytes('\n')
				got = append(got, line...)
				if err != nil {
					t.Fatalf("ended untold after %d bytes: %v", len(got), err)
				}
			}
			close(told)
			rest, err := io.ReadAll(p.stdout)
			check(t, err)
			check(t, <-fed)
			got = append(got, rest...)
			// The notice stands where the echo was when it came, with a newline of its own in the middle of a line.
			before, after, found := strings.Cut(string(got), notice)
			if before != "" && !strings.HasPrefix(input.String(), before) {
				before = strings.TrimSuffix(before, "\n")
			}
			if !found || before+after != input.String() {
				t.Errorf("%d bytes of %d came back, told: %v", len(before)+len(after), input.Len(), found)
			}
			e.wait(0)
		})
	}
}

// pythonClient sends raw bytes without newlines, and leaves when it has received exactly SHUTDOWN after its echo.
const pythonClient = `
import os, socket, sys

host, port = sys.argv[1], int(sys.argv[2])
with socket.create_connection((host, port), timeout=20) as s:
    for n in (1, 7, 4096, 100_000):
        data = os.urandom(n).replace(b"\n", b"\r")
        s.sendall(data)
        back = b""
        while len(back) < n:
            back += s.recv(n - len(back))
        assert back == data, "the echo is not what was sent"
    print("ready", flush=True)
    notice = b""
    while len(notice) < 8:
        more = s.recv(100)
        assert more, "closed without a notice"
        notice += more
    assert notice == b"SHUTDOWN", notice
    s.sendall(b"last")
    s.shutdown(socket.SHUT_WR)
    back = b""
    while more := s.recv(100):
        back += more
    assert back == b"last", back
print("left", flush=True)
`

func TestPythonClientLeavesOnExactlyShutdown(t *testing.T) {
	t.Parallel()
	python := require(t, "python3")
	e := start(t, "--notice", "SHUTDOWN", "--grace", "20s")
	host, port := e.hostPort()
	clients := make([]*program, 3)
	for i := range clients {
		clients[i] = startProgram(t, python, "-c", pythonClient, host, port)
	}
	for _, p := range clients {
		p.reads("ready\n")
	}
	e.signal(syscall.SIGTERM)
	for _, p := range clients {
		p.ends("left\n")
	}
	e.wait(0)
	if sum := e.awaitLog("drained"); sum.num("notified") != 3 || sum.num("left_by_themselves") != 3 {
		t.Errorf("the summary is %s", sum.text)
	}
}
