package main

import (
	"cmp"
	"context"
	"io/fs"
	"os"
	"os/signal"
	"os/user"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/oklog/run"
	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"echod/control"
	"echod/metrics"
	"echod/server"
)

const serveHelp = `Signals: the first SIGINT, SIGTERM, SIGQUIT or SIGHUP starts the drain: the server
notifies its clients and gives them --grace to finish. A second SIGINT, SIGTERM or
SIGQUIT closes everything at once; SIGQUIT writes all goroutine stacks to stderr first.
SIGHUP never forces.

Exit codes: 0 drained, 1 could not start or failed, 2 usage, 128+signal when a second
signal forced the end.

Each flag has an environment variable: ECHOD_MAX_CONNS for --max-conns, and so on. For
flags that may be repeated it holds a comma-separated list. Flags take precedence. An
empty variable counts as unset.`

// serveFlags holds the flags of serve.
type serveFlags struct {
	listen              []string
	control             string
	controlMode         string
	controlGroup        string
	grace               time.Duration
	notice              string
	maxConns            int
	atLimit             string
	maxConnsPerIP       int
	maxConnsPerUID      int
	maxConnRate         string
	maxConnRateTotal    string
	allow, deny         []string
	unixMode, unixGroup string
	tls                 tlsFlags
	idleTimeout         time.Duration
	stallTimeout        time.Duration
	drainDelay          time.Duration
	spread              time.Duration
	maxConnAge          time.Duration
	stopTimeout         time.Duration
	proxyProtocol       []string
	http                string
	httpHosts           []string
	pprof               bool
	agentCheck          string
	logLevel            string
	logFormat           string

	pidFile        string
	upgradeTimeout time.Duration
	upgradeKeep    time.Duration

	checkOnly bool
	envFile   string

	listenGiven bool // listen was set by a flag or a variable
}

