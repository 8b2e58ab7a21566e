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
	"testing"
	"time"
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
func connect(addr string) (*peer, error) { return connectOver("tcp", addr) }

func connectOver(network, addr string) (*peer, error) {
	nc, err := net.DialTimeout(network, addr, patience)
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

func connectTLS(addr string, roots *x509.CertPool) (*peer, error) {
	nc, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		return nil, err
	}
	session := tls.Client(finIsError{nc}, &tls.Config{RootCAs: roots, ServerName: "localhost"})
	return newPeer(&tlsPeer{Conn: session, tcp: nc.(*net.TCPConn)})
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

// overEach runs a subtest with a server that clients reach over TCP, and the slow tests with TLS and with a Unix socket.
func overEach(t *testing.T, f func(t *testing.T, start func(flags ...string) *echod)) {
	t.Helper()
	for name, start := range map[string]func(t testing.TB, flags ...string) *echod{
		"over TCP": start,
		"over TLS": func(t testing.TB, flags ...string) *echod {
			e, _, _ := startTLS(t, flags...)
			return e
		},
		"over a Unix socket": func(t testing.TB, flags ...string) *echod {
			path := filepath.Join(shortDir(t), "echo")
			e := start(t, append(flags, "--listen", "unix://"+path)...)
			e.connect = func() (*peer, error) { return connectOver("unix", path) }
			return e
		},
	} {
		t.Run(name, func(t *testing.T) {
			if name != "over TCP" {
				slow(t)
			}
			t.Parallel()
			f(t, func(flags ...string) *echod { return start(t, flags...) })
		})
	}
}

// connectSoon is connect with a short timeout, for servers that may have stopped listening: at the start of a drain the
// kernel drops SYNs, and a client sends a dropped SYN again only after a second.
func connectSoon(addr string) (*peer, error) {
	nc, err := net.DialTimeout("tcp", addr, 300*time.Millisecond)
	if err != nil {
		return nil, err
	}
	return newPeer(nc.(peerConn))
}

// dial connects a peer to the server's first listener.
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

// tcp returns the peer's TCP connection.
func (p *peer) tcp() *net.TCPConn {
	if session, ok := p.peerConn.(*tlsPeer); ok {
		return session.tcp
	}
	return p.peerConn.(*net.TCPConn)
}

// vanish closes the connection with an RST.
func (p *peer) vanish() error {
	_ = p.tcp().SetLinger(0)
	return p.Close()
}

// flood writes without reading until a write fails.
func (p *peer) flood() {
	_ = p.tcp().SetReadBuffer(4 << 10)
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
