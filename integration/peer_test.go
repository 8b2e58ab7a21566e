//go:build unix

package integration

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// peer is a client of a test. Its methods return errors, so that many clients can run concurrently.
type peer struct {
	peerConn
	in *bufio.Reader
}

// peerConn is a *net.TCPConn, a *net.UnixConn or a *tlsPeer.
type peerConn interface {
	net.Conn
	CloseWrite() error
}

// connect connects a peer over TCP whose reads and writes have a deadline.
func connect(addr string) (*peer, error) { return connectOver("tcp", addr, patience) }

// aMoment is a short timeout to connect to a server that may have stopped listening: at the start of a drain the kernel
// drops SYNs, and a client sends a dropped SYN again only after a second.
const aMoment = 300 * time.Millisecond

func connectSoon(addr string) (*peer, error) { return connectOver("tcp", addr, aMoment) }

func connectOver(network, addr string, timeout time.Duration) (*peer, error) {
	nc, err := net.DialTimeout(network, addr, timeout)
	if err != nil {
		return nil, err
	}
	return newPeer(nc.(peerConn))
}

func newPeer(nc peerConn) (*peer, error) {
	return &peer{peerConn: nc, in: bufio.NewReader(nc)}, nc.SetDeadline(time.Now().Add(patience))
}

// tlsPeer is a TLS client. A FIN without close_notify is an error. As with TCP, the first write does not wait for the
// server: it does the handshake in a goroutine, which ends with the connection.
type tlsPeer struct {
	*tls.Conn
	tcp   *net.TCPConn
	first chan error // of the first write; nil before it
	err   error      // of the first write, once it is over
}

func connectTLS(addr string, roots *x509.CertPool, timeout time.Duration) (*peer, error) {
	nc, err := net.DialTimeout("tcp", addr, timeout)
	if err != nil {
		return nil, err
	}
	return newPeer(overTLS(nc.(*net.TCPConn), roots))
}

func overTLS(nc *net.TCPConn, roots *x509.CertPool) *tlsPeer {
	return &tlsPeer{Conn: tls.Client(finIsError{nc}, &tls.Config{RootCAs: roots, ServerName: "localhost"}), tcp: nc}
}

// finIsError makes an error of a FIN, so that a TLS client sees io.EOF only after a close_notify.
type finIsError struct{ net.Conn }

// Read reads from the connection.
func (c finIsError) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err == io.EOF {
		err = errors.New("a FIN without close_notify")
	}
	return n, err
}

// Write writes b.
func (p *tlsPeer) Write(b []byte) (int, error) {
	if p.first == nil {
		p.first = make(chan error, 1)
		b = bytes.Clone(b)
		go func() {
			_, err := p.Conn.Write(b)
			p.first <- err
			close(p.first)
		}()
		return len(b), nil
	}
	if err := p.awaitFirst(); err != nil {
		return 0, err
	}
	return p.Conn.Write(b)
}

// CloseWrite sends close_notify.
func (p *tlsPeer) CloseWrite() error {
	if err := p.awaitFirst(); err != nil {
		return err
	}
	if err := p.Handshake(); err != nil {
		return err
	}
	return p.Conn.CloseWrite()
}

func (p *tlsPeer) awaitFirst() error {
	if p.first != nil && p.err == nil {
		p.err = <-p.first // nil once it is closed
	}
	return p.err
}

// A transport is how the clients of a test reach the server.
type transport struct {
	name string
	// listen returns the flags of a server, and what connects a client to it.
	listen func(t testing.TB) (flags []string, connect func(e *echod, timeout time.Duration) (*peer, error))
}

var transports = []transport{transportTCP, transportTLS, transportUnix}

var (
	transportTCP = transport{"TCP", func(testing.TB) ([]string, func(*echod, time.Duration) (*peer, error)) {
		return []string{"--listen", "127.0.0.1:0"}, func(e *echod, timeout time.Duration) (*peer, error) {
			return connectOver("tcp", e.addr, timeout)
		}
	}}
	transportTLS = transport{"TLS", func(t testing.TB) ([]string, func(*echod, time.Duration) (*peer, error)) {
		flags, roots := tlsFlags(t, t.TempDir())
		return append(flags, "--listen", "tls://127.0.0.1:0"), func(e *echod, timeout time.Duration) (*peer, error) {
			return connectTLS(e.addr, roots, timeout)
		}
	}}
	transportUnix = transport{"a Unix socket", func(t testing.TB) ([]string, func(*echod, time.Duration) (*peer, error)) {
		path := filepath.Join(shortDir(t), "echo")
		return []string{"--listen", "unix://" + path}, func(_ *echod, timeout time.Duration) (*peer, error) {
			return connectOver("unix", path, timeout)
		}
	}}
)

// start starts a server that clients reach over tr.
func (tr transport) start(t testing.TB, flags ...string) *echod { return tr.startAs(t, nil, flags...) }

func (tr transport) startAs(t testing.TB, wrapper []string, flags ...string) *echod {
	t.Helper()
	return tr.startWith(t, func(flags ...string) *echod { return startAs(t, wrapper, flags...) }, flags...)
}

