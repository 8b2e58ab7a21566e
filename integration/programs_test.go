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

// A kind of program, and how to recognise it. Names do not tell: nc is OpenBSD's, traditional, Nmap's or BusyBox's.
type kind struct {
	name     string
	commands [][]string // that may start it
	probe    string     // argument that makes it introduce itself
	says     string     // part of its introduction
}

var (
	openbsdNC     = kind{"OpenBSD's netcat", [][]string{{"nc.openbsd"}, {"nc"}}, "-h", "OpenBSD netcat"}
	traditionalNC = kind{"the traditional netcat", [][]string{{"nc.traditional"}, {"nc"}}, "-h", "[v1.10"}
	ncat          = kind{"ncat", [][]string{{"ncat"}, {"nc"}}, "--version", "Ncat: Version"}
	socat         = kind{"socat", [][]string{{"socat"}}, "-V", "socat version"}
	busyboxNC     = kind{"BusyBox's nc", [][]string{{"busybox", "nc"}, {"nc"}}, "--help", "BusyBox"}
	busyboxTelnet = kind{"BusyBox's telnet", [][]string{{"busybox", "telnet"}, {"telnet"}}, "--help", "BusyBox"}
	curl          = kind{"curl with Unix sockets", [][]string{{"curl"}}, "--version", "UnixSockets"}
	haproxy       = kind{"HAProxy 2.4 or later", [][]string{{"haproxy"}}, "-v", "HAProxy version"} // earlier: HA-Proxy
	gnuMake       = kind{"GNU make", [][]string{{"make"}, {"gmake"}}, "--version", "GNU Make"}
	nsenter       = kind{"util-linux's nsenter", [][]string{{"nsenter"}}, "--help", "--all"}
	setpriv       = kind{"util-linux's setpriv", [][]string{{"setpriv"}}, "--help", "--reuid"}
	analyze       = kind{"systemd-analyze 250 or later", [][]string{{"systemd-analyze"}}, "--help", "--offline"}
	tmux          = kind{"tmux", [][]string{{"tmux"}}, "-V", "tmux "}
	dpkg          = kind{"Debian's dpkg", [][]string{{"dpkg"}}, "--version", "'dpkg' package"} // BusyBox has others
	rpm           = kind{"RPM", [][]string{{"rpm"}}, "--version", "RPM version"}
)

// find returns the command that starts a program of this kind. Without one the test is skipped, or fails; see missing.
func (k kind) find(t testing.TB) []string {
	t.Helper()
	command := k.look(t)
	if command == nil {
		missing(t, k.name+" is not installed")
	}
	return command
}

// look is like find, but returns nil without such a program.
func (k kind) look(t testing.TB) []string {
	t.Helper()
	for _, command := range k.commands {
		path, err := exec.LookPath(command[0])
		if err != nil {
			continue
		}
		command = append([]string{path}, command[1:]...)
		if got := run(t, commandOf(append(command, k.probe)...)); strings.Contains(got.stdout+got.stderr, k.says) {
			return command
		}
	}
	return nil
}

// program is a client that somebody else wrote, run with pipes.
type program struct {
	t      testing.TB
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stdout *bufio.Reader
	stderr *journal
	over   chan struct{} // closed when it has exited
}

// startProgram starts a program. It is killed when the test ends, or after patience.
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

// say writes text to the program's standard input.
func (p *program) say(text string) {
	p.t.Helper()
	_, err := io.WriteString(p.stdin, text)
	check(p.t, err)
}

// reads reads len(want) bytes of the program's standard output, which must be want.
func (p *program) reads(want string) {
	p.t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(p.stdout, got); string(got[:n]) != want {
		p.t.Fatalf("%s shows %q (%v, stderr %q), want %q", p.cmd.Args[0], got[:n], err, p.stderr.String(), want)
	}
}

// readsUpTo reads the program's standard output up to and including want.
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

// ends waits for the program to exit by itself with code 0; the rest of its output must be rest.
func (p *program) ends(rest string) {
	p.t.Helper()
	got := p.exitsByItself()
	if got != rest || p.cmd.ProcessState.ExitCode() != 0 {
		p.t.Errorf("%s ends with %q (%v, stderr %q), want %q and exit code 0",
			p.cmd.Args[0], got, p.cmd.ProcessState, p.stderr.String(), rest)
	}
}

// exitsByItself waits for the program to exit and returns the rest of its output. Being killed for taking too long is
// an error.
func (p *program) exitsByItself() string {
	p.t.Helper()
	got, err := io.ReadAll(p.stdout)
	check(p.t, err)
	_ = p.cmd.Wait()
	close(p.over)
	if !p.cmd.ProcessState.Exited() {
		p.t.Errorf("%s did not exit: %v, output %q", p.cmd.Args[0], p.cmd.ProcessState, got)
	}
	return string(got)
}

// hostPort splits the server's address, as most programs want it.
func (e *echod) hostPort() (host, port string) {
	e.t.Helper()
	host, port, err := net.SplitHostPort(e.addr)
	check(e.t, err)
	return host, port
}

