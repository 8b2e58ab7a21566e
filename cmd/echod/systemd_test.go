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

// told is what systemd was told.
type told struct {
	mu    sync.Mutex
	lines []string
}

func (t *told) tell(state string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lines = append(t.lines, state)
}

// take returns what was told since the last time.
func (t *told) take() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	lines := t.lines
	t.lines = nil
	return lines
}

// fewListener is one to which few come.
type fewListener struct {
	few    chan net.Conn
	closed chan struct{}
	close  func()
}

func (l fewListener) Accept() (net.Conn, error) {
	select {
	case nc := <-l.few:
		return nc, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l fewListener) Close() error {
	l.close()
	return nil
}

func (l fewListener) Addr() net.Addr { return &net.TCPAddr{} }

// supervise tells what there is to tell of srv, until the test ends.
func supervise(t *testing.T, s *sdNotifier, task func(context.Context)) *told {
	t.Helper()
	var said told
	s.notify = said.tell
	ctx, cancel := context.WithCancelCause(context.Background())
	var tasks sync.WaitGroup
	tasks.Go(func() { task(ctx) })
	t.Cleanup(func() {
		cancel(errStopped)
		tasks.Wait()
	})
	return &said
}

// newTestServer makes a server, and serve has it serve one client until the test ends.
func newTestServer(t *testing.T, opts server.Options) (srv *server.Server, serve func()) {
	t.Helper()
	srv, err := server.New(server.Echo, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = srv.Close() })
	return srv, func() {
		far, near := net.Pipe()
		ln := fewListener{few: make(chan net.Conn, 1), closed: make(chan struct{})}
		ln.close = sync.OnceFunc(func() { close(ln.closed) })
		ln.few <- far
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

// probed is a probe that says what it is told to.
type probed struct {
	mu    sync.Mutex
	err   error // errProbeTimeout: it takes as long as it may
	tries int
}

func (p *probed) probe(ctx context.Context) error {
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

func (p *probed) say(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.err = err
}

func (p *probed) tried() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.tries
}

func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func TestReadyIsSaidOnceTheServerServesAndIsAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv, serve := newTestServer(t, server.Options{})
		core, logs := observer.New(zap.WarnLevel)
		plane := &probed{err: errors.New("not yet")}
		s := &sdNotifier{srv: srv, log: zap.New(core), probes: []func(context.Context) error{srv.Probe, plane.probe}}
		said := supervise(t, s, s.announce)
		pass(time.Minute)
		if lines := said.take(); plane.tried() > 0 || lines != nil {
			t.Errorf("before it serves it was probed %d times, and systemd told %q", plane.tried(), lines)
		}
		serve()
		pass(10*statusInterval - 1)
		if lines := said.take(); plane.tried() != 10 || lines != nil {
			t.Errorf("it was probed %d times, want 10, and systemd told %q", plane.tried(), lines)
		}
		if n := logs.FilterMessage("probe failed; not ready yet").Len(); n != 10 {
			t.Errorf("%d warnings, want 10", n)
		}
		plane.say(nil)
		pass(statusInterval)
		if got, want := said.take(), []string{"READY=1", "STATUS=running: 1 connection, 1 accepted"}; !slices.Equal(got, want) {
			t.Errorf("systemd was told %q, want %q", got, want)
		}
	})
}

func TestWatchdogIsToldWhileEveryProbeSaysSo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		both := []*probed{{}, {}}
		s := &sdNotifier{log: zap.NewNop(), probes: []func(context.Context) error{both[0].probe, both[1].probe}}
		said := supervise(t, s, func(ctx context.Context) { s.pingWatchdog(ctx, 6*time.Second) })
		pass(6*time.Second + 1)
		if got := said.take(); len(got) != 4 || got[0] != "WATCHDOG=1" {
			t.Errorf("in 6 s systemd was told %q, want WATCHDOG=1 at once and every 2 s", got)
		}
		for i, p := range both {
			for _, err := range []error{errors.New("wedged"), errProbeTimeout} {
				p.say(err)
				pass(20 * time.Second)
				if got := said.take(); got != nil {
					t.Errorf("probe %d says %v, and systemd was told %q", i, err, got)
				}
			}
			p.say(nil)
			pass(6 * time.Second)
			if said.take() == nil {
				t.Error("systemd was not told that all is well again")
			}
		}
	})
}

func TestDrainGetsTheTimeThatItTakesAndAStuckOneNoMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		core, _ := observer.New(zap.InfoLevel)
		// A log that blocks holds up whoever conducts the drain.
		log := zap.New(core, zap.Hooks(func(e zapcore.Entry) error {
			if e.Message == "draining" {
				<-release
			}
			return nil
		}))
		srv, serve := newTestServer(t, server.Options{Logger: log, Drain: server.DrainOptions{Delay: 30 * time.Second}})
		serve()
		s := &sdNotifier{srv: srv, log: zap.NewNop()}
		said := supervise(t, s, s.announce)
		t.Cleanup(func() { close(release) })
		pass(time.Second)
		said.take()
		srv.StartDrain(server.DrainOptions{Grace: 30 * time.Second, Reason: "x"})
		extensions := func() (n int) {
			for _, line := range said.take() {
				if strings.HasPrefix(line, "STOPPING=1\nEXTEND_TIMEOUT_USEC=") {
					n++
				}
			}
			return n
		}
		synctest.Wait()
		if got, want := said.take()[0], "STOPPING=1\nEXTEND_TIMEOUT_USEC=70000000"; got != want {
			t.Errorf("systemd was told %q, want %q: delay, grace and ten seconds", got, want)
		}
		pass(time.Minute + drainMargin)
		if n := extensions(); n < 60 {
			t.Errorf("systemd was asked for time %d times, want every second", n)
		}
		pass(time.Hour)
		if n := extensions(); n != 0 {
			t.Errorf("the drain is stuck, and systemd was asked for time %d times", n)
		}
	})
}
