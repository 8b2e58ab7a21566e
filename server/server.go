package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// Server serves connections of any stream protocol with a Handler. Make one with New. A Server cannot be reused:
// after a drain it never serves again. All methods may be called concurrently and at any time. On a zero Server,
// methods that can return an error do.
type Server struct {
	// Set once, by New.
	handler      Handler
	opts         Options
	log          *zap.Logger
	started      time.Time
	maxAgeCause  *drainCause // cause of the notices for Timeouts.MaxAge
	maxConnFiles int         // maximum number of files that connections may have open; 0 means no limit

	draining chan struct{} // closed when all clients have been told to leave
	stopped  chan struct{} // closed when every connection is closed and the report is final

	state monitor[state]

	backgroundCtx    context.Context // ends when the server has stopped
	cancelBackground context.CancelCauseFunc
	sweeperDone      chan struct{} // closed when the sweeper has returned

	scheduleChanged   chan struct{} // holds a token when the schedule has changed
	schedulerDone     chan struct{} // closed when the goroutine of the schedule has returned
	predecessorSendMu sync.Mutex    // held while a message is sent to the predecessor
	settings          atomic.Pointer[activeSettings]
	initialSettings   Settings      // set once, by New
	timeoutsChanged   chan struct{} // holds a token when timeouts have changed

	probeToken chan struct{} // holds a token while a probe's goroutine runs
}

// New makes a Server. h may be nil if each Listener has its own handler. The error names each invalid option.
func New(h Handler, opts Options) (*Server, error) {
	opts, err := opts.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("server: %w", err)
	}
	s := &Server{
		handler:     h,
		opts:        opts,
		log:         opts.Logger,
		started:     time.Now(),
		maxAgeCause: &drainCause{reason: ReasonMaxAge.String(), closed: ReasonMaxAge, grace: opts.Drain.Grace},
		draining:    make(chan struct{}),
		stopped:     make(chan struct{}),
		sweeperDone: make(chan struct{}),
		probeToken:  make(chan struct{}, 1),

		scheduleChanged: make(chan struct{}, 1),
		schedulerDone:   make(chan struct{}),
		timeoutsChanged: make(chan struct{}, 1),
	}
	s.settings.Store(opts.activeSettings())
	s.initialSettings = s.activeSettings().toSettings()
	if files, limited := openFilesLimit(); limited && opts.Limits.ReservedFiles > 0 {
		s.maxConnFiles = max(1, files-opts.Limits.ReservedFiles)
	}
	s.backgroundCtx, s.cancelBackground = context.WithCancelCause(context.Background())
	s.state.With(func(st *state) {
		st.lifecycle = StateStarting
		st.recentClosed.size = recentConns
		st.history.first = firstEventID()
		st.history.last = st.history.first - 1
		st.perClient = make(map[clientKey]int)
	})
	return s, nil
}

// ListenAndServe listens at address, as Listen does, and serves. The address may also be tls://host:port; see
// ListenAndServeTLS.
func (s *Server) ListenAndServe(address string) error {
	if s.log == nil {
		return errNotNew
	}
	if strings.HasPrefix(address, tlsScheme) {
		return s.ListenAndServeTLS(address, "", "")
	}
	ln, err := Listen(context.Background(), address)
	if err != nil {
		return err
	}
	return s.Serve(ln)
}

// Serve accepts connections from ln and serves each on a goroutine of its own; see ServeListener.
func (s *Server) Serve(ln net.Listener) error { return s.ServeListener(Listener{Listener: ln}) }

