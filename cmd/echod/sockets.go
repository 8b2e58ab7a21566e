package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
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
// the default address and the default control socket. Other addresses are served on as well; there can be only one control
// socket, so that another --control is an error.
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
	case s.control != nil && f.control != "" && f.control != s.control.Addr().String():
		return s, fmt.Errorf("--control %s: systemd has handed over a control socket, %s: leave out one of the two", f.control, s.control.Addr())
	case s.control != nil:
		log.Info("control socket open", zap.Stringer("path", s.control.Addr()))
	case f.control != "off":
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
	full := address
	if !strings.Contains(address, ":") {
		full = ":" + address
	}
	host, port, err := net.SplitHostPort(full)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
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
