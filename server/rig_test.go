package server

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// budget is how long after the deadline a drain may take at most.
const budget = 2 * time.Second

// rig is a server on a fake listener in a synctest bubble, and its log.
type rig struct {
	*Server
	ln     *fakeListener
	logs   *observer.ObservedLogs
	served chan error
}

// bubbled returns a test that runs f in a synctest bubble. Channels that are waited on must be made in it. A wait that
// never ends makes time pass, because the sweeper's ticker keeps running, and so the test fails.
func bubbled(f func(*testing.T)) func(*testing.T) {
	return func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			const most = 100 * time.Hour
			watchdog := time.AfterFunc(most, func() { panic(t.Name() + " hangs: it has waited for " + most.String()) })
			t.Cleanup(func() { watchdog.Stop() })
			f(t)
		})
	}
}

// inBubble returns a test that runs f on a server in a synctest bubble.
func inBubble(h Handler, o Options, f func(*testing.T, *rig)) func(*testing.T) {
	return bubbled(func(t *testing.T) { f(t, newRig(t, h, o)) })
}

// newRig starts a server, and closes it when the test ends.
func newRig(t *testing.T, h Handler, o Options) *rig {
	t.Helper()
	ln := newFakeListener()
	return newRigOn(t, ln, ln, h, o)
}

// newRigOn starts a server on ln. Its clients connect through fake.
func newRigOn(t *testing.T, ln net.Listener, fake *fakeListener, h Handler, o Options) *rig {
	t.Helper()
	r := &rig{ln: fake}
	r.Server, r.logs = newServer(t, h, o)
	r.served = serve(t, r.Server, ln)
	synctest.Wait()
	return r
}

// newServer makes a server with an observed log. Without another Notifier it speaks the line protocol.
func newServer(t testing.TB, h Handler, o Options) (*Server, *observer.ObservedLogs) {
	t.Helper()
	core, logs := observer.New(zap.DebugLevel)
	if o.Logger == nil {
		o.Logger = zap.New(core)
	}
	if o.Notifier == nil {
		o.Notifier = DefaultLineNotifier()
	}
	s, err := New(h, o)
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	return s, logs
}

// serve serves ln, and closes the server when the test ends.
func serve(t testing.TB, s *Server, ln net.Listener) chan error {
	t.Helper()
	return serveListener(t, s, Listener{Listener: ln})
}

func serveListener(t testing.TB, s *Server, ln Listener) chan error {
	t.Helper()
	served := make(chan error, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		served <- s.ServeListener(ln)
	}()
	t.Cleanup(func() {
		_ = s.Close()
		<-done
	})
	return served
}

// dial connects a client. Like all methods of rig and client it returns when the server has reacted.
func (r *rig) dial(t *testing.T) *client {
	t.Helper()
	return r.dialFrom(t, "198.51.100.1")
}

func (r *rig) dialFrom(t *testing.T, ip string) *client {
	t.Helper()
	nc, err := r.ln.dialFrom(ip)
	if err != nil {
		t.Fatalf("dial: %v", err)
	}
	synctest.Wait()
	return &client{fakeConn: nc}
}

// pause places a hold.
func (r *rig) pause(t *testing.T, o PauseOptions) *Hold {
	t.Helper()
	h, err := r.Pause(o)
	if err != nil {
		t.Fatalf("Pause: %v", err)
	}
	synctest.Wait()
	return h
}

// drain begins a drain.
func (r *rig) drain(grace time.Duration, reason string) {
	r.StartDrain(DrainOptions{Grace: grace, Reason: reason})
	synctest.Wait()
}

// messages returns the log entries with the given message.
func (r *rig) messages(text string) []observer.LoggedEntry { return r.logs.FilterMessage(text).All() }

// client is the far end of a connection in a bubble.
type client struct{ *fakeConn }

func (c *client) send(t *testing.T, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatalf("send %q: %v", text, err)
	}
	synctest.Wait()
}

// has checks what has arrived since the last call.
func (c *client) has(t *testing.T, want string) {
	t.Helper()
	synctest.Wait()
	if got := c.arrived(); got != want {
		t.Errorf("client received %q, want %q", got, want)
	}
}

// arrived reads what has arrived so far.
func (c *client) arrived() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := c.in.buf.String()
	c.in.buf.Reset()
	c.cond.Broadcast()
	return all
}

// echoes checks that the handler echoes text.
func (c *client) echoes(t *testing.T, text string) {
	t.Helper()
	c.send(t, text)
	c.has(t, text)
}

// ends checks that the client receives want and then a FIN, and closes it.
func (c *client) ends(t *testing.T, want string) {
	t.Helper()
	got, err := io.ReadAll(c)
	if err != nil || string(got) != want {
		t.Errorf("client read %q, %v; want %q and a FIN", got, err, want)
	}
	_ = c.Close()
	synctest.Wait()
}

// leave half-closes, reads to the end, and closes.
func (c *client) leave(t *testing.T) {
	t.Helper()
	_ = c.CloseWrite()
	_, _ = io.Copy(io.Discard, c)
	_ = c.Close()
	synctest.Wait()
}

// pass lets time pass in a bubble, and returns when everything that was due has happened.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// elapsed returns how long f takes.
func elapsed(f func()) time.Duration {
	begin := time.Now()
	f()
	return time.Since(begin)
}