func newServeCommand(use string) *cobra.Command {
	var f serveFlags
	cmd := &cobra.Command{
		Use:   use,
		Short: "Run the server until a signal or 'echod ctl shutdown' stops it",
		Long: `Run the echo server until a signal or 'echod ctl shutdown' stops it.

` + serveHelp,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			f.listenGiven = cmd.Flags().Changed("listen")
			switch {
			case f.checkOnly:
				return checkCommand(cmd, f)
			case f.envFile != "":
				return usagef("--env-file: needs --check")
			}
			return serve(cmd, f)
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringArrayVar(&f.listen, "listen", []string{"127.0.0.1:9999"},
		"`address` to listen on, such as [::1]:9999, or :9999 for all\n"+
			"addresses, tls://:9998 for TLS, unix:///run/echod/echo.sock for\n"+
			"a Unix socket; may be repeated")
	f.tls.add(flags)
	flags.StringVar(&f.unixMode, "unix-mode", "0600", "octal `mode` of the Unix sockets of --listen")
	flags.StringVar(&f.unixGroup, "unix-group", "",
		"`group` of the Unix sockets of --listen, by name or number")
	flags.StringVar(&f.control, "control", "",
		"`path` of the control socket, or off\n"+
			"(default: the socket that systemd passes, else\n"+
			"$RUNTIME_DIRECTORY/control.sock, else\n"+
			"$XDG_RUNTIME_DIR/echod/control.sock, else a socket in a\n"+
			"private temporary directory)")
	flags.StringVar(&f.controlMode, "control-mode", "0600", "octal `mode` of the control socket")
	flags.StringVar(&f.controlGroup, "control-group", "",
		"`group` of the control socket, by name or number")
	flags.DurationVar(&f.grace, "grace", server.DefaultGrace,
		"`time` that clients have to finish during a drain")
	flags.DurationVar(&f.drainDelay, "drain-delay", 0,
		"`time` for which a stopping server is not ready but still\n"+
			"accepts clients, before --grace begins: for load balancers")
	flags.DurationVar(&f.spread, "spread", 0,
		"`time` over which a drain tells clients to leave, in random order,\n"+
			"each with its own --grace; 0 is all at once")
	flags.StringVar(&f.pidFile, "pid-file", "",
		"`path` of a file with the pid of the process that serves")
	flags.DurationVar(&f.upgradeTimeout, "upgrade-timeout", defaultUpgradeTimeout,
		"`time` for the new program of an upgrade to start")
	flags.DurationVar(&f.upgradeKeep, "upgrade-keep", 0,
		"`time` for which an upgrade serves connections that cannot be\n"+
			"handed over, before it drains them; 0 is --grace")
	flags.DurationVar(&f.stopTimeout, "stop-timeout", 0,
		"`time` after which the supervisor kills a stopping server; the\n"+
			"server warns at start if a drain can take longer; 0 is unknown")
	flags.StringVar(&f.notice, "notice", server.DefaultNoticeTemplate,
		"`text` sent to each client when the drain begins, with {seconds},\n"+
			"{reason}, {deadline} and Go escapes; a text that does not end\n"+
			"in \\n is sent exactly as it is; an empty one sends nothing\n"+
			"(default: SHUTDOWN {seconds} {reason}\\n)")
	flags.Lookup("notice").DefValue = "" // pflag would escape the backslash of the default again
	flags.IntVar(&f.maxConns, "max-conns", 0,
		"maximum `number` of connections served at once; 0 is as many as\nthe limit of open files allows")
	flags.StringVar(&f.atLimit, "at-limit", "wait",
		"`action` for clients beyond --max-conns and --max-conn-rate-total:\n"+
			"wait leaves them in the accept queue,\nreject sends them BUSY")
	flags.IntVar(&f.maxConnsPerIP, "max-conns-per-ip", 0,
		"maximum `number` of connections from one address; further\nones are sent BUSY; 0 is unlimited")
	flags.IntVar(&f.maxConnsPerUID, "max-conns-per-uid", 0,
		"maximum `number` of connections from one user id on Unix\nsockets; further ones are sent BUSY; 0 is unlimited")
	flags.StringVar(&f.maxConnRate, "max-conn-rate", "0",
		"maximum `rate` of new connections from one address, such as 20/s,\n"+
			"100/m or 5/h; further ones are sent BUSY; 0 is\nunlimited")
	flags.StringVar(&f.maxConnRateTotal, "max-conn-rate-total", "0",
		"maximum `rate` of new connections in total; --at-limit says what\nhappens to further ones")
	flags.StringSliceVar(&f.allow, "allow", nil,
		"address `ranges` that may connect, such as 10.0.0.0/8, and no\nothers; may be repeated")
	flags.StringSliceVar(&f.deny, "deny", nil,
		"address `ranges` that may not connect; where --allow covers an\naddress too, the smaller range decides")
	flags.DurationVar(&f.idleTimeout, "idle-timeout", 0,
		"`time` without traffic after which a connection is closed;\n0 is never")
	flags.DurationVar(&f.maxConnAge, "max-conn-age", 0,
		"`time` after which a client is told to leave, and closed after\n"+
			"--grace; varies by 10 % from client to client; 0 is never")
	flags.DurationVar(&f.stallTimeout, "stall-timeout", server.DefaultStallTimeout,
		"`time` after which a client that reads nothing while data waits\nfor it is closed; 0 is never")
	flags.StringSliceVar(&f.proxyProtocol, "proxy-protocol", nil,
		"address `ranges` of proxies that send a PROXY protocol header,\n"+
			"such as 10.0.0.0/8; unix is all clients of Unix sockets")
	flags.StringVar(&f.http, "http", "",
		"`address` for a status page at /, and for /livez, /readyz,\n"+
			"/metrics and /v1/status, all read-only; a port alone is on\n"+
			"127.0.0.1; tls://:9090 is HTTPS, with the certificates of\n--tls-cert")
	flags.StringSliceVar(&f.httpHosts, "http-host", nil,
		"host `names` by which callers may address --http, besides IP\n"+
			"addresses, localhost and this machine's name")
	flags.BoolVar(&f.pprof, "pprof", false, "serve /debug/pprof on --http too")
	flags.StringVar(&f.agentCheck, "agent-check", "",
		"`address` for HAProxy's agent checks, which ask whether to send\n"+
			"new clients here; a port alone is on 127.0.0.1")
	flags.StringVar(&f.logLevel, "log-level", "info",
		"lowest `level` that is logged: debug, info, warn\nor error")
	flags.StringVar(&f.logFormat, "log-format", "",
		"log `format`: console, json or journal (default: console on a\n"+
			"terminal, journal under systemd, else json)")
	flags.BoolVar(&f.checkOnly, "check", false,
		"check flags, environment, files and addresses, and exit:\n0 if the server would start")
	flags.StringVar(&f.envFile, "env-file", "",
		"with --check: `file` of variables to check in place of the\nenvironment, such as /etc/default/echod")
	cmd.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	completeValues(cmd, "tls-client-auth", "require", "optional")
	completeValues(cmd, "tls-min-version", "1.2", "1.3")
	completeValues(cmd, "at-limit", settingValues["at-limit"]...)
	completeValues(cmd, "log-level", settingValues["log-level"]...)
	completeValues(cmd, "proxy-protocol", "unix")
	completeValues(cmd, "log-format", "console", "json", "journal")
	return cmd
}

// options returns the server's options. All errors are usage errors.
func (f serveFlags) options(log *zap.Logger) (server.Options, error) {
	opts := server.Options{
		Logger: log,
		Limits: server.Limits{MaxConns: f.maxConns, MaxConnsPerIP: f.maxConnsPerIP, MaxConnsPerUID: f.maxConnsPerUID},
		Timeouts: server.Timeouts{
			Idle: f.idleTimeout, Stall: cmp.Or(f.stallTimeout, server.Off), MaxAge: f.maxConnAge,
		},
		Drain: server.DrainOptions{Grace: cmp.Or(f.grace, server.Off), Delay: f.drainDelay, Spread: f.spread, StopTimeout: f.stopTimeout},
	}
	for _, d := range []struct {
		flag  string
		value time.Duration
	}{
		{"grace", f.grace},
		{"idle-timeout", f.idleTimeout},
		{"stall-timeout", f.stallTimeout},
		{"drain-delay", f.drainDelay},
		{"spread", f.spread},
		{"max-conn-age", f.maxConnAge},
		{"stop-timeout", f.stopTimeout},
		{"upgrade-timeout", f.upgradeTimeout},
		{"upgrade-keep", f.upgradeKeep},
	} {
		if d.value < 0 {
			return opts, usagef("--%s %s: must not be negative", d.flag, d.value)
		}
	}
	for _, n := range []struct {
		flag  string
		value int
	}{{"max-conns", f.maxConns}, {"max-conns-per-ip", f.maxConnsPerIP}, {"max-conns-per-uid", f.maxConnsPerUID}} {
		if n.value < 0 {
			return opts, usagef("--%s %d: must not be negative", n.flag, n.value)
		}
	}
	var err error
	if opts.Limits.AtLimit, err = server.ParseLimitMode(f.atLimit); err != nil {
		return opts, usagef("--at-limit %q: want wait or reject", f.atLimit)
	}
	var access server.Settings
	for _, setting := range []struct{ name, text string }{
		{"max-conn-rate", f.maxConnRate},
		{"max-conn-rate-total", f.maxConnRateTotal},
		{"allow", strings.Join(f.allow, ",")},
		{"deny", strings.Join(f.deny, ",")},
	} {
		if err := access.Set(setting.name, setting.text); err != nil {
			return opts, usagef("--%s %w", setting.name, err)
		}
	}
	opts.Access = access.Access
	opts.Limits.MaxConnRate, opts.Limits.MaxConnRateTotal = access.Limits.MaxConnRate, access.Limits.MaxConnRateTotal
	notice, err := server.ParseLineNotifier(f.notice)
	if err != nil {
		return opts, usagef("--%w", err) // the error begins with "notice"
	}
	opts.Notifier = notice
	trusted, err := parseTrusted(f.proxyProtocol)
	if err != nil {
		return opts, err
	}
	if len(trusted) > 0 {
		opts.WrapConn = readProxyHeaders(trusted)
	}
	if len(f.httpHosts) > 0 && f.http == "" {
		return opts, usagef("--http-host: needs --http")
	}
	for _, name := range f.httpHosts {
		if name == "" || strings.ContainsAny(name, ":/@ ") {
			return opts, usagef("--http-host %q: want a host name without a port", name)
		}
	}
	if f.pprof && f.http == "" {
		return opts, usagef("--pprof: needs --http")
	}
	return opts, nil
}

// socketOptions returns the options of the control socket. All errors are usage errors.
func (f serveFlags) socketOptions() (opts control.SocketOptions, err error) {
	return socketAccess("control", f.controlMode, f.controlGroup)
}

// socketAccess returns the options of a Unix socket whose flags begin with prefix. All errors are usage errors.
func socketAccess(prefix, modeText, groupName string) (opts control.SocketOptions, err error) {
	mode, err := strconv.ParseUint(modeText, 8, 32)
	if err != nil || mode > 0o777 {
		return opts, usagef("--%s-mode %q: want an octal mode such as 0660", prefix, modeText)
	}
	opts.Mode = fs.FileMode(mode)
	if groupName == "" {
		return opts, nil
	}
	gid := groupName
	if group, err := user.LookupGroup(groupName); err == nil {
		gid = group.Gid
	}
	n, err := strconv.Atoi(gid)
	if err != nil || n < 0 {
		return opts, usagef("--%s-group %q: no such group", prefix, groupName)
	}
	opts.GID = &n
	return opts, nil
}

// serveConfig holds the options and certificates that serve needs to open its sockets.
type serveConfig struct {
	server  server.Options
	control control.SocketOptions
	echo    echoOptions
}

// prepare checks all flags except addresses, and loads the certificates. ticketKeys are those of the predecessor.
func (f serveFlags) prepare(ticketKeys []byte, log *zap.Logger) (p serveConfig, err error) {
	if p.server, err = f.options(log); err != nil {
		return p, err
	}
	if p.control, err = f.socketOptions(); err != nil {
		return p, err
	}
	p.control.Logger = log
	if p.echo.unix, err = socketAccess("unix", f.unixMode, f.unixGroup); err != nil {
		return p, err
	}
	p.echo.unix.Name, p.echo.unix.Fixed, p.echo.unix.Logger = "echo socket", true, log
	p.echo.certs, err = f.tls.load(append([]string{f.http}, f.listen...), ticketKeys, log)
	return p, err
}

// serve runs the server until it has stopped.
func serve(cmd *cobra.Command, f serveFlags) (err error) {
	ctx := cmd.Context()
	// Signals are caught before any socket opens, so that a signal starts a drain as soon as there can be clients. Signals
	// that arrive before the run group starts wait in the channel.
	caught := make(chan os.Signal, 16) // signal.Notify drops signals if the channel is full
	notifySignals(caught, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGHUP)
	upgrades := make(chan os.Signal, 1)
	notifyUpgrade(upgrades)
	// Logging to a pipe without a reader must not end the server.
	signal.Ignore(syscall.SIGPIPE)

	taken, err := receiveOffer(ctx)
	if err != nil {
		return err
	}
	defer func() {
		if taken != nil && err != nil {
			taken.offer.Refuse(err)
		}
	}()
	stats := metrics.New(version)
	level, err := parseLevel(f.logLevel)
	if err != nil {
		return err
	}
	log, sink, err := newLogger(level, f.logFormat, stats.LogDropped)
	if err != nil {
		return err
	}
	defer sink.close()
	p, err := f.prepare(taken.ticketKeys(), log)
	if err != nil {
		return err
	}
	p.server.OnClose, p.server.LogLevel = stats.OnClose, &level
	srv, err := server.New(server.Echo, p.server)
	if err != nil {
		return err
	}
	stats.Watch(srv)
	sockets, err := f.openOrTakeOver(ctx, srv, taken, p.control, log, p.echo)
	if err != nil {
		return err
	}
	var predecessor *control.Process
	if taken != nil {
		predecessor = &control.Process{PID: taken.from.PID, Version: taken.from.Version}
	}
	tookOver := taken != nil
	taken = nil // the predecessor has ended; a later error is only this process's
	if err := pidFile(f.pidFile).write(); err != nil {
		if !tookOver {
			sockets.close()
			return err
		}
		log.Error("cannot write the pid file", zap.Error(err)) // not fatal, because clients are connected
	}
	log.Info("starting", zap.String("version", version), zap.Int("pid", os.Getpid()), zap.Duration("grace", f.grace))
	if err := warnUnknownVariables(log, cmd); err != nil {
		return err
	}
	f.logLimitations(log)

	var g run.Group
	g.Add(control.ServerActor(srv, sockets.echo...))

	up := &upgrader{
		srv: srv, log: log, timeout: f.upgradeTimeout, keep: f.upgradeKeep, sockets: sockets, certs: p.echo.certs,
		notify: tellSupervisor,
	}
	signals := control.NewSignals(srv, caught, log, sink.writer(os.Stderr))
	signals.Seen = stats.Signal
	signals.Final = underSystemd() || f.stopTimeout > 0
	signals.PassOn = up.forwardSignal
	handleSignals, stopSignals := signals.Actor()
	g.Add(func() error {
		awaitListening(srv, len(sockets.echo))
		return handleSignals()
	}, stopSignals)

	g.Add(up.actor(upgrades))

	planeOpts := control.Options{
		Version: version, Logger: log, Metrics: stats, OnRequest: stats.Request,
		Upgrade: up.upgrade, Predecessor: predecessor, Hosts: f.httpHosts,
		Fixed: fixedSettings(cmd.Flags(), sockets.echo),
	}
	if name, err := os.Hostname(); err == nil {
		planeOpts.Hosts = append(planeOpts.Hosts, name)
	}
	if certs := p.echo.certs; certs != nil {
		planeOpts.Certificates = certs
		stats.WatchCertificates(certs)
		g.Add(watchActor(srv, certs))
	}
	if f.pprof {
		planeOpts.Debug = profiles()
	}
	probes := []func(context.Context) error{srv.Probe}
	if sockets.control != nil {
		if holds := newHoldsFile(sockets.control.Addr().String(), srv, log); holds != nil {
			if tookOver { // an upgrade keeps the holds
				holds.takeOver()
			} else {
				holds.reportLost()
			}
			planeOpts.LostHolds = holds.lost
			planeOpts.OnRequest = func(route, method string, code int) {
				stats.Request(route, method, code)
				holds.onRequest(route, method, code)
			}
		}
		plane := control.New(srv, planeOpts)
		up.leave = append(up.leave, plane.Leave)
		if tookOver {
			plane.ContinuePauses()
		}
		g.Add(plane.Actor(sockets.control))
		probes = append(probes, plane.Probe)
	}
	if sockets.http != nil {
		if strings.HasPrefix(f.http, tlsScheme) {
			planeOpts.TLSConfig = withoutClientAuth(p.echo.certs.Config())
		}
		web := control.NewWeb(srv, planeOpts)
		up.leave = append(up.leave, web.Leave)
		g.Add(web.Actor(sockets.http))
	}
	if sockets.agent != nil {
		agent := control.NewAgent(srv, sockets.agent, log)
		up.leave = append(up.leave, agent.Leave)
		g.Add(agent.Actor())
	}
	if tookOver {
		tellKeeper(os.Getpid())
		if watchKeeper, stop := keeperActor(srv, log); watchKeeper != nil {
			g.Add(watchKeeper, stop)
		}
	}
	if n := newSDNotifier(srv, log, probes...); n != nil {
		if tookOver {
			n.awaitKnown = awaitSupervisor
		}
		up.leave = append(up.leave, n.stop)
		g.Add(n.actor())
	}

	err = g.Run()
	if !up.handedOver.Load() {
		sockets.removeUnix()
		if err := pidFile(f.pidFile).remove(); err != nil {
			log.Warn("cannot remove the pid file", zap.Error(err))
		}
	}
	if err != nil {
		return err
	}
	if sig := signals.Forced(); sig != nil && !up.handedOver.Load() {
		return &exitError{code: exitSignal + signalNumber(sig)}
	}
	return keepIfUpgraded(caught)
}

// awaitListening waits until the server serves n listeners, for a second at most. A drain that begins earlier could end
// before these listeners' clients are accepted.
func awaitListening(srv *server.Server, n int) {
	for range 1000 {
		if len(srv.Status().Listeners) >= n {
			return
		}
		select {
		case <-time.After(time.Millisecond): // the server does not report single listeners
		case <-srv.Done():
			return
		}
	}
}

// openOrTakeOver opens the sockets that the flags name. If there is a predecessor, it takes over its sockets and
// connections instead.
func (f serveFlags) openOrTakeOver(ctx context.Context, srv *server.Server, taken *receivedOffer,
	opts control.SocketOptions, log *zap.Logger, echo echoOptions,
) (sockets, error) {
	if taken == nil {
		return f.openSockets(ctx, opts, log, echo)
	}
	s, err := taken.sockets(opts, echo)
	if err != nil {
		return s, err
	}
	log.Info("taking over", zap.Int("predecessor", taken.from.PID), zap.String("its_version", taken.from.Version))
	return s, srv.TakeOver(ctx, taken.offer, s.echo)
}

// logLimitations logs features that do not work or are limited in this environment.
func (f serveFlags) logLimitations(log *zap.Logger) {
	if missing := unsupportedFeatures(runtime.GOOS); missing != nil {
		log.Warn("not supported on this platform", zap.Strings("features", missing))
	}
	const end = 2 * time.Second // for the server to stop after the deadline
	if longest := f.drainDelay + f.spread + f.grace + end; f.stopTimeout > 0 && longest > f.stopTimeout {
		then := "the supervisor kills the server during the drain"
		if underSystemd() {
			then = "the server asks systemd for more time"
		}
		log.Warn("a drain can take longer than --stop-timeout", zap.Duration("drain", longest),
			zap.Duration("stop_timeout", f.stopTimeout), zap.String("then", then))
	}
}

// unsupportedFeatures lists the features that echod does not have on the given system.
func unsupportedFeatures(system string) []string {
	const (
		queue   = "the length of the accept queue"
		filter  = "keeping new clients out of the accept queue during a drain"
		callers = "the uid and pid of control clients"
		modes   = "the mode and group of the control socket"
	)
	switch system {
	case "linux":
		return nil
	case "darwin":
		return []string{queue, filter}
	case "windows":
		return []string{queue, filter, callers, modes}
	default:
		return []string{queue, filter, callers}
	}
}
