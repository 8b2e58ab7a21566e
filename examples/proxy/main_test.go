package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap/zaptest"

	"echod/server"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start serves a proxy for an upstream server. drain begins the drain, and returns when it has begun.
func start(t *testing.T, upstream string, grace time.Duration) (addr net.Addr, srv *server.Server, drain func()) {
	t.Helper()
	srv, err := server.New(proxy{upstream}, server.Options{
		Logger: zaptest.NewLogger(t),
		Drain:  server.DrainOptions{Grace: grace},
	})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := server.Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- serve(ctx, srv, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return ln.Addr(), srv, func() {
		cancel()
		<-srv.Draining()
	}
}

// listen starts an upstream server for one connection, whose result is an error of the test.
func listen(t *testing.T, serve func(*net.TCPConn) error) (address string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		nc, err := ln.Accept()
		if err != nil {
			done <- err
			return
		}
		done <- errors.Join(serve(nc.(*net.TCPConn)), nc.Close())
	}()
	t.Cleanup(func() {
		if err := <-done; err != nil {
			t.Errorf("upstream server: %v", err)
		}
		if err := ln.Close(); err != nil {
			t.Error(err)
		}
	})
	return ln.Addr().String()
}

func TestHalfClose(t *testing.T) {
	request, answer := make([]byte, 8<<20), make([]byte, 8<<20)
	random := rand.NewChaCha8([32]byte{})
	_, _ = random.Read(request)
	_, _ = random.Read(answer)

	// last sends p as the last bytes in its direction.
	last := func(nc *net.TCPConn, p []byte) error {
		if _, err := nc.Write(p); err != nil {
			return err
		}
		return nc.CloseWrite()
	}
	// all reads want and an end of stream.
	all := func(nc *net.TCPConn, want []byte) error {
		got, err := io.ReadAll(nc)
		if err == nil && !bytes.Equal(got, want) {
			err = fmt.Errorf("got %d other bytes than the %d that were sent", len(got), len(want))
		}
		return err
	}

	t.Run("the client ends its direction first", func(t *testing.T) {
		addr, _, _ := start(t, listen(t, func(nc *net.TCPConn) error {
			if err := all(nc, request); err != nil {
				return err
			}
			return last(nc, answer)
		}), 0)
		c := dial(t, addr)
		if err := last(c, request); err != nil {
			t.Fatal(err)
		}
		if err := all(c, answer); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("the upstream server ends its direction first", func(t *testing.T) {
		addr, _, _ := start(t, listen(t, func(nc *net.TCPConn) error {
			if err := last(nc, answer); err != nil {
				return err
			}
			return all(nc, request)
		}), 0)
		c := dial(t, addr)
		if err := all(c, answer); err != nil {
			t.Fatal(err)
		}
		if err := last(c, request); err != nil {
			t.Fatal(err)
		}
		if err := all(c, nil); err != nil {
			t.Fatal(err)
		}
	})
}

func TestHTTP(t *testing.T) {
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(w, r.Body)
	}))
	defer upstream.Close()
	addr, _, _ := start(t, upstream.Listener.Addr().String(), 0)

	client := upstream.Client()
	defer client.CloseIdleConnections()
	resp, err := client.Post("http://"+addr.String(), "text/plain", bytes.NewReader([]byte("hello")))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if got, err := io.ReadAll(resp.Body); string(got) != "hello" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestUpstreamFails(t *testing.T) {
	t.Run("no upstream server", func(t *testing.T) {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		if err := ln.Close(); err != nil {
			t.Fatal(err)
		}
		addr, srv, drain := start(t, ln.Addr().String(), 0)
		c := dial(t, addr)
		if _, err := io.ReadAll(c); err != nil {
			t.Errorf("%v, want an end of stream", err)
		}
		_ = c.Close()
		drain()
		<-srv.Done()
		if got := srv.Closed()[0]; !errors.Is(got.Err, syscall.ECONNREFUSED) || got.Reason != server.ReasonHandlerError {
			t.Errorf("got %v, %v", got.Reason, got.Err)
		}
	})
	t.Run("the upstream server resets the connection", func(t *testing.T) {
		addr, _, _ := start(t, listen(t, func(nc *net.TCPConn) error { return nc.SetLinger(0) }), 0)
		c := dial(t, addr)
		if _, err := io.ReadAll(c); err != nil {
			t.Errorf("%v, want an end of stream", err)
		}
	})
}

func TestDrain(t *testing.T) {
	echo := func(nc *net.TCPConn) error {
		_, err := io.Copy(nc, nc)
		return err
	}
	ping := func(t *testing.T, c net.Conn) {
		t.Helper()
		if _, err := io.WriteString(c, "ping"); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 4)); err != nil {
			t.Fatal(err)
		}
	}

	t.Run("a session continues until it ends", func(t *testing.T) {
		addr, srv, drain := start(t, listen(t, echo), time.Minute)
		c := dial(t, addr)
		ping(t, c)
		drain()
		ping(t, c)
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if rest, err := io.ReadAll(c); len(rest) > 0 || err != nil {
			t.Errorf("got %q, %v, want an end of stream", rest, err)
		}
		<-srv.Done()
		if report, _ := srv.Report(); report.Left != 1 {
			t.Errorf("%+v, want one client that left by itself", report)
		}
	})
	t.Run("a session that does not end is closed at the deadline, on both sides", func(t *testing.T) {
		addr, srv, drain := start(t, listen(t, echo), time.Millisecond)
		c := dial(t, addr)
		ping(t, c)
		drain()
		if rest, err := io.ReadAll(c); len(rest) > 0 || err != nil {
			t.Errorf("got %q, %v, want an end of stream", rest, err)
		}
		<-srv.Done()
		if report, _ := srv.Report(); report.AtDeadline != 1 {
			t.Errorf("%+v, want one client that was closed at the deadline", report)
		}
	})
}

func dial(t *testing.T, addr net.Addr) *net.TCPConn {
	t.Helper()
	nc, err := net.Dial(addr.Network(), addr.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	return nc.(*net.TCPConn)
}
