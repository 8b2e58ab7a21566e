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

// peer is a TCP client that a test plays. Its methods return errors, so that many can be played at a time.
type peer struct {
	*net.TCPConn
	in *bufio.Reader
}

// connect makes a peer, whose reads and writes are bounded in time.
func connect(addr string) (*peer, error) {
	nc, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		return nil, err
	}
	p := &peer{TCPConn: nc.(*net.TCPConn)}
	p.in = bufio.NewReader(p.TCPConn)
	return p, p.SetDeadline(time.Now().Add(patience))
}

// connectSoon is connect for where nobody may be listening any more: the kernel drops what comes at the begin of a
// drain, and a dropped SYN is sent again after a second only.
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

// served connects a peer that is being served.
func (e *echod) served() *peer {
	e.t.Helper()
	p := e.dial()
	check(e.t, p.echo("hello\n"))
	return p
}

// crowd connects n peers that are being served.
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

// expect reads exactly this text.
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

// rest reads to the end of the stream, which must be a FIN and not a reset.
func (p *peer) rest() (string, error) {
	got, err := io.ReadAll(p.in)
	if err != nil {
		return string(got), fmt.Errorf("after %.200q: %w", got, err)
	}
	return string(got), nil
}

// expectRest reads exactly this text, and then the end of the stream.
func (p *peer) expectRest(want string) error {
	got, err := p.rest()
	if err == nil && got != want {
		err = fmt.Errorf("got %.200q to the end, want %.200q", got, want)
	}
	return err
}

// leave says that no more will come, and expects the end of the stream.
func (p *peer) leave() error {
	if err := p.CloseWrite(); err != nil {
		return err
	}
	return p.expectRest("")
}

// vanish closes with a reset.
func (p *peer) vanish() error {
	_ = p.SetLinger(0)
	return p.Close()
}

// flood writes without ever reading, until that is no longer possible.
func (p *peer) flood() {
	_ = p.SetReadBuffer(4 << 10)
	block := bytes.Repeat([]byte("flood\n"), 8<<10)
	for {
		if _, err := p.Write(block); err != nil {
			return
		}
	}
}

// onlyOnce removes the one notice that is in what a client has received.
func onlyOnce(received, notice string) (string, error) {
	if n := strings.Count(received, notice); n != 1 {
		return received, fmt.Errorf("the notice %q came %d times in %.300q", notice, n, received)
	}
	before, after, _ := strings.Cut(received, notice)
	return before + after, nil
}
