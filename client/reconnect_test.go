package client

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestCeiling(t *testing.T) {
	const s = time.Second
	tests := []struct {
		b    Backoff
		want []time.Duration
	}{
		{Backoff{}, []time.Duration{s / 10, s / 5, 2 * s / 5, 4 * s / 5, 8 * s / 5, 16 * s / 5, 32 * s / 5, 10 * s, 10 * s}},
		{Backoff{Min: s, Max: 3 * s}, []time.Duration{s, 2 * s, 3 * s, 3 * s}},
		{Backoff{Min: time.Minute}, []time.Duration{time.Minute, time.Minute}},
		{Backoff{Min: 1, Max: 1<<63 - 1}, []time.Duration{1, 2, 4}},
	}
	for _, tt := range tests {
		for n, want := range tt.want {
			if got := tt.b.limit(n); got != want {
				t.Errorf("%+v: ceiling(%d) = %v, want %v", tt.b, n, got, want)
			}
		}
	}
	if got := (Backoff{Min: 1, Max: 1<<63 - 1}).limit(1000); got != 1<<63-1 {
		t.Errorf("ceiling(1000) = %v", got)
	}
}

func TestDialRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		script := append(make([]behaviour, 30), echoes)
		dial := pipes(t, script...)
		b := &Backoff{Min: time.Second, Max: 8 * time.Second}
		last := time.Now()
		var waits []time.Duration
		c := connect(t, "memory", Options{Reconnect: b, Dial: func(ctx context.Context, address string) (net.Conn, error) {
			waits = append(waits, time.Since(last))
			last = time.Now()
			return dial(ctx, address)
		}})
		if len(waits) != len(script) || waits[0] != 0 {
			t.Fatalf("waits before the %d attempts: %v", len(script), waits)
		}
		for i, wait := range waits[1:] {
			if limit := b.limit(i); wait < 0 || wait > limit {
				t.Errorf("wait %d is %v, want at most %v", i, wait, limit)
			}
		}
		if slices.Max(waits) < 2*time.Second {
			t.Errorf("waits do not grow: %v", waits)
		}
		slices.Sort(waits)
		if n := len(slices.Compact(waits)); n < len(script)/2 {
			t.Errorf("waits do not vary: %d values", n)
		}
		mustEcho(t, c, "hello\n")
	})
}

func TestDialGivesUp(t *testing.T) {
	errStop := errors.New("stop")
	tests := []struct {
		name      string
		reconnect *Backoff
		err       error
		attempts  int
		want      string
	}{
		{"without Reconnect", nil, errRefused, 1, "connect to memory: connection refused"},
		{"after so many retries", &Backoff{Retries: 3}, errRefused, 4, "gave up after 3 retries: connect to memory: connection refused"},
		{"malformed address", &Backoff{}, &net.AddrError{Err: "missing port", Addr: "memory"}, 1, "address memory: missing port"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				attempts := 0
				_, err := Dial(t.Context(), "memory", Options{Reconnect: tt.reconnect, Dial: func(context.Context, string) (net.Conn, error) {
					attempts++
					return nil, tt.err
				}})
				if err == nil || err.Error() != tt.want || !errors.Is(err, tt.err) || attempts != tt.attempts {
					t.Errorf("%d attempts: %v", attempts, err)
				}
			})
		})
	}
	t.Run("context ends", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeoutCause(t.Context(), time.Hour, errStop)
			defer cancel()
			_, err := Dial(ctx, "memory", Options{Reconnect: &Backoff{}, Dial: pipes(t)})
			if !errors.Is(err, errStop) || !errors.Is(err, errRefused) {
				t.Errorf("Dial: %v, want both the cause and the last failure", err)
			}
		})
	})
	t.Run("context had ended", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(errStop)
		if _, err := Dial(ctx, "127.0.0.1:1", Options{Reconnect: &Backoff{}}); !errors.Is(err, errStop) {
			t.Errorf("Dial: %v", err)
		}
	})
}

