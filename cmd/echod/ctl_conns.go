package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"echod/control"
	"echod/internal/text"
	"echod/server"
)

// addFilterFlags adds the flags that select connections. only is "only" for commands that list them.
func addFilterFlags(cmd *cobra.Command, f *control.ConnFilter, only string) {
	cmd.Flags().StringSliceVar(&f.Remote, "remote", nil,
		only+"clients from these address `ranges`, such as 10.0.0.0/8;\nunix is clients of Unix sockets")
	cmd.Flags().DurationVar(&f.MinIdle, "min-idle", 0, only+"connections without traffic for this `time`")
	cmd.Flags().StringVar(&f.Identity, "identity", "", only+"clients whose certificate has this `name`: the\n"+
		"subject, its common name or an alternative name; * stands for\nany text")
	completeValues(cmd, "remote", "unix")
}

func addWideFlag(cmd *cobra.Command, wide *bool) {
	cmd.Flags().BoolVarP(wide, "wide", "w", false, "show all columns, and do not cut to 80 characters")
}

func checkLimit(limit int) error {
	if limit < -1 {
		return usagef("--limit %d: want a number, or -1 for all", limit)
	}
	return nil
}

func (ctl *ctl) connsCommand() *cobra.Command {
	var req control.ListRequest
	var wide bool
	cmd := &cobra.Command{
		Use:   "conns",
		Short: "List the open connections",
		Args:  usageArgs(cobra.NoArgs),
		Example: `  echod ctl conns --remote 10.0.0.0/8 --min-idle 1h
  echod ctl conns --sort idle --limit 20`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkLimit(req.Limit); err != nil {
				return err
			}
			return ctl.withClient(cmd, func(ctx context.Context, c *control.Client, out io.Writer) error {
				conns, err := listConns(ctx, c, req)
				if err != nil {
					return err
				}
				return showConns(out, conns, wide)
			})
		},
	}
	cmd.Flags().IntVar(&req.Limit, "limit", -1, "list at most this `number`; -1 is all")
	cmd.Flags().StringVar(&req.Sort, "sort", "opened",
		"`order`: opened is the oldest first, idle the idlest, in and out\nthe most bytes")
	completeValues(cmd, "sort", "opened", "idle", "in", "out")
	addFilterFlags(cmd, &req.ConnFilter, "only ")
	addWideFlag(cmd, &wide)
	return cmd
}

// listConns requests all pages. A connection can move to a later page when a byte moves. It is listed once.
func listConns(ctx context.Context, c *control.Client, req control.ListRequest) (conns []control.Conn, err error) {
	seen := make(map[uint64]bool)
	for all := req.Limit < 0; ; {
		page, err := c.ConnPage(ctx, req)
		if err != nil {
			return nil, err
		}
		for _, conn := range page.Connections {
			if !seen[conn.ID] {
				seen[conn.ID] = true
				conns = append(conns, conn)
			}
		}
		if req.Limit -= len(page.Connections); page.Next == "" || !all && req.Limit <= 0 {
			return conns, nil
		}
		if req.Cursor = page.Next; all {
			req.Limit = -1
		}
	}
}

func showConns(out io.Writer, conns []control.Conn, wide bool) error {
	identified := slices.ContainsFunc(conns, func(c control.Conn) bool { return c.Labels[server.LabelSubject] != "" })
	told := slices.ContainsFunc(conns, func(c control.Conn) bool { return c.Notified })
	leaving := slices.ContainsFunc(conns, func(c control.Conn) bool { return c.Drain != nil })
	heads := "ID\tREMOTE~\tSTATE\tOPEN\tIDLE"
	if wide || !leaving {
		heads += "\tIN\tOUT"
	}
	if wide {
		heads += "\tLOCAL"
	}
	if wide || told && !leaving {
		heads += "\tNOTIFIED"
	}
	if leaving {
		heads += "\tCLOSES IN\tBECAUSE~"
	}
	if identified {
		heads += "\tIDENTITY~"
	}
	t := newTable(heads)
	for _, c := range conns {
		cells := []any{
			c.ID, c.Remote, c.State, age(time.Since(c.Opened)), ageOf(c.IdleSeconds),
		}
		if wide || !leaving {
			cells = append(cells, humanize.Bytes(c.BytesIn), humanize.Bytes(c.BytesOut))
		}
		if wide {
			cells = append(cells, c.Local)
		}
		if wide || told && !leaving {
			cells = append(cells, yesNo(c.Notified))
		}
		switch {
		case leaving && c.Drain != nil:
			cells = append(cells, age(max(0, time.Until(c.Drain.Deadline))), c.Drain.Reason)
		case leaving:
			cells = append(cells, "-", "-")
		}
		if identified {
			cells = append(cells, cmp.Or(c.Labels[server.LabelSubject], "-"))
		}
		t.row(cells...)
	}
	return t.print(out, wide)
}

