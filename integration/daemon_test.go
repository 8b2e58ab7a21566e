//go:build unix

package integration

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"echod/control"
)

// echod is a running server.
type echod struct {
	t       testing.TB
	cmd     *exec.Cmd
	pid     int
	socket  string   // path of the control socket
	addrs   []string // of the listeners
	addr    string   // the first of them
	log     *journal
	control *control.Client

	connectWithin func(timeout time.Duration) (*peer, error) // connects a client to addr

	exited chan struct{}
	gone   time.Time // when it exited; valid once exited is closed
	code   int       // its exit code, or 128+signal; valid once exited is closed
}

// start starts a server with these flags, and others that all tests use, and waits until it listens.
func start(t testing.TB, flags ...string) *echod {
	t.Helper()
	return startAs(t, nil, flags...)
}

// startAs is like start, but runs the server through a wrapper that executes its arguments, such as nohup.
func startAs(t testing.TB, wrapper []string, flags ...string) *echod {
	t.Helper()
	argv := slices.Concat(wrapper, []string{built(t, echodBinary), "serve", "--log-format", "json"}, flags)
	if !slices.Contains(flags, "--listen") {
		argv = append(argv, "--listen", "127.0.0.1:0")
	}
	socket := ""
	if i := slices.Index(flags, "--control"); i >= 0 {
		socket = flags[i+1]
	} else {
		socket = filepath.Join(shortDir(t), "c")
		argv = append(argv, "--control", socket)
	}
	return launch(t, exec.Command(argv[0], argv[1:]...), socket)
}

// startEmbedding starts the program in testdata/embed.
func startEmbedding(t testing.TB, flags ...string) *echod {
	t.Helper()
	socket := filepath.Join(shortDir(t), "c")
	flags = append(flags, "--control", socket)
	if !slices.Contains(flags, "--listen") {
		flags = append(flags, "--listen", "127.0.0.1:0")
	}
	return launch(t, exec.Command(built(t, embedBinary), flags...), socket)
}

// launch starts a server and waits for all of its listeners.
func launch(t testing.TB, cmd *exec.Cmd, socket string) *echod {
	t.Helper()
	e := spawn(t, cmd, socket)
	listeners := 0
	for _, arg := range e.cmd.Args {
		if arg == "--listen" {
			listeners++
		}
	}
	for i := range max(1, listeners) {
		e.addrs = append(e.addrs, e.awaitNth(i+1, "listening").str("address"))
	}
	e.addr = e.addrs[0]
	e.connectWithin = func(timeout time.Duration) (*peer, error) { return connectOver("tcp", e.addr, timeout) }
	return e
}

// spawn starts a server and does not wait for its listeners. The end of the test kills it.
func spawn(t testing.TB, cmd *exec.Cmd, socket string) *echod {
	t.Helper()
	e := &echod{t: t, cmd: cmd, socket: socket, log: newJournal(), exited: make(chan struct{})}
	e.cmd.Stderr = e.log
	if e.cmd.Env == nil {
		e.cmd.Env = environment()
	}
	e.cmd.WaitDelay = patience
	check(t, e.cmd.Start())
	e.pid = e.cmd.Process.Pid
	go e.await()
	e.control = control.NewClient(socket)
	t.Cleanup(e.cleanup)
	return e
}

// shortDir makes a directory with a short name: a socket's path has at most 107 bytes.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "echod")
	check(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func (e *echod) await() {
	defer close(e.exited)
	_ = e.cmd.Wait()
	e.gone = time.Now()
	e.log.end()
	e.code = exitCode(e.cmd.ProcessState)
}

// exitCode returns the exit code as a shell shows it.
func exitCode(state *os.ProcessState) int {
	if status, ok := state.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return 128 + int(status.Signal())
	}
	return state.ExitCode()
}

func (e *echod) cleanup() {
	e.control.Close()
	select {
	case <-e.exited:
	default:
		_ = e.cmd.Process.Kill()
		<-e.exited
	}
	if strings.Contains(e.log.String(), "DATA RACE") {
		e.t.Error("the race detector found a race")
	}
	if e.t.Failed() {
		text := e.log.String()
		if len(text) > 20_000 {
			text = text[:10_000] + "\n…\n" + text[len(text)-10_000:]
		}
		e.t.Logf("log of %s:\n%s", strings.Join(e.cmd.Args, " "), text)
	}
}

