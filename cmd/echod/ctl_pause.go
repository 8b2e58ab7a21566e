package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"echod/control"
)

// Exit codes of 'pause -- COMMAND'. timeout(1) uses the first one for a failure of its own. Shells use the others for a
// command that cannot be run or is not found (POSIX, 2.8.2).
const (
	exitPauseEnded    = 125
	exitNotExecutable = 126
	exitNotFound      = 127
)

func (ctl *ctl) pauseCommand() *cobra.Command {
	var req control.PauseRequest
	var grace time.Duration
	cmd := &cobra.Command{
		Use:   "pause [-- COMMAND [ARG...]]",
		Short: "Stop accepting new clients, until resumed or while COMMAND runs",
		Long: `Stop accepting new clients. Existing connections are not affected, unless --evict sends
them away: clients are told to leave, have the server's --grace or the one given here, and
are then closed. The server stays up, and is not ready. When it is resumed, clients that
were not told yet stay.

Without a command the pause lasts until 'echod ctl resume', or for --ttl. With a command
it ends when the command does, and the exit code is the command's. If the pause ends
before the command (by a resume, --ttl or a restart of the server), the command keeps
running, and the exit code is 125 if it succeeds. If echod ctl itself is killed, the pause
ends and the command keeps running without it.

Mode hold leaves new clients in the accept queue and serves them on resume. Mode reject
sends them PAUSED and closes.`,
		Example: `  echod ctl pause --reason backup --ttl 10m
  echod ctl pause --evict --spread 30s --grace 1m --reason maintenance
  echod ctl pause --reason backup -- /usr/local/bin/backup --full`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 && cmd.ArgsLenAtDash() != 0 {
				return usagef("put -- before the command to run: echod ctl pause -- %s", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, command []string) error {
			if cmd.Flags().Changed("ttl") && req.TTL <= 0 {
				return usagef("--ttl %s: must be positive", req.TTL)
			}
			switch {
			case req.Spread < 0:
				return usagef("--spread %s: must not be negative", req.Spread)
			case req.Spread > 0 && !req.Evict:
				return usagef("--spread: needs --evict")
			}
			if cmd.Flags().Changed("grace") {
				switch {
				case grace < 0:
					return usagef("--grace %s: must not be negative", grace)
				case !req.Evict:
					return usagef("--grace: needs --evict")
				}
				req.Grace = &grace
			}
			if len(command) > 0 && ctl.json {
				return usagef("--json cannot be used with a command: the outputs would mix")
			}
			if len(command) > 0 {
				return ctl.pauseWhile(cmd, req, command)
			}
			return ctl.withClient(cmd, func(ctx context.Context, c *control.Client, out io.Writer) error {
				h, err := c.Pause(ctx, req)
				if err != nil {
					return err
				}
				return printLine(out, "paused: hold %s", describeHold(h))
			})
		},
	}
	cmd.Flags().StringVar(&req.Reason, "reason", "", "`text` for operators")
	cmd.Flags().DurationVar(&req.TTL, "ttl", 0,
		"resume automatically after this `time` (default: never)")
	cmd.Flags().BoolVar(&req.Evict, "evict", false, "send the connected clients away")
	cmd.Flags().DurationVar(&req.Spread, "spread", 0,
		"with --evict: `time` over which clients are told, one after another")
	cmd.Flags().DurationVar(&grace, "grace", 0,
		"with --evict: `time` that each client then has (default: the\nserver's --grace)")
	cmd.Flags().StringVar(&req.Mode, "mode", "hold", "`mode` for new clients: hold or reject")
	completeValues(cmd, "mode", "hold", "reject")
	cmd.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveDefault) // for the command to run
	return cmd
}

// pauseWhile runs command while the server is paused. The hold depends on this process's connection, so the server
// releases it even if this process is killed.
func (ctl *ctl) pauseWhile(cmd *cobra.Command, req control.PauseRequest, command []string) error {
	c, err := controlClient(ctl.path, cmd.ErrOrStderr())
	if err != nil {
		return err
	}
	defer c.Close()
	c.Claims = callerClaims()
	ctx := cmd.Context()
	lease, err := c.PauseWhileConnected(ctx, req)
	if err != nil {
		return err
	}
	defer lease.Close()

	child := exec.Command(command[0], command[1:]...)
	child.Stdin, child.Stdout, child.Stderr = cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr()
	ended := false
	code, err := runChild(child, lease, func() {
		ended = true
		_ = printLine(cmd.ErrOrStderr(), "echod: the pause ended before the command did: %s", lease.EndReason())
	})
	releaseLease(ctx, c, lease)
	if err != nil {
		return &exitError{code, fmt.Errorf("running %s: %w", command[0], err)}
	}
	if code == 0 && ended {
		code = exitPauseEnded
	}
	if code != 0 {
		return &exitError{code: code}
	}
	return nil
}

// releaseLease releases the hold before this process exits. If the server does not answer, the end of the
// connection releases it.
func releaseLease(ctx context.Context, c *control.Client, lease *control.Lease) {
	select {
	case <-lease.Ended():
	default:
		ctx, cancel := context.WithTimeoutCause(ctx, 5*time.Second, errors.New("the server does not answer"))
		defer cancel()
		_, _ = c.ReleaseHold(ctx, lease.Hold.ID)
	}
}

// runChild runs child until it exits, and returns its exit code as a shell would. It forwards the signals that a terminal
// does not send to the child itself. It calls early if the lease ends before the child.
func runChild(child *exec.Cmd, lease *control.Lease, early func()) (code int, err error) {
	signals := make(chan os.Signal, 16)
	// The signals stay caught until this process exits. A terminal sends SIGINT to both processes. It may arrive after
	// the child has exited, and must not end this process before it has released the hold.
	notifySignals(signals, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGHUP)
	if err := child.Start(); err != nil {
		if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
			return exitNotFound, errors.New("command not found")
		}
		return exitNotExecutable, withoutPath(err)
	}
	done := make(chan error, 1)
	go func() { done <- child.Wait() }()
	ended := lease.Ended()
	for {
		select {
		case err := <-done:
			select {
			case <-ended:
				early()
			default:
			}
			return exitCode(child.ProcessState, err)
		case <-ended:
			early()
			ended = nil
		case sig := <-signals:
			if sig == syscall.SIGTERM || sig == syscall.SIGHUP {
				_ = child.Process.Signal(sig) // an error means that the child has exited
			}
		}
	}
}

func withoutPath(err error) error {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err
	}
	return err
}

func exitCode(state *os.ProcessState, err error) (int, error) {
	if _, isExit := errors.AsType[*exec.ExitError](err); err != nil && !isExit {
		return exitFailed, err
	}
	if status, ok := state.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return exitSignal + int(status.Signal()), nil
	}
	return state.ExitCode(), nil
}
