package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"go.uber.org/zap"

	"echod/internal/text"
	"echod/server"
)

// sdNotifier tells systemd about the server's state, see sd_notify(3).
type sdNotifier struct {
	srv        *server.Server
	probes     []func(context.Context) error // the server is alive if all of them succeed
	log        *zap.Logger
	notify     func(state string)    // sd_notify
	stopped    atomic.Bool           // another process notifies now
	done       chan struct{}         // closed by stop
	awaitKnown func(context.Context) // waits until systemd knows this process; nil if it knows it already
}

// stop ends the notifications, because another process is the main process now. It is called once.
func (n *sdNotifier) stop() {
	n.stopped.Store(true)
	close(n.done)
}

// statusInterval is the time between two updates of the status.
const statusInterval = time.Second

// underSystemd reports whether systemd, or a supervisor like it, waits for notifications.
func underSystemd() bool { return os.Getenv("NOTIFY_SOCKET") != "" }

// newSDNotifier returns nil if no supervisor waits for notifications.
func newSDNotifier(srv *server.Server, log *zap.Logger, probes ...func(context.Context) error) *sdNotifier {
	if !underSystemd() {
		return nil
	}
	n := &sdNotifier{srv: srv, probes: probes, log: log, done: make(chan struct{})}
	n.notify = func(state string) {
		if n.stopped.Load() {
			return
		}
		if err := sdNotify(os.Getenv("NOTIFY_SOCKET"), state); err != nil {
			log.Warn("notifying systemd", zap.String("state", state), zap.Error(err))
		}
	}
	return n
}

// notifyTimeout bounds each notification: a supervisor that does not read must not delay the drain.
const notifyTimeout = 100 * time.Millisecond

// sdNotify sends one notification. Unlike daemon.SdNotify it does not wait for a full socket.
func sdNotify(socket, state string) error {
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetWriteDeadline(time.Now().Add(notifyTimeout)) // it fails on closed connections only
	_, err = conn.Write([]byte(state))
	return err
}

var errStopped = errors.New("the server has stopped")

// actor returns the run.Group pair that notifies systemd until the server has stopped.
func (n *sdNotifier) actor() (execute func() error, interrupt func(error)) {
	ending := make(chan struct{})
	execute = func() error {
		ctx, cancel := context.WithCancelCause(context.Background())
		var tasks sync.WaitGroup
		tasks.Go(func() {
			if n.awaitKnown != nil {
				n.awaitKnown(ctx)
			}
			tasks.Go(func() { n.notifyReady(ctx) })
			if interval, err := daemon.SdWatchdogEnabled(false); err != nil {
				n.log.Warn("reading systemd's watchdog interval", zap.Error(err))
			} else if interval > 0 {
				tasks.Go(func() { n.pingWatchdog(ctx, interval) })
			}
		})
		select {
		case <-n.srv.Done():
		case <-n.done:
		}
		cancel(errStopped)
		tasks.Wait()
		<-n.srv.Done()
		<-ending // the group's error is that of the first actor that returns, which must not be this one
		return nil
	}
	return execute, func(error) { close(ending) }
}

// notifyReady sends READY when all probes succeed. Then it sends changes of the status, and during a drain requests for
// more time.
func (n *sdNotifier) notifyReady(ctx context.Context) {
	if !n.awaitReady(ctx) {
		return
	}
	n.notify(daemon.SdNotifyReady)
	for last := ""; ctx.Err() == nil; {
		st := n.srv.Status()
		if st.State >= server.StateDraining {
			n.extendTimeout(st)
		}
		if line := statusLine(st); line != last {
			n.notify("STATUS=" + line)
			last = line
		}
		n.awaitChange(ctx, st.State)
	}
}

// readyTimeout bounds each probe before the server is ready.
const readyTimeout = 5 * time.Second

// awaitReady waits until the server is running and all probes succeed. It returns false if ctx ends first.
func (n *sdNotifier) awaitReady(ctx context.Context) bool {
	if n.srv.AwaitStatus(ctx, func(st server.State, _ int) bool { return st > server.StateStarting }) != nil {
		return false
	}
	for {
		err := n.probe(ctx, readyTimeout)
		switch {
		case err == nil:
			return true
		case ctx.Err() != nil:
			return false
		}
		n.log.Warn("probe failed; not ready yet", zap.Error(err))
		select {
		case <-time.After(statusInterval):
		case <-ctx.Done():
			return false
		}
	}
}

// awaitChange waits until the state changes or statusInterval has passed.
func (n *sdNotifier) awaitChange(ctx context.Context, state server.State) {
	ctx, cancel := context.WithTimeoutCause(ctx, statusInterval, errStopped)
	defer cancel()
	_ = n.srv.AwaitStatus(ctx, func(now server.State, _ int) bool { return now != state })
}

// drainMargin is the time that systemd grants a drain after its deadline. It is long, because the machine may be busy.
const drainMargin = 10 * time.Second

// extendTimeout asks systemd for the time that the drain still needs, regardless of the unit's stop timeout. For a drain
// that is stuck it asks for no more time.
func (n *sdNotifier) extendTimeout(st server.Status) {
	if st.Drain == nil || st.State == server.StateStopped {
		return
	}
	left := time.Until(st.Drain.Deadline) + drainMargin
	if left <= 0 {
		return
	}
	state := "EXTEND_TIMEOUT_USEC=" + strconv.FormatInt(left.Microseconds(), 10)
	if !time.Now().Before(st.Drain.AcceptUntil) { // before that the drain can be cancelled, and STOPPING cannot
		state = daemon.SdNotifyStopping + "\n" + state
	}
	n.notify(state)
}

// pingWatchdog pings systemd's watchdog while the probes succeed. Without pings systemd restarts the server.
func (n *sdNotifier) pingWatchdog(ctx context.Context, interval time.Duration) {
	tick := time.NewTicker(interval / 3)
	defer tick.Stop()
	for ctx.Err() == nil {
		if err := n.probe(ctx, interval/2); err == nil {
			n.notify(daemon.SdNotifyWatchdog)
		} else if ctx.Err() == nil {
			n.log.Error("liveness check failed; not pinging the watchdog", zap.Error(err))
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

var errProbeTimeout = errors.New("probe timed out")

func (n *sdNotifier) probe(ctx context.Context, d time.Duration) error {
	ctx, cancel := context.WithTimeoutCause(ctx, d, errProbeTimeout)
	defer cancel()
	for _, probe := range n.probes {
		if err := probe(ctx); err != nil {
			return err
		}
	}
	return nil
}

// statusLine returns the line that systemctl status shows.
func statusLine(st server.Status) string {
	connections := text.Count(st.Connections, "connection")
	switch {
	case st.State == server.StatePaused:
		return fmt.Sprintf("paused by %s: %s", text.Count(len(st.Holds), "hold"), connections)
	case st.Drain != nil && st.State == server.StateDraining:
		return fmt.Sprintf("draining until %s: %s", st.Drain.Deadline.Format(time.TimeOnly), connections)
	default:
		return fmt.Sprintf("%s: %s, %d accepted", st.State, connections, st.Accepted)
	}
}
