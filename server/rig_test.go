package server

import (
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

// rig is a server that serves a fake listener in a synctest bubble, and what it has logged.
type rig struct {
	*Server
	ln     *fakeListener
	logs   *observer.ObservedLogs
	served chan error
}

// newRig starts a server. When the test ends it is closed and awaited.
func newRig(t *testing.T, h Handler, o Options) *rig {
	t.Helper()
	ln := newFakeListener()
	return newRigOn(t, ln, ln, h, o)
}

// newRigOn starts a server on ln, whose clients come by fake.
func newRigOn(t *testing.T, ln net.Listener, fake *fakeListener, h Handler, o Options) *rig {
	t.Helper()
	r := &rig{ln: fake}
	r.Server, r.logs = newServer(t, h, o)
	r.served = serve(t, r.Server, ln)
	synctest.Wait()
	return r
}

// newServer makes a server whose log is observed.
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

// serve serves ln, and closes and awaits the server when the test ends.
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

// dial connects a client, and returns when the server has done with it what it does at once.
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

// client is the far end of a connection in a bubble.
type client struct{ *fakeConn }

// send sends text, and returns when the server has done with it what it does at once.
func (c *client) send(t *testing.T, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatalf("send %q: %v", text, err)
	}
	synctest.Wait()
}

// has checks that want is what has arrived so far, and reads it.
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

// ends checks that want and then a clean end of stream is what the client gets, and closes it.
func (c *client) ends(t *testing.T, want string) {
	t.Helper()
	got, err := io.ReadAll(c)
	if err != nil || string(got) != want {
		t.Errorf("client read %q, %v; want %q and a clean end of stream", got, err, want)
	}
	_ = c.Close()
	synctest.Wait()
}

// leave ends the client's stream and reads to the end of the server's.
func (c *client) leave(t *testing.T) {
	t.Helper()
	_ = c.CloseWrite()
	_, _ = io.Copy(io.Discard, c)
	_ = c.Close()
	synctest.Wait()
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

// pass lets time pass, and returns when all that was due has been done. For the test's own goroutine.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
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

// elapsed returns how long f takes.
func elapsed(f func()) time.Duration {
	begin := time.Now()
	f()
	return time.Since(begin)
}

// messages returns what was logged with the given message.
func (r *rig) messages(text string) []observer.LoggedEntry {
	return r.logs.FilterMessage(text).All()
}

// untilDone is a handler that reads nothing and heeds its context.
var untilDone = HandlerFunc(func(ctx context.Context, _ *Conn) error {
	<-ctx.Done()
	return context.Cause(ctx)
})

// stubborn is a handler that ignores everything until the test has ended.
func stubborn(t *testing.T) Handler {
	t.Helper()
	ended := make(chan struct{})
	t.Cleanup(func() { close(ended) })
	return HandlerFunc(func(context.Context, *Conn) error {
		<-ended
		return nil
	})
}

// shutdownIn drains with the given grace period, and returns the report and how long it took.
func shutdownIn(t *testing.T, s *Server, grace time.Duration, reason string) (Report, time.Duration) {
	t.Helper()
	begin := time.Now()
	rep := s.Drain(DrainOptions{Grace: grace, Reason: reason})
	return rep, time.Since(begin)
}

// reportOf is for a server that must have stopped.
func reportOf(r Report, ok bool) Report {
	if !ok {
		panic("the server has not stopped")
	}
	return r
}

// wantErr checks that err is want, and says so in its text.
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
