package client

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestBackoffLimit(t *testing.T) {
	const s = time.Second
	for _, tt := range []struct {
		b    Backoff
		want []time.Duration
	}{
		{Backoff{}, []time.Duration{s / 10, s / 5, 2 * s / 5, 4 * s / 5, 8 * s / 5, 16 * s / 5, 32 * s / 5, 10 * s}},
		{Backoff{Min: s, Max: 3 * s}, []time.Duration{s, 2 * s, 3 * s, 3 * s}},
		{Backoff{Min: time.Minute}, []time.Duration{time.Minute, time.Minute}},
		{Backoff{Min: 1, Max: 1<<63 - 1}, []time.Duration{1, 2, 4}},
	} {
		for n, want := range tt.want {
			if got := tt.b.limit(n); got != want {
				t.Errorf("%+v: limit(%d) = %v, want %v", tt.b, n, got, want)
			}
		}
	}
	if got := (Backoff{Min: 1, Max: 1<<63 - 1}).limit(1000); got != 1<<63-1 {
		t.Errorf("limit(1000) = %v, want Max", got)
	}
}

func TestDialRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		script := append(make([]behaviour, 30), echoes)
		dial := pipes(t, script...)
		b := &Backoff{Min: time.Second, Max: 8 * time.Second}
		last := time.Now()
		var waits []time.Duration
		timed := func(ctx context.Context, address string) (net.Conn, error) {
			waits = append(waits, time.Since(last))
			last = time.Now()
			return dial(ctx, address)
		}
		c := connect(t, "memory", Options{Reconnect: b, Dial: timed})
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
	for _, tt := range []struct {
		name      string
		reconnect *Backoff
		err       error
		attempts  int
		want      string
	}{
		{"at once without Reconnect", nil, errRefused, 1, "connect to memory: connection refused"},
		{
			"after Retries", &Backoff{Retries: 3}, errRefused, 4,
			"gave up after 3 retries: connect to memory: connection refused",
		},
		{
			"at once with a malformed address", &Backoff{}, &net.AddrError{Err: "missing port", Addr: "memory"}, 1,
			"address memory: missing port",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				attempts := 0
				dial := func(context.Context, string) (net.Conn, error) {
					attempts++
					return nil, tt.err
				}
				_, err := Dial(t.Context(), "memory", Options{Reconnect: tt.reconnect, Dial: dial})
				if err == nil || err.Error() != tt.want || !errors.Is(err, tt.err) || attempts != tt.attempts {
					t.Errorf("after %d attempts: %v, want %s after %d", attempts, err, tt.want, tt.attempts)
				}
			})
		})
	}
	t.Run("when the context ends", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeoutCause(t.Context(), time.Hour, errStop)
			defer cancel()
			_, err := Dial(ctx, "memory", Options{Reconnect: &Backoff{}, Dial: pipes(t)})
			if !errors.Is(err, errStop) || !errors.Is(err, errRefused) {
				t.Errorf("Dial: %v, want both the cause and the last failure", err)
			}
		})
	})
	t.Run("with the cause, although dialing sees the deadline first", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			time.AfterFunc(time.Second, func() { cancel(errStop) })
			dial := func(context.Context, string) (net.Conn, error) { return nil, os.ErrDeadlineExceeded }
			if _, err := Dial(lateContext{ctx}, "memory", Options{Dial: dial}); !errors.Is(err, errStop) {
				t.Errorf("Dial: %v, want %v", err, errStop)
			}
		})
	})
	t.Run("when the context has ended before", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(errStop)
		if _, err := Dial(ctx, "127.0.0.1:1", Options{Reconnect: &Backoff{}}); !errors.Is(err, errStop) {
			t.Errorf("Dial: %v, want %v", err, errStop)
		}
	})
}

// A lateContext has not ended although its deadline is over.
type lateContext struct{ context.Context }

func (lateContext) Deadline() (time.Time, bool) { return time.Now(), true }