// awaitLog waits for a log line with this message and these fields.
func (e *echod) awaitLog(msg string, fields ...string) entry {
	e.t.Helper()
	return e.awaitNth(1, msg, fields...)
}

// awaitNth waits for the n-th such line.
func (e *echod) awaitNth(n int, msg string, fields ...string) entry {
	e.t.Helper()
	found, err := e.log.await(within(e.t, patience), n, msg, fields...)
	check(e.t, err)
	return found
}

// signal sends sig and returns the time.
func (e *echod) signal(sig syscall.Signal) time.Time {
	e.t.Helper()
	sent := time.Now()
	check(e.t, e.cmd.Process.Signal(sig))
	return sent
}

// wait waits for the process to exit, and checks its exit code.
func (e *echod) wait(code int) {
	e.t.Helper()
	select {
	case <-e.exited:
	case <-within(e.t, patience).Done():
		e.t.Fatal("the server does not exit")
	}
	if e.code != code {
		e.t.Fatalf("exit code %d, want %d", e.code, code)
	}
}

// status returns the server's status.
func (e *echod) status() control.Status {
	e.t.Helper()
	st, err := e.control.Status(within(e.t, patience))
	check(e.t, err)
	return st
}

// expectState checks the server's state.
func (e *echod) expectState(want string) {
	e.t.Helper()
	if got := e.status().State; got != want {
		e.t.Fatalf("the server is %s, want %s", got, want)
	}
}

// awaitOpen waits until n connections are open.
func (e *echod) awaitOpen(n int) {
	e.t.Helper()
	_, err := e.control.Wait(within(e.t, patience), control.WaitRequest{Connections: &n})
	if err != nil {
		e.t.Fatalf("waiting for %d open connections: %v", n, err)
	}
}

// expectAccounts checks that accepted = open + closed, and the number closed for each reason.
func (e *echod) expectAccounts(want map[string]uint64) {
	e.t.Helper()
	st := e.status()
	check(e.t, balanced(st))
	for why, n := range want {
		if st.Closed[why] != n {
			e.t.Errorf("%d closed as %s, want %d; all: %v", st.Closed[why], why, n, st.Closed)
		}
	}
	if len(st.Closed) != len(want) {
		e.t.Errorf("closed %v, want %v", st.Closed, want)
	}
}

// queued returns how many clients wait in the first listener's accept queue.
func (e *echod) queued(st control.Status) int {
	e.t.Helper()
	if st.Listeners[0].AcceptQueue == nil {
		missing(e.t, "this system does not show the length of an accept queue")
	}
	return *st.Listeners[0].AcceptQueue
}

func balanced(st control.Status) error {
	closed := uint64(0)
	for _, n := range st.Closed {
		closed += n
	}
	if st.Accepted != uint64(st.Connections)+closed {
		return fmt.Errorf("accepted %d is not open %d + closed %d", st.Accepted, st.Connections, closed)
	}
	return nil
}

// result is the outcome of a program.
type result struct {
	stdout, stderr string
	code           int
}

// ctl runs 'echod ctl' with the server's control socket.
func (e *echod) ctl(args ...string) result {
	e.t.Helper()
	return run(e.t, e.ctlCommand(args...))
}

func (e *echod) ctlCommand(args ...string) *exec.Cmd {
	e.t.Helper()
	return exec.Command(built(e.t, echodBinary), append([]string{"ctl", "--control", e.socket}, args...)...)
}

// run runs a program until it exits. It is killed after patience.
func run(t testing.TB, cmd *exec.Cmd) result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if cmd.Env == nil {
		cmd.Env = environment()
	}
	cmd.WaitDelay = time.Second
	check(t, cmd.Start())
	overdue := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
	defer overdue.Stop()
	_ = cmd.Wait()
	return result{stdout.String(), stderr.String(), exitCode(cmd.ProcessState)}
}

func commandOf(argv ...string) *exec.Cmd { return exec.Command(argv[0], argv[1:]...) }