func (tr transport) startEmbedding(t testing.TB, flags ...string) *echod {
	t.Helper()
	return tr.startWith(t, func(flags ...string) *echod { return startEmbedding(t, flags...) }, flags...)
}

func (tr transport) startWith(t testing.TB, start func(flags ...string) *echod, flags ...string) *echod {
	t.Helper()
	more, connect := tr.listen(t)
	e := start(append(flags, more...)...)
	e.connectWithin = func(timeout time.Duration) (*peer, error) { return connect(e, timeout) }
	return e
}

// overEach runs a subtest with clients that come over TCP, and the slow tests with TLS and with a Unix socket.
func overEach(t *testing.T, f func(t *testing.T, over transport)) {
	t.Helper()
	overSome(t, transports, f)
}

// overSome is overEach for a test that makes no sense over the other transports.
func overSome(t *testing.T, some []transport, f func(t *testing.T, over transport)) {
	t.Helper()
	for _, tr := range some {
		t.Run("over "+tr.name, func(t *testing.T) {
			if tr.name != transportTCP.name {
				slow(t)
			}
			f(t, tr)
		})
	}
}

// connect connects a peer to the server's first listener.
func (e *echod) connect() (*peer, error) { return e.connectWithin(patience) }

// dial is connect. The end of the test closes the peer.
func (e *echod) dial() *peer {
	e.t.Helper()
	p, err := e.connect()
	check(e.t, err)
	e.t.Cleanup(func() { _ = p.Close() })
	return p
}

// served connects a peer and waits until the server serves it.
func (e *echod) served() *peer {
	e.t.Helper()
	p := e.dial()
	check(e.t, p.echo("hello\n"))
	return p
}

// crowd connects n peers and waits until the server serves them.
func (e *echod) crowd(n int) []*peer {
	e.t.Helper()
	peers := make([]*peer, n)
	for i := range peers {
		peers[i] = e.dial()
	}
	each(e.t, n, func(i int) error { return peers[i].echo(fmt.Sprintf("hello from %d\n", i)) })
	return peers
}

func (p *peer) send(text string) error {
	_, err := io.WriteString(p.peerConn, text)
	return err
}

// expect reads len(want) bytes, which must be want.
func (p *peer) expect(want string) error {
	got := make([]byte, len(want))
	n, err := io.ReadFull(p.in, got)
	if string(got[:n]) != want {
		return fmt.Errorf("got %.200q (%v), want %.200q", got[:n], err, want)
	}
	return nil
}

// echo sends text and reads its echo.
func (p *peer) echo(text string) error {
	if err := p.send(text); err != nil {
		return err
	}
	return p.expect(text)
}

// rest reads to the end of the stream. A reset is an error.
func (p *peer) rest() (string, error) {
	got, err := io.ReadAll(p.in)
	if err != nil {
		return string(got), fmt.Errorf("after %.200q: %w", got, err)
	}
	return string(got), nil
}

// expectRest reads to the end of the stream, which must be want and then a FIN.
func (p *peer) expectRest(want string) error {
	got, err := p.rest()
	if err == nil && got != want {
		err = fmt.Errorf("got %.200q to the end, want %.200q", got, want)
	}
	return err
}

// leave half-closes, and expects the end of the stream.
func (p *peer) leave() error {
	if err := p.CloseWrite(); err != nil {
		return err
	}
	return p.expectRest("")
}

// socket is what is below a peer's stream.
type socket interface {
	syscall.Conn
	SetReadBuffer(bytes int) error
}

func (p *peer) socket() socket {
	if session, ok := p.peerConn.(*tlsPeer); ok {
		return session.tcp
	}
	return p.peerConn.(socket)
}

// vanish closes the connection so that the server sees a reset: with an RST or, on a Unix socket, with input unread.
func (p *peer) vanish() error {
	if tcp, ok := p.socket().(*net.TCPConn); ok { // not its TLS session, which would send close_notify
		_ = tcp.SetLinger(0)
		return tcp.Close()
	}
	if err := p.send("unread"); err != nil {
		return err
	}
	raw, err := p.socket().SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Read(func(fd uintptr) bool {
		_, _, failed = unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return failed != unix.EAGAIN
	})
	return errors.Join(err, failed, p.Close())
}

// flood writes without reading until a write fails.
func (p *peer) flood() {
	_ = p.socket().SetReadBuffer(4 << 10)
	block := bytes.Repeat([]byte("flood\n"), 8<<10)
	for {
		if _, err := p.Write(block); err != nil {
			return
		}
	}
}

// onlyOnce removes the notice from the bytes that a client received. It is an error if the notice is not in there once.
func onlyOnce(received, notice string) (string, error) {
	if n := strings.Count(received, notice); n != 1 {
		return received, fmt.Errorf("the notice %q came %d times in %.300q", notice, n, received)
	}
	before, after, _ := strings.Cut(received, notice)
	return before + after, nil
}
