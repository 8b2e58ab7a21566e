package server

import (
	"errors"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func TestG11AcceptingBacksOffAndRecovers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		began := time.Now()
		var tries []time.Duration
		var short atomic.Bool
		short.Store(true)
		r.ln.failWith(func() error {
			tries = append(tries, time.Since(began))
			if short.Load() {
				return &os.SyscallError{Syscall: "accept4", Err: syscall.EMFILE}
			}
			return nil
		})
		c := r.dial(t)
		c.send(t, "x\n")
		pass(5 * time.Second)
		short.Store(false)
		pass(2 * time.Second)
		c.has(t, "x\n")

		ms := time.Millisecond
		wantEqual(t, "tries", tries, []time.Duration{
			0, 5 * ms, 15 * ms, 35 * ms, 75 * ms, 155 * ms, 315 * ms, 635 * ms, 1275 * ms,
			2275 * ms, 3275 * ms, 4275 * ms, 5275 * ms,
		})
		wantEqual(t, "warnings", len(r.messages("cannot accept, retrying")), 1)
		wantEqual(t, "reliefs", len(r.messages("accepting again")), 1)
		wantState(t, r.Server, StateRunning, 1)
	})
}

func TestG11AConnectionThatClosesPromptsARetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		open := r.dial(t)
		r.ln.failWith(func() error {
			if r.Status().Connections > 0 {
				return syscall.EMFILE
			}
			return nil
		})
		next := r.dial(t)
		pass(4 * time.Second) // deep in the backoff
		wait := elapsed(func() {
			open.leave(t)
			next.send(t, "x\n")
			next.has(t, "x\n")
		})
		wantEqual(t, "wait for the next try", wait, time.Duration(0))
	})
}

func TestG11ADrainAndAPauseWorkWhileOutOfFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		served := r.dial(t)
		var short atomic.Bool
		short.Store(true)
		r.ln.failWith(func() error {
			if short.Load() {
				return syscall.EMFILE
			}
			return nil
		})
		queued := r.dial(t)
		pass(time.Second)
		r.pause(t, PauseOptions{}).Release()
		r.StartDrain(DrainOptions{Grace: 10 * time.Second, Reason: "TERM"})
		pass(quietTime)
		served.has(t, "SHUTDOWN 10 TERM\n") // although the queue cannot be emptied yet
		short.Store(false)
		served.leave(t) // and that is tried again now
		queued.has(t, "SHUTDOWN 10 TERM\n")
		queued.leave(t)
		<-r.Done()
		wantClosed(t, r.Server, map[Reason]uint64{ReasonClientLeft: 2})
	})
}

func TestG11ADrainThatNeverGetsFilesEndsAtItsDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		r.ln.failWith(func() error { return syscall.EMFILE })
		r.dial(t)
		if _, took := shutdownIn(t, r.Server, 3*time.Second, "TERM"); took > 3*time.Second+budget {
			t.Errorf("drain took %v, want at most the grace of 3s and %v", took, budget)
		}
		wantErr(t, "Serve", <-r.served, ErrServerClosed)
	})
}

func TestServeReturnsWhatMakesAcceptingImpossible(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Drain: DrainOptions{Grace: time.Minute}})
		c := r.dial(t)
		broken := errors.New("broken")
		r.ln.failWith(func() error { return broken })
		r.dial(t)
		began := time.Now()
		pass(acceptorsStop)
		c.has(t, "SHUTDOWN 60 accept error\n")
		if !r.ln.isClosed() {
			t.Error("Serve left its listener open")
		}
		c.leave(t)
		wantErr(t, "Serve", <-r.served, broken)
		wantEqual(t, "duration", time.Since(began), acceptorsStop)
	})
}

func TestServeOfAListenerThatSomebodyCloses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		_ = r.ln.Close()
		wantErr(t, "Serve", <-r.served, net.ErrClosed)
		wantState(t, r.Server, StateRunning, 0)
	})
}

func TestOneListenersEndLeavesTheOthersAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		other := newFakeListener()
		served := serve(t, r.Server, other)
		synctest.Wait()
		_ = r.ln.Close()
		wantErr(t, "Serve", <-r.served, net.ErrClosed)
		o := &rig{Server: r.Server, ln: other}
		c := o.dial(t)
		c.send(t, "x")
		c.has(t, "x")
		_ = r.Close()
		wantErr(t, "Serve of the other", <-served, ErrServerClosed)
	})
}

// A queue that fills as fast as it is emptied, where the system cannot keep newcomers out.
func TestDrainDoesNotChaseNewcomersForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := newFakeListener()
		r := newRigOn(t, endlessListener{ln}, ln, Echo, Options{})
		_, took := shutdownIn(t, r.Server, time.Second, "TERM")
		if took > time.Second+budget {
			t.Errorf("drain took %v, want at most the grace of 1s and %v", took, budget)
		}
		if n := r.Status().Accepted; n > emptyAtMost {
			t.Errorf("the drain accepted %d clients, want at most %d", n, emptyAtMost)
		}
	})
}

// endlessListener has somebody in its queue whenever it is being emptied.
type endlessListener struct{ *fakeListener }

func (l endlessListener) Accept() (net.Conn, error) {
	l.mu.Lock()
	emptying := !l.deadline.at.IsZero() && !l.deadline.passed()
	l.mu.Unlock()
	if emptying {
		if nc, err := l.dialFrom("198.51.100.1"); err == nil {
			_ = nc.Close()
		}
	}
	return l.fakeListener.Accept()
}
