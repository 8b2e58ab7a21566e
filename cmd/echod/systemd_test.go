package main

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"echod/server"
)

// notifications records what was sent to systemd.
type notifications struct {
	mu    sync.Mutex
	lines []string
}

func (t *notifications) add(state string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lines = append(t.lines, state)
}

// take returns the notifications since the last call.
func (t *notifications) take() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	lines := t.lines
	t.lines = nil
	return lines
}

// oneListener accepts what is sent to conns.
type oneListener struct {
	conns  chan net.Conn
	closed chan struct{}
	close  func()
}

func (l oneListener) Accept() (net.Conn, error) {
	select {
	case nc := <-l.conns:
		return nc, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l oneListener) Close() error {
	l.close()
	return nil
}

func (l oneListener) Addr() net.Addr { return &net.TCPAddr{} }

// runTask runs a task of the notifier until the test ends.
func runTask(t *testing.T, s *sdNotifier, task func(context.Context)) *notifications {
	t.Helper()
	var sent notifications
	s.notify = sent.add
	ctx, cancel := context.WithCancelCause(context.Background())
	var tasks sync.WaitGroup
	tasks.Go(func() { task(ctx) })
	t.Cleanup(func() {
		cancel(errStopped)
		tasks.Wait()
	})
	return &sent
}

// newTestServer returns a server. serve makes it serve one client until the test ends.
func newTestServer(t *testing.T, opts server.Options) (srv *server.Server, serve func()) {
	t.Helper()
	srv, err := server.New(server.Echo, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = srv.Close() })
	return srv, func() {
		far, near := net.Pipe()
		ln := oneListener{conns: make(chan net.Conn, 1), closed: make(chan struct{})}
		ln.close = sync.OnceFunc(func() { close(ln.closed) })
		ln.conns <- far
		var both sync.WaitGroup
		both.Go(func() { _, _ = io.Copy(io.Discard, near) })
		both.Go(func() { _ = srv.Serve(ln) })
		t.Cleanup(func() {
			_ = near.Close()
			_ = srv.Close()
			both.Wait()
		})
	}
}

// fakeProbe is a probe with a given result.
type fakeProbe struct {
	mu    sync.Mutex
	err   error // errProbeTimeout: block until the timeout
	tries int
}

func (p *fakeProbe) probe(ctx context.Context) error {
	p.mu.Lock()
	p.tries++
	err := p.err
	p.mu.Unlock()
	if errors.Is(err, errProbeTimeout) {
		<-ctx.Done()
		return context.Cause(ctx)
	}
	return err
}

func (p *fakeProbe) set(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.err = err
}

func (p *fakeProbe) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.tries
}

func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func TestReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv, serve := newTestServer(t, server.Options{})
		core, logs := observer.New(zap.WarnLevel)
		plane := &fakeProbe{err: errors.New("not yet")}
		s := &sdNotifier{srv: srv, log: zap.New(core), probes: []func(context.Context) error{srv.Probe, plane.probe}}
		sent := runTask(t, s, s.notifyReady)
		pass(time.Minute)
		if lines := sent.take(); plane.count() > 0 || lines != nil {
			t.Errorf("before it serves: %d probes, notified %q", plane.count(), lines)
		}
		serve()
		pass(10*statusInterval - 1)
		if lines := sent.take(); plane.count() != 10 || lines != nil {
			t.Errorf("%d probes, want 10; notified %q", plane.count(), lines)
		}
		if n := logs.FilterMessage("probe failed; not ready yet").Len(); n != 10 {
			t.Errorf("%d warnings, want 10", n)
		}
		plane.set(nil)
		pass(statusInterval)
		if got, want := sent.take(), []string{"READY=1", "STATUS=running: 1 connection, 1 accepted"}; !slices.Equal(got, want) {
			t.Errorf("notified %q, want %q", got, want)
		}
	})
}

func TestWatchdog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		both := []*fakeProbe{{}, {}}
		s := &sdNotifier{log: zap.NewNop(), probes: []func(context.Context) error{both[0].probe, both[1].probe}}
		sent := runTask(t, s, func(ctx context.Context) { s.pingWatchdog(ctx, 6*time.Second) })
		pass(6*time.Second + 1)
		if got := sent.take(); len(got) != 4 || got[0] != "WATCHDOG=1" {
			t.Errorf("notified %q in 6 s, want WATCHDOG=1 at once and every 2 s", got)
		}
		for i, p := range both {
			for _, err := range []error{errors.New("wedged"), errProbeTimeout} {
				p.set(err)
				pass(20 * time.Second)
				if got := sent.take(); got != nil {
					t.Errorf("probe %d returns %v; notified %q", i, err, got)
				}
			}
			p.set(nil)
			pass(6 * time.Second)
			if sent.take() == nil {
				t.Error("no ping after the probe succeeded again")
			}
		}
	})
}

func TestExtendTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		core, _ := observer.New(zap.InfoLevel)
		// A blocking logger stops the drain.
		log := zap.New(core, zap.Hooks(func(e zapcore.Entry) error {
			if e.Message == "draining" {
				<-release
			}
			return nil
		}))
		srv, serve := newTestServer(t, server.Options{Logger: log, Drain: server.DrainOptions{Delay: 30 * time.Second}})
		serve()
		s := &sdNotifier{srv: srv, log: zap.NewNop()}
		sent := runTask(t, s, s.notifyReady)
		t.Cleanup(func() { close(release) })
		pass(time.Second)
		sent.take()
		srv.StartDrain(server.DrainOptions{Grace: 30 * time.Second, Reason: "x"})
		extensions := func() (n int) {
			for _, line := range sent.take() {
				if strings.Contains(line, "EXTEND_TIMEOUT_USEC=") {
					n++
				}
			}
			return n
		}
		synctest.Wait()
		if got, want := sent.take()[0], "EXTEND_TIMEOUT_USEC=70000000"; got != want {
			t.Errorf("notified %q, want %q: delay, grace and ten seconds", got, want)
		}
		pass(30*time.Second - 1)
		if all := strings.Join(sent.take(), "\n"); strings.Contains(all, "STOPPING=1") {
			t.Error("STOPPING=1 was sent while the drain can be cancelled")
		}
		pass(time.Second)
		if all := strings.Join(sent.take(), "\n"); !strings.Contains(all, "STOPPING=1\nEXTEND_TIMEOUT_USEC=") {
			t.Errorf("after the delay: %q, want STOPPING=1", all)
		}
		pass(29*time.Second + drainMargin)
		if n := extensions(); n < 30 {
			t.Errorf("%d extensions, want one a second", n)
		}
		pass(time.Hour)
		if n := extensions(); n != 0 {
			t.Errorf("%d extensions during a stuck drain", n)
		}
	})
}
