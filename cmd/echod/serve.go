package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"os/user"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"github.com/oklog/run"
	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"echod/control"
	"echod/server"
)

const serveHelp = `Signals: the first SIGINT, SIGTERM or SIGQUIT, and SIGHUP, begin the drain: clients
are told, and have --grace to finish. The second one closes everything at once;
a second SIGQUIT writes all goroutine stacks to stderr first. SIGHUP never forces.

Exit codes: 0 drained, 1 could not start or failed, 2 usage, 128+signal when forced
by a second signal.

Every flag can be given as an environment variable too: --max-conns as
ECHOD_MAX_CONNS, and so on; --listen takes a list with commas there. An empty
variable counts as unset.`

// serveFlags are the flags of serve, as given.
type serveFlags struct {
	listen        []string
	control       string
	controlMode   string
	controlGroup  string
	grace         time.Duration
	notice        string
	maxConns      int
	atLimit       string
	maxConnsPerIP int
	idleTimeout   time.Duration
	stallTimeout  time.Duration
	logLevel      string
	logFormat     string
}

func newServeCommand(use string) *cobra.Command {
	var f serveFlags
	cmd := &cobra.Command{
		Use:   use,
		Short: "Serve until a signal, or 'echod ctl shutdown', ends it",
		Long: `Serve every TCP client what it sends, until a signal or 'echod ctl shutdown' ends it.

` + serveHelp,
		Args: takes(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return serve(cmd.Context(), f) },
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringArrayVar(&f.listen, "listen", []string{"127.0.0.1:9999"}, "`address` to serve on, such as :9999 or [::]:9999; may be\nrepeated")
	flags.StringVar(&f.control, "control", "", "control socket's `path`, or off\n(default: $RUNTIME_DIRECTORY/control.sock, else\n$XDG_RUNTIME_DIR/echod/control.sock, else in a private\ntemporary directory)")
	flags.StringVar(&f.controlMode, "control-mode", "0600", "control socket's `mode`, in octal")
	flags.StringVar(&f.controlGroup, "control-group", "", "control socket's `group`: a name or number")
	flags.DurationVar(&f.grace, "grace", server.DefaultGrace, "`time` that clients have to finish when the server\nstops")
	flags.StringVar(&f.notice, "notice", server.DefaultNotice, "`text` sent to every client then, with {seconds}, {reason},\n{deadline} and Go escapes; sent as it is without \\n at its end;\nempty sends nothing\n(default: SHUTDOWN {seconds} {reason}\\n)")
	flags.Lookup("notice").DefValue = "" // shown above: pflag would quote it once more
	flags.IntVar(&f.maxConns, "max-conns", 0, "`number` of connections served at once; 0 is as many as the\nopen files limit allows")
	flags.StringVar(&f.atLimit, "at-limit", "wait", "`action` for more clients: wait leaves them in the kernel's\nqueue, reject tells them BUSY")
	flags.IntVar(&f.maxConnsPerIP, "max-conns-per-ip", 0, "`number` served at once from one address, more are told BUSY;\n0 is unlimited")
	flags.DurationVar(&f.idleTimeout, "idle-timeout", 0, "`time` without a byte after which a connection is closed;\n0 is never")
	flags.DurationVar(&f.stallTimeout, "stall-timeout", server.DefaultStallTimeout, "`time` for which a client may read nothing while data waits\nfor it; 0 is for ever")
	flags.StringVar(&f.logLevel, "log-level", "info", "least `level` that is logged: debug, info, warn or\nerror")
	flags.StringVar(&f.logFormat, "log-format", "", "`format` of the log: console or json (default: console on a\nterminal, else json)")
	return cmd
}

// options gives what the flags mean to the server.
func (f serveFlags) options(log *zap.Logger) (server.Options, error) {
	opts := server.Options{
		Logger: log, Grace: f.grace, MaxConns: f.maxConns, MaxConnsPerIP: f.maxConnsPerIP,
		IdleTimeout: f.idleTimeout, StallTimeout: f.stallTimeout,
	}
	for _, d := range []struct {
		flag  string
		value time.Duration
	}{{"grace", f.grace}, {"idle-timeout", f.idleTimeout}, {"stall-timeout", f.stallTimeout}} {
		if d.value < 0 {
			return opts, usagef("--%s %s: must not be negative", d.flag, d.value)
		}
	}
	for _, n := range []struct {
		flag  string
		value int
	}{{"max-conns", f.maxConns}, {"max-conns-per-ip", f.maxConnsPerIP}} {
		if n.value < 0 {
			return opts, usagef("--%s %d: must not be negative", n.flag, n.value)
		}
	}
	// The library's zero values mean its defaults, the flags' mean none.
	if f.grace == 0 {
		opts.Grace = -1
	}
	if f.stallTimeout == 0 {
		opts.StallTimeout = -1
	}
	switch f.atLimit {
	case "wait":
		opts.AtLimit = server.Wait
	case "reject":
		opts.AtLimit = server.Reject
	default:
		return opts, usagef("--at-limit %q: want wait or reject", f.atLimit)
	}
	notice, err := server.ParseNotice(f.notice)
	if err != nil {
		return opts, usagef("--%w", err) // it begins with: notice
	}
	opts.Notice = notice
	return opts, nil
}

// socketOptions gives what the flags mean to the control socket.
func (f serveFlags) socketOptions() (opts control.SocketOptions, err error) {
	mode, err := strconv.ParseUint(f.controlMode, 8, 32)
	if err != nil || mode > 0o777 {
		return opts, usagef("--control-mode %q: want an octal mode such as 0660", f.controlMode)
	}
	opts.Mode = fs.FileMode(mode)
	if f.controlGroup == "" {
		return opts, nil
	}
	gid := f.controlGroup
	if group, err := user.LookupGroup(f.controlGroup); err == nil {
		gid = group.Gid
	}
	n, err := strconv.Atoi(gid)
	if err != nil || n < 0 {
		return opts, usagef("--control-group %q: no such group", f.controlGroup)
	}
	opts.GID = &n
	return opts, nil
}

// serve runs the server to its end.
func serve(ctx context.Context, f serveFlags) error {
	// A log whose reader has gone must not end the server.
	signal.Ignore(syscall.SIGPIPE)
	log, sink, err := newLogger(f.logLevel, f.logFormat)
	if err != nil {
		return err
	}
	defer sink.close()
	opts, err := f.options(log)
	if err != nil {
		return err
	}
	access, err := f.socketOptions()
	if err != nil {
		return err
	}
	srv, err := server.New(server.Echo, opts)
	if err != nil {
		return err
	}
	listeners, err := listen(ctx, f.listen)
	if err != nil {
		return err
	}
	log.Info("starting", zap.String("version", version), zap.Int("pid", os.Getpid()), zap.Duration("grace", f.grace))

	if what := lacking(runtime.GOOS); what != nil {
		log.Warn("not to be had on this system", zap.Strings("what", what))
	}

	var g run.Group
	g.Add(control.ServerActor(srv, listeners...))

	signals := control.NewSignals(srv, notifySignals(), log, stacks{sink})
	g.Add(signals.Actor())

	if f.control != "off" {
		socket, err := listenControl(ctx, f.control, access, log)
		if err != nil {
			closeAll(listeners)
			return err
		}
		g.Add(control.New(srv, control.Options{Version: version, Logger: log}).Actor(socket))
	}

	if err := g.Run(); err != nil {
		return err
	}
	if sig := signals.Forced(); sig != nil {
		return &exitError{code: exitSignal + signalNumber(sig)}
	}
	return nil
}

// lacking lists what echod cannot do on a system.
func lacking(system string) []string {
	const (
		queue   = "telling how many clients wait to be accepted"
		resets  = "keeping new clients out of an accept queue that a drain empties"
		callers = "telling who uses the control socket"
		modes   = "the control socket's mode and group"
	)
	switch system {
	case "linux":
		return nil
	case "darwin":
		return []string{queue, resets}
	case "windows":
		return []string{queue, resets, callers, modes}
	default:
		return []string{queue, resets, callers}
	}
}

// notifySignals registers for the signals that mean something here. One that nohup has told us to
// ignore stays ignored.
func notifySignals() <-chan os.Signal {
	wanted := []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT}
	if !signal.Ignored(syscall.SIGHUP) {
		wanted = append(wanted, syscall.SIGHUP)
	}
	in := make(chan os.Signal, 16) // signal.Notify drops what does not fit
	signal.Notify(in, wanted...)
	return in
}

