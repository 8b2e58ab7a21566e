package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/coreos/go-systemd/v22/activation"
	"go.uber.org/zap"

	"echod/client"
	"echod/control"
	"echod/server"
)

// sockets are all sockets that the server listens on.
type sockets struct {
	echo    []server.Listener
	control net.Listener   // nil with --control off
	http    net.Listener   // nil without --http
	agent   net.Listener   // nil without --agent-check
	unix    []net.Listener // those of echo that are Unix sockets; closing them removes their files
}

// echoOptions says how echo listeners are opened.
type echoOptions struct {
	certs *server.Certificates // nil if no address needs them
	unix  control.SocketOptions
}

// removeUnix removes the files of the Unix sockets of echo.
func (s sockets) removeUnix() {
	for _, ln := range s.unix {
		_ = ln.Close()
	}
}

// openSockets opens the sockets that the flags ask for, and takes those that systemd passes. These replace the
// default address and the default control socket. Addresses given with --listen are served as well. There
// is only one control socket, so that a different --control is an error.
//
// The echo listeners are opened last: once a client can connect, nothing delays the start.
func (f serveFlags) openSockets(ctx context.Context, opts control.SocketOptions, log *zap.Logger,
	echo echoOptions,
) (s sockets, err error) {
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if err := f.checkUnopened(); err != nil {
		return s, err
	}
	if s, err = inheritSockets(); err != nil {
		return s, err
	}
	switch {
	case s.control != nil && f.control != "" && f.control != s.control.Addr().String():
		return s, fmt.Errorf("--control %s: systemd passes another control socket, %s: use only one of them",
			f.control, s.control.Addr())
	case s.control != nil:
		log.Info("control socket open", zap.Stringer("path", s.control.Addr()))
	case f.control != "off":
		if s.control, err = listenControl(ctx, f.control, opts, log); err != nil {
			return s, err
		}
	}
	if f.http != "" {
		if s.http, err = listenHTTP(ctx, f.http, log); err != nil {
			return s, err
		}
	}
	if f.agentCheck != "" {
		if s.agent, err = listenAgent(ctx, f.agentCheck, log); err != nil {
			return s, err
		}
	}
	if len(s.echo) == 0 && !f.listenGiven && underSystemd() {
		log.Warn("systemd passes no socket; listening on the default address", zap.Strings("addresses", f.listen))
	}
	if len(s.echo) == 0 || f.listenGiven {
		if err := s.listenEcho(ctx, f.listen, echo); err != nil {
			return s, err
		}
	}
	return s, nil
}

// checkUnopened checks what can be checked before anything is opened: the form of all addresses, that they differ, and
// the pid file. It does not count the default address, which sockets of systemd replace.
func (f serveFlags) checkUnopened() error {
	var taken []claim
	add := func(flag, value, address string) error {
		next := claim{flag, value, address}
		for _, c := range taken {
			if next.overlaps(c) {
				return fmt.Errorf("--%s %s: --%s %s has this address already", flag, value, c.flag, c.value)
			}
		}
		taken = append(taken, next)
		return nil
	}
	if f.http != "" {
		full, _, err := httpAddress(f.http)
		if err != nil {
			return err
		}
		if err := add("http", f.http, full); err != nil {
			return err
		}
	}
	if f.agentCheck != "" {
		full, err := agentAddress(f.agentCheck)
		if err != nil {
			return err
		}
		if err := add("agent-check", f.agentCheck, full); err != nil {
			return err
		}
	}
	for _, address := range f.listen {
		a, err := parseEchoAddress(address)
		if err != nil {
			return err
		}
		if f.listenGiven {
			if err := add("listen", address, cmp.Or(a.path, a.hostPort)); err != nil {
				return err
			}
		}
	}
	return pidFile(f.pidFile).check()
}

// A claim is an address that a flag asks for: host:port, or the path of a Unix socket.
type claim struct{ flag, value, address string }