// ServeListener accepts connections from l and serves each on a goroutine of its own. It may be called for several
// listeners, and closes the listener before it returns. The error is never nil:
//
//   - ErrServerClosed after a drain. ServeListener then returns after its last handler, or at most two seconds after
//     the deadline if handlers ignore their context.
//   - An error that matches net.ErrClosed if the listener was closed while the server runs, by CloseListener or by its
//     owner. ServeListener returns at once; connections and other listeners are not affected.
//   - The error that made accepting impossible. If this was the last listener, the server drains first.
//
// Errors of Accept that are temporary, by errno or by their Temporary method, are retried with a growing delay. If a
// drain has already begun, it handles the clients in the accept queue as the drain does: it serves or rejects them.
func (s *Server) ServeListener(l Listener) error {
	switch {
	case l.Listener == nil:
		return errors.New("server: serve: the listener is nil")
	case s.log == nil:
		_ = l.Close()
		return errNotNew
	case l.Handler == nil && s.handler == nil:
		_ = l.Close()
		return errors.New("server: serve: neither the listener nor the server has a handler")
	case l.TLSConfig != nil && !hasCertificate(l.TLSConfig):
		_ = l.Close()
		return errNoCertificate
	}
	a := s.takePendingAcceptor(l)
	if a == nil {
		a = newAcceptor(s, l)
	}
	var sweep bool
	s.state.With(func(st *state) {
		if st.lifecycle == StateStarting {
			st.setLifecycle(StateRunning)
		}
		if a.afterStop = st.lifecycle == StateStopped; !a.afterStop {
			sweep, st.sweeperStarted = !st.sweeperStarted, true
		}
		st.acceptors = append(st.acceptors, a)
		st.tasks++
		if i := slices.Index(st.closeOnServe, l.Listener); i >= 0 {
			st.closeOnServe = slices.Delete(st.closeOnServe, i, i+1)
			a.closing = true
		}
	})
	if sweep {
		go s.sweepConns()
	}
	s.log.Info("listening", zap.Stringer("address", l.Addr()), zap.Bool("tls", l.TLSConfig != nil))

	err := a.run()
	last := a.deregister()
	s.endTask()
	switch closing := a.isClosing(); {
	case closing, errors.Is(err, net.ErrClosed) && !s.isDraining():
		s.log.Info("listener closed", zap.Stringer("address", l.Addr()))
		return fmt.Errorf("serving %s: %w", l.Addr(), net.ErrClosed)
	case err != nil && !s.isDraining():
		s.log.Error("cannot accept any more", zap.Stringer("address", l.Addr()), zap.Error(err))
		err = fmt.Errorf("serving %s: %w", l.Addr(), err)
		if !last {
			return err
		}
		s.StartDrain(DrainOptions{Reason: "accept error", Final: true})
	default:
		err = ErrServerClosed
	}
	<-s.stopped
	if a.afterStop {
		s.awaitFor(flushTimeout+lingerTimeout, func(st *state) bool { return st.tasks == 0 })
	}
	return err
}

// takePendingAcceptor removes the acceptor that TakeOver made for l from the pending ones, and returns it; nil if there
// is none.
func (s *Server) takePendingAcceptor(l Listener) (a *acceptor) {
	s.state.With(func(st *state) {
		if i := slices.IndexFunc(st.pendingAcceptors, func(a *acceptor) bool { return a.ln.Listener == l.Listener }); i >= 0 {
			a = st.pendingAcceptors[i]
			st.pendingAcceptors = slices.Delete(st.pendingAcceptors, i, i+1)
		}
	})
	return a
}

// CloseListener stops accepting from ln, and returns at once. The server serves the clients in ln's accept queue and
// closes ln; then its Serve returns. Other listeners and all connections are not affected. If CloseListener is called
// before ServeListener, ServeListener does the same when it is called. The error is ErrNoListener if ServeListener
// has returned for ln, or if the server has stopped.
func (s *Server) CloseListener(ln net.Listener) (err error) {
	s.state.With(func(st *state) {
		i := slices.IndexFunc(st.acceptors, func(a *acceptor) bool { return a.ln.Listener == ln })
		switch {
		case i >= 0:
			st.acceptors[i].interrupt()
			st.acceptors[i].closing = true
		case s.log == nil, st.lifecycle == StateStopped, slices.Contains(st.formerListeners, ln):
			err = ErrNoListener
		case slices.Contains(st.closeOnServe, ln):
		case len(st.closeOnServe) == maxKnownListeners:
			err = ErrNoListener
		default:
			st.closeOnServe = append(st.closeOnServe, ln)
		}
	})
	return err
}

func (a *acceptor) isClosing() (yes bool) {
	a.srv.state.With(func(*state) { yes = a.closing })
	return yes
}

// Done returns a channel that is closed when the server has stopped.
func (s *Server) Done() <-chan struct{} { return s.stopped }

// Draining returns a channel that is closed when the drain has notified all clients: after DrainOptions.Delay, after
// the clients in the accept queue were accepted, and after DrainOptions.Spread. Force and Close close it too.
func (s *Server) Draining() <-chan struct{} { return s.draining }

func (s *Server) isDraining() (yes bool) {
	s.state.With(func(st *state) { yes = st.drain != nil })
	return yes
}