func listen(ctx context.Context, addresses []string) ([]net.Listener, error) {
	for _, address := range addresses {
		if _, _, err := net.SplitHostPort(address); err != nil {
			return nil, usagef("--listen %q: want an address such as 127.0.0.1:9999, :9999 or [::]:9999", address)
		}
	}
	var listeners []net.Listener
	for _, address := range addresses {
		ln, err := server.Listen(ctx, address)
		if err != nil {
			closeAll(listeners)
			return nil, fmt.Errorf("--listen %s: %w", address, plain(err))
		}
		listeners = append(listeners, ln)
	}
	return listeners, nil
}

// plain strips what the net package puts around an error: the message names the address already.
func plain(err error) error {
	if oe, ok := errors.AsType[*net.OpError](err); ok {
		err = oe.Err
	}
	if se, ok := errors.AsType[*os.SyscallError](err); ok {
		err = se.Err
	}
	return err
}

func closeAll(listeners []net.Listener) {
	for _, ln := range listeners {
		_ = ln.Close()
	}
}

func listenControl(ctx context.Context, path string, access control.SocketOptions, log *zap.Logger) (net.Listener, error) {
	if path == "" {
		found, err := serverSocket()
		if err != nil {
			return nil, err
		}
		path = found
	}
	socket, err := control.Listen(ctx, path, access)
	if errors.Is(err, control.ErrInUse) {
		return nil, fmt.Errorf("%w: give this one a --control of its own, or --control off", err)
	}
	if err != nil {
		return nil, err
	}
	log.Info("control socket open", zap.String("path", path))
	return socket, nil
}
