package server

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"time"
)

// probe gives the server a second.
func probe(t *testing.T, s *Server) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	return s.Probe(ctx)
}

// stuckListener ignores its deadlines.
type stuckListener struct{ *fakeListener }

func (l stuckListener) SetDeadline(time.Time) error { return nil }

func TestProbe(t *testing.T) {
	t.Run("a server is alive in every state", inBubble(Echo, Options{Limits: Limits{MaxConns: 2}}, func(t *testing.T, r *rig) {
		alive := func(when string) {
			t.Helper()
			for range 3 {
				wantErr(t, when, probe(t, r.Server), nil)
			}
		}
		alive("running")
		c := r.dial(t)
		alive("serving")
		h := r.pause(t, PauseOptions{})
		alive("paused")
		h.Release()
		alive("resumed")
		r.ln.slip(1)
		h = r.pause(t, PauseOptions{})
		r.dial(t)
		alive("with a connection that waits for its admission")
		h.Release()
		alive("resumed and full")
		r.dial(t)
		alive("with a client in the accept queue")
		r.drain(time.Minute, "x")
		alive("draining")
		pass(acceptorsTimeout)
		alive("after the notices")
		c.send(t, "x\n")
		c.has(t, "SHUTDOWN 60 x\nx\n")
		_ = r.Close()
		alive("stopped")
	}))

	t.Run("a server that is out of files is alive", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		outOfFiles(r)
		r.dial(t)
		for range 50 {
			pass(99 * time.Millisecond)
			wantErr(t, "Probe", probe(t, r.Server), nil)
		}
	}))

	t.Run("a listener without deadlines is alive", bubbled(func(t *testing.T) {
		fake := newFakeListener()
		r := newRigOn(t, plainListener{fake}, fake, Echo, Options{})
		for range 3 {
			wantErr(t, "Probe", probe(t, r.Server), nil)
			r.dial(t).echoes(t, "x")
		}
	}))

	t.Run("it names an accept loop that is stuck", bubbled(func(t *testing.T) {
		fake := newFakeListener()
		r := newRigOn(t, stuckListener{fake}, fake, Echo, Options{})
		err := probe(t, r.Server)
		wantErr(t, "Probe", err, ErrStuck)
		wantErrText(t, "Probe", err, "accepting from "+fake.Addr().String())
		_ = fake.Close() // makes Accept return
	}))

	t.Run("it finds a lock that is held", func(t *testing.T) {
		s, _ := newServer(t, Echo, Options{})
		release, held := make(chan struct{}), make(chan struct{})
		go s.state.With(func(*state) { close(held); <-release })
		<-held
		for range 2 { // the second finds the first one still waiting
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
			wantErr(t, "Probe", s.Probe(ctx), ErrStuck)
			cancel()
		}
		close(release)
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		wantErr(t, "Probe after that", s.Probe(ctx), nil)
	})

	t.Run("a drain that does not end is found", bubbled(func(t *testing.T) {
		release := make(chan struct{})
		r := newRig(t, Echo, Options{Logger: blockingLog("draining", release)}) // blocks the drain's goroutine
		r.dial(t)
		r.drain(time.Second, "x")
		pass(time.Second + drainOverdue)
		wantErr(t, "Probe in good time", probe(t, r.Server), nil)
		pass(time.Second)
		err := probe(t, r.Server)
		wantErr(t, "Probe", err, ErrStuck)
		wantErrText(t, "Probe", err, "the drain has not ended 6s after its deadline")
		close(release)
		<-r.Done()
		wantErr(t, "Probe after the end", probe(t, r.Server), nil)
	}))

	t.Run("probes at the same time all succeed", func(t *testing.T) {
		s, _ := serveTCP(t, Echo, Options{})
		errs := make([]error, 16)
		var probes sync.WaitGroup
		for i := range errs {
			probes.Go(func() {
				for n := 0; n < 200 && errs[i] == nil; n++ {
					errs[i] = s.Probe(t.Context())
				}
			})
		}
		probes.Wait()
		wantErr(t, "Probe", errors.Join(errs...), nil)
	})

	t.Run("it costs no client its connection", func(t *testing.T) {
		s, addr := serveTCP(t, Echo, Options{})
		ctx, cancel := context.WithCancel(t.Context())
		var probing sync.WaitGroup
		probing.Go(func() {
			for ctx.Err() == nil {
				if err := s.Probe(context.Background()); err != nil {
					t.Error(err)
				}
			}
		})
		for range 200 {
			nc, err := net.Dial("tcp", addr.String())
			if err != nil {
				t.Fatal(err)
			}
			echoed(t, nc, "x")
			_ = nc.Close()
		}
		cancel()
		probing.Wait()
	})
}
