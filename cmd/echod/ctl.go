package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"echod/control"
	"echod/internal/text"
	"echod/server"
)

func newCtlCommand() *cobra.Command {
	ctl := &ctl{}
	cmd := &cobra.Command{
		Use:   "ctl",
		Short: "Control a running server through its control socket",
		Long: `Control a running server through its control socket.

Without --control the command uses the first server that it finds. It tries the paths
where servers put their socket by default: $RUNTIME_DIRECTORY/control.sock,
$XDG_RUNTIME_DIR/echod/control.sock, a private temporary or cache directory,
/run/echod/control.sock and /run/echod-control.sock. It skips directories that another
user controls.

Exit codes: 0 done, 1 the server refused, 2 no server answers, 3 a wait timed out,
64 usage. 'pause -- COMMAND' exits with the command's code, or with 125 if the command
succeeded but the pause ended before it did.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usagef("missing command: status, pause, resume, conns, clients, closed, kill, notify, settings, set, wait, " +
				"events, upgrade or shutdown")
		},
	}
	cmd.PersistentFlags().StringVar(&ctl.path, "control", "", "`path` of the control socket")
	cmd.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	cmd.PersistentFlags().BoolVar(&ctl.json, "json", false,
		"print the server's answer unchanged, as JSON")
	cmd.AddCommand(
		ctl.statusCommand(), ctl.connsCommand(), ctl.clientsCommand(), ctl.closedCommand(), ctl.eventsCommand(), ctl.waitCommand(),
		ctl.settingsCommand(), ctl.setCommand(),
		ctl.pauseCommand(), ctl.resumeCommand(), ctl.killCommand(), ctl.notifyCommand(), ctl.reloadCommand(),
		ctl.shutdownCommand(), ctl.upgradeCommand(),
	)
	return cmd
}

// ctl holds the flags that all ctl commands share.
type ctl struct {
	path  string
	json  bool
	quiet bool // print no notes about the search for a server
}

// withClient calls f with a client. With --json it prints the answers of the server, and discards what f writes to out.
func (ctl *ctl) withClient(cmd *cobra.Command, f func(ctx context.Context, c *control.Client, out io.Writer) error) error {
	notes := cmd.ErrOrStderr()
	if ctl.quiet {
		notes = io.Discard
	}
	c, err := controlClient(ctl.path, notes)
	if err != nil {
		return err
	}
	defer c.Close()
	c.Claims = callerClaims()
	out := cmd.OutOrStdout()
	if ctl.json {
		c.OnAnswer = func(body []byte) { _, _ = cmd.OutOrStdout().Write(body) }
		out = io.Discard
	}
	return interruptible(cmd.Context(), func(ctx context.Context) error { return f(ctx, c, out) })
}

func (ctl *ctl) statusCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show the server's state, counts, holds and drain",
		Args:  usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return ctl.withClient(cmd, func(ctx context.Context, c *control.Client, out io.Writer) error {
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
	row := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%s\t%s\n", name, text.Printable(fmt.Sprintf(format, args...)))
	}
	row("state", "%s", st.State)
	if d := st.Drain; d != nil {
		row("drain", "%s", describeDrain(*d))
		if until := d.AcceptingUntil; until != nil && time.Now().Before(*until) {
			row("accepting", "for another %s", formatDuration(time.Until(*until)))
		}
	}
	for _, h := range st.Holds {
		row("hold", "%s", describeHold(h))
	}
	for _, h := range st.LostHolds {
		row("ended", "by a restart: hold %s", describeHold(h))
	}
	if st.Told > 0 && st.Drain == nil {
		row("leaving", "%s told to leave, see 'echod ctl conns'", text.Count(st.Told, "client"))
	}
	for _, l := range st.Listeners {
		queue := ""
		if l.AcceptQueue != nil && l.AcceptQueueLimit != nil {
			queue = fmt.Sprintf(", %d of %d in the accept queue", *l.AcceptQueue, *l.AcceptQueueLimit)
		}
		if l.TLS {
			queue = ", TLS" + queue
		}
		row("listening", "%s%s", l.Address, queue)
	}
	for _, c := range st.Certificates {
		row("certificate", "%s, expires %s", cmp.Or(strings.Join(c.Names, " "), c.Subject),
			c.NotAfter.Local().Format(time.DateTime))
	}
	row("connections", "%d open, %d accepted", st.Connections, st.Accepted)
	for _, l := range st.LimitsReached {
		row("full", "%s", l)
	}
	var closed, rejected []string
	for _, why := range slices.Sorted(maps.Keys(st.Closed)) {
		if reason, ok := strings.CutPrefix(why, "rejected-"); ok {
			rejected = append(rejected, fmt.Sprintf("%d %s", st.Closed[why], reason))
		} else {
			closed = append(closed, fmt.Sprintf("%d %s", st.Closed[why], why))
		}
	}
	if len(closed) > 0 {
		row("closed", "%s", strings.Join(closed, ", "))
	}
	if len(rejected) > 0 {
		row("rejected", "%s", strings.Join(rejected, ", "))
	}
	for _, c := range st.SettingsChanged {
		row("changed", "%s is %s, at start %s", c.Name, valueOrNone(c.New), valueOrNone(c.Old))
	}
	row("bytes", "%s in, %s out", humanize.Bytes(st.BytesIn), humanize.Bytes(st.BytesOut))
	if st.Drain == nil {
		row("a drain", "%s", describeDefaultDrain(st))
	}
	row("up", "%s, started %s", formatSeconds(st.UptimeSeconds), st.Started.Local().Format(time.DateTime))
	row("process", "%d, version %s", st.PID, st.Version)
	if p := st.Predecessor; p != nil {
		row("predecessor", "process %d, version %s, with %s", p.PID, p.Version, text.Count(p.Connections, "connection"))
	}
	return w.Flush()
}

// describeDrain describes the progress of a drain and when it ends.
func describeDrain(d control.Drain) string {
	words := []string{d.Reason, formatDuration(max(0, time.Until(d.Deadline))) + " left", fmt.Sprintf("%d notified", d.Notified)}
	if d.NoticeFailed > 0 {
		words = append(words, fmt.Sprintf("%d could not be notified", d.NoticeFailed))
	}
	if d.Untold > 0 {
		until := ""
		if d.TellingUntil != nil {
			until = ", within " + formatDuration(max(0, time.Until(*d.TellingUntil)))
		}
		words = append(words, fmt.Sprintf("%d still to be notified%s", d.Untold, until))
	}
	return strings.Join(words, ", ")
}

// describeDefaultDrain says how long a drain with the default times takes.
func describeDefaultDrain(st control.Status) string {
	const end = 2 // seconds for the server to stop after the deadline
	var parts []string
	for _, part := range []struct {
		name string
		time float64
	}{{"delay", st.DrainDelaySeconds}, {"spread", st.SpreadSeconds}, {"grace", st.GraceSeconds}} {
		if part.time > 0 {
			parts = append(parts, formatSeconds(part.time)+" "+part.name)
		}
	}
	parts = append(parts, formatSeconds(end)+" to close the rest")
	return fmt.Sprintf("would take %s at most: %s",
		formatSeconds(st.DrainDelaySeconds+st.SpreadSeconds+st.GraceSeconds+end), strings.Join(parts, ", "))
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
		words = append(words, "placed "+formatDuration(stood.Truncate(time.Second))+" ago")
	}
	if h.Expires != nil {
		words = append(words, "expires in "+formatDuration(time.Until(*h.Expires)))
	}
	if h.Evict {
		evict := "evicts clients"
		if h.SpreadSeconds > 0 {
			evict += " within " + formatSeconds(h.SpreadSeconds)
		}
		if h.GraceSeconds != nil {
			evict += " with " + formatSeconds(*h.GraceSeconds) + " grace"
		}
		words = append(words, evict)
	}
	if h.UID != nil && h.PID != nil {
		words = append(words, "by "+describeCaller(control.Caller{UID: *h.UID, PID: *h.PID, User: h.User, Claims: h.Claims}))
	}
	return strings.Join(words, ", ")
}

// describeCaller describes a user, its process, and the process's claims.
func describeCaller(c control.Caller) string {
	who := fmt.Sprintf("uid %d, pid %d", c.UID, c.PID)
	name := c.User
	if name == "" { // the server may not know the users that this process knows
		if u, err := user.LookupId(strconv.Itoa(c.UID)); err == nil {
			name = u.Username
		}
	}
	if name != "" {
		who = fmt.Sprintf("%s (%s)", name, who)
	}
	if c.Claims != "" {
		who += fmt.Sprintf(", claims to be %s", c.Claims)
	}
	return who
}

// callerClaims describes the user that this process acts for, according to sudo and the login uid.
func callerClaims() string {
	var parts []string
	if name := os.Getenv("SUDO_USER"); name != "" {
		parts = append(parts, "sudo user "+name)
	}
	const unset = "4294967295" // the process does not belong to a login
	if login, err := os.ReadFile("/proc/self/loginuid"); err == nil {
		if uid := strings.TrimSpace(string(login)); uid != unset {
			parts = append(parts, "login uid "+uid)
		}
	}
	return strings.Join(parts, ", ")
}

func (ctl *ctl) eventsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "events",
		Short: "Print events as they happen, until interrupted",
		Args:  usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return ctl.withClient(cmd, func(ctx context.Context, c *control.Client, out io.Writer) error {
				for e, err := range c.Events(ctx) {
					if err != nil {
						return err
					}
					if err := printLine(out, "%s", describeEvent(e)); err != nil {
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
		what = fmt.Sprintf("closed    conn %d from %s: %s, %s in, %s out", e.Closed.ID, e.Closed.Remote,
			e.Closed.Reason,
			humanize.Bytes(e.Closed.BytesIn), humanize.Bytes(e.Closed.BytesOut))
	case e.Hold != nil && e.Cause != "":
		what = fmt.Sprintf("released  %s: %s", describeHold(*e.Hold), e.Cause)
		if e.ReleasedBy != nil {
			what += " by " + describeCaller(*e.ReleasedBy)
		}
	case e.Hold != nil:
		what = "hold      " + describeHold(*e.Hold)
	case e.State != "":
		what = "state     " + e.State
	case e.Type == string(server.EventSettings):
		what = "settings "
		for _, c := range e.Settings {
			what += fmt.Sprintf(" %s: %s -> %s,", c.Name, valueOrNone(c.Old), valueOrNone(c.New))
		}
		what = strings.TrimSuffix(what, ",")
		if e.ChangedBy != nil {
			what += " by " + describeCaller(*e.ChangedBy)
		}
	case e.Missed > 0:
		what = fmt.Sprintf("missed    %s: this terminal is slower than the server", text.Count(e.Missed, "event"))
	case e.Type == "upgraded":
		what = "upgraded  another process serves now"
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
		Short: "Wait for a state or a number of open connections",
		Long: `Wait for a state or a number of open connections. A wait for running or paused also
waits for a server to start. So do other waits with --timeout, unless they are for stopped
or the server stops meanwhile.`,
		Args: usageArgs(cobra.NoArgs),
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
				return usagef("nothing to wait for: want --state, --connections or both")
			}
			wait := func(timeout *time.Duration) error {
				req.Timeout = timeout
				return ctl.withClient(cmd, func(ctx context.Context, c *control.Client, out io.Writer) error {
					seen, err := c.Wait(ctx, req)
					if err != nil {
						return err
					}
					return printLine(out, "%s with %s", seen.State, text.Count(seen.Connections, "connection"))
				})
			}
			switch {
			case state == "running" || state == "paused":
				return ctl.retryUntilUp(req.Timeout, wait, true)
			case state != "stopped" && req.Timeout != nil:
				return ctl.retryUntilUp(req.Timeout, wait, false)
			default:
				return wait(req.Timeout)
			}
		},
	}
	cmd.Flags().StringVar(&state, "state", "",
		"`state` to wait for: running, paused, draining or stopped")
	completeValues(cmd, "state", "running", "paused", "draining", "stopped")
	cmd.Flags().IntVar(&connections, "connections", 0, "exactly this `number` of open connections")
	cmd.Flags().DurationVar(&timeout, "timeout", 0,
		"give up, with exit code 3, after this `time` (default: never)")
	return cmd
}

// waitRetry is the time between two attempts of wait to reach a server.
const waitRetry = 100 * time.Millisecond

// retryUntilUp calls f until it reaches a server, for at most timeout if that is not nil. With again it also calls f again
// if the server stops during a call.
func (ctl *ctl) retryUntilUp(timeout *time.Duration, f func(timeout *time.Duration) error, again bool) error {
	began := time.Now()
	for left := timeout; ; time.Sleep(waitRetry) {
		if timeout != nil {
			left = new(max(0, *timeout-time.Since(began)))
		}
		err := f(left)
		_, away := errors.AsType[*control.UnreachableError](err)
		if exit, ok := errors.AsType[*exitError](err); ok {
			away = exit.code == exitUnreachable
		}
		switch {
		case !away || errors.Is(err, fs.ErrPermission), !again && errors.Is(err, io.EOF):
			return err
		case left != nil && *left == 0:
			return &exitError{exitTimeout, fmt.Errorf("the wait timed out: %w", err)}
		}
		ctl.quiet = true
	}
}

func (ctl *ctl) resumeCommand() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "resume [HOLD... | --all]",
		Short: "Release the hold, the named holds, or all",
		Long: `Release the hold. If there are several, they are listed, and nothing is released: name
those to release, or give --all. Each may protect the work of another user.`,
		ValidArgsFunction: ctl.completeHolds,
		RunE: func(cmd *cobra.Command, holds []string) error {
			if all && len(holds) > 0 {
				return usagef("--all and names of holds exclude each other")
			}
			return ctl.withClient(cmd, func(ctx context.Context, c *control.Client, out io.Writer) error {
				if len(holds) == 0 {
					return resume(ctx, c, out, all)
				}
				for _, id := range holds {
					change, err := c.ReleaseHold(ctx, id)
					if err != nil {
						return err
					}
					if err := printLine(out, "released %s: the server is %s", id, change.State); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "release all holds")
	return cmd
}

func resume(ctx context.Context, c *control.Client, out io.Writer, all bool) error {
	release := c.Resume
	if all {
		release = c.ResumeAll
	}
	change, err := release(ctx)
	if problem, ok := errors.AsType[*control.Problem](err); ok && problem.Type == control.ProblemHolds {
		lines := []string{fmt.Sprintf("%d holds exist: name those to release, or give --all", len(problem.Holds))}
		for _, h := range problem.Holds {
			lines = append(lines, "  "+text.Printable(describeHold(h)))
		}
		return errors.New(strings.Join(lines, "\n"))
	}
	switch {
	case err != nil:
		return err
	case !change.Changed:
		return printLine(out, "nothing to resume: the server is %s", change.State)
	default:
		return printLine(out, "released %s: the server is %s", text.Count(*change.Released, "hold"), change.State)
	}
}

func (ctl *ctl) notifyCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "notify TEXT...",
		Short:   "Send the line 'NOTICE TEXT' to every client",
		Args:    usageArgs(cobra.MinimumNArgs(1)),
		Example: `  echod ctl notify maintenance at noon`,
		RunE: func(cmd *cobra.Command, words []string) error {
			return ctl.withClient(cmd, func(ctx context.Context, c *control.Client, out io.Writer) error {
				n, err := c.Notify(ctx, strings.Join(words, " "))
				if err != nil {
					return err
				}
				return printLine(out, "sent to %s, %d failed", text.Count(n.Sent, "client"), n.Failed)
			})
		},
	}
}

func (ctl *ctl) reloadCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "reload-certs",
		Short: "Load the TLS certificates again if their files have changed",
		Args:  usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return ctl.withClient(cmd, func(ctx context.Context, c *control.Client, out io.Writer) error {
				reloaded, err := c.ReloadCertificates(ctx)
				if err != nil {
					return err
				}
				if !reloaded.Changed {
					return printLine(out, "no file has changed")
				}
				return printLine(out, "loaded %s", text.Count(len(reloaded.Certificates), "certificate"))
			})
		},
	}
}

func (ctl *ctl) shutdownCommand() *cobra.Command {
	var req control.ShutdownRequest
	var grace, spread, extend time.Duration
	var cancel bool
	cmd := &cobra.Command{
		Use:   "shutdown",
		Short: "Start the drain, spread, shorten, extend or cancel it, or close everything now",
		Long: `Start the drain. During a drain, a shorter --grace brings the deadline forward, --now
closes everything, --extend gives clients more time, and --cancel cancels the drain.

With --spread clients are told one after another at random, each with its own --grace
from then on, so that they do not all reconnect in the same second.

--extend never goes beyond the supervisor's stop timeout, see --stop-timeout of 'echod
serve'. Clients are not told again. --cancel works during --drain-delay, while no client
has been told, and not if a supervisor's signal began the drain.`,
		Example: `  echod ctl shutdown --grace 1m --spread 30s --reason upgrade
  echod ctl shutdown --extend 30s
  echod ctl shutdown --cancel`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			given := func(name string) bool { return cmd.Flags().Changed(name) }
			begins := req.Now || given("grace") || given("spread") || given("reason")
			switch {
			case req.Now && (given("grace") || given("spread")):
				return usagef("--now excludes --grace and --spread")
			case cancel && (begins || given("extend")), given("extend") && begins:
				return usagef("--extend and --cancel exclude other flags")
			case given("extend") && extend <= 0:
				return usagef("--extend %s: must be positive", extend)
			}
			if given("grace") {
				req.Grace = &grace
			}
			if given("spread") {
				req.Spread = &spread
			}
			return ctl.withClient(cmd, func(ctx context.Context, c *control.Client, out io.Writer) error {
				switch {
				case cancel:
					change, err := c.CancelShutdown(ctx)
					if err != nil {
						return err
					}
					return printLine(out, "cancelled: the server is %s", change.State)
				case given("extend"):
					return extendDrain(ctx, c, out, extend)
				default:
					return startDrain(ctx, c, out, req)
				}
			})
		},
	}
	cmd.Flags().DurationVar(&grace, "grace", 0,
		"`time` that clients have to finish (default: the server's --grace)")
	cmd.Flags().DurationVar(&spread, "spread", 0,
		"`time` over which clients are told, one after another (default: the\nserver's --spread)")
	cmd.Flags().StringVar(&req.Reason, "reason", "",
		"`text` for the notice that clients get (default: control)")
	cmd.Flags().BoolVar(&req.Now, "now", false, "close everything now")
	cmd.Flags().DurationVar(&extend, "extend", 0, "give the clients of the drain so much more `time`")
	cmd.Flags().BoolVar(&cancel, "cancel", false, "cancel the drain, while no client has been told")
	cmd.Flags().BoolVar(&req.Predecessor, "predecessor", false,
		"drain only the connections that an upgrade has left with\nthe old process, without waiting for --upgrade-keep")
	return cmd
}

