package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"echod/control"
)

func (ctl *ctl) statusCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show the server's state, counts, holds and drain",
		Args:  takes(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return ctl.do(cmd, func(ctx context.Context, c *control.Client, out io.Writer) error {
				st, err := c.Status(ctx)
				if err != nil {
					return err
				}
				return showStatus(out, st)
			})
		},
	}
}

func showStatus(out io.Writer, st control.Status) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) { fmt.Fprintf(w, name+"\t"+format+"\n", args...) }
	row("state", "%s", st.State)
	if d := st.Drain; d != nil {
		row("drain", "%s, %s left, %d notified, %d not to be told", d.Reason, span(max(0, time.Until(d.Deadline))), d.Notified, d.NoticeFailed)
		if until := d.AcceptingUntil; until != nil && time.Now().Before(*until) {
			row("accepting", "for another %s", span(time.Until(*until)))
		}
	}
	for _, h := range st.Holds {
		row("hold", "%s", describeHold(h))
	}
	for _, l := range st.Listeners {
		queue := ""
		if l.AcceptQueue != nil && l.AcceptQueueLimit != nil {
			queue = fmt.Sprintf(", %d waiting (room for %d)", *l.AcceptQueue, *l.AcceptQueueLimit)
		}
		row("listening", "%s%s", l.Address, queue)
	}
	row("connections", "%d open, %d accepted", st.Connections, st.Accepted)
	if len(st.Closed) > 0 {
		reasons := slices.Sorted(maps.Keys(st.Closed))
		for i, why := range reasons {
			reasons[i] = fmt.Sprintf("%d %s", st.Closed[why], why)
		}
		row("closed", "%s", strings.Join(reasons, ", "))
	}
	row("bytes", "%s in, %s out", humanize.Bytes(st.BytesIn), humanize.Bytes(st.BytesOut))
	row("up", "%s, since %s", seconds(st.UptimeSeconds), st.Started.Local().Format(time.DateTime))
	row("process", "%d, version %s", st.PID, st.Version)
	return w.Flush()
}

func describeHold(h control.Hold) string {
	words := []string{h.ID}
	if h.Reason != "" {
		words = append(words, fmt.Sprintf("%q", h.Reason))
	}
	if h.Mode != "hold" {
		words = append(words, "mode "+h.Mode)
	}
	if stood := time.Since(h.Since); stood >= time.Second {
		words = append(words, "since "+span(stood)+" ago")
	}
	if h.Expires != nil {
		words = append(words, "expires in "+span(time.Until(*h.Expires)))
	}
	if h.UID != nil && h.PID != nil {
		words = append(words, fmt.Sprintf("by uid %d, pid %d", *h.UID, *h.PID))
	}
	return strings.Join(words, ", ")
}

func (ctl *ctl) connsCommand() *cobra.Command {
	var limit int
	var minIdle time.Duration
	cmd := &cobra.Command{
		Use:   "conns",
		Short: "List the open connections, the oldest first",
		Args:  takes(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if limit < -1 {
				return usagef("--limit %d: want a number, or -1 for all", limit)
			}
			return ctl.do(cmd, func(ctx context.Context, c *control.Client, out io.Writer) error {
				list, err := c.Conns(ctx, limit, minIdle)
				if err != nil {
					return err
				}
				return table(out, "ID\tREMOTE\tLOCAL\tSTATE\tOPEN\tIDLE\tIN\tOUT\tNOTIFIED", func(row func(...any)) {
					for _, c := range list.Connections {
						row(c.ID, c.Remote, c.Local, c.State, span(time.Since(c.Opened)), seconds(c.IdleSeconds),
							humanize.Bytes(c.BytesIn), humanize.Bytes(c.BytesOut), yesNo(c.Notified))
					}
				})
			})
		},
	}
	cmd.Flags().IntVar(&limit, "limit", -1, "list at most this `number`; -1 is all")
	cmd.Flags().DurationVar(&minIdle, "min-idle", 0, "only those without a byte for this `time`")
	return cmd
}

