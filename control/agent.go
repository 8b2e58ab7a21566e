package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"echod/internal/text"
	"echod/server"
)

// Bounds on what the callers of an Agent can make it hold.
const (
	maxAgentCallers    = 8                // open at once, or 3 % of the files that the process may open
	agentAnswerTimeout = time.Second      // for the caller to read the line and close
	agentProbeEvery    = time.Second      // between two probes of the server
	agentRetry         = time.Second / 10 // between two attempts to accept
	maxAgentQuestion   = 4 << 10          // bytes of the caller's input that are read
)

// Agent answers the agent checks of HAProxy. Each connection gets one line, and is closed. What the caller sends
// (agent-send) is ignored. The lines are
//
//	up ready      new clients are served, or wait at the connection limit
//	up drain      paused, draining, starting, or full with LimitReject: new clients are not served, existing ones are
//	down #REASON  the server does not respond
//
// An Agent changes nothing, and reveals nothing else.
type Agent struct {
	srv        *server.Server
	log        *zap.Logger
	callers    *callerListener
	leaving    atomic.Bool           // Leave was called
	probeError atomic.Pointer[error] // result of the last probe of the server; nil means that it is alive
}

// NewAgent returns an Agent of srv that answers on ln. A nil log logs nothing.
func NewAgent(srv *server.Server, ln net.Listener, log *zap.Logger) *Agent {
	if log == nil {
		log = zap.NewNop()
	}
	limit := maxAgentCallers
	if files, limited := openFilesLimit(); limited {
		limit = min(limit, max(2, files*3/100))
	}
	return &Agent{srv: srv, log: log, callers: newCallerListener(ln, limit)}
}

// Actor returns the run.Group pair that answers until the server has stopped. If it cannot, execute returns at
// once: its error becomes the group's, and the group's interrupts begin the drain.
func (a *Agent) Actor() (execute func() error, interrupt func(error)) {
	execute = func() error {
		err := a.serve()
		if a.leaving.Load() {
			<-a.srv.Done()
			return nil
		}
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		a.log.Error("agent check failed", zap.Error(err)) // the group reports it only after the drain
		return fmt.Errorf("agent check: %w", err)
	}
	interrupt = func(error) {
		a.srv.StartDrain(server.DrainOptions{Reason: "stopping"})
		<-a.srv.Done()
		_ = a.callers.Close()
	}
	return execute, interrupt
}

// Leave stops answering, because another process serves the listener now.
func (a *Agent) Leave() {
	a.leaving.Store(true)
	_ = a.callers.Close()
}

// serve accepts callers until the listener is closed, and waits for their goroutines.
func (a *Agent) serve() error {
	var running sync.WaitGroup
	defer running.Wait()
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(net.ErrClosed)
	running.Go(func() { a.probeServer(ctx) })
	for {
		c, err := a.callers.Accept()
		if _, temporary := errors.AsType[temporaryError](err); temporary {
			select {
			case <-time.After(agentRetry):
			case <-a.callers.closed:
			}
			continue
		}
		if err != nil {
			_ = a.callers.Close()
			return err
		}
		running.Go(func() { a.answer(c) })
	}
}

// probeServer is the goroutine that probes the server regularly. Answers use its last result. So only one goroutine
// waits for a server that hangs, however many callers there are.
func (a *Agent) probeServer(ctx context.Context) {
	tick := time.NewTicker(agentProbeEvery)
	defer tick.Stop()
	for {
		probing, cancel := context.WithTimeoutCause(ctx, probeTimeout, errProbeTimeout)
		err := a.srv.Probe(probing)
		cancel()
		if err != nil {
			a.probeError.Store(&err)
		} else {
			a.probeError.Store(nil)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// answer sends the line, and gives the caller time to read it.
func (a *Agent) answer(c net.Conn) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(agentAnswerTimeout))
	if _, err := io.WriteString(c, a.statusLine()+"\n"); err != nil {
		return // the caller has left
	}
	if half, ok := c.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
		// Closing with unread input sends an RST, and the caller could lose the line.
		_, _ = io.CopyN(io.Discard, c, maxAgentQuestion)
	}
}

// statusLine returns the line for the server's state.
func (a *Agent) statusLine() string {
	if dead := a.probeError.Load(); dead != nil {
		return "down #" + text.Printable((*dead).Error())
	}
	if ready, _ := readiness(a.srv); !ready {
		return "up drain"
	}
	return "up ready"
}
