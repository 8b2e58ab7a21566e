//go:build unix

package integration

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
)

// peer is a TCP client of a test. Its methods return errors, so that many clients can run concurrently.
type peer struct {
	*net.TCPConn
	in *bufio.Reader
}

// connect connects a peer whose reads and writes have a deadline.
func connect(addr string) (*peer, error) {
	nc, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		return nil, err
	}
	p := &peer{TCPConn: nc.(*net.TCPConn)}
	p.in = bufio.NewReader(p.TCPConn)
	return p, p.SetDeadline(time.Now().Add(patience))
}

// connectSoon is connect with a short timeout, for servers that may have stopped listening: at the start of a drain the
// kernel drops SYNs, and a client sends a dropped SYN again only after a second.
func connectSoon(addr string) (*peer, error) {
	nc, err := net.DialTimeout("tcp", addr, 300*time.Millisecond)
	if err != nil {
		return nil, err
	}
	_ = nc.SetDeadline(time.Now().Add(patience))
	return &peer{TCPConn: nc.(*net.TCPConn), in: bufio.NewReader(nc)}, nil
}

// dial connects a peer to the server's first listener.
func (e *echod) dial() *peer {
	e.t.Helper()
	p, err := connect(e.addr)
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
	_, err := io.WriteString(p.TCPConn, text)
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

// vanish closes the connection with an RST.
func (p *peer) vanish() error {
	_ = p.SetLinger(0)
	return p.Close()
}

// flood writes without reading until a write fails.
func (p *peer) flood() {
	_ = p.SetReadBuffer(4 << 10)
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
