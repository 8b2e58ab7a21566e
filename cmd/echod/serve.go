package main

import (
	"context"
	"io/fs"
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
	"echod/metrics"
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
	drainDelay    time.Duration
	stopTimeout   time.Duration
	proxyProtocol []string
	http          string
	pprof         bool
	logLevel      string
	logFormat     string

	listenGiven bool // and not the default
}

func newServeCommand(use string) *cobra.Command {
	var f serveFlags
	cmd := &cobra.Command{
		Use:   use,
		Short: "Serve until a signal, or 'echod ctl shutdown', ends it",
		Long: `Serve every TCP client what it sends, until a signal or 'echod ctl shutdown' ends it.

` + serveHelp,
		Args: takes(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			f.listenGiven = cmd.Flags().Changed("listen")
			return serve(cmd.Context(), f)
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringArrayVar(&f.listen, "listen", []string{"127.0.0.1:9999"}, "`address` to serve on, such as :9999 or [::]:9999; may be\nrepeated")
	flags.StringVar(&f.control, "control", "", "control socket's `path`, or off\n(default: what a socket unit hands over, else\n$RUNTIME_DIRECTORY/control.sock, else\n$XDG_RUNTIME_DIR/echod/control.sock, else in a private\ntemporary directory)")
	flags.StringVar(&f.controlMode, "control-mode", "0600", "control socket's `mode`, in octal")
	flags.StringVar(&f.controlGroup, "control-group", "", "control socket's `group`: a name or number")
	flags.DurationVar(&f.grace, "grace", server.DefaultGrace, "`time` that clients have to finish when the server\nstops")
	flags.DurationVar(&f.drainDelay, "drain-delay", 0, "`time` for which new clients are still served once the\nserver is to stop, before --grace begins, and it is not\nready: for load balancers to notice")
	flags.DurationVar(&f.stopTimeout, "stop-timeout", 0, "`time` after which a supervisor kills a server that it\nstops; one that may take longer says so at start; 0 is\nnot known")
	flags.StringVar(&f.notice, "notice", server.DefaultNotice, "`text` sent to every client then, with {seconds}, {reason},\n{deadline} and Go escapes; sent as it is without \\n at its end;\nempty sends nothing\n(default: SHUTDOWN {seconds} {reason}\\n)")
	flags.Lookup("notice").DefValue = "" // shown above: pflag would quote it once more
	flags.IntVar(&f.maxConns, "max-conns", 0, "`number` of connections served at once; 0 is as many as the\nopen files limit allows")
	flags.StringVar(&f.atLimit, "at-limit", "wait", "`action` for more clients: wait leaves them in the kernel's\nqueue, reject tells them BUSY")
	flags.IntVar(&f.maxConnsPerIP, "max-conns-per-ip", 0, "`number` served at once from one address, more are told BUSY;\n0 is unlimited")
	flags.DurationVar(&f.idleTimeout, "idle-timeout", 0, "`time` without a byte after which a connection is closed;\n0 is never")
	flags.DurationVar(&f.stallTimeout, "stall-timeout", server.DefaultStallTimeout, "`time` for which a client may read nothing while data waits\nfor it; 0 is for ever")
	flags.StringSliceVar(&f.proxyProtocol, "proxy-protocol", nil, "`ranges` of addresses of proxies, such as 10.0.0.0/8, that\nsay who their clients are by the PROXY protocol")
	flags.StringVar(&f.http, "http", "", "`address` of /livez, /readyz, /metrics and /v1/status, which\nchange nothing; a port alone is on 127.0.0.1")
	flags.BoolVar(&f.pprof, "pprof", false, "serve /debug/pprof there too")
	flags.StringVar(&f.logLevel, "log-level", "info", "least `level` that is logged: debug, info, warn or\nerror")
	flags.StringVar(&f.logFormat, "log-format", "", "`format` of the log: console, json or journal (default:\nconsole on a terminal, journal under systemd, else json)")
	return cmd
}

// options gives what the flags mean to the server.
func (f serveFlags) options(log *zap.Logger) (server.Options, error) {
	opts := server.Options{
		Logger: log, Grace: f.grace, MaxConns: f.maxConns, MaxConnsPerIP: f.maxConnsPerIP,
		IdleTimeout: f.idleTimeout, StallTimeout: f.stallTimeout, DrainDelay: f.drainDelay,
	}
	for _, d := range []struct {
		flag  string
		value time.Duration
	}{
		{"grace", f.grace},
		{"idle-timeout", f.idleTimeout},
		{"stall-timeout", f.stallTimeout},
		{"drain-delay", f.drainDelay},
		{"stop-timeout", f.stopTimeout},
	} {
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
	trusted, err := parseTrusted(f.proxyProtocol)
	if err != nil {
		return opts, err
	}
	if len(trusted) > 0 {
		opts.Identify = proxied(trusted)
	}
	if f.pprof && f.http == "" {
		return opts, usagef("--pprof: there is no --http for it to be served on")
	}
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
	shown := metrics.New(version)
	opts.OnClose = shown.OnClose
	srv, err := server.New(server.Echo, opts)
	if err != nil {
		return err
	}
	shown.Watch(srv)
	sockets, err := f.open(ctx, access, log)
	if err != nil {
		return err
	}
	log.Info("starting", zap.String("version", version), zap.Int("pid", os.Getpid()), zap.Duration("grace", f.grace))
	f.warn(log)

	var g run.Group
	g.Add(control.ServerActor(srv, sockets.echo...))

	signals := control.NewSignals(srv, notifySignals(), log, stacks{sink})
	signals.Seen = shown.Signal
	g.Add(signals.Actor())

	planes := control.Options{Version: version, Logger: log, Metrics: shown, OnRequest: shown.Request, Pprof: f.pprof}
	probes := []func(context.Context) error{srv.Probe}
	if sockets.control != nil {
		plane := control.New(srv, planes)
		g.Add(plane.Actor(sockets.control))
		probes = append(probes, plane.Probe)
	}
	if sockets.http != nil {
		g.Add(control.NewWeb(srv, planes).Actor(sockets.http))
	}
	if s := newSupervised(srv, log, probes...); s != nil {
		g.Add(s.actor())
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

// warn says what will not be as one may expect.
func (f serveFlags) warn(log *zap.Logger) {
	if what := lacking(runtime.GOOS); what != nil {
		log.Warn("not to be had on this system", zap.Strings("what", what))
	}
	const end = 2 * time.Second // after its deadline a drain is over
	if takes := f.drainDelay + f.grace + end; f.stopTimeout > 0 && takes > f.stopTimeout {
		then := "it is killed halfway"
		if underSystemd() {
			then = "systemd is asked for more time"
		}
		log.Warn("a drain may take longer than the supervisor waits", zap.Duration("drain", takes),
			zap.Duration("stop_timeout", f.stopTimeout), zap.String("then", then))
	}
}
