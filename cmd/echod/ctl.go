package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"echod/control"
)

func newCtlCommand() *cobra.Command {
	ctl := &ctl{}
	cmd := &cobra.Command{
		Use:   "ctl",
		Short: "Control a running server through its control socket",
		Long: `Control a running server through its control socket.

Without --control the socket is looked for where servers put theirs by default:
$RUNTIME_DIRECTORY/control.sock, $XDG_RUNTIME_DIR/echod/control.sock, a private
temporary directory, and /run/echod/control.sock.

Exit codes: 0 done, 1 the server refused, 2 no server answers, 3 a wait timed out,
64 usage; with 'pause -- COMMAND' the command's own.`,
		Args: takes(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usagef("say what to do: status, pause, resume, conns, closed, kill, notify, wait, events or shutdown")
		},
	}
	cmd.PersistentFlags().StringVar(&ctl.path, "control", "", "control socket's `path`")
	cmd.PersistentFlags().BoolVar(&ctl.json, "json", false, "print the server's answer as it is, in JSON")
	cmd.AddCommand(
		ctl.statusCommand(), ctl.connsCommand(), ctl.closedCommand(), ctl.eventsCommand(), ctl.waitCommand(),
		ctl.pauseCommand(), ctl.resumeCommand(), ctl.killCommand(), ctl.notifyCommand(), ctl.shutdownCommand(),
	)
	return cmd
}

// ctl is what the ctl commands share.
type ctl struct {
	path string
	json bool
}

// do calls f with a client. Under --json the answers are printed as they come, and what f writes for
// people is not.
func (ctl *ctl) do(cmd *cobra.Command, f func(ctx context.Context, c *control.Client, out io.Writer) error) error {
	c, err := controlClient(ctl.path)
	if err != nil {
		return err
	}
	defer c.Close()
	out := cmd.OutOrStdout()
	if ctl.json {
		c.OnAnswer = func(body []byte) { _, _ = cmd.OutOrStdout().Write(body) }
		out = io.Discard
	}
	return interruptible(cmd.Context(), func(ctx context.Context) error { return f(ctx, c, out) })
}

// interruptible calls f with a context that ends with SIGINT, SIGTERM or one of the others, whose exit code is then that
// of a process that the signal has ended.
func interruptible(ctx context.Context, f func(context.Context) error, others ...os.Signal) error {
	ctx, cancel := context.WithCancelCause(ctx)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, append(others, os.Interrupt, syscall.SIGTERM)...)
	var watching sync.WaitGroup
	watching.Go(func() {
		select {
		case sig := <-signals:
			cancel(&exitError{exitSignal + signalNumber(sig), errors.New("interrupted")})
		case <-ctx.Done():
		}
	})
	defer watching.Wait()
	defer signal.Stop(signals)
	defer cancel(context.Canceled)
	err := f(ctx)
	if interrupted, ok := errors.AsType[*exitError](context.Cause(ctx)); ok && err != nil {
		return interrupted
	}
	return err
}

// table writes rows in columns.
func table(out io.Writer, head string, rows func(row func(cells ...any))) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, head)
	rows(func(cells ...any) {
		text := make([]string, len(cells))
		for i, cell := range cells {
			text[i] = fmt.Sprint(cell)
		}
		fmt.Fprintln(w, strings.Join(text, "\t"))
	})
	return w.Flush()
}

// span shows a duration to a precision that a person can read.
func span(d time.Duration) string {
	switch {
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	case d < time.Minute:
		return d.Round(100 * time.Millisecond).String()
	default:
		return d.Round(time.Second).String()
	}
}

func seconds(s float64) string { return span(time.Duration(s * float64(time.Second))) }

func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return strconv.Itoa(n) + " " + noun + "s"
}