func (ctl *ctl) closedCommand() *cobra.Command {
	var limit int
	cmd := &cobra.Command{
		Use:   "closed",
		Short: "List the last closed connections with their reasons, the latest first",
		Args:  takes(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if limit < -1 {
				return usagef("--limit %d: want a number, or -1 for all", limit)
			}
			return ctl.do(cmd, func(ctx context.Context, c *control.Client, out io.Writer) error {
				list, err := c.Closed(ctx, limit)
				if err != nil {
					return err
				}
				return table(out, "ID\tREMOTE\tREASON\tCLOSED\tDURATION\tIN\tOUT\tNOTIFIED", func(row func(...any)) {
					for _, c := range list.Connections {
						row(c.ID, c.Remote, c.Reason, c.Closed.Local().Format(time.TimeOnly), seconds(c.DurationSeconds),
							humanize.Bytes(c.BytesIn), humanize.Bytes(c.BytesOut), yesNo(c.Notified))
					}
				})
			})
		},
	}
	cmd.Flags().IntVar(&limit, "limit", 20, "list at most this `number`; -1 is all that are remembered,\nup to 1024")
	return cmd
}

func yesNo(yes bool) string {
	if yes {
		return "yes"
	}
	return "no"
}

func (ctl *ctl) eventsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "events",
		Short: "Show what happens, as it happens, until interrupted",
		Args:  takes(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return ctl.do(cmd, func(ctx context.Context, c *control.Client, out io.Writer) error {
				for e, err := range c.Events(ctx) {
					if err != nil {
						return err
					}
					if _, err := fmt.Fprintln(out, describeEvent(e)); err != nil {
						return fmt.Errorf("writing events: %w", err)
					}
				}
				return nil
			})
		},
	}
}

func describeEvent(e control.Event) string {
	what := e.Type
	switch {
	case e.Conn != nil:
		what = fmt.Sprintf("opened    conn %d from %s", e.Conn.ID, e.Conn.Remote)
	case e.Closed != nil:
		what = fmt.Sprintf("closed    conn %d from %s: %s, %s in, %s out", e.Closed.ID, e.Closed.Remote, e.Closed.Reason,
			humanize.Bytes(e.Closed.BytesIn), humanize.Bytes(e.Closed.BytesOut))
	case e.Hold != nil && e.Cause != "":
		what = fmt.Sprintf("released  %s: %s", e.Hold.ID, e.Cause)
	case e.Hold != nil:
		what = "hold      " + describeHold(*e.Hold)
	case e.State != "":
		what = "state     " + e.State
	case e.Missed > 0:
		what = fmt.Sprintf("missed    %s, since this terminal is slower than the server", count(e.Missed, "event"))
	}
	return e.Time.Local().Format("15:04:05.000") + "  " + what
}

func (ctl *ctl) waitCommand() *cobra.Command {
	var (
		state       string
		connections int
		timeout     time.Duration
	)
	cmd := &cobra.Command{
		Use:   "wait",
		Short: "Wait for a state, or a number of open connections",
		Args:  takes(cobra.NoArgs),
		Example: `  echod ctl wait --state running --timeout 10s
  echod ctl wait --connections 0`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			req := control.WaitRequest{State: state}
			if cmd.Flags().Changed("connections") {
				req.Connections = &connections
			}
			if cmd.Flags().Changed("timeout") {
				req.Timeout = &timeout
			}
			if req.State == "" && req.Connections == nil {
				return usagef("say what to wait for: --state, --connections or both")
			}
			return ctl.do(cmd, func(ctx context.Context, c *control.Client, out io.Writer) error {
				seen, err := c.Wait(ctx, req)
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(out, "%s with %s\n", seen.State, count(seen.Connections, "connection"))
				return err
			})
		},
	}
	cmd.Flags().StringVar(&state, "state", "", "running, paused, draining or stopped")
	cmd.Flags().IntVar(&connections, "connections", 0, "exactly this `number` of open connections")
	cmd.Flags().DurationVar(&timeout, "timeout", 0, "give up, with exit code 3, after this `time` (default: never)")
	return cmd
}