// TestClientPrograms runs the server against programs that people use as clients: what they show, and that they end by
// themselves when the server closes.
func TestClientPrograms(t *testing.T) {
	t.Parallel()
	plain := func(host, port string) []string { return []string{host, port} }
	viaSocat := func(host, port string) []string { return []string{"-", "TCP:" + host + ":" + port} }

	// At the server's FIN OpenBSD's nc and ncat wait for their own input to end. On a terminal it ends with the next line
	// that a user types. The others exit.
	for _, tt := range []struct {
		kind     kind
		args     func(host, port string) []string
		endInput bool
	}{
		{openbsdNC, plain, true},
		{ncat, plain, true},
		{socat, viaSocat, false},
		{traditionalNC, plain, false},
		{busyboxNC, plain, false},
	} {
		t.Run("an interactive user of "+tt.kind.name+" sees echo and notice", func(t *testing.T) {
			t.Parallel()
			command := tt.kind.find(t)
			e := start(t, "--grace", "500ms")
			p := startProgram(t, append(command, tt.args(e.hostPort())...)...)
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

	// Line endings, exit codes and last words differ between versions of telnet.
	for _, tt := range []struct {
		name string
		find func(t *testing.T) []string
	}{
		{"telnet", func(t *testing.T) []string { return []string{require(t, "telnet")} }},
		{"BusyBox's telnet", func(t *testing.T) []string { return busyboxTelnet.find(t) }},
	} {
		t.Run("an interactive user of "+tt.name+" sees echo and notice", func(t *testing.T) {
			t.Parallel()
			command := tt.find(t)
			e := start(t, "--grace", "500ms")
			host, port := e.hostPort()
			p := startProgram(t, append(command, host, port)...)
			p.say("hello\n")
			p.readsUpTo("hello")
			e.signal(syscall.SIGINT)
			p.readsUpTo("SHUTDOWN 1 SIGINT")
			e.wait(0)
			p.exitsByItself()
		})
	}

	for _, tt := range []struct {
		kind   kind
		option string
	}{
		{openbsdNC, "-d"},
		{ncat, "--recv-only"},
	} {
		t.Run("a user of "+tt.kind.name+" without input gets the notice, and success", func(t *testing.T) {
			t.Parallel()
			command := tt.kind.find(t)
			e := start(t, "--grace", "500ms")
			host, port := e.hostPort()
			p := startProgram(t, append(command, tt.option, host, port)...)
			e.awaitOpen(1)
			e.signal(syscall.SIGTERM)
			p.reads("SHUTDOWN 1 SIGTERM\n")
			p.ends("")
			e.wait(0)
		})
	}

	for _, tt := range []struct {
		kind kind
		args func(host, port string) []string
	}{
		{openbsdNC, func(host, port string) []string { return []string{"-N", host, port} }},
		{ncat, plain},
		{socat, func(host, port string) []string { return append([]string{"-t", "20"}, viaSocat(host, port)...) }},
		{busyboxNC, plain},
	} {
		t.Run(tt.kind.name+" half-closes in a drain and gets everything back", func(t *testing.T) {
			t.Parallel()
			command := tt.kind.find(t)
			e := start(t, "--grace", "20s")
			testHalfClose(t, e, startProgram(t, append(command, tt.args(e.hostPort())...)...))
		})
	}

	t.Run("a Python client leaves at exactly SHUTDOWN", func(t *testing.T) {
		t.Parallel()
		python := python3.find(t)[0]
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
	})
}

// testHalfClose sends half of the input before the notice and half after it, half-closes, and reads to the end.
func testHalfClose(t *testing.T, e *echod, p *program) {
	t.Helper()
	const lines, notice = 20_000, "SHUTDOWN 20 SIGTERM\n"
	var b strings.Builder
	for n := range lines {
		fmt.Fprintf(&b, "line %d\n", n)
	}
	input := b.String()
	half := len(input) / 2

	p.say("first\n")
	p.reads("first\n")
	e.signal(syscall.SIGTERM)
	told := make(chan struct{})
	fed := make(chan error, 1)
	go func() {
		_, first := io.WriteString(p.stdin, input[:half])
		<-told
		_, second := io.WriteString(p.stdin, input[half:])
		fed <- errors.Join(first, second, p.stdin.Close())
	}()
	var got []byte
	for !bytes.HasSuffix(got, []byte(notice)) {
		line, err := p.stdout.ReadBytes('\n')
		got = append(got, line...)
		if err != nil {
			close(told)
			<-fed
			t.Fatalf("no notice in %d bytes: %v", len(got), err)
		}
	}
	close(told)
	rest, err := io.ReadAll(p.stdout)
	check(t, err)
	check(t, <-fed)
	// In the middle of a line, the server sends a newline before the notice.
	before := strings.TrimSuffix(string(got), notice)
	if !strings.HasPrefix(input, before) {
		before = strings.TrimSuffix(before, "\n")
	}
	if before+string(rest) != input {
		t.Errorf("%d bytes came back, want the %d that were sent", len(before)+len(rest), len(input))
	}
	e.wait(0)
}

// pythonClient sends bytes without newlines, and leaves when it has received exactly SHUTDOWN after its echo. It
// keeps to Python 3.6.
const pythonClient = `
import os, socket, sys

def read(s, n):
    got = b""
    while len(got) < n:
        more = s.recv(n - len(got))
        if not more:
            break
        got += more
    return got

with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20) as s:
    for n in (1, 7, 4096, 100000):
        data = os.urandom(n).replace(b"\n", b"\r")
        s.sendall(data)
        assert read(s, n) == data, "the echo is not what was sent"
    print("ready", flush=True)
    notice = read(s, 8)
    assert notice == b"SHUTDOWN", notice
    s.sendall(b"last")
    s.shutdown(socket.SHUT_WR)
    rest = read(s, 100)
    assert rest == b"last", rest
print("left", flush=True)
`
