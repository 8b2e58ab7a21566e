package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestLines(t *testing.T) {
	c := connect(t, listen(t, echoes), Options{})
	ctx := t.Context()
	t.Run("EchoLine returns any line, even one that looks like a notice", func(t *testing.T) {
		for _, line := range []string{"hello", "", "SHUTDOWN 5 SIGTERM", "PAUSED"} {
			if got, err := c.EchoLine(ctx, line); err != nil || got != line {
				t.Errorf("EchoLine(%q) = %q, %v", line, got, err)
			}
		}
	})
	t.Run("several lines can be in flight", func(t *testing.T) {
		sent := []string{"a", "", "NOTICE b", strings.Repeat("c", 5000), "d"}
		for _, line := range sent {
			if err := c.SendLine(ctx, line); err != nil {
				t.Fatal(err)
			}
		}
		for _, want := range sent {
			if got, err := c.ReceiveLine(ctx); err != nil || got != want {
				t.Errorf("ReceiveLine = %q, %v, want %q", got, err, want)
			}
		}
	})
	t.Run("a line with a newline is refused and not sent", func(t *testing.T) {
		if err := c.SendLine(ctx, "two\nlines"); !errors.Is(err, ErrNewline) {
			t.Errorf("SendLine: %v, want ErrNewline", err)
		}
		if _, err := c.EchoLine(ctx, "two\nlines"); !errors.Is(err, ErrNewline) {
			t.Errorf("EchoLine: %v, want ErrNewline", err)
		}
		if n := c.Outstanding(); n != 0 {
			t.Errorf("outstanding = %d, want 0", n)
		}
	})
	t.Run("a line longer than MaxLine is left for Receive", func(t *testing.T) {
		c := connect(t, listen(t, echoes), Options{MaxLine: 4})
		if err := c.Send(ctx, []byte("four\nfive5\n")); err != nil {
			t.Fatal(err)
		}
		if line, err := c.ReceiveLine(ctx); err != nil || line != "four" {
			t.Errorf("ReceiveLine = %q, %v, want four", line, err)
		}
		if line, err := c.ReceiveLine(ctx); !errors.Is(err, ErrLineTooLong) {
			t.Errorf("ReceiveLine = %q, %v, want ErrLineTooLong", line, err)
		}
		if got, err := receiveN(t, c, 6); err != nil || got != "five5\n" {
			t.Errorf("received %q, %v, want five5", got, err)
		}
	})
}

func TestConcurrentUse(t *testing.T) {
	t.Run("one goroutine sends while another receives", func(t *testing.T) {
		c := connect(t, listen(t, echoes), Options{})
		want := bytes.Repeat([]byte("hello\nNOTICE x\n\n"), 50_000)
		var wg sync.WaitGroup
		wg.Go(func() {
			for chunk := range slices.Chunk(want, 300_000) {
				if err := c.Send(t.Context(), chunk); err != nil {
					t.Error(err)
				}
			}
			if err := c.CloseWrite(); err != nil {
				t.Error(err)
			}
		})
		got, err := receiveN(t, c, len(want))
		wg.Wait()
		if err != nil || got != string(want) {
			t.Errorf("%d of %d bytes came back, error: %v", len(got), len(want), err)
		}
	})
	t.Run("each of many Echoes gets its own echo", func(t *testing.T) {
		c := connect(t, listen(t, echoes), Options{})
		var wg sync.WaitGroup
		for i := range 20 {
			wg.Go(func() {
				for j := range 20 {
					line := fmt.Sprintf("%d of %d", j, i)
					if got, err := c.EchoLine(t.Context(), line); err != nil || got != line {
						t.Errorf("EchoLine(%q) = %q, %v", line, got, err)
					}
				}
			})
		}
		wg.Wait()
	})
}

func TestShutdown(t *testing.T) {
	t.Run("the message in flight is finished and the next one refused", func(t *testing.T) {
		var notices []string
		c := connect(t, listen(t, answers(6, "NOTICE soon\nhel\nSHUTDOWN 5 SIGTERM\nlo\n")),
			Options{OnNotice: func(n Notice) { notices = append(notices, n.String()) }})
		mustEcho(t, c, "hello\n")
		if diff := cmp.Diff([]string{"NOTICE soon", "SHUTDOWN 5 SIGTERM"}, notices); diff != "" {
			t.Errorf("notices (-want +got):\n%s", diff)
		}
		err := c.Send(t.Context(), []byte("more\n"))
		wantNotice(t, err, "SHUTDOWN 5 SIGTERM")
		if errors.Is(err, io.EOF) {
			t.Errorf("Send: %v, although the connection is open", err)
		}
		_, err = c.Echo(t.Context(), []byte("more\n"))
		wantNotice(t, err, "SHUTDOWN 5 SIGTERM")
		for range 2 { // the second time the end is already known
			_, err = c.Receive(t.Context(), make([]byte, 1))
			wantNotice(t, err, "SHUTDOWN 5 SIGTERM")
			const want = "server is shutting down (SIGTERM): server closed the connection"
			if !errors.Is(err, io.EOF) || !strings.HasSuffix(err.Error(), want) {
				t.Errorf("Receive: %v, want %s", err, want)
			}
		}
	})
	t.Run("outstanding lines can be received after it", func(t *testing.T) {
		c := connect(t, listen(t, answers(4, "a\nSHUTDOWN 5 x\nb\n")), Options{})
		if err := c.Send(t.Context(), []byte("a\nb\n")); err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"a", "b"} {
			if got, err := c.ReceiveLine(t.Context()); err != nil || got != want {
				t.Errorf("ReceiveLine = %q, %v, want %q", got, err, want)
			}
		}
		_, err := c.ReceiveLine(t.Context())
		wantNotice(t, err, "SHUTDOWN 5 x")
	})
	t.Run("an operator's message does not end anything", func(t *testing.T) {
		c := connect(t, listen(t, answers(2, "NOTICE lunch\na\n")), Options{})
		mustEcho(t, c, "a\n")
		_, err := c.Receive(t.Context(), make([]byte, 1))
		if _, ok := errors.AsType[*NoticeError](err); ok || !errors.Is(err, io.EOF) {
			t.Errorf("Receive: %v, want EOF and no NoticeError", err)
		}
	})
}

