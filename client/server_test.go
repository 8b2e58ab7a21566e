package client

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
)

var errRefused = errors.New("connection refused")

// A behaviour is how a scripted server treats one connection. The connection is
// closed when it returns.
type behaviour func(net.Conn)

// says returns a behaviour that sends text at once, echoes nothing, and closes
// when the client has.
func says(text string) behaviour {
	return func(conn net.Conn) {
		_, _ = io.WriteString(conn, text)
		halfClose(conn)
		_, _ = io.Copy(io.Discard, conn)
	}
}

// after returns a behaviour that reads n bytes, answers with text and, unlike a
// server that drains, closes at once.
func after(n int, text string) behaviour {
	return func(conn net.Conn) {
		_, _ = io.CopyN(io.Discard, conn, int64(n))
		_, _ = io.WriteString(conn, text)
	}
}

// echoes is the behaviour of a server that does nothing else.
func echoes(conn net.Conn) { _, _ = io.Copy(conn, struct{ io.Reader }{conn}) }

// stalls is the behaviour of a server that neither reads nor writes, for the time
// of the test.
func stalls(t *testing.T) behaviour {
	return func(net.Conn) { <-t.Context().Done() }
}

func halfClose(conn net.Conn) {
	if c, ok := conn.(interface{ CloseWrite() error }); ok {
		_ = c.CloseWrite()
	}
}

// listen serves TCP connections on the loopback, the last behaviour over and over.
// It returns the address.
func listen(t *testing.T, script ...behaviour) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() {
		_ = l.Close()
		wg.Wait()
	})
	wg.Go(func() {
		for i := 0; ; i++ {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				script[min(i, len(script)-1)](conn)
			})
		}
	})
	return l.Addr().String()
}

// pipes returns a dial function whose connections live in memory, the first with
// the first behaviour and so on; where that is nil, and after the last, it refuses.
func pipes(t *testing.T, script ...behaviour) func(context.Context, string) (net.Conn, error) {
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	return func(context.Context, string) (net.Conn, error) {
		if len(script) == 0 {
			return nil, errRefused
		}
		next := script[0]
		script = script[1:]
		if next == nil {
			return nil, errRefused
		}
		near, far := net.Pipe()
		wg.Go(func() {
			defer far.Close()
			next(far)
		})
		return near, nil
	}
}

// connect dials and closes the client when the test ends.
func connect(t *testing.T, address string, opts Options) *Client {
	t.Helper()
	c, err := Dial(t.Context(), address, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return c
}

// mustEcho fails the test unless msg comes back.
func mustEcho(t *testing.T, c *Client, msg string) {
	t.Helper()
	got, err := c.Echo(t.Context(), []byte(msg))
	if err != nil || string(got) != msg {
		t.Fatalf("Echo(%q) = %q, %v", msg, got, err)
	}
}

// wantNotice fails the test unless err is a *NoticeError with that notice.
func wantNotice(t *testing.T, err error, want string) {
	t.Helper()
	got, ok := errors.AsType[*NoticeError](err)
	if !ok || got.Notice.String() != want {
		t.Errorf("error = %v, want a NoticeError with %q", err, want)
	}
}
