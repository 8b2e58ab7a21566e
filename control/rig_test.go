package control

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/oklog/run"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"echod/internal/text"
	"echod/server"
)

// patience bounds waits in tests. It passes only when a test fails.
const patience = 30 * time.Second

// rig is an echo server with a control plane, run as a program would run them, and a client.
type rig struct {
	srv    *server.Server
	plane  *Plane
	client *Client
	logs   *observer.ObservedLogs
	socket string // path; empty in a bubble

	dialControl, dialEcho func(context.Context) (net.Conn, error)

	ended chan struct{} // closed when the run group has ended, with err
	err   error
}

// actor is the pair that run.Group.Add takes.
type actor struct {
	execute   func() error
	interrupt func(error)
}

func pair(execute func() error, interrupt func(error)) actor { return actor{execute, interrupt} }

// newRig serves on real sockets. Each of more may change the rig before it starts, and return another actor.
func newRig(t *testing.T, opts server.Options, more ...func(*rig) actor) *rig {
	t.Helper()
	ln, err := server.Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{socket: filepath.Join(shortDir(t), "control.sock")}
	socket := listenControl(t, r.socket)
	r.dialControl = func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "unix", r.socket) }
	r.dialEcho = func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", ln.Addr().String())
	}
	r.client = NewClient(r.socket)
	r.start(t, opts, ln, socket, more)
	return r
}

// listenControl opens a control socket. It skips the test if Windows Sockets knows no such address family, as in wine.
func listenControl(t *testing.T, path string) net.Listener {
	t.Helper()
	const wsaEAFNOSUPPORT = syscall.Errno(10047)
	socket, err := Listen(t.Context(), path, SocketOptions{Mode: 0o600})
	switch {
	case errors.Is(err, wsaEAFNOSUPPORT):
		t.Skip(err)
	case err != nil:
		t.Fatal(err)
	}
	return socket
}

// newBubble serves in memory, for synctest.
func newBubble(t *testing.T, opts server.Options, more ...func(*rig) actor) *rig {
	t.Helper()
	ln, socket := newPipeListener(), newPipeListener()
	r := &rig{dialControl: socket.Dial, dialEcho: ln.Dial}
	r.client = &Client{path: "memory", http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return socket.Dial(ctx) },
	}}}
	r.start(t, opts, ln, socket, more)
	return r
}

// upgrade replaces the program's upgrade. The timeout selects the outcome.
func (r *rig) upgrade(_ context.Context, timeout time.Duration) (Upgraded, error) {
	switch st := r.srv.Status(); {
	case st.Drain != nil:
		return Upgraded{}, &server.DrainingError{Deadline: st.Drain.Deadline}
	case timeout == time.Millisecond:
		return Upgraded{}, &Problem{Type: ProblemUpgrade, Title: "Rolled back", Status: http.StatusInternalServerError, Detail: "no successor"}
	case timeout == 2*time.Millisecond:
		return Upgraded{}, server.ErrHandoverInProgress
	default:
		return Upgraded{PID: 4712, HandedOver: st.Connections, Behind: map[string]int{"handshake": 1}, FrozenSeconds: 0.01, TookSeconds: 0.2}, nil
	}
}

func (r *rig) start(t *testing.T, opts server.Options, ln, socket net.Listener, more []func(*rig) actor) {
	t.Helper()
	var core zapcore.Core
	core, r.logs = observer.New(zap.DebugLevel)
	log := zap.New(core)
	opts.Logger = log
	if opts.Notifier == nil {
		opts.Notifier = server.DefaultLineNotifier()
	}
	srv, err := server.New(server.Echo, opts)
	if err != nil {
		t.Fatal(err)
	}
	r.srv = srv
	r.plane = New(srv, Options{Version: "1.2.3", Logger: log, Metrics: http.HandlerFunc(someMetrics), Upgrade: r.upgrade})
	r.plane.linger = patience // a busy machine must not cut an answer off

	actors := []actor{pair(ServerActor(srv, server.Listener{Listener: ln}))}
	for _, add := range more {
		if a := add(r); a.execute != nil {
			actors = append(actors, a)
		}
	}
	actors = append(actors, pair(r.plane.Actor(socket)))
	var g run.Group
	for _, a := range actors {
		g.Add(a.execute, a.interrupt)
	}
	r.ended = make(chan struct{})
	go func() {
		defer close(r.ended)
		r.err = g.Run()
	}()
	t.Cleanup(func() {
		r.client.Close()
		_ = srv.Close()
		<-r.ended
	})
	r.await(t, server.StateRunning)
}

