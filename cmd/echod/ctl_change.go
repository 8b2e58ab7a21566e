package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"echod/control"
)

func (ctl *ctl) resumeCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "resume [HOLD...]",
		Short: "Release all holds, or those that are named",
		RunE: func(cmd *cobra.Command, holds []string) error {
			return ctl.do(cmd, func(ctx context.Context, c *control.Client, out io.Writer) error {
				if len(holds) == 0 {
					change, err := c.Resume(ctx)
					if err != nil {
						return err
					}
					if !change.Changed {
						_, err = fmt.Fprintf(out, "nothing to resume: the server is %s\n", change.State)
						return err
					}
					_, err = fmt.Fprintf(out, "released %s: the server is %s\n", count(*change.Released, "hold"), change.State)
					return err
				}
				for _, id := range holds {
					change, err := c.ReleaseHold(ctx, id)
					if err != nil {
						return err
					}
					fmt.Fprintf(out, "released %s: the server is %s\n", id, change.State)
				}
				return nil
			})
		},
	}
}

func (ctl *ctl) killCommand() *cobra.Command {
	var all bool
	var minIdle time.Duration
	cmd := &cobra.Command{
		Use:   "kill ID... | --min-idle TIME | --all",
		Short: "End connections: what was read is written back first",
		RunE: func(cmd *cobra.Command, args []string) error {
			idle := cmd.Flags().Changed("min-idle")
			ways := 0
			for _, given := range []bool{len(args) > 0, idle, all} {
				if given {
					ways++
				}
			}
			if ways != 1 {
				return usagef("say which connections, in one way: their ids, --min-idle or --all")
			}
			ids := make([]uint64, len(args))
			for i, arg := range args {
				id, err := strconv.ParseUint(arg, 10, 64)
				if err != nil {
					return usagef("%q is not a connection's id: see 'echod ctl conns'", arg)
				}
				ids[i] = id
			}
			return ctl.do(cmd, func(ctx context.Context, c *control.Client, out io.Writer) error {
				switch {
				case all:
					change, err := c.KillAll(ctx)
					return sayKilled(out, change, err)
				case idle:
					change, err := c.KillIdle(ctx, minIdle)
					return sayKilled(out, change, err)
				}
				var errs []error
				for _, id := range ids {
					_, err := c.Kill(ctx, id)
					if err == nil {
						fmt.Fprintf(out, "killed connection %d\n", id)
					}
					errs = append(errs, err)
				}
				return errors.Join(errs...)
			})
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "every connection")
	cmd.Flags().DurationVar(&minIdle, "min-idle", 0, "those without a byte for this `time`")
	return cmd
}

func sayKilled(out io.Writer, change control.Change, err error) error {
	if err == nil {
		_, err = fmt.Fprintf(out, "killed %s\n", count(*change.Killed, "connection"))
	}
	return err
}

func (ctl *ctl) notifyCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "notify TEXT...",
		Short:   "Send the line 'NOTICE TEXT' to every client",
		Args:    takes(cobra.MinimumNArgs(1)),
		Example: `  echod ctl notify maintenance at noon`,
		RunE: func(cmd *cobra.Command, words []string) error {
			return ctl.do(cmd, func(ctx context.Context, c *control.Client, out io.Writer) error {
				n, err := c.Notify(ctx, strings.Join(words, " "))
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(out, "sent to %s, %d not to be told\n", count(n.Sent, "client"), n.Failed)
				return err
			})
		},
	}
}

func (ctl *ctl) shutdownCommand() *cobra.Command {
	var req control.ShutdownRequest
	var grace time.Duration
	cmd := &cobra.Command{
		Use:   "shutdown",
		Short: "Begin the drain, or shorten it, or end it now",
		Args:  takes(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cmd.Flags().Changed("grace") {
				if req.Now {
					return usagef("--now leaves no --grace: say one or the other")
				}
				req.Grace = &grace
			}
			return ctl.do(cmd, func(ctx context.Context, c *control.Client, out io.Writer) error {
				change, err := c.Shutdown(ctx, req)
				if err != nil {
					return err
				}
				left := "no time left"
				if change.Drain != nil {
					left = span(max(0, time.Until(change.Drain.Deadline))) + " left"
				}
				if !change.Changed {
					left += ", as before"
				}
				_, err = fmt.Fprintf(out, "%s, %s\n", change.State, left)
				return err
			})
		},
	}
	cmd.Flags().DurationVar(&grace, "grace", 0, "`time` that clients have (default: the server's own --grace)")
	cmd.Flags().StringVar(&req.Reason, "reason", "", "`text` for the notice (default: control)")
	cmd.Flags().BoolVar(&req.Now, "now", false, "close everything now")
	return cmd
}
