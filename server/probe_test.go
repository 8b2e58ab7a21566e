package server

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

// probe asks for a proof within a second.
func probe(t *testing.T, s *Server) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	return s.Probe(ctx)
}

func TestProbeFindsAServerAliveInEveryState(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Limits: Limits{MaxConns: 2}})
		alive := func(when string) {
			t.Helper()
			for range 3 {
				if err := probe(t, r.Server); err != nil {
					t.Errorf("%s: %v", when, err)
				}
			}
		}
		alive("running")
		c := r.dial(t)
		alive("serving")
		h := r.pause(t, PauseOptions{})
		alive("paused")
		h.Release()
		alive("resumed")
		r.ln.slip(1) // Accept returns with a connection, though it was woken
		h = r.pause(t, PauseOptions{})
		r.dial(t) // which slips in, and waits at the gate
		alive("with a connection at the gate")
		h.Release()
		alive("resumed and full")
		r.dial(t) // stays in the queue
		alive("with a queue")
		r.StartDrain(DrainOptions{Grace: time.Minute, Reason: "x"})
		alive("draining")
		pass(acceptorsStop)
		alive("having told")
		c.send(t, "x\n")
		c.has(t, "SHUTDOWN 60 x\nx\n")
		_ = r.Close()
		alive("stopped")
	})
}

// deafListener does not come back from Accept, whatever its deadline is.
type deafListener struct{ *fakeListener }

func (l deafListener) SetDeadline(time.Time) error { return nil }

func TestProbeNamesAnAcceptLoopThatIsStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeListener()
		r := newRigOn(t, deafListener{fake}, fake, Echo, Options{})
		err := probe(t, r.Server)
		wantErr(t, "Probe", err, ErrStuck)
		wantErrText(t, "Probe", err, "accepting from "+fake.Addr().String())
		_ = fake.Close() // lets Accept go
	})
}

func TestProbeSaysThatTheBooksAreStuck(t *testing.T) {
	s, _ := newServer(t, Echo, Options{})
	release := make(chan struct{})
	held := make(chan struct{})
	go s.state.With(func(*state) { close(held); <-release })
	<-held
	for range 2 { // the second finds the first one still waiting
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		wantErr(t, "Probe", s.Probe(ctx), ErrStuck)
		cancel()
	}
	close(release)
	if err := probe(t, s); err != nil {
		t.Errorf("after that: %v", err)
	}
}

// Probes that coincide wait for one another: a load balancer asks while the watchdog does.
func TestProbesAtTheSameTimeAllFindTheServerAlive(t *testing.T) {
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
	if err := errors.Join(errs...); err != nil {
		t.Error(err)
	}
}

// A log that blocks holds up whoever conducts the drain.
func TestProbeFindsADrainThatDoesNotEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		core, _ := observer.New(zap.InfoLevel)
		log := zap.New(core, zap.Hooks(func(e zapcore.Entry) error {
			if e.Message == "draining" {
				<-release
			}
			return nil
		}))
		r := newRig(t, Echo, Options{Logger: log})
		r.dial(t)
		r.StartDrain(DrainOptions{Grace: time.Second, Reason: "x"})
		pass(time.Second + drainOverdue)
		if err := probe(t, r.Server); err != nil {
			t.Errorf("in good time: %v", err)
		}
		pass(time.Second)
		err := probe(t, r.Server)
		wantErr(t, "Probe", err, ErrStuck)
		wantErrText(t, "Probe", err, "the drain has not ended 6s after its deadline")
		close(release)
		<-r.Done()
		if err := probe(t, r.Server); err != nil {
			t.Errorf("after its end: %v", err)
		}
	})
}

// A probe wakes the accept loop by a deadline, and must not cost a client his connection.
func TestProbeLosesNoClient(t *testing.T) {
	s, address := serveTCP(t, Echo, Options{})
	stop := make(chan struct{})
	probed := make(chan error, 1)
	go func() {
		for {
			select {
			case <-stop:
				probed <- nil
				return
			default:
			}
			if err := s.Probe(context.Background()); err != nil {
				probed <- err
				return
			}
		}
	}()
	for range 200 {
		nc, err := net.Dial("tcp", address.String())
		if err != nil {
			t.Fatal(err)
		}
		send(t, nc, "x")
		receives(t, nc, "x")
		_ = nc.Close()
	}
	close(stop)
	if err := <-probed; err != nil {
		t.Error(err)
	}
}
