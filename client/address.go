package client

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"path"
	"path/filepath"
	"strings"
	"time"
)

// addressForms lists the accepted forms, for error messages.
const addressForms = "want host:port, tcp://host:port, tls://host:port or unix:///path"

// An Address is the parsed form of a server's address.
type Address struct {
	Network string // "tcp" or "unix"
	Addr    string // host:port, or the path of a Unix socket
	TLS     bool   // use TLS; only with Network "tcp"
}

// ParseAddress parses an address in one of the forms host:port, tcp://host:port,
// tls://host:port and unix:///path. An empty host means the local host. On
// Windows a path may begin with a drive, as in unix:///C:/path. The error is a
// [*net.AddrError] that names the address and the accepted forms.
func ParseAddress(address string) (Address, error) {
	invalid := func(problem string) (Address, error) {
		return Address{}, &net.AddrError{Err: problem + "; " + addressForms, Addr: address}
	}
	scheme, rest, found := strings.Cut(address, "://")
	if !found {
		scheme, rest = "tcp", address
	}
	switch scheme {
	case "unix":
		if !strings.HasPrefix(rest, "/") || path.Clean(rest) == "/" {
			return invalid("the path of a Unix socket must be absolute")
		}
		if filepath.VolumeName(rest[1:]) != "" { // /C:/dir/s on Windows, as in file: URLs
			rest = rest[1:]
		}
		return Address{Network: "unix", Addr: rest}, nil
	case "tcp", "tls":
		_, port, err := net.SplitHostPort(rest)
		if err != nil {
			problem := err.Error()
			if addrErr, ok := errors.AsType[*net.AddrError](err); ok {
				problem = addrErr.Err
			}
			return invalid(problem)
		}
		if port == "" {
			return invalid("missing port in address")
		}
		if _, err := net.LookupPort("tcp", port); err != nil {
			return invalid(fmt.Sprintf("invalid port %q", port))
		}
		return Address{Network: "tcp", Addr: rest, TLS: scheme == "tls"}, nil
	default:
		return invalid(fmt.Sprintf("unknown scheme %q", scheme))
	}
}

// DialConn connects to a server and returns the bare connection, which does not
// tell notices from echoes. For a tls:// address it completes the handshake, and
// the connection is a [*tls.Conn]. A nil config means to verify the server
// against the system's roots. If config.ServerName is empty, the host of the
// address is used. If the context ends first, the error is its cause.
func DialConn(ctx context.Context, address string, config *tls.Config) (net.Conn, error) {
	a, err := ParseAddress(address)
	if err != nil {
		return nil, err
	}
	var conn net.Conn
	if a.TLS {
		if host, _, _ := net.SplitHostPort(a.Addr); host == "" && (config == nil || config.ServerName == "") {
			config = cmp.Or(config, &tls.Config{}).Clone()
			config.ServerName = "localhost"
		}
		conn, err = (&tls.Dialer{Config: config}).DialContext(ctx, a.Network, a.Addr)
	} else {
		conn, err = new(net.Dialer).DialContext(ctx, a.Network, a.Addr)
	}
	if err != nil {
		return nil, contextCauseOr(ctx, err)
	}
	return conn, nil
}

// contextCauseOr returns the cause of ctx if it has ended, and err otherwise.
func contextCauseOr(ctx context.Context, err error) error {
	// The net package watches the deadline with a timer of its own, which may fire
	// an instant before ctx ends.
	if deadline, ok := ctx.Deadline(); ok && !time.Now().Before(deadline) {
		<-ctx.Done()
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// dialEcho connects with dial, or with DialConn if dial is nil.
func dialEcho(
	ctx context.Context, address string, dial DialFunc, config *tls.Config, onNotice func(Notice),
) (*echoConn, error) {
	var conn net.Conn
	var err error
	if dial != nil {
		conn, err = dial(ctx, address)
	} else {
		conn, err = DialConn(ctx, address, config)
	}
	if err != nil {
		err = contextCauseOr(ctx, err)
		if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "dial" {
			err = op.Err // without the address, which is in the message below
		}
		if a, ok := errors.AsType[*net.AddrError](err); ok && a.Addr == address {
			return nil, a // names the address itself
		}
		return nil, fmt.Errorf("connect to %s: %w", address, err)
	}
	return newEchoConn(conn, onNotice), nil
}

// isPermanent reports whether dialing again cannot help: the address is malformed,
// or the server's certificate is not trusted.
func isPermanent(err error) bool {
	if _, ok := errors.AsType[*net.AddrError](err); ok {
		return true
	}
	_, ok := errors.AsType[*tls.CertificateVerificationError](err)
	return ok
}
