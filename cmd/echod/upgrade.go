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
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"echod/control"
	"echod/internal/text"
	"echod/server"
)

// An upgrade replaces the running program by the one that is on disk now. The predecessor starts the successor, which
// takes the listeners and connections over from it (package server, HandOver). upgrade_linux.go starts the processes
// and decides which one stays the parent.

const defaultUpgradeTimeout = 10 * time.Second

// Names of listeners that are passed on besides those of the server.
const (
	handedControl = "control"
	handedHTTP    = "http"
)

// handedData is what the predecessor tells the successor besides the server's state.
type handedData struct {
	Version string   `json:"version"`
	PID     int      `json:"pid"`
	TLS     []string `json:"tls,omitempty"` // addresses of the listeners with TLS

	TicketKeys []byte `json:"ticket_keys,omitempty"` // secret
}

// upgrader is the predecessor's side of upgrades.
type upgrader struct {
	srv     *server.Server
	log     *zap.Logger
	timeout time.Duration // for the successor to be ready
	keep    time.Duration // for which connections that stay behind are served before they are drained
	sockets sockets
	certs   *server.Certificates    // nil without TLS
	leave   []func()                // stop using the listeners that were passed on
	notify  func(successor process) // tells the supervisor, before the successor does
	done    atomic.Bool             // another process serves now
}

// actor returns the run.Group pair that upgrades on each signal from in, until the server has stopped.
func (u *upgrader) actor(in <-chan os.Signal) (execute func() error, interrupt func(error)) {
	ending := make(chan struct{})
	execute = func() error {
		for {
			select {
			case <-u.srv.Done():
				<-ending // the group's error is that of the first actor to return: not of this one
				return nil
			case sig := <-in:
				if u.done.Load() {
					passOn(sig)
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
	handed := handedData{Version: version, PID: os.Getpid(), TLS: tlsAddresses(u.sockets.echo)}
	if u.certs != nil {
		handed.TicketKeys = u.certs.TicketKeys()
	}
	data, err := json.Marshal(handed)
	if err != nil {
		return done, err
	}
	extra := map[string]net.Listener{}
	if u.sockets.control != nil {
		extra[handedControl] = control.Handed(u.sockets.control)
	}
	if u.sockets.http != nil {
		extra[handedHTTP] = u.sockets.http
	}
	report, err := u.srv.HandOver(ctx, link, server.HandoverOptions{
		Program: "echod " + version, Data: data, Extra: extra, Kill: successor.kill,
		Keep:      cmp.Or(u.keep, u.srv.Status().Grace),
		Committed: func() { u.committed(successor) },
	})
	if err != nil {
		successor.kill()
		if errors.Is(err, io.EOF) {
			err = errors.New("the successor exited before it was ready; its log says why")
		}
		return done, err
	}
	return control.Upgraded{
		PID: successor.pid, HandedOver: report.HandedOver, Behind: report.Behind,
		FrozenSeconds: report.Frozen.Seconds(), TookSeconds: report.Took.Seconds(),
	}, nil
}

// committed gives up everything except the connections that stayed behind.
func (u *upgrader) committed(successor process) {
	u.done.Store(true)
	becomeKeeperOf(successor)
	for _, leave := range u.leave {
		leave()
	}
	u.notify(successor)
	successor.release()
}

// takenOver is what a successor was offered.
type takenOver struct {
	offer *server.Offer
	from  handedData
}

// receiveOffer returns nil if this process was not started for an upgrade.
func receiveOffer(ctx context.Context) (*takenOver, error) {
	link, err := predecessorLink()
	if err != nil || link == nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, defaultUpgradeTimeout,
		errors.New("no offer came from the predecessor"))
	defer cancel()
	offer, err := server.ReceiveOffer(ctx, link)
	if err != nil {
		return nil, err
	}
	t := &takenOver{offer: offer}
	if err := json.Unmarshal(offer.Data, &t.from); err != nil {
		err = fmt.Errorf("reading the predecessor's offer: %w", err)
		offer.Refuse(err)
		return nil, err
	}
	return t, nil
}

// ticketKeys returns the keys of session tickets that were handed over. t may be nil.
func (t *takenOver) ticketKeys() []byte {
	if t == nil {
		return nil
	}
	return t.from.TicketKeys
}

// sockets returns the listeners that were passed on, in place of those that the flags ask for.
func (t *takenOver) sockets(opts control.SocketOptions, echo echoOptions) (s sockets, err error) {
	s.echo, s.http = t.offer.Listeners, t.offer.Extra[handedHTTP]
	if err := s.adoptEcho(t.from.TLS, echo); err != nil {
		return s, err
	}
	if ln := t.offer.Extra[handedControl]; ln != nil {
		s.control, err = control.Adopt(ln, opts)
	}
	return s, err
}

func (ctl *ctl) upgradeCommand() *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "upgrade",
		Short: "Replace the running program, and keep the connections",
		Long: `Replace the running program by the one that is on disk now, and keep the connections.

The server starts the program again with the same arguments and environment, and hands its
listeners and connections over. Clients do not notice. If the new program does not start,
the old one continues unchanged, and the command says why.

Exit codes: 0 upgraded, 1 rolled back or refused, 2 no server answers, 64 usage.`,
		Args: takes(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if timeout < 0 {
				return usagef("--timeout %s: must not be negative", timeout)
			}
			return ctl.do(cmd, func(ctx context.Context, c *control.Client, out io.Writer) error {
				done, err := c.Upgrade(ctx, timeout)
				if err != nil {
					return err
				}
				err = printLine(out, "upgraded to process %d: %s handed over, frozen for %s", done.PID,
					text.Count(done.HandedOver, "connection"), seconds(done.FrozenSeconds))
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
	return cmd
}
