package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"echod/control"
	"echod/internal/text"
	"echod/server"
)

// An upgrade replaces the running program with the one on disk. The predecessor starts the successor, and hands its
// listeners and connections over to it (server.HandOver). upgrade_linux.go starts the processes, and decides which one
// remains the parent.

const defaultUpgradeTimeout = 10 * time.Second

// Names of the HandoverOptions.Extra listeners.
const (
	extraControl = "control"
	extraHTTP    = "http"
	extraAgent   = "agent"
)

// upgradeData is the HandoverOptions.Data of an upgrade.
type upgradeData struct {
	Version string   `json:"version"`
	PID     int      `json:"pid"`
	TLS     []string `json:"tls,omitempty"` // addresses of the listeners with TLS

	TicketKeys       []byte `json:"ticket_keys,omitempty"`       // secret
	ControlInherited bool   `json:"control_inherited,omitempty"` // the control socket is systemd's
}

// upgrader is the predecessor's side of upgrades.
type upgrader struct {
	srv        *server.Server
	log        *zap.Logger
	timeout    time.Duration // for the successor to be ready
	keep       time.Duration // time before connections that were not handed over are drained
	sockets    sockets
	certs      *server.Certificates    // nil without TLS
	leave      []func()                // functions that stop using the listeners that were handed over
	notify     func(successor process) // tells the supervisor about the successor
	handedOver atomic.Bool             // another process serves now
	running    sync.Mutex              // held during an upgrade
}

// actor returns the run.Group pair that upgrades on each signal from in, until the server has stopped.
func (u *upgrader) actor(in <-chan os.Signal) (execute func() error, interrupt func(error)) {
	ending := make(chan struct{})
	execute = func() error {
		for {
			select {
			case <-u.srv.Done():
				<-ending // the group's error is that of the first actor that returns, which must not be this one
				return nil
			case sig := <-in:
				if u.srv.HandedOver() {
					u.forwardSignal(sig)
					continue
				}
				if _, err := u.upgrade(context.Background(), 0); err != nil {
					u.log.Error("upgrade failed", zap.Error(err))
				}
			}
		}
	}
	return execute, func(error) { close(ending) }
}

// upgrade replaces the running program. An error means that nothing has changed.
func (u *upgrader) upgrade(ctx context.Context, timeout time.Duration) (done control.Upgraded, err error) {
	if timeout == 0 {
		timeout = u.timeout
	}
	if !u.running.TryLock() {
		return done, server.ErrHandoverInProgress
	}
	defer u.running.Unlock()
	if d := u.srv.Status().Drain; d != nil {
		return done, &server.DrainingError{Deadline: d.Deadline}
	}
	defer func() {
		_, draining := errors.AsType[*server.DrainingError](err)
		if err != nil && !draining && !errors.Is(err, server.ErrHandoverInProgress) {
			err = &control.Problem{
				Type: control.ProblemUpgrade, Title: "The upgrade was rolled back", Status: 500,
				Detail: "the upgrade was rolled back, and nothing has changed: " + err.Error(),
			}
		}
	}()
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("the successor was not ready within %s", timeout))
	defer cancel()
	successor, link, err := startSuccessor(ctx)
	if err != nil {
		return done, fmt.Errorf("starting the successor: %w", err)
	}
	u.log.Info("upgrading", zap.Int("successor", successor.pid))
	setSuccessor(successor.pid)
	about := upgradeData{Version: version, PID: os.Getpid(), TLS: tlsAddresses(u.sockets.echo)}
	if u.certs != nil {
		about.TicketKeys = u.certs.TicketKeys()
	}
	extra := map[string]net.Listener{}
	if ln := u.sockets.control; ln != nil {
		extra[extraControl] = control.UnwrapListener(ln)
		about.ControlInherited = extra[extraControl] == ln
	}
	data, err := json.Marshal(about)
	if err != nil {
		return done, err
	}
	if u.sockets.http != nil {
		extra[extraHTTP] = u.sockets.http
	}
	if u.sockets.agent != nil {
		extra[extraAgent] = u.sockets.agent
	}
	report, err := u.srv.HandOver(ctx, link, server.HandoverOptions{
		Program: "echod " + version, Data: data, Extra: extra, Kill: successor.kill,
		Keep:      cmp.Or(u.keep, u.srv.Status().Grace),
		Committed: func() { u.stopServing(successor) },
	})
	if err != nil {
		setSuccessor(0)
		successor.kill()
		if errors.Is(err, io.EOF) {
			err = errors.New("the successor exited before it was ready: its messages are in this server's log")
		}
		return done, err
	}
	return control.Upgraded{
		PID: successor.pid, HandedOver: report.HandedOver, Behind: report.Kept,
		FrozenSeconds: report.Frozen.Seconds(), TookSeconds: report.Took.Seconds(),
	}, nil
}