func (ctl *ctl) clientsCommand() *cobra.Command {
	var limit int
	var filter control.ConnFilter
	var wide bool
	cmd := &cobra.Command{
		Use:   "clients",
		Short: "Count the open connections by client address, the most first",
		Long: `Count the open connections by client address, the most first. IPv6 addresses count
by their /64, as for --max-conns-per-ip.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkLimit(limit); err != nil {
				return err
			}
			return ctl.withClient(cmd, func(ctx context.Context, c *control.Client, out io.Writer) error {
				list, err := c.Clients(ctx, limit, filter)
				if err != nil {
					return err
				}
				t := newTable("ADDRESS~\tCONNECTIONS\tOLDEST\tIDLE\tIN\tOUT")
				for _, p := range list.Clients {
					t.row(p.Address, p.Connections, age(time.Since(p.Oldest)), ageOf(p.IdleSeconds),
						humanize.Bytes(p.BytesIn), humanize.Bytes(p.BytesOut))
				}
				if err := t.print(out, wide); err != nil {
					return err
				}
				if more := list.Total - len(list.Clients); more > 0 {
					return printLine(out, "and %s more (--limit -1 lists all)", text.Count(more, "client"))
				}
				return nil
			})
		},
	}
	cmd.Flags().IntVar(&limit, "limit", 20, "list at most this `number`; -1 is all")
	addFilterFlags(cmd, &filter, "only ")
	addWideFlag(cmd, &wide)
	return cmd
}

func (ctl *ctl) closedCommand() *cobra.Command {
	var limit int
	var wide bool
	cmd := &cobra.Command{
		Use:   "closed",
		Short: "List the last closed connections and why they closed, latest first",
		Args:  usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkLimit(limit); err != nil {
				return err
			}
			return ctl.withClient(cmd, func(ctx context.Context, c *control.Client, out io.Writer) error {
				list, err := c.Closed(ctx, limit)
				if err != nil {
					return err
				}
				heads := "ID\tREMOTE~\tREASON\tCLOSED\tOPEN FOR\tIN\tOUT"
				if wide {
					heads += "\tNOTIFIED\tERROR"
				}
				t := newTable(heads)
				for _, c := range list.Connections {
					cells := []any{
						c.ID, c.Remote, c.Reason, c.Closed.Local().Format(time.TimeOnly), ageOf(c.DurationSeconds),
						humanize.Bytes(c.BytesIn), humanize.Bytes(c.BytesOut),
					}
					if wide {
						cells = append(cells, yesNo(c.Notified), c.Error)
					}
					t.row(cells...)
				}
				return t.print(out, wide)
			})
		},
	}
	cmd.Flags().IntVar(&limit, "limit", 20,
		"list at most this `number`; -1 is all that the server remembers,\nup to 1024")
	addWideFlag(cmd, &wide)
	return cmd
}

func yesNo(yes bool) string {
	if yes {
		return "yes"
	}
	return "no"
}

func (ctl *ctl) killCommand() *cobra.Command {
	var all bool
	var filter control.ConnFilter
	cmd := &cobra.Command{
		Use:   "kill ID... | --remote RANGE | --min-idle TIME | --identity NAME | --all",
		Short: "Close connections, after writing back what was read",
		Long: `Close connections, after writing back what was read: those with the ids, or those that
match all of --remote, --min-idle and --identity. 'echod ctl conns' with the same flags
lists them first.`,
		Example: `  echod ctl kill 17 23
  echod ctl kill --remote 203.0.113.0/24 --min-idle 5m`,
		ValidArgsFunction: ctl.completeIDs,
		RunE: func(cmd *cobra.Command, args []string) error {
			filtered := cmd.Flags().Changed("min-idle") || filter.Identity != "" || len(filter.Remote) > 0
			ways := 0
			for _, given := range []bool{len(args) > 0, filtered, all} {
				if given {
					ways++
				}
			}
			if ways != 1 {
				return usagef("want exactly one of: connection ids; --remote, --min-idle and --identity; --all")
			}
			ids := make([]uint64, len(args))
			for i, arg := range args {
				id, err := strconv.ParseUint(arg, 10, 64)
				if err != nil {
					return usagef("%q is not a connection id: see 'echod ctl conns'", arg)
				}
				ids[i] = id
			}
			return ctl.withClient(cmd, func(ctx context.Context, c *control.Client, out io.Writer) error {
				switch {
				case all:
					change, err := c.KillAll(ctx)
					return printKilled(out, change, err)
				case filtered:
					change, err := c.KillMatching(ctx, filter)
					return printKilled(out, change, err)
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
	addFilterFlags(cmd, &filter, "")
	return cmd
}

func printKilled(out io.Writer, change control.Change, err error) error {
	if err == nil {
		err = printLine(out, "killed %s", text.Count(*change.Killed, "connection"))
	}
	return err
}

// completionTimeout bounds how long the shell waits for the server.
const completionTimeout = time.Second

// complete offers the values that f requests from the server, or none after an error.
func (ctl *ctl) complete(cmd *cobra.Command, f func(ctx context.Context, c *control.Client) []cobra.Completion,
) ([]cobra.Completion, cobra.ShellCompDirective) {
	c, err := controlClient(ctl.path, io.Discard)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer c.Close()
	ctx, cancel := context.WithTimeoutCause(cmd.Context(), completionTimeout, errCompletion)
	defer cancel()
	return f(ctx, c), cobra.ShellCompDirectiveNoFileComp
}

var errCompletion = errors.New("the server takes too long")

// completeIDs offers the ids of open connections.
func (ctl *ctl) completeIDs(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return ctl.complete(cmd, func(ctx context.Context, c *control.Client) (offers []cobra.Completion) {
		list, err := c.Conns(ctx, 200, control.ConnFilter{})
		if err != nil {
			return nil
		}
		for _, c := range list.Connections {
			offers = append(offers, fmt.Sprintf("%d\t%s", c.ID, c.Remote))
		}
		return offers
	})
}

// completeHolds offers the ids of holds.
func (ctl *ctl) completeHolds(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return ctl.complete(cmd, func(ctx context.Context, c *control.Client) (offers []cobra.Completion) {
		st, err := c.Status(ctx)
		if err != nil {
			return nil
		}
		for _, h := range st.Holds {
			offers = append(offers, h.ID+"\t"+h.Reason)
		}
		return offers
	})
}