func TestRejected(t *testing.T) {
	for _, notice := range []string{"PAUSED", "BUSY", "SHUTDOWN 0 deploy"} {
		t.Run(notice, func(t *testing.T) {
			c := connect(t, listen(t, says(notice+"\n")), Options{})
			got, err := c.Echo(t.Context(), []byte("hello\n"))
			wantNotice(t, err, notice)
			if len(got) > 0 {
				t.Errorf("%q came back", got)
			}
			wantNotice(t, c.Send(t.Context(), []byte("x")), notice)
		})
	}
	t.Run("while the client sends and the server does not read", func(t *testing.T) {
		c := connect(t, listen(t, func(conn net.Conn) {
			_, _ = io.WriteString(conn, "BUSY\n")
			halfClose(conn)
			hangs(t)(conn)
		}), Options{})
		_, err := c.Echo(t.Context(), make([]byte, 64<<20))
		wantNotice(t, err, "BUSY")
	})
}

func TestConnectionEnds(t *testing.T) {
	t.Run("a FIN before the whole echo is an unexpected EOF", func(t *testing.T) {
		c := connect(t, listen(t, answers(6, "hel")), Options{})
		got, err := c.Echo(t.Context(), []byte("hello\n"))
		end, ok := errors.AsType[*EndError](err)
		if string(got) != "hel" || !ok || end.Missing != 3 || !errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
			t.Errorf("Echo = %q, %v, want hel and an EndError with 3 bytes missing", got, err)
		}
	})
	t.Run("a RST is a lost connection", func(t *testing.T) {
		c := connect(t, listen(t, func(conn net.Conn) {
			answers(2, "a\n")(conn)
			_, _ = io.ReadFull(conn, make([]byte, 1))
			_ = conn.(*net.TCPConn).SetLinger(0)
		}), Options{})
		mustEcho(t, c, "a\n")
		got, err := c.Echo(t.Context(), []byte("b"))
		end, ok := errors.AsType[*EndError](err)
		if !ok || end.Missing != 1 || errors.Is(err, io.EOF) || !strings.Contains(err.Error(), "connection lost") {
			t.Errorf("Echo = %q, %v, want an EndError with 1 byte missing", got, err)
		}
	})
	t.Run("a wrong byte is a corruption, which is not retried", func(t *testing.T) {
		c := connect(t, listen(t, answers(6, "heLlo\n")), Options{Reconnect: &Backoff{}})
		got, err := c.Echo(t.Context(), []byte("hello\n"))
		corruption, ok := errors.AsType[*CorruptionError](err)
		if !ok || corruption.Offset != 2 {
			t.Errorf("Echo = %q, %v, want a CorruptionError at offset 2", got, err)
		}
	})
}

var errUnwritable = errors.New("unwritable")

// An unwritable connection fails every write.
type unwritable struct{ net.Conn }

func (unwritable) Write([]byte) (int, error) { return 0, errUnwritable }

// A halfClosable connection closes when it is half-closed.
type halfClosable struct{ net.Conn }

func (c halfClosable) CloseWrite() error { return c.Close() }

// TestEchoCannotSend proves that Echo does not wait for the echo of bytes that
// could not be sent.
func TestEchoCannotSend(t *testing.T) {
	for name, tt := range map[string]struct {
		wrap func(net.Conn) net.Conn
		want error
	}{
		"with half-close":    {func(conn net.Conn) net.Conn { return halfClosable{unwritable{conn}} }, io.ErrClosedPipe},
		"without half-close": {func(conn net.Conn) net.Conn { return unwritable{conn} }, errUnwritable},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dial := pipes(t, hangs(t))
				c := connect(t, "memory", Options{Dial: func(ctx context.Context, address string) (net.Conn, error) {
					conn, err := dial(ctx, address)
					return tt.wrap(conn), err
				}})
				if _, err := c.Echo(t.Context(), []byte("x")); !errors.Is(err, tt.want) || c.Outstanding() != 0 {
					t.Errorf("Echo: %v; outstanding = %d, want %v and 0", err, c.Outstanding(), tt.want)
				}
			})
		})
	}
}