// stopServing releases everything that the successor uses now. The connections that were not handed over stay.
func (u *upgrader) stopServing(successor process) {
	u.handedOver.Store(true)
	tellKeeper(successor.pid)
	for _, leave := range u.leave {
		leave()
	}
	u.notify(successor)
	successor.release()
}

// forwardSignal forwards a signal to the successor after a handover. This process also drains its own connections. systemd
// itself sends signals to both processes.
func (u *upgrader) forwardSignal(sig os.Signal) {
	if u.srv.HandedOver() && !isUnit() {
		signalServing(sig)
	}
}

// receivedOffer is the offer of the predecessor, in a successor.
type receivedOffer struct {
	offer *server.Offer
	from  upgradeData
}

// receiveOffer receives the predecessor's offer. It returns nil if no upgrade started this process.
func receiveOffer(ctx context.Context) (*receivedOffer, error) {
	link, err := predecessorLink()
	if err != nil || link == nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, defaultUpgradeTimeout,
		errors.New("the predecessor sent no offer in time"))
	defer cancel()
	offer, err := server.ReceiveOffer(ctx, link)
	if err != nil {
		return nil, err
	}
	t := &receivedOffer{offer: offer}
	if err := json.Unmarshal(offer.Data, &t.from); err != nil {
		err = fmt.Errorf("reading the predecessor's offer: %w", err)
		offer.Refuse(err)
		return nil, err
	}
	return t, nil
}

// ticketKeys returns the keys of session tickets that were handed over. t may be nil.
func (t *receivedOffer) ticketKeys() []byte {
	if t == nil {
		return nil
	}
	return t.from.TicketKeys
}

// refuseOffer tells the predecessor why this process cannot take over. It does nothing if no upgrade started this process.
func refuseOffer(why error) {
	if taken, err := receiveOffer(context.Background()); taken != nil && err == nil {
		taken.offer.Refuse(why)
	}
}

// sockets returns the listeners of the predecessor. They replace those in the flags.
func (t *receivedOffer) sockets(opts control.SocketOptions, echo echoOptions) (s sockets, err error) {
	s.echo, s.http, s.agent = t.offer.Listeners, t.offer.Extra[extraHTTP], t.offer.Extra[extraAgent]
	for i := range s.echo {
		s.echo[i].EmptyQueue = s.echo[i].Inherited
	}
	if err := s.adoptEcho(t.from.TLS, echo); err != nil {
		return s, err
	}
	s.control = t.offer.Extra[extraControl]
	if s.control != nil && !t.from.ControlInherited {
		s.control, err = control.Adopt(s.control, opts)
	}
	return s, err
}

func (ctl *ctl) upgradeCommand() *cobra.Command {
	var timeout time.Duration
	var pid int
	cmd := &cobra.Command{
		Use:   "upgrade",
		Short: "Replace the running program, and keep the connections",
		Long: `Replace the running program by the one that is on disk now, and keep the connections.

The server starts the program again with the same arguments and environment, and hands its
listeners and connections over. Clients do not notice. If the new program does not start,
the old one continues unchanged, and the command says why.

Exit codes: 0 upgraded, 1 rolled back or refused, 2 no server answers, 4 the running version
cannot be upgraded and has to be restarted, 64 usage.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if timeout < 0 {
				return usagef("--timeout %s: must not be negative", timeout)
			}
			if cmd.Flags().Changed("pid") {
				path, err := socketOf(cmd.Context(), ctl.path, pid)
				if err != nil {
					return err
				}
				ctl.path = path
			}
			return ctl.withClient(cmd, func(ctx context.Context, c *control.Client, out io.Writer) error {
				done, err := c.Upgrade(ctx, timeout)
				if problem, ok := errors.AsType[*control.Problem](err); ok && problem.Type == control.ProblemNotFound {
					return &exitError{exitTooOld, errors.New("the running version cannot be upgraded: restart it")}
				}
				if err != nil {
					return err
				}
				frozen := "under 1ms"
				if done.FrozenSeconds >= time.Millisecond.Seconds() {
					frozen = formatSeconds(done.FrozenSeconds)
				}
				err = printLine(out, "upgraded to process %d: %s handed over, frozen for %s", done.PID,
					text.Count(done.HandedOver, "connection"), frozen)
				for why, n := range done.Behind {
					err = errors.Join(err, printLine(out, "%s stayed with the old process: %s",
						text.Count(n, "connection"), strings.TrimSpace(why)))
				}
				return err
			})
		},
	}
	cmd.Flags().DurationVar(&timeout, "timeout", 0,
		"`time` for the new program to get ready; 0 is the server's\n--upgrade-timeout")
	cmd.Flags().IntVar(&pid, "pid", 0, "upgrade the server that is this `process`, and no other")
	return cmd
}
