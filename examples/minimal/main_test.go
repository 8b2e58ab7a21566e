package main

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"testing"

	"go.uber.org/goleak"

	"echod/server"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestMinimal(t *testing.T) {
	ln, err := server.Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, signal := context.WithCancel(t.Context())
	stopped := make(chan error, 1)
	go func() { stopped <- run(ctx, ln) }()

	idle := dial(t, ln.Addr())
	idle.send("hello\nworld\n")
	idle.expect("HELLO\n")
	idle.expect("WORLD\n")
	busy := dial(t, ln.Addr())
	busy.send("hello\nwor")
	busy.expect("HELLO\n")

	signal()
	t.Run("a shutdown closes idle clients at once", func(t *testing.T) {
		if _, err := idle.r.ReadByte(); !errors.Is(err, io.EOF) {
			t.Errorf("got %v, want EOF", err)
		}
	})
	t.Run("a shutdown lets the others finish their line", func(t *testing.T) {
		busy.send("ld\n")
		busy.expect("WORLD\n")
		if _, err := busy.r.ReadByte(); !errors.Is(err, io.EOF) {
			t.Errorf("got %v, want EOF", err)
		}
	})
	if err := <-stopped; err != nil {
		t.Errorf("run: %v, want nil because every client left in time", err)
	}
}

type client struct {
	t *testing.T
	net.Conn
	r *bufio.Reader
}

func dial(t *testing.T, addr net.Addr) client {
	t.Helper()
	nc, err := net.Dial(addr.Network(), addr.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	return client{t, nc, bufio.NewReader(nc)}
}

func (c client) send(text string) {
	c.t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		c.t.Fatal(err)
	}
}

func (c client) expect(want string) {
	c.t.Helper()
	if got, err := c.r.ReadString('\n'); got != want {
		c.t.Fatalf("got %q (%v), want %q", got, err, want)
	}
}