// overlaps reports whether the second listener would fail because of the first.
func (c claim) overlaps(other claim) bool {
	if c.address == other.address {
		return !strings.HasSuffix(c.address, ":0")
	}
	host, port, err := net.SplitHostPort(c.address)
	otherHost, otherPort, otherErr := net.SplitHostPort(other.address)
	if err != nil || otherErr != nil || port != otherPort || port == "0" {
		return false
	}
	hosts := []string{cmp.Or(host, "::"), cmp.Or(otherHost, "::")}
	slices.Sort(hosts)
	switch {
	case hosts[0] == hosts[1]:
		return true
	case runtime.GOOS != "linux":
		return false // an address and all addresses can be used side by side
	case slices.Equal(hosts, []string{"0.0.0.0", "::"}):
		return c.flag != "listen" || other.flag != "listen" || host == "" || otherHost == "" // see listenEcho
	default:
		return slices.Contains(hosts, "::") || hosts[0] == "0.0.0.0" && !strings.Contains(hosts[1], ":")
	}
}

func (s sockets) close() {
	for _, ln := range s.echo {
		_ = ln.Close()
	}
	s.removeUnix()
	for _, ln := range []net.Listener{s.control, s.http, s.agent} {
		if ln != nil {
			_ = ln.Close()
		}
	}
}

// Names of the sockets that systemd passes (FileDescriptorName=).
const (
	echoSocket    = "echo" // may be several
	controlSocket = "control"
)

// inheritSockets returns the sockets that systemd passes; see sd_listen_fds(3). A socket with an unknown name is an
// error, because nothing would serve it.
func inheritSockets() (s sockets, err error) {
	byName, err := activation.ListenersWithNames()
	if err != nil {
		return s, fmt.Errorf("inheriting sockets from systemd: %w", err)
	}
	for name, listeners := range byName {
		for _, ln := range listeners {
			switch {
			case ln == nil:
				err = fmt.Errorf("systemd socket %q: not a listening stream socket", name)
			case name == echoSocket:
				s.echo = append(s.echo, server.Listener{Listener: ln, Inherited: true, EmptyQueue: true})
			case name == controlSocket && s.control == nil && ln.Addr().Network() == "unix":
				s.control = ln
			case name == controlSocket:
				err = fmt.Errorf("systemd socket %q, %s: want a single Unix socket", name, ln.Addr())
			default:
				err = fmt.Errorf("systemd socket %q, %s: want FileDescriptorName=%s or %s",
					name, ln.Addr(), echoSocket, controlSocket)
			}
		}
	}
	if err != nil {
		s.close()
	}
	return s, err
}

// echoAddress is an address of --listen.
type echoAddress struct {
	path     string // of a Unix socket
	hostPort string
	tls      bool
}

// parseEchoAddress parses an address of --listen. All errors are usage errors.
func parseEchoAddress(address string) (a echoAddress, err error) {
	if strings.HasPrefix(address, unixScheme) {
		parsed, err := client.ParseAddress(address)
		if err != nil {
			return a, usagef("--listen %s: want an absolute path, as in unix:///run/echod/echo.sock", address)
		}
		return echoAddress{path: parsed.Addr}, nil
	}
	a.hostPort, a.tls = strings.CutPrefix(address, tlsScheme)
	a.hostPort = strings.TrimPrefix(a.hostPort, "tcp://")
	_, port, err := net.SplitHostPort(a.hostPort)
	if err != nil || port == "" || strings.Contains(a.hostPort, "://") {
		return a, usagef("--listen %q: want an address such as 127.0.0.1:9999, :9999 or [::1]:9999, %s:9998 or %s/path",
			address, tlsScheme, unixScheme)
	}
	return a, nil
}

