package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"echod/control"
)

// What shells exit with when a command cannot be run, or is not there (POSIX, 2.8.2).
const (
	exitNotExecutable = 126
	exitNotFound      = 127
)

func (ctl *ctl) pauseCommand() *cobra.Command {
	var req control.PauseRequest
	cmd := &cobra.Command{
		Use:   "pause [-- COMMAND [ARG...]]",
		Short: "Admit nobody new, until resumed or while COMMAND runs",
		Long: `Admit nobody new. Clients that are being served notice nothing.

Without a command the pause lasts until 'echod ctl resume', or for --ttl. With one it
lasts while the command runs, whatever becomes of it or of echod ctl, and the exit code
is the command's.

Mode hold leaves new clients in the kernel's queue, to be served on resume; mode reject
tells them PAUSED and closes.`,
		Example: `  echod ctl pause --reason backup --ttl 10m
  echod ctl pause --reason backup -- /usr/local/bin/backup --full`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 && cmd.ArgsLenAtDash() != 0 {
				return usagef("put -- before the command to run: echod ctl pause -- %s", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, command []string) error {
			if cmd.Flags().Changed("ttl") && req.TTL <= 0 {
				return usagef("--ttl %s: a pause of no time makes no sense", req.TTL)
			}
			if len(command) > 0 && ctl.json {
				return usagef("--json does not go with a command, whose output it would be mixed up with")
			}
			if len(command) > 0 {
				return ctl.pauseWhile(cmd, req, command)
			}
			return ctl.do(cmd, func(ctx context.Context, c *control.Client, out io.Writer) error {
				h, err := c.Pause(ctx, req)
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(out, "paused: hold %s\n", describeHold(h))
				return err
			})
		},
	}
	cmd.Flags().StringVar(&req.Reason, "reason", "", "`text` that says why")
	cmd.Flags().DurationVar(&req.TTL, "ttl", 0, "resume by itself after this `time` (default: never)")
	cmd.Flags().StringVar(&req.Mode, "mode", "hold", "`mode`: hold or reject new clients")
	return cmd
}

// pauseWhile runs command while the server is paused. The hold is tied to this process's connection, so
// that it goes however this process ends.
func (ctl *ctl) pauseWhile(cmd *cobra.Command, req control.PauseRequest, command []string) error {
	c, err := controlClient(ctl.path)
	if err != nil {
		return err
	}
	defer c.Close()
	ctx := cmd.Context()
	lease, err := c.PauseWhileConnected(ctx, req)
	if err != nil {
		return err
	}
	defer lease.Close()

	child := exec.Command(command[0], command[1:]...)
	child.Stdin, child.Stdout, child.Stderr = cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr()
	code, err := runChild(child, lease, func() {
		fmt.Fprintf(cmd.ErrOrStderr(), "echod: the pause ended before the command did: %s\n", lease.Why())
	})
	releaseLease(ctx, c, lease)
	if err != nil {
		return &exitError{code, fmt.Errorf("running %s: %w", command[0], err)}
	}
	if code != 0 {
		return &exitError{code: code}
	}
	return nil
}

// releaseLease resumes before this process says that it is done. Where that cannot be said to the server any more,
// it knows by the connection's end.
func releaseLease(ctx context.Context, c *control.Client, lease *control.Lease) {
	select {
	case <-lease.Ended():
	default:
		ctx, cancel := context.WithTimeoutCause(ctx, 5*time.Second, errors.New("the server does not answer"))
		defer cancel()
		_, _ = c.ReleaseHold(ctx, lease.Hold.ID)
	}
}

// runChild runs child to its end, passes on the signals that a terminal does not send it itself, and
// returns its exit code as a shell would. early is called when the lease ends first.
func runChild(child *exec.Cmd, lease *control.Lease, early func()) (code int, err error) {
	signals := make(chan os.Signal, 16)
	// Caught until this process ends: a signal that a terminal sends to both may reach this one when the command has
	// ended already, and the hold is to be released and the command's exit code passed on all the same.
	signal.Notify(signals, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGHUP)
	if err := child.Start(); err != nil {
		if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
			return exitNotFound, errors.New("command not found")
		}
		return exitNotExecutable, plainPath(err)
	}
	done := make(chan error, 1)
	go func() { done <- child.Wait() }()
	ended := lease.Ended()
	for {
		select {
		case err := <-done:
			return exitCode(child.ProcessState, err)
		case <-ended:
			early()
			ended = nil
		case sig := <-signals:
			if sig == syscall.SIGTERM || sig == syscall.SIGHUP {
				_ = child.Process.Signal(sig) // it may just have ended
			}
		}
	}
}

func plainPath(err error) error {
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