// drainIn drains with the given grace period, and returns the report and how long it took.
func drainIn(s *Server, grace time.Duration, reason string) (Report, time.Duration) {
	begin := time.Now()
	rep := s.Drain(DrainOptions{Grace: grace, Reason: reason})
	return rep, time.Since(begin)
}

// report returns the report of a server that has stopped.
func report(t *testing.T, s *Server) Report {
	t.Helper()
	rep, ok := s.Report()
	if !ok {
		t.Fatal("the server has not stopped")
	}
	return rep
}

// wantState checks the state and how many connections are open.
func wantState(t *testing.T, s *Server, state State, connections int) {
	t.Helper()
	if st := s.Status(); st.State != state || st.Connections != connections {
		t.Errorf("server is %v with %d connections, want %v with %d", st.State, st.Connections, state, connections)
	}
}

// wantPhases checks the phases of the open connections, oldest first.
func wantPhases(t *testing.T, s *Server, want ...Phase) {
	t.Helper()
	var got []Phase
	for info := range s.Conns() {
		got = append(got, info.Phase)
	}
	wantEqual(t, "phases", got, want)
}

// wantClosed checks how many connections were closed for which reason.
func wantClosed(t *testing.T, s *Server, want map[Reason]uint64) {
	t.Helper()
	wantEqual(t, "closed by reason", s.Status().Closed, want)
}

func wantErr(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: error %v, want %v", what, err, want)
	}
}

func wantErrText(t *testing.T, what string, err error, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%s: error %v, want one that says %q", what, err, want)
	}
}

// untilDone is a handler that reads nothing and returns when its context ends.
var untilDone = HandlerFunc(func(ctx context.Context, _ *Conn) error {
	<-ctx.Done()
	return context.Cause(ctx)
})

// untilWriteFails is a handler that writes for as long as it can.
var untilWriteFails = HandlerFunc(func(_ context.Context, c *Conn) error {
	p := make([]byte, 64<<10)
	for {
		if _, err := c.Write(p); err != nil {
			return err
		}
	}
})

// stubborn returns a handler that ignores everything until the test ends.
func stubborn(t *testing.T) Handler {
	t.Helper()
	ended := make(chan struct{})
	t.Cleanup(func() { close(ended) })
	return HandlerFunc(func(context.Context, *Conn) error {
		<-ended
		return nil
	})
}

// returns is a handler that does nothing and returns err.
func returns(err error) Handler {
	return HandlerFunc(func(context.Context, *Conn) error { return err })
}

// next returns the next value from ch. It fails the test if there is none for a quarter of a minute.
func next[T any](t *testing.T, ch <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-ch:
	case <-time.After(15 * time.Second):
		t.Fatal("nothing happened for 15 s")
	}
	return v
}

// Over loopback.

// serveTCP starts a server on loopback.
func serveTCP(t testing.TB, h Handler, o Options) (*Server, net.Addr) {
	t.Helper()
	ln := listen(t)
	s, _ := newServer(t, h, o)
	serve(t, s, ln)
	return s, ln.Addr()
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	ln, err := Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln
}

// dialTCP connects a client whose reads and writes fail after 30 s at most, so that a failing test does not hang.
func dialTCP(t testing.TB, addr net.Addr) *net.TCPConn {
	t.Helper()
	return dialTo(t, addr).(*net.TCPConn)
}

func dialTo(t testing.TB, addr net.Addr) net.Conn {
	t.Helper()
	nc, err := net.DialTimeout(addr.Network(), addr.String(), 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	_ = nc.SetDeadline(time.Now().Add(30 * time.Second))
	return nc
}

func send(t *testing.T, w io.Writer, text string) {
	t.Helper()
	if _, err := io.WriteString(w, text); err != nil {
		t.Fatalf("send %q: %v", text, err)
	}
}

// receives checks what the client receives next.
func receives(t *testing.T, r io.Reader, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(r, got); err != nil || string(got) != want {
		t.Errorf("client received %q, %v; want %q", got[:n], err, want)
	}
}

// receivesAll checks that the client receives want and then a FIN.
func receivesAll(t *testing.T, r io.Reader, want string) {
	t.Helper()
	if got, err := io.ReadAll(r); err != nil || string(got) != want {
		t.Errorf("client received %q, %v; want %q and a FIN", got, err, want)
	}
}

// echoed sends text and checks that it comes back.
func echoed(t *testing.T, rw io.ReadWriter, text string) {
	t.Helper()
	send(t, rw, text)
	receives(t, rw, text)
}

// await waits for a condition that nothing signals, such as one of the kernel's.
func await(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for began := time.Now(); !cond(); time.Sleep(time.Millisecond) {
		if time.Since(began) > 30*time.Second {
			t.Fatalf("waited 30 s for %s", what)
		}
	}
}

// awaitConns waits until n connections are open.
func awaitConns(t *testing.T, s *Server, n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := s.AwaitStatus(ctx, func(_ State, open int) bool { return open == n }); err != nil {
		t.Fatalf("waiting for %d connections: %v", n, err)
	}
}

// commonPrefix returns how many bytes at the beginning of a and b are equal.
func commonPrefix(a, b []byte) int {
	n := 0
	for n < min(len(a), len(b)) && a[n] == b[n] {
		n++
	}
	return n
}

// wantBytes compares long byte strings.
func wantBytes(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		t.Errorf("%s: got %d bytes, want %d; they are equal up to byte %d", what, len(got), len(want), commonPrefix(got, want))
	}
}
