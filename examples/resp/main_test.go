package main

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/goleak"
	"go.uber.org/zap/zaptest"

	"echod/server"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start serves st. The test must call drain, which returns when all clients have been told.
func start(t *testing.T, st *store) (address string, srv *server.Server, drain func()) {
	t.Helper()
	srv, err := server.New(st, server.Options{Logger: zaptest.NewLogger(t)})
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
	return ln.Addr().String(), srv, func() {
		cancel()
		<-srv.Draining()
	}
}

func newRedis(t *testing.T, address string) *redis.Client {
	// No retries: a command that is refused must not be hidden by another one that is not.
	c := redis.NewClient(&redis.Options{Addr: address, MaxRetries: -1})
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func TestCommands(t *testing.T) {
	address, _, _ := start(t, &store{})
	c := newRedis(t, address)
	ctx := t.Context()

	if got, err := c.Ping(ctx).Result(); got != "PONG" || err != nil {
		t.Errorf("PING: %q, %v", got, err)
	}
	if got, err := c.Echo(ctx, "a\r\nb").Result(); got != "a\r\nb" || err != nil {
		t.Errorf("ECHO: %q, %v", got, err)
	}
	if err := c.Set(ctx, "k", "v", 0).Err(); err != nil {
		t.Errorf("SET: %v", err)
	}
	if got, err := c.Get(ctx, "k").Result(); got != "v" || err != nil {
		t.Errorf("GET: %q, %v", got, err)
	}
	if got, err := c.Del(ctx, "k", "none").Result(); got != 1 || err != nil {
		t.Errorf("DEL: %d, %v", got, err)
	}
	if _, err := c.Get(ctx, "k").Result(); !errors.Is(err, redis.Nil) {
		t.Errorf("GET after DEL: %v, want redis.Nil", err)
	}
	if err := c.Incr(ctx, "k").Err(); err == nil || !strings.HasPrefix(err.Error(), "ERR unknown command") {
		t.Errorf("INCR: %v, want an error reply", err)
	}

	t.Run("pipelined", func(t *testing.T) {
		const n = 10_000
		var gets []*redis.StringCmd
		_, err := c.Pipelined(ctx, func(p redis.Pipeliner) error {
			for range n {
				p.Set(ctx, "k", strings.Repeat("x", 100), 0)
				gets = append(gets, p.Get(ctx, "k"))
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, get := range gets {
			if len(get.Val()) != 100 {
				t.Fatalf("got %q, want 100 bytes", get.Val())
			}
		}
	})
}

func TestDrain(t *testing.T) {
	t.Run("the next command gets an error reply", func(t *testing.T) {
		address, srv, drain := start(t, &store{lastCall: time.Minute})
		c := newRedis(t, address)
		if err := c.Ping(t.Context()).Err(); err != nil {
			t.Fatal(err)
		}
		drain()
		if err := c.Ping(t.Context()).Err(); err == nil || err.Error() != "ERR server is shutting down" {
			t.Errorf("got %v, want an error reply", err)
		}
		<-srv.Done()
		if report, _ := srv.Report(); report.Left != 1 {
			t.Errorf("%+v, want one client that left by itself", report)
		}
	})
	t.Run("idle clients get an end of stream and nothing else", func(t *testing.T) {
		address, srv, drain := start(t, &store{lastCall: time.Millisecond})
		c := dial(t, address)
		if _, err := io.WriteString(c, "*1\r\n$4\r\nPING\r\n"); err != nil {
			t.Fatal(err)
		}
		r := bufio.NewReader(c)
		if got, err := r.ReadString('\n'); got != "+PONG\r\n" {
			t.Fatalf("got %q (%v)", got, err)
		}
		drain()
		if rest, err := io.ReadAll(r); len(rest) > 0 || err != nil {
			t.Errorf("got %q, %v, want an end of stream", rest, err)
		}
		<-srv.Done()
		if report, _ := srv.Report(); report.Left != 1 {
			t.Errorf("%+v, want one client that left before the deadline", report)
		}
	})
	t.Run("a command that is half received gets an error reply", func(t *testing.T) {
		address, _, drain := start(t, &store{lastCall: time.Millisecond})
		c := dial(t, address)
		if _, err := io.WriteString(c, "*1\r\n$4\r\nPING\r\n*1\r\n$4\r\nPI"); err != nil {
			t.Fatal(err)
		}
		r := bufio.NewReader(c)
		if got, err := r.ReadString('\n'); got != "+PONG\r\n" {
			t.Fatalf("got %q (%v)", got, err)
		}
		drain()
		if _, err := io.WriteString(c, "NG\r\n"); err != nil {
			t.Fatal(err)
		}
		const want = "-ERR server is shutting down\r\n"
		if got, err := io.ReadAll(r); string(got) != want || err != nil {
			t.Errorf("got %q, %v, want %q", got, err, want)
		}
	})
}

func TestMalformedCommands(t *testing.T) {
	address, _, _ := start(t, &store{})
	for _, command := range []string{
		"PING\r\n",
		"\n",
		"*0\r\n",
		"*-1\r\n",
		"*1025\r\n",
		"*1\r\n$1048577\r\n",
		"*2\r\n$1048576\r\n" + strings.Repeat("x", 1<<20) + "\r\n$1\r\nx\r\n",
		"*1\r\n$4\r\nPINGPING\r\n",
		"*" + strings.Repeat("1", 5000),
	} {
		c := dial(t, address)
		if _, err := io.WriteString(c, command); err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(c)
		if !strings.HasPrefix(string(got), "-ERR protocol error: ") || !strings.HasSuffix(string(got), "\r\n") || err != nil {
			t.Errorf("%.20q: got %q, %v, want an error reply", command, got, err)
		}
	}
}

func dial(t *testing.T, address string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}
