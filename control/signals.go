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

// Signals turns signals into drains:
//
//   - The first INT, TERM or QUIT begins a drain. If HUP or the control plane began a drain, that drain continues with
//     its deadline, because supervisors and terminals send TERM and HUP in pairs.
//   - The second one closes everything at once. QUIT writes the stacks of all goroutines first.
//   - HUP begins a drain, and never forces it.
//
// The program registers the channel with signal.Notify before it opens its listeners, so that no signal causes the
// default action. run.SignalHandler does not fit: it stops listening after the first signal.
type Signals struct {
	srv    *server.Server
	in     <-chan os.Signal
	log    *zap.Logger
	stacks io.Writer
	// Seen, if not nil, is called with the name of each signal. Set it before Actor is called.
	Seen func(name string)
	// PassOn, if not nil, is called with each signal after it was handled, to forward it to another process. Set it before
	// Actor is called.
	PassOn func(sig os.Signal)
	// Final makes the drains that signals begin final (server.DrainOptions.Final), because a supervisor kills the process
	// some time after its signal. Set it before Actor is called.
	Final  bool
	forced atomic.Pointer[os.Signal]
}

// NewSignals handles the signals received from in, and writes stacks to stacks.
func NewSignals(srv *server.Server, in <-chan os.Signal, log *zap.Logger, stacks io.Writer) *Signals {
	return &Signals{srv: srv, in: in, log: log, stacks: stacks}
}

// Actor returns the run.Group pair that handles signals until the server has stopped and the group ends.
func (s *Signals) Actor() (execute func() error, interrupt func(error)) {
	ending := make(chan struct{})
	execute = func() error {
		asked := 0 // number of INT, TERM and QUIT so far
		for {
			select {
			case <-s.srv.Done():
				<-ending // the group's error is that of the first actor to return, which must not be this one
				return nil
			case sig := <-s.in:
				if s.srv.Status().State < server.StateDraining {
					asked = 0 // no drain yet, or it was cancelled
				}
				if sig != syscall.SIGHUP {
					asked++
				}
				s.handle(sig, asked)
			}
		}
	}
	interrupt = func(error) {
		s.srv.StartDrain(server.DrainOptions{Reason: "stopping", Final: true})
		close(ending)
	}
	return execute, interrupt
}

// Forced returns the signal that closed everything, or nil if none did. Call it after the actor has returned.
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
	if s.PassOn != nil {
		defer s.PassOn(sig)
	}
	name := zap.String("signal", SignalName(sig))
	if sig != syscall.SIGHUP && asked >= 2 {
		s.log.Warn("second signal received; closing everything now", name)
		if sig == syscall.SIGQUIT {
			_, _ = s.stacks.Write(allStacks())
		}
		if s.srv.Force(SignalName(sig)) {
			s.forced.Store(&sig)
		}
		return
	}
	s.log.Info("signal received", name)
	if !s.srv.StartDrain(server.DrainOptions{Reason: SignalName(sig), Final: s.Final}) {
		s.log.Info("drain already in progress; its deadline is unchanged", name)
	}
}

// SignalName returns a signal's name, such as SIGTERM.
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

// allStacks returns the stacks of all goroutines, at most 64 MiB.
func allStacks() []byte {
	for size := 1 << 20; ; size *= 2 {
		buf := make([]byte, size)
		if n := runtime.Stack(buf, true); n < size || size >= 64<<20 {
			return buf[:n]
		}
	}
}
