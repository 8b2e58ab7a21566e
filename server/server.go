package server

import (
	"context"
	"errors"
	"net"
	"time"

	"go.uber.org/zap"
)

// Server serves connections of any stream protocol with a Handler. Make one with New. It is for a
// single use: once draining it never serves again. All methods may be called concurrently, and at
// any time in the server's life.
type Server struct {
	// Set once, by New.
	handler Handler
	opts    Options
	log     *zap.Logger
	started time.Time

	draining chan struct{} // closed once clients have been told that the drain has begun
	stopped  chan struct{} // closed once every connection is closed and the report is final

	book awaited[ledger]

	sweepCtx  context.Context // ends when the server has stopped
	stopSweep context.CancelCauseFunc
	sweeper   chan struct{} // closed when the sweeper has returned

	probing chan struct{} // of size one, and full while a probe's goroutine is under way
}

// New makes a Server. The error names each option that makes no sense.
func New(h Handler, opts Options) (*Server, error) {
	if h == nil {
		return nil, errors.New("making a server: the handler is nil")
	}
	opts, err := opts.resolve()
	if err != nil {
		return nil, err
	}
	s := &Server{
		handler:  h,
		opts:     opts,
		log:      opts.Logger,
		started:  time.Now(),
		draining: make(chan struct{}),
		stopped:  make(chan struct{}),
		sweeper:  make(chan struct{}),
		probing:  make(chan struct{}, 1),
	}
	s.sweepCtx, s.stopSweep = context.WithCancelCause(context.Background())
	s.book.With(func(l *ledger) {
		l.state = Starting
		if opts.MaxConnsPerIP > 0 {
			l.perIP = make(ipCounts)
		}
	})
	return s, nil
}

// Serve accepts connections from ln and serves each on a goroutine of its own. It may be called for
// several listeners. It takes ln over, closes it, and returns only when the server has stopped: after
// its last handler, or at most two seconds after the drain's deadline when handlers ignore their
// context. The error is never nil: ErrServerClosed after a drain that somebody asked for, else what
// made accepting from ln impossible, in which case the server drains by itself.
func (s *Server) Serve(ln net.Listener) error {
	a := newAcceptor(s, ln)
	var late, sweep bool
	s.book.With(func(l *ledger) {
		if late = l.state >= Draining; late {
			return
		}
		if l.state == Starting {
			l.setState(Running)
		}
		l.acceptors = append(l.acceptors, a)
		l.tasks++
		sweep, l.sweeping = !l.sweeping, true
	})
	if late {
		_ = ln.Close()
		<-s.stopped
		return ErrServerClosed
	}
	if sweep {
		go s.sweep()
	}
	s.log.Info("listening", zap.Stringer("address", ln.Addr()))

	err := a.run()
	if err != nil {
		s.log.Error("accepting has become impossible", zap.Stringer("address", ln.Addr()), zap.Error(err))
		s.Drain(0, "accept error")
	}
	<-s.stopped
	if err != nil {
		return err
	}
	return ErrServerClosed
}

// Done is closed when the server has stopped.
func (s *Server) Done() <-chan struct{} { return s.stopped }

// clock is the time since the server was made, in nanoseconds, and never zero. Unlike the wall clock
// it cannot be set, which would make every connection look idle.
func (s *Server) clock() int64 { return int64(time.Since(s.started)) + 1 }

// at is the inverse of clock.
func (s *Server) at(clock int64) time.Time { return s.started.Add(time.Duration(clock - 1)) }

// startTask books a goroutine that works for a connection that is on the books. It calls endTask
// last; the drain waits for it.
func (s *Server) startTask() { s.book.With(func(l *ledger) { l.tasks++ }) }
func (s *Server) endTask()   { s.book.With(func(l *ledger) { l.tasks-- }) }