func TestCloseWriteUnsupported(t *testing.T) {
	c := connect(t, "memory", Options{Dial: pipes(t, echoes)})
	for range 2 {
		if err := c.CloseWrite(); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("CloseWrite: %v, want errors.ErrUnsupported", err)
		}
	}
	mustEcho(t, c, "still usable\n")
}

// A closeOnce connection fails the second Close.
type closeOnce struct {
	net.Conn
	closed atomic.Bool
}

func (c *closeOnce) Close() error {
	if c.closed.Swap(true) {
		return errors.New("closed twice")
	}
	return c.Conn.Close()
}

func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dial := pipes(t, hangs(t))
		c := connect(t, "memory", Options{Dial: func(ctx context.Context, address string) (net.Conn, error) {
			conn, err := dial(ctx, address)
			return &closeOnce{Conn: conn}, err
		}})
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := c.Receive(t.Context(), make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Receive: %v, want net.ErrClosed", err)
			}
		})
		wg.Go(func() {
			if err := c.Send(t.Context(), []byte("x")); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Send: %v, want net.ErrClosed", err)
			}
		})
		synctest.Wait()
		for range 2 {
			if err := c.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		}
		wg.Wait()
		_, echoErr := c.Echo(t.Context(), []byte("x"))
		_, lineErr := c.ReceiveLine(t.Context())
		_, receiveErr := c.Receive(t.Context(), make([]byte, 1))
		for _, err := range []error{echoErr, lineErr, receiveErr, c.Send(t.Context(), nil), c.CloseWrite()} {
			if !errors.Is(err, net.ErrClosed) {
				t.Errorf("after Close: %v, want net.ErrClosed", err)
			}
		}
	})
}

// TestContextInterrupts blocks every call, and checks that it returns at the very
// instant at which its context ends, with the cause.
func TestContextInterrupts(t *testing.T) {
	errLate := errors.New("too late")
	locked := func(mutex func(*Client) ctxMutex) func(*testing.T, *Client) {
		return func(t *testing.T, c *Client) {
			if err := mutex(c).lock(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	sending := locked(func(c *Client) ctxMutex { return c.sendMu })
	receiving := locked(func(c *Client) ctxMutex { return c.recvMu })
	send := func(ctx context.Context, c *Client) error { return c.Send(ctx, []byte("x")) }
	receive := func(ctx context.Context, c *Client) error { _, err := c.Receive(ctx, make([]byte, 1)); return err }
	receiveLine := func(ctx context.Context, c *Client) error { _, err := c.ReceiveLine(ctx); return err }
	echo := func(ctx context.Context, c *Client) error { _, err := c.Echo(ctx, []byte("x")); return err }
	for name, tt := range map[string]struct {
		before func(*testing.T, *Client)
		call   func(context.Context, *Client) error
	}{
		"Send":                               {nil, send},
		"Receive":                            {nil, receive},
		"ReceiveLine":                        {nil, receiveLine},
		"Echo":                               {nil, echo},
		"Send while another sends":           {sending, send},
		"Receive while another receives":     {receiving, receive},
		"ReceiveLine while another receives": {receiving, receiveLine},
		"Echo while another sends":           {sending, echo},
		"Echo while another receives":        {receiving, echo},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := connect(t, "memory", Options{Dial: pipes(t, hangs(t))})
				if tt.before != nil {
					tt.before(t, c)
				}
				ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, errLate)
				defer cancel()
				start := time.Now()
				err := tt.call(ctx, c)
				if took := time.Since(start); !errors.Is(err, errLate) || took != time.Minute {
					t.Errorf("after %v: %v, want %v after 1m", took, err, errLate)
				}
				if err := tt.call(ctx, c); !errors.Is(err, errLate) && !errors.Is(err, ErrOutstanding) {
					t.Errorf("with a context that has ended: %v", err)
				}
				if n := c.Outstanding(); n != 0 {
					t.Errorf("outstanding = %d, although the server has read nothing", n)
				}
			})
		})
	}
}

func TestUsableAfterInterrupt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow := func(conn net.Conn) {
			buf := make([]byte, 100)
			for {
				n, err := conn.Read(buf)
				if err != nil {
					return
				}
				time.Sleep(time.Hour)
				_, _ = conn.Write(buf[:n])
			}
		}
		c := connect(t, "memory", Options{Dial: pipes(t, slow)})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := c.Echo(ctx, []byte("hello\n")); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("Echo: %v, want the end of the context", err)
		}
		if _, err := c.Echo(t.Context(), []byte("x")); !errors.Is(err, ErrOutstanding) {
			t.Errorf("Echo: %v, want ErrOutstanding", err)
		}
		if line, err := c.ReceiveLine(t.Context()); err != nil || line != "hello" {
			t.Errorf("ReceiveLine = %q, %v, want hello", line, err)
		}
		mustEcho(t, c, "again\n")
	})
}
