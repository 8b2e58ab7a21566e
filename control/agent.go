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
	agentAnswerTimeout = time.Second      // to take the line and close
	agentProbeEvery    = time.Second      // how often the Agent asks the server whether it is alive
	agentRetry         = time.Second / 10 // after an accept that failed
	maxAgentQuestion   = 4 << 10          // bytes that are read of what a caller sends
)

// Agent answers the agent checks of HAProxy. Each connection gets one line, and is closed. What the caller sends
// (agent-send) is ignored. The lines are
//
//	up ready      new clients are served, or wait at the connection limit
//	up drain      paused, draining, starting, or full with LimitReject: no new clients; the ones it has stay
//	down #REASON  the server does not respond
//
// An Agent changes nothing, and tells no more than that.
type Agent struct {
	srv     *server.Server
	log     *zap.Logger
	callers *callers
	left    atomic.Bool           // Leave was called
	dead    atomic.Pointer[error] // from the last probe of the server; nil: it is alive
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
	return &Agent{srv: srv, log: log, callers: limitCallers(ln, limit)}
}

// Actor returns the run.Group pair that answers until the server has stopped. If it cannot, execute returns at
// once: its error becomes the group's, and the group's interrupts begin the drain.
func (a *Agent) Actor() (execute func() error, interrupt func(error)) {
	execute = func() error {
		err := a.serve()
		if a.left.Load() {
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
	a.left.Store(true)
	_ = a.callers.Close()
}

// serve accepts callers until the listener is closed, and waits for their goroutines.
func (a *Agent) serve() error {
	var running sync.WaitGroup
	defer running.Wait()
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(net.ErrClosed)
	running.Go(func() { a.watch(ctx) })
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

// watch asks the server again and again whether it is alive. Answers do not wait for it, so that no number of callers
// makes more than one goroutine wait for a server that hangs.
func (a *Agent) watch(ctx context.Context) {
	tick := time.NewTicker(agentProbeEvery)
	defer tick.Stop()
	for {
		probing, cancel := context.WithTimeoutCause(ctx, probeTimeout, errProbeTimeout)
		err := a.srv.Probe(probing)
		cancel()
		if err != nil {
			a.dead.Store(&err)
		} else {
			a.dead.Store(nil)
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
	if _, err := io.WriteString(c, a.line()+"\n"); err != nil {
		return // the caller has gone
	}
	if half, ok := c.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
		// To close with unread input would reset the connection, and could take the line from the caller.
		_, _ = io.CopyN(io.Discard, c, maxAgentQuestion)
	}
}

func (a *Agent) line() string {
	if dead := a.dead.Load(); dead != nil {
		return "down #" + text.Printable((*dead).Error())
	}
	if ready, _ := readiness(a.srv); !ready {
		return "up drain"
	}
	return "up ready"
}
