package control

import (
	"io"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"

	"go.uber.org/zap"

	"echod/server"
)

// Signals turns signals into what they mean for a server:
//
//   - The first INT, TERM or QUIT begins the drain; when HUP or the control plane has begun it, that is
//     adopted: logged, and its deadline kept, since supervisors and terminals send TERM and HUP in pairs.
//   - The second one closes everything now. A QUIT writes the stacks of all goroutines first.
//   - HUP begins the drain, and never counts towards forcing it.
//
// Its owner registers the channel before the run group starts, so that no signal finds the default
// action. run.SignalHandler does not do: it stops listening after the first.
type Signals struct {
	srv    *server.Server
	in     <-chan os.Signal
	log    *zap.Logger
	stacks io.Writer
	// Seen, when not nil, is told the name of each signal that comes. Set it before Actor is called.
	Seen   func(name string)
	forced atomic.Pointer[os.Signal]
}

// NewSignals makes the actor for the signals that come from in. Stacks are written to stacks.
func NewSignals(srv *server.Server, in <-chan os.Signal, log *zap.Logger, stacks io.Writer) *Signals {
	return &Signals{srv: srv, in: in, log: log, stacks: stacks}
}

// Actor returns the run.Group pair that handles signals until the server has stopped, and the group ends.
func (s *Signals) Actor() (execute func() error, interrupt func(error)) {
	ending := make(chan struct{})
	execute = func() error {
		asked := 0 // how often INT, TERM or QUIT have come
		for {
			select {
			case <-s.srv.Done():
				<-ending // the group returns the first actor's error: that is not this one's
				return nil
			case sig := <-s.in:
				if sig != syscall.SIGHUP {
					asked++
				}
				s.handle(sig, asked)
			}
		}
	}
	interrupt = func(error) {
		s.srv.Drain(0, "stopping")
		close(ending)
	}
	return execute, interrupt
}

// Forced returns the signal that forced the end, once the actor has returned; nil when none did.
func (s *Signals) Forced() os.Signal {
	if sig := s.forced.Load(); sig != nil {
		return *sig
	}
	return nil
}

func (s *Signals) handle(sig os.Signal, asked int) {
	if s.Seen != nil {
		s.Seen(SignalName(sig))
	}
	name := zap.String("signal", SignalName(sig))
	if sig != syscall.SIGHUP && asked >= 2 {
		s.log.Warn("signal received again: closing everything now", name)
		if sig == syscall.SIGQUIT {
			_, _ = s.stacks.Write(allStacks())
		}
		if s.srv.Force(SignalName(sig)) {
			s.forced.Store(&sig)
		}
		return
	}
	s.log.Info("signal received", name)
	if !s.srv.Drain(0, SignalName(sig)) {
		s.log.Info("the drain under way goes on, its deadline is kept", name)
	}
}

// SignalName gives a signal's name as kill -l and notices have it, such as SIGTERM.
func SignalName(sig os.Signal) string {
	switch sig {
	case syscall.SIGHUP:
		return "SIGHUP"
	case syscall.SIGINT:
		return "SIGINT"
	case syscall.SIGQUIT:
		return "SIGQUIT"
	case syscall.SIGTERM:
		return "SIGTERM"
	default:
		return sig.String()
	}
}

// allStacks returns the stacks of all goroutines, as runtime.Stack writes them.
func allStacks() []byte {
	for size := 1 << 20; ; size *= 2 {
		buf := make([]byte, size)
		if n := runtime.Stack(buf, true); n < size || size >= 64<<20 {
			return buf[:n]
		}
	}
}
