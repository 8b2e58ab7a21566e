package server

import (
	"context"
	"crypto/tls"
	"fmt"
	"iter"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// A Listener is a net.Listener with the options for its connections.
type Listener struct {
	net.Listener
	// Handler serves the connections. Nil means the server's handler.
	Handler Handler
	// WrapConn prepares the connections. Nil means Options.WrapConn.
	WrapConn WrapConn
	// TLSConfig makes the server perform a TLS handshake on each connection, after WrapConn, so that a PROXY header
	// comes before TLS. Nil means no TLS. The configuration must not be modified after that.
	TLSConfig *tls.Config
	// Inherited means that another process, such as systemd, has the listener's socket, too. A drain then only stops
	// accepting. It does not change the socket, and leaves the clients in the accept queue to the successor. Accepted
	// connections keep the keepalive and TCP_NODELAY settings of the socket.
	Inherited bool
	// EmptyQueue makes a drain of an inherited listener serve the clients that are in the accept queue when it
	// begins. Use it if there may be no successor, because the kernel resets clients in the queue when the last process
	// closes the socket. The drain leaves later clients to the successor.
	EmptyQueue bool
}

// Addr returns the listener's address. It is never nil, even if that of the net.Listener is.
func (l Listener) Addr() net.Addr { return knownAddr(l.Listener.Addr()) }

// knownAddr returns addr, or a placeholder if addr is nil. Listeners and connections of other packages may have no address.
func knownAddr(addr net.Addr) net.Addr {
	if addr == nil {
		return unknownAddr{}
	}
	return addr
}

type unknownAddr struct{}

func (unknownAddr) Network() string { return "unknown" }
func (unknownAddr) String() string  { return "unknown" }

// ListenConfig opens listeners for a server. The zero value is ready to use.
type ListenConfig struct {
	// Backlog is the length of the accept queue. Zero means the system's maximum. It needs a unix system.
	Backlog int
	// KeepAlive configures TCP keepalive for accepted connections. The zero value means Go's defaults.
	KeepAlive net.KeepAliveConfig
}

// Listen opens a listener with the zero ListenConfig.
func Listen(ctx context.Context, address string) (net.Listener, error) {
	return ListenConfig{}.Listen(ctx, address)
}

// Listen opens a listener at address: host:port or tcp://host:port for TCP, or unix:///path for a Unix socket. The
// host 0.0.0.0 means all IPv4 addresses. An empty host or [::] means all IPv4 and IPv6 addresses. Unlike net.Listen it
// does not use Multipath TCP, because a drain cannot stop new handshakes on such a listener while it empties the accept
// queue. On Windows the path of a Unix socket may begin with a drive, as in unix:///C:/path. Serve takes listeners of
// any kind.
func (lc ListenConfig) Listen(ctx context.Context, address string) (net.Listener, error) {
	network, addr, err := splitAddress(address)
	if err != nil {
		return nil, err
	}
	config := net.ListenConfig{KeepAliveConfig: lc.KeepAlive}
	if lc.KeepAlive != (net.KeepAliveConfig{}) && !lc.KeepAlive.Enable {
		config.KeepAlive = -1
	}
	config.SetMultipathTCP(false)
	config.Control = func(network, _ string, raw syscall.RawConn) error {
		if network != "unix" { // before listen(2), so that it applies to every client
			keepUrgentInline(raw)
		}
		return nil
	}
	if ctx.Err() != nil { // package net may ignore ctx for a host that needs no DNS
		return nil, fmt.Errorf("listening on %s: %w", address, context.Cause(ctx))
	}
	ln, err := config.Listen(ctx, network, addr)
	if err != nil {
		return nil, fmt.Errorf("listening on %s: %w", address, err)
	}
	if lc.Backlog > 0 {
		if err := setBacklog(ln, lc.Backlog); err != nil {
			_ = ln.Close()
			return nil, fmt.Errorf("listening on %s: setting the backlog: %w", address, err)
		}
	}
	return ln, nil
}

func splitAddress(address string) (network, addr string, err error) {
	scheme, rest, ok := strings.Cut(address, "://")
	switch {
	case !ok:
		return tcpNetwork(address), address, nil
	case scheme == "tcp":
		return tcpNetwork(rest), rest, nil
	case scheme == "unix" && strings.HasPrefix(rest, "/"):
		if filepath.VolumeName(rest[1:]) != "" { // /C:/dir/s on Windows, as in file: URLs
			rest = rest[1:]
		}
		return "unix", rest, nil
	default:
		return "", "", fmt.Errorf("address %q: want host:port, tcp://host:port or unix:///path", address)
	}
}

// tcpNetwork returns the network for an address. For 0.0.0.0 and the network tcp, package net would also listen on IPv6.
func tcpNetwork(addr string) string {
	if strings.HasPrefix(addr, "0.0.0.0:") {
		return "tcp4"
	}
	return "tcp"
}

// An acceptSource is a listener whose accept can be interrupted.
type acceptSource interface {
	// accept returns os.ErrDeadlineExceeded when it is or was interrupted.
	accept() (net.Conn, error)
	// acceptWithin is like accept, but returns os.ErrDeadlineExceeded after d. interrupt must not be called after it.
	acceptWithin(d time.Duration) (net.Conn, error)
	// interrupt makes accept return, also if it is called later, until resume. Both are called under the same lock.
	interrupt()
	resume()
	// close closes the listener, and returns connections that were accepted before that.
	close() iter.Seq[net.Conn]
}

func newSource(ln net.Listener) acceptSource {
	if d, ok := ln.(deadlineListener); ok {
		return deadlineSource{d}
	}
	p := &pumpSource{
		ln: ln, accepted: make(chan acceptResult), interrupts: make(chan struct{}, 1),
		closing: make(chan struct{}),
	}
	go p.pump()
	return p
}

type deadlineListener interface {
	net.Listener
	SetDeadline(t time.Time) error
}

// aLongTimeAgo is a deadline that makes a blocked call return at once.
var aLongTimeAgo = time.Unix(1, 0)

// deadlineSource interrupts accept with the listener's deadline.
type deadlineSource struct{ ln deadlineListener }

func (s deadlineSource) accept() (net.Conn, error) { return s.ln.Accept() }

func (s deadlineSource) acceptWithin(d time.Duration) (net.Conn, error) {
	_ = s.ln.SetDeadline(time.Now().Add(d))
	return s.ln.Accept()
}

func (s deadlineSource) interrupt() { _ = s.ln.SetDeadline(aLongTimeAgo) }
func (s deadlineSource) resume()    { _ = s.ln.SetDeadline(time.Time{}) }

func (s deadlineSource) close() iter.Seq[net.Conn] {
	_ = s.ln.Close()
	return func(func(net.Conn) bool) {}
}

// pumpSource accepts on a goroutine of its own, for listeners that only Close interrupts, such as tls.NewListener's.
// It accepts at most one connection ahead. The goroutine ends when the listener is closed, and close waits for it.
type pumpSource struct {
	ln         net.Listener
	accepted   chan acceptResult
	interrupts chan struct{} // holds a token while interrupted
	closing    chan struct{}
}

type acceptResult struct {
	nc  net.Conn
	err error
}

func (p *pumpSource) pump() {
	defer close(p.accepted)
	for {
		nc, err := p.ln.Accept()
		p.accepted <- acceptResult{nc, err}
		select {
		case <-p.closing:
			if err != nil {
				return
			}
		default:
		}
	}
}

func (p *pumpSource) accept() (net.Conn, error) {
	select {
	case <-p.interrupts:
		return nil, os.ErrDeadlineExceeded
	case r := <-p.accepted:
		return r.nc, r.err
	}
}

func (p *pumpSource) acceptWithin(d time.Duration) (net.Conn, error) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil, os.ErrDeadlineExceeded
	case r := <-p.accepted:
		return r.nc, r.err
	}
}

func (p *pumpSource) interrupt() {
	select {
	case p.interrupts <- struct{}{}:
	default:
	}
}

func (p *pumpSource) resume() {
	select {
	case <-p.interrupts:
	default:
	}
}

func (p *pumpSource) close() iter.Seq[net.Conn] {
	close(p.closing)
	_ = p.ln.Close()
	return func(yield func(net.Conn) bool) {
		for r := range p.accepted {
			if r.nc != nil && !yield(r.nc) {
				return
			}
		}
	}
}