func startDrain(ctx context.Context, c *control.Client, out io.Writer, req control.ShutdownRequest) error {
	change, err := c.Shutdown(ctx, req)
	if err != nil {
		return err
	}
	if req.Predecessor {
		return printLine(out, "the predecessor drains its connections")
	}
	left := drainLeft(change)
	if !change.Changed {
		left += ", unchanged"
	}
	if err := printLine(out, "%s, %s", change.State, left); err != nil {
		return err
	}
	if (req.Grace != nil || req.Spread != nil) && !change.Changed {
		return errors.New("the drain is unchanged: --grace can only shorten it; --extend lengthens it")
	}
	return nil
}

func extendDrain(ctx context.Context, c *control.Client, out io.Writer, extend time.Duration) error {
	change, err := c.ExtendShutdown(ctx, extend)
	if err != nil {
		return err
	}
	const limit = "the supervisor would kill the server later than that (--stop-timeout)"
	switch extended := time.Duration(*change.ExtendedSeconds * float64(time.Second)); {
	case !change.Changed:
		return fmt.Errorf("not extended, %s: %s", drainLeft(change), limit)
	case extended < extend:
		return printLine(out, "%s, %s: extended by %s only, because %s", change.State, drainLeft(change), formatDuration(extended), limit)
	default:
		return printLine(out, "%s, %s", change.State, drainLeft(change))
	}
}

func drainLeft(change control.Change) string {
	if change.Drain == nil {
		return "no time left"
	}
	return formatDuration(max(0, time.Until(change.Drain.Deadline))) + " left"
}

// printLine prints a line. It makes texts from the server printable.
func printLine(out io.Writer, format string, args ...any) error {
	_, err := fmt.Fprintln(out, text.Printable(fmt.Sprintf(format, args...)))
	return err
}

// formatDuration formats a duration for people.
func formatDuration(d time.Duration) string {
	switch {
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	case d < time.Minute:
		return d.Round(100 * time.Millisecond).String()
	default:
		return d.Round(time.Second).String()
	}
}

func formatSeconds(s float64) string { return formatDuration(time.Duration(s * float64(time.Second))) }
