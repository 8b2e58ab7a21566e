package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"go.uber.org/zap"

	"echod/server"
)

// The names under which a socket unit hands over its sockets (FileDescriptorName=).
const (
	echoSocket    = "echo"    // to serve on; may be several
	controlSocket = "control" // of the control plane
)

// inherited are the sockets that systemd has opened for this process, see sd_listen_fds(3).
type inherited struct {
	echo    []net.Listener
	control net.Listener // nil without one
}

// inheritSockets takes the sockets over. What their names do not explain is an error: it would be left to nobody.
func inheritSockets() (in inherited, err error) {
	byName, err := activation.ListenersWithNames()
	if err != nil {
		return in, fmt.Errorf("taking over systemd's sockets: %w", err)
	}
	for name, listeners := range byName {
		for _, ln := range listeners {
			switch {
			case ln == nil:
				err = fmt.Errorf("systemd's socket %q does not listen for a stream", name)
			case name == echoSocket:
				in.echo = append(in.echo, server.Inherited(ln))
			case name == controlSocket && in.control == nil && ln.Addr().Network() == "unix":
				in.control = ln
			case name == controlSocket:
				err = fmt.Errorf("systemd's socket %q, %s: there can be one, a Unix socket", name, ln.Addr())
			default:
				err = fmt.Errorf("systemd's socket %q, %s: want FileDescriptorName=%s or %s", name, ln.Addr(), echoSocket, controlSocket)
			}
		}
	}
	if err != nil {
		in.close()
	}
	return in, err
}

func (in inherited) close() {
	closeAll(in.echo)
	if in.control != nil {
		_ = in.control.Close()
	}
}

// supervised tells systemd what the server does, see sd_notify(3).
type supervised struct {
	srv    *server.Server
	probes []func(context.Context) error // of the server and its control plane
	log    *zap.Logger
	tell   func(state string) // sd_notify
}

// statusEvery is how often the status is brought up to date.
const statusEvery = time.Second

// underSystemd says that systemd, or what takes its place, wants to be told.
func underSystemd() bool { return os.Getenv("NOTIFY_SOCKET") != "" }

// newSupervised returns nil where nobody supervises. The server is alive while all probes say so.
func newSupervised(srv *server.Server, log *zap.Logger, probes ...func(context.Context) error) *supervised {
	if !underSystemd() {
		return nil
	}
	return &supervised{srv: srv, probes: probes, log: log, tell: func(state string) {
		if _, err := daemon.SdNotify(false, state); err != nil {
			log.Warn("telling systemd", zap.String("state", state), zap.Error(err))
		}
	}}
}

var errSupervisionOver = errors.New("the server has stopped")

// actor is the run.Group pair that keeps systemd informed until the server has stopped.
func (s *supervised) actor() (execute func() error, interrupt func(error)) {
	ending := make(chan struct{})
	execute = func() error {
		ctx, cancel := context.WithCancelCause(context.Background())
		var tasks sync.WaitGroup
		tasks.Go(func() { s.announce(ctx) })
		if interval, err := daemon.SdWatchdogEnabled(false); err != nil {
			s.log.Warn("reading systemd's watchdog interval", zap.Error(err))
		} else if interval > 0 {
			tasks.Go(func() { s.keepWatchdog(ctx, interval) })
		}
		<-s.srv.Done()
		cancel(errSupervisionOver)
		tasks.Wait()
		<-ending // the group returns the first actor's error: that is not this one's
		return nil
	}
	return execute, func(error) { close(ending) }
}

// announce says READY once the server and its control plane answer, and then what they do.
func (s *supervised) announce(ctx context.Context) {
	if !s.awaitReady(ctx) {
		return
	}
	s.tell(daemon.SdNotifyReady)
	for last := ""; ctx.Err() == nil; {
		st := s.srv.Status()
		if st.State >= server.Draining {
			s.extend(st)
		}
		if line := statusLine(st); line != last {
			s.tell("STATUS=" + line)
			last = line
		}
		s.awaitChange(ctx, st.State)
	}
}

// readyTry is how long a probe may take before the server is ready.
const readyTry = 5 * time.Second

// awaitReady waits until the server serves, and its probes say that it is alive.
func (s *supervised) awaitReady(ctx context.Context) bool {
	if s.srv.AwaitStatus(ctx, func(st server.State, _ int) bool { return st > server.Starting }) != nil {
		return false
	}
	for {
		err := s.probeFor(ctx, readyTry)
		switch {
		case err == nil:
			return true
		case ctx.Err() != nil:
			return false
		}
		s.log.Warn("not ready yet", zap.Error(err))
		select {
		case <-time.After(statusEvery):
		case <-ctx.Done():
			return false
		}
	}
}

// awaitChange waits for another state, for a while.
func (s *supervised) awaitChange(ctx context.Context, state server.State) {
	ctx, cancel := context.WithTimeoutCause(ctx, statusEvery, errSupervisionOver)
	defer cancel()
	_ = s.srv.AwaitStatus(ctx, func(now server.State, _ int) bool { return now != state })
}

// drainMargin is how much longer than its deadline a drain may take, with something to spare on a busy machine.
const drainMargin = 10 * time.Second

// extend asks for the time that the drain still takes, whatever the unit's stop timeout is. One that is stuck gets no more.
func (s *supervised) extend(st server.Status) {
	if st.Drain == nil || st.State == server.Stopped {
		return
	}
	left := time.Until(st.Drain.Deadline) + drainMargin
	if left <= 0 {
		return
	}
	s.tell(daemon.SdNotifyStopping + "\nEXTEND_TIMEOUT_USEC=" + strconv.FormatInt(left.Microseconds(), 10))
}

// keepWatchdog tells systemd that all is well, as long as it is. One that is wedged gets no word, and is restarted.
func (s *supervised) keepWatchdog(ctx context.Context, interval time.Duration) {
	tick := time.NewTicker(interval / 3)
	defer tick.Stop()
	for ctx.Err() == nil {
		if err := s.probeFor(ctx, interval/2); err == nil {
			s.tell(daemon.SdNotifyWatchdog)
		} else if ctx.Err() == nil {
			s.log.Error("not alive: the watchdog is not told otherwise", zap.Error(err))
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

var errProbeSlow = errors.New("the probe took too long")

func (s *supervised) probeFor(ctx context.Context, d time.Duration) error {
	ctx, cancel := context.WithTimeoutCause(ctx, d, errProbeSlow)
	defer cancel()
	for _, probe := range s.probes {
		if err := probe(ctx); err != nil {
			return err
		}
	}
	return nil
}

// statusLine is what systemctl status shows.
func statusLine(st server.Status) string {
	switch {
	case st.State == server.Paused:
		return fmt.Sprintf("paused by %d: %d connections", len(st.Holds), st.Connections)
	case st.Drain != nil && st.State == server.Draining:
		return fmt.Sprintf("draining until %s: %d connections", st.Drain.Deadline.Format(time.TimeOnly), st.Connections)
	default:
		return fmt.Sprintf("%s: %d connections, %d accepted", st.State, st.Connections, st.Accepted)
	}
}
