package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"

	"go.uber.org/zap"

	"echod/control"
	"echod/server"
)

// sockets are all that the server listens on.
type sockets struct {
	echo    []net.Listener
	control net.Listener // nil without a control plane
	http    net.Listener // nil without --http
}

// open opens what the flags ask for, and takes over what systemd has opened: that is served on instead of
// the default address and the default control socket.
func (f serveFlags) open(ctx context.Context, access control.SocketOptions, log *zap.Logger) (s sockets, err error) {
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	in, err := inheritSockets()
	if err != nil {
		return s, err
	}
	s.echo, s.control = in.echo, in.control
	if len(in.echo) == 0 || f.listenGiven {
		more, err := listen(ctx, f.listen)
		if err != nil {
			return s, err
		}
		s.echo = append(s.echo, more...)
	}
	switch {
	case f.control == "off" && s.control != nil:
		return s, errors.New("--control off: systemd has handed over a control socket: leave it out of the socket unit")
	case f.control != "off" && s.control == nil:
		if s.control, err = listenControl(ctx, f.control, access, log); err != nil {
			return s, err
		}
	}
	if f.http != "" {
		s.http, err = listenHTTP(ctx, f.http, log)
	}
	return s, err
}

func (s sockets) close() {
	closeAll(s.echo)
	for _, ln := range []net.Listener{s.control, s.http} {
		if ln != nil {
			_ = ln.Close()
		}
	}
}

// listenHTTP listens for probes and Prometheus: on this machine alone, unless an address says otherwise.
func listenHTTP(ctx context.Context, address string, log *zap.Logger) (net.Listener, error) {
	if !strings.Contains(address, ":") {
		address = ":" + address
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil || port == "" {
		return nil, usagef("--http %q: want a port such as 9090, or an address such as 0.0.0.0:9090", address)
	}
	if host == "" {
		host = "127.0.0.1"
	}
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", net.JoinHostPort(host, port))
	if err != nil {
		return nil, fmt.Errorf("--http %s: %w", address, plain(err))
	}
	log.Info("http open", zap.Stringer("address", ln.Addr()))
	return ln, nil
}

// alive makes the proof for the watchdog: the server's own, and that the control plane answers.
func alive(srv *server.Server, plane net.Listener) func(context.Context) error {
	var client *http.Client
	if plane != nil {
		client = &http.Client{Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, plane.Addr().Network(), plane.Addr().String())
			},
		}}
	}
	return func(ctx context.Context) error {
		if err := srv.Probe(ctx); err != nil || client == nil {
			return err
		}
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://echod/v1/status", nil)
		if err != nil {
			return err
		}
		answer, err := client.Do(request)
		if err != nil {
			return fmt.Errorf("asking the control plane: %w", err)
		}
		defer answer.Body.Close()
		if answer.StatusCode != http.StatusOK {
			return fmt.Errorf("asking the control plane: %s", answer.Status)
		}
		return nil
	}
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
