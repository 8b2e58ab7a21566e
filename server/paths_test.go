package server

import (
	"crypto/tls"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"
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
		ln := listen(t)
		s, _ := newServer(t, h, Options{})
		serveListener(t, s, Listener{Listener: ln, TLSConfig: forServer})
		return s, func() stream { return dialTLS(t, ln.Addr(), forClient) }
	}},
	{"TLS of the listener's own", func(t *testing.T, h Handler) (*Server, func() stream) {
		forServer, forClient := tlsConfigs(t)
		ln := listen(t)
		s, _ := newServer(t, h, Options{})
		serve(t, s, tls.NewListener(ln, forServer))
		return s, func() stream { return dialTLS(t, ln.Addr(), forClient) }
	}},
}

func init() {
	if runtime.GOOS == "windows" {
		return // its Unix sockets have no half-close that Go offers
	}
	paths = append(paths, path{"Unix", func(t *testing.T, h Handler) (*Server, func() stream) {
		ln := listenUnix(t)
		s, _ := newServer(t, h, Options{})
		serve(t, s, ln)
		return s, func() stream { return dialUnix(t, ln.Addr()) }
	}})
}

// listenUnix listens on a Unix socket in a directory of its own, whose name is short enough for one.
func listenUnix(t testing.TB) net.Listener {
	t.Helper()
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	ln, err := Listen(t.Context(), "unix://"+filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln
}

func dialUnix(t testing.TB, addr net.Addr) *net.UnixConn {
	t.Helper()
	nc, err := net.Dial("unix", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	_ = nc.SetDeadline(time.Now().Add(30 * time.Second))
	return nc.(*net.UnixConn)
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