// someMetrics are metrics for tests.
func someMetrics(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	_, _ = io.WriteString(w, "echod_holds 0\n")
}

// await waits for the server to be in state.
func (r *rig) await(t *testing.T, state server.State) {
	t.Helper()
	r.awaitStatus(t, state.String(), func(st server.State, _ int) bool { return st == state })
}

// awaitConns waits for n connections to be open.
func (r *rig) awaitConns(t *testing.T, n int) {
	t.Helper()
	r.awaitStatus(t, text.Count(n, "connection"), func(_ server.State, open int) bool { return open == n })
}

func (r *rig) awaitStatus(t *testing.T, what string, match func(server.State, int) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := r.srv.AwaitStatus(ctx, match); err != nil {
		st := r.srv.Status()
		t.Fatalf("the server is %s with %s: want %s", st.State, text.Count(st.Connections, "connection"), what)
	}
}

// awaitStreams waits until n requests last.
func (r *rig) awaitStreams(t *testing.T, n int) {
	t.Helper()
	for deadline := time.Now().Add(patience); r.plane.streams.count() != n; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d requests last: want %d", r.plane.streams.count(), n)
		}
	}
}

// echoClient connects a client to the echo server, and waits until it is served. Lines that it then receives go to its
// channel.
func (r *rig) echoClient(t *testing.T) *echoClient {
	t.Helper()
	before := r.srv.Status().Connections
	conn, err := r.dialEcho(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if _, err := io.WriteString(conn, "hello\n"); err != nil {
		t.Fatal(err)
	}
	c := &echoClient{Conn: conn, lines: make(chan string, 64)}
	read := bufio.NewReader(conn)
	if line, err := read.ReadString('\n'); err != nil || line != "hello\n" {
		t.Fatalf("echo is %q, %v: want hello", line, err)
	}
	go c.read(read)
	r.awaitConns(t, before+1)
	return c
}

// echoClient is a client that reads lines until it or the server closes.
type echoClient struct {
	net.Conn
	lines chan string // closed at the end
}

func (c *echoClient) read(r *bufio.Reader) {
	defer close(c.lines)
	defer c.Close()
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		c.lines <- line
	}
}

// rawConn connects to the control plane without our client.
func (r *rig) rawConn(t *testing.T) net.Conn {
	t.Helper()
	conn, err := r.dialControl(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// answered is a whole answer.
type answered struct {
	status int
	header http.Header
	body   string
}

// do makes a request with net/http, without our client.
func (r *rig) do(t *testing.T, method, target, body string) answered {
	t.Helper()
	req, err := http.NewRequestWithContext(within(t, patience), method, "http://echod"+target, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := r.client.http.Do(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, target, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s %s: reading the answer: %v", method, target, err)
	}
	return answered{resp.StatusCode, resp.Header, string(text)}
}

// wantProblem checks that err is a problem of this type, and returns it.
func wantProblem(t *testing.T, err error, want string) *Problem {
	t.Helper()
	problem, ok := errors.AsType[*Problem](err)
	if !ok {
		t.Fatalf("error is %v: want a problem of type %s", err, want)
	}
	if problem.Type != want {
		t.Fatalf("problem is %s (%s): want %s", problem.Type, problem.Detail, want)
	}
	return problem
}

// must returns the result of a call, and fails the test if there is an error.
func must[T any](t *testing.T) func(T, error) T {
	t.Helper()
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// receive returns what comes from a channel.
func receive[T any](t *testing.T, what string, from <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-from:
	case <-time.After(patience):
		t.Fatalf("%s: nothing came", what)
	}
	return v
}

// shortDir makes a directory whose path leaves room for the name of a socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "echod")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// pipeListener listens in memory, with an accept queue.
type pipeListener struct {
	queue  chan net.Conn
	fail   chan error // what Accept returns
	done   chan struct{}
	mu     sync.Mutex
	closed bool
}

func newPipeListener() *pipeListener {
	return &pipeListener{queue: make(chan net.Conn, 128), fail: make(chan error, 1), done: make(chan struct{})}
}

func (l *pipeListener) Dial(context.Context) (net.Conn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, syscall.ECONNREFUSED
	}
	served, client := net.Pipe()
	l.queue <- served
	return client, nil
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case <-l.done:
		return nil, net.ErrClosed
	case err := <-l.fail:
		return nil, err
	case c := <-l.queue:
		return c, nil
	}
}

func (l *pipeListener) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	close(l.done)
	for len(l.queue) > 0 {
		_ = (<-l.queue).Close()
	}
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "memory", Net: "unix"} }
