package server

import (
	"crypto/tls"
	"net"
	"testing"
)

// stream is a client's end of a connection.
type stream interface {
	net.Conn
	CloseWrite() error
}

// A path is one of the ways that bytes take through WriteTo.
type path struct {
	name string
	// serve starts a server with a handler, and returns it with what connects a client.
	serve func(t *testing.T, h Handler) (*Server, func() stream)
}

var paths = []path{
	{"TCP", func(t *testing.T, h Handler) (*Server, func() stream) {
		s, address := serveTCP(t, h, Options{})
		return s, func() stream { return dialTCP(t, address) }
	}},
	{"wrapped", func(t *testing.T, h Handler) (*Server, func() stream) {
		ln := listen(t)
		s, _ := newServer(t, h, Options{})
		serve(t, s, wrappingListener{ln})
		return s, func() stream { return dialTCP(t, ln.Addr()) }
	}},
	{"TLS", func(t *testing.T, h Handler) (*Server, func() stream) {
		forServer, forClient := tlsConfigs(t)
		forClient.ServerName = "127.0.0.1"
		ln := listen(t)
		s, _ := newServer(t, h, Options{})
		serve(t, s, tls.NewListener(ln, forServer))
		return s, func() stream { return tls.Client(dialTCP(t, ln.Addr()), forClient) }
	}},
}

// wrappingListener accepts connections that a program has put something of its own around.
type wrappingListener struct{ net.Listener }

type wrappedConn struct{ *net.TCPConn }

func (l wrappingListener) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return wrappedConn{nc.(*net.TCPConn)}, nil
}

// onEachPath runs f for each path.
func onEachPath(t *testing.T, f func(t *testing.T, serve func(h Handler) (*Server, func() stream))) {
	t.Helper()
	for _, p := range paths {
		t.Run(p.name, func(t *testing.T) {
			f(t, func(h Handler) (*Server, func() stream) { return p.serve(t, h) })
		})
	}
}