// listenEcho listens on all addresses. If 0.0.0.0 and [::] are given with the same port, the latter is for IPv6
// only, and otherwise for both.
func (s *sockets) listenEcho(ctx context.Context, addresses []string, opts echoOptions) error {
	for _, address := range addresses {
		a, err := parseEchoAddress(address)
		if err != nil {
			return err
		}
		if a.path != "" {
			if err := s.listenUnix(ctx, a.path, opts.unix); err != nil {
				return err
			}
			continue
		}
		listener := server.Listener{}
		if a.tls {
			listener.TLSConfig = opts.certs.Config()
		}
		host, port, _ := net.SplitHostPort(a.hostPort) // parseEchoAddress has checked it
		if host == "::" && slices.Contains(addresses, "0.0.0.0:"+port) {
			var lc net.ListenConfig
			lc.SetMultipathTCP(false) // as server.Listen does
			listener.Listener, err = lc.Listen(ctx, "tcp6", a.hostPort)
		} else {
			listener.Listener, err = server.Listen(ctx, a.hostPort)
		}
		if err != nil {
			return fmt.Errorf("--listen %s: %w", address, withoutAddress(err))
		}
		s.echo = append(s.echo, listener)
	}
	return nil
}

// httpAddress returns the address of --http, and whether it is served over TLS. A port alone is on the loopback
// interface; an address means the same as for --listen.
func httpAddress(address string) (hostPort string, isTLS bool, err error) {
	full, isTLS := strings.CutPrefix(address, tlsScheme)
	full = strings.TrimPrefix(full, "tcp://")
	if !strings.Contains(full, ":") {
		full = "127.0.0.1:" + full
	}
	_, port, err := net.SplitHostPort(full)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return "", false, usagef("--http %q: want a port such as 9090, or an address such as :9090 or %s:9090", address, tlsScheme)
	}
	return full, isTLS, nil
}

// listenHTTP listens for probes and Prometheus.
func listenHTTP(ctx context.Context, address string, log *zap.Logger) (net.Listener, error) {
	full, isTLS, err := httpAddress(address)
	if err != nil {
		return nil, err
	}
	ln, err := server.Listen(ctx, full)
	if err != nil {
		return nil, fmt.Errorf("--http %s: %w", address, withoutAddress(err))
	}
	log.Info("http open", zap.Stringer("address", ln.Addr()), zap.Bool("tls", isTLS))
	return ln, nil
}

// agentAddress returns the address of --agent-check. A port alone is on the loopback interface.
func agentAddress(address string) (hostPort string, err error) {
	full, isTLS, err := httpAddress(address)
	if err != nil || isTLS {
		return "", usagef("--agent-check %q: want a port such as 9300, or an address such as :9300", address)
	}
	return full, nil
}

// listenAgent listens for HAProxy's agent checks.
func listenAgent(ctx context.Context, address string, log *zap.Logger) (net.Listener, error) {
	full, err := agentAddress(address)
	if err != nil {
		return nil, err
	}
	ln, err := server.Listen(ctx, full)
	if err != nil {
		return nil, fmt.Errorf("--agent-check %s: %w", address, withoutAddress(err))
	}
	log.Info("agent check open", zap.Stringer("address", ln.Addr()))
	return ln, nil
}

// listenControl opens the control socket. With an empty path it uses the default; the listener is nil if
// there is none.
func listenControl(
	ctx context.Context, path string, opts control.SocketOptions, log *zap.Logger,
) (ln net.Listener, err error) {
	if path == "" {
		ln, path, err = listenDefault(ctx, opts, log)
	} else {
		ln, err = control.Listen(ctx, path, opts)
	}
	if errors.Is(err, control.ErrInUse) {
		return nil, fmt.Errorf("%w: give this server another --control, or --control off", err)
	}
	if ln != nil && err == nil {
		log.Info("control socket open", zap.String("path", path))
	}
	return ln, err
}

// withoutAddress removes the operation and the address that package net adds to an error, because the caller's message
// has the address.
func withoutAddress(err error) error {
	if oe, ok := errors.AsType[*net.OpError](err); ok {
		err = oe.Err
	}
	if se, ok := errors.AsType[*os.SyscallError](err); ok {
		err = se.Err
	}
	return err
}