// TestEchoReconnects sends one message across servers that turn the client away,
// vanish and shut down, and sees it come back whole, once.
func TestEchoReconnects(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var notices []string
		c := connect(t, "memory", Options{
			Reconnect: &Backoff{Retries: 6}, // one less than it takes, but for the progress between
			OnNotice:  func(n Notice) { notices = append(notices, n.String()) },
			Dial: pipes(t,
				after(12, "hel\nSHUTDOWN 5 SIGTERM\nlo"),
				nil,
				after(0, "SHUTDOWN 0 SIGTERM\n"),
				after(0, "PAUSED\n"),
				after(0, "BUSY\n"),
				after(7, ""),
				after(7, ", w"),
				echoes,
			),
		})
		mustEcho(t, c, "hello, world")
		if got, want := strings.Join(notices, "; "), "SHUTDOWN 5 SIGTERM; SHUTDOWN 0 SIGTERM; PAUSED; BUSY"; got != want {
			t.Errorf("notices: %s; want %s", got, want)
		}
		mustEcho(t, c, "and on\n")
	})
}

// TestEchoMovesOn sees that a client that was told between two messages takes the
// second one to another connection, and leaves the first cleanly.
func TestEchoMovesOn(t *testing.T) {
	eof := make(chan error, 1)
	told := func(conn net.Conn) {
		after(2, "a\nSHUTDOWN 60 x\n")(conn)
		_, err := conn.Read(make([]byte, 1))
		eof <- err
	}
	c := connect(t, listen(t, told, echoes), Options{Reconnect: &Backoff{Min: time.Millisecond}})
	mustEcho(t, c, "a\n")
	mustEcho(t, c, "b\n")
	if err := <-eof; err == nil || err.Error() != "EOF" {
		t.Errorf("the first server read %v, want EOF", err)
	}
}

func TestEchoGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		busy := after(0, "BUSY\n")
		c := connect(t, "memory", Options{Reconnect: &Backoff{Retries: 2}, Dial: pipes(t, after(3, "ab"), busy, busy, echoes)})
		got, err := c.Echo(t.Context(), []byte("abc"))
		wantNotice(t, err, "BUSY")
		if string(got) != "ab" || !strings.Contains(err.Error(), "gave up after 2 retries") {
			t.Errorf("Echo = %q, %v", got, err)
		}
		mustEcho(t, c, "the next one tries anew")
	})
}

// TestEchoAfterLoss loses a connection in Receive, which does not reconnect.
func TestEchoAfterLoss(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := connect(t, "memory", Options{Reconnect: &Backoff{}, Dial: pipes(t, after(1, ""), echoes)})
		if err := c.Send(t.Context(), []byte("a")); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Receive(t.Context(), make([]byte, 1)); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("Receive: %v, want io.ErrUnexpectedEOF", err)
		}
		mustEcho(t, c, "b")
	})
}

func TestInterruptedEchoGivesConnectionUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := connect(t, "memory", Options{Reconnect: &Backoff{}, Dial: pipes(t, stalls(t), echoes)})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := c.Echo(ctx, []byte("a")); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("Echo: %v", err)
		}
		if err := c.Send(t.Context(), []byte("a")); !errors.Is(err, errAbandoned) {
			t.Errorf("Send: %v, want %v", err, errAbandoned)
		}
		mustEcho(t, c, "b")
	})
}

func TestCloseWhileReconnecting(t *testing.T) {
	t.Run("waiting", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c := connect(t, "memory", Options{Reconnect: &Backoff{Min: time.Hour}, Dial: pipes(t, after(1, ""))})
			time.AfterFunc(time.Minute, func() { _ = c.Close() })
			if _, err := c.Echo(t.Context(), []byte("a")); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Echo: %v, want net.ErrClosed", err)
			}
		})
	})
	t.Run("dialing", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var c *Client
			dial := pipes(t, after(1, ""), echoes)
			c = connect(t, "memory", Options{Reconnect: &Backoff{}, Dial: func(ctx context.Context, address string) (net.Conn, error) {
				if c != nil {
					_ = c.Close()
				}
				return dial(ctx, address)
			}})
			if _, err := c.Echo(t.Context(), []byte("a")); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Echo: %v, want net.ErrClosed", err)
			}
		})
	})
}