func TestEchoReconnects(t *testing.T) {
	t.Run("until the whole message has come back once", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var notices []string
			c := connect(t, "memory", Options{
				Reconnect: &Backoff{Retries: 6}, // one less than the script needs: an echo resets the count
				OnNotice:  func(n Notice) { notices = append(notices, n.String()) },
				Dial: pipes(t,
					answers(12, "hel\nSHUTDOWN 5 SIGTERM\nlo"),
					nil,
					answers(0, "SHUTDOWN 0 SIGTERM\n"),
					answers(0, "PAUSED\n"),
					answers(0, "BUSY\n"),
					answers(7, ""),
					answers(7, ", w"),
					echoes,
				),
			})
			mustEcho(t, c, "hello, world")
			const want = "SHUTDOWN 5 SIGTERM; SHUTDOWN 0 SIGTERM; PAUSED; BUSY"
			if got := strings.Join(notices, "; "); got != want {
				t.Errorf("notices: %s; want %s", got, want)
			}
			mustEcho(t, c, "the next message\n")
		})
	})
	t.Run("when a notice came between two messages", func(t *testing.T) {
		eof := make(chan error, 1)
		noticed := func(conn net.Conn) {
			answers(2, "a\nSHUTDOWN 60 x\n")(conn)
			_, err := conn.Read(make([]byte, 1))
			eof <- err
		}
		c := connect(t, listen(t, noticed, echoes), Options{Reconnect: &Backoff{Min: time.Millisecond}})
		mustEcho(t, c, "a\n")
		mustEcho(t, c, "b\n")
		if err := <-eof; err != io.EOF {
			t.Errorf("the first server read %v, want EOF", err)
		}
	})
	t.Run("when Receive has lost the connection before", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c := connect(t, "memory", Options{Reconnect: &Backoff{}, Dial: pipes(t, answers(1, ""), echoes)})
			if err := c.Send(t.Context(), []byte("a")); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Receive(t.Context(), make([]byte, 1)); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("Receive: %v, want io.ErrUnexpectedEOF", err)
			}
			mustEcho(t, c, "b")
		})
	})
	t.Run("when the Echo before was interrupted", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c := connect(t, "memory", Options{Reconnect: &Backoff{}, Dial: pipes(t, hangs(t), echoes)})
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if _, err := c.Echo(ctx, []byte("a")); !errors.Is(err, context.DeadlineExceeded) {
				t.Fatalf("Echo: %v, want the end of the context", err)
			}
			if err := c.Send(t.Context(), []byte("a")); !errors.Is(err, errAbandoned) {
				t.Errorf("Send: %v, want %v", err, errAbandoned)
			}
			mustEcho(t, c, "b")
		})
	})
	t.Run("but not for longer than the Backoff allows", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			busy := answers(0, "BUSY\n")
			dial := pipes(t, answers(3, "ab"), busy, busy, echoes)
			c := connect(t, "memory", Options{Reconnect: &Backoff{Retries: 2}, Dial: dial})
			got, err := c.Echo(t.Context(), []byte("abc"))
			wantNotice(t, err, "BUSY")
			if string(got) != "ab" || !strings.Contains(err.Error(), "gave up after 2 retries") {
				t.Errorf("Echo = %q, %v, want ab and the end of the retries", got, err)
			}
			mustEcho(t, c, "the next Echo counts from zero")
		})
	})
}

func TestCloseWhileReconnecting(t *testing.T) {
	t.Run("before an attempt", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c := connect(t, "memory", Options{Reconnect: &Backoff{Min: time.Hour}, Dial: pipes(t, answers(1, ""))})
			time.AfterFunc(time.Minute, func() { _ = c.Close() })
			if _, err := c.Echo(t.Context(), []byte("a")); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Echo: %v, want net.ErrClosed", err)
			}
		})
	})
	t.Run("during an attempt", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var c *Client
			dial := pipes(t, answers(1, ""), echoes)
			closing := func(ctx context.Context, address string) (net.Conn, error) {
				if c != nil {
					_ = c.Close()
				}
				return dial(ctx, address)
			}
			c = connect(t, "memory", Options{Reconnect: &Backoff{}, Dial: closing})
			if _, err := c.Echo(t.Context(), []byte("a")); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Echo: %v, want net.ErrClosed", err)
			}
		})
	})
}
