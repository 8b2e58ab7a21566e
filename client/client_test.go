package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestLines(t *testing.T) {
	c := connect(t, listen(t, echoes), Options{})
	ctx := t.Context()
	for _, line := range []string{"hello", "", "SHUTDOWN 5 SIGTERM", "PAUSED"} {
		if got, err := c.EchoLine(ctx, line); err != nil || got != line {
			t.Errorf("EchoLine(%q) = %q, %v", line, got, err)
		}
	}
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
	if err := c.SendLine(ctx, "two\nlines"); !errors.Is(err, ErrNewline) {
		t.Errorf("SendLine: %v, want ErrNewline", err)
	}
	if _, err := c.EchoLine(ctx, "two\nlines"); !errors.Is(err, ErrNewline) {
		t.Errorf("EchoLine: %v, want ErrNewline", err)
	}
	if n := c.Outstanding(); n != 0 {
		t.Errorf("outstanding = %d, want 0", n)
	}
}

func TestReceiveLineTooLong(t *testing.T) {
	c := connect(t, listen(t, echoes), Options{MaxLine: 4})
	if err := c.Send(t.Context(), []byte("four\nfive5\n")); err != nil {
		t.Fatal(err)
	}
	if line, err := c.ReceiveLine(t.Context()); err != nil || line != "four" {
		t.Errorf("ReceiveLine = %q, %v", line, err)
	}
	if line, err := c.ReceiveLine(t.Context()); !errors.Is(err, ErrLineTooLong) {
		t.Errorf("ReceiveLine = %q, %v, want ErrLineTooLong", line, err)
	}
	if got, err := receiveN(t, c, 6); err != nil || got != "five5\n" {
		t.Errorf("the line left is %q, %v", got, err)
	}
}

// receiveN receives n bytes.
func receiveN(t *testing.T, c *Client, n int) (string, error) {
	t.Helper()
	buf := make([]byte, n)
	for got := 0; got < n; {
		m, err := c.Receive(t.Context(), buf[got:])
		got += m
		if err != nil {
			return string(buf[:got]), err
		}
	}
	return string(buf), nil
}

// TestEchoLarge sends far more than all buffers on the way can hold.
func TestEchoLarge(t *testing.T) {
	c := connect(t, listen(t, echoes), Options{})
	msg := make([]byte, 16<<20)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(msg)
	got, err := c.Echo(t.Context(), msg)
	if err != nil || !bytes.Equal(got, msg) {
		t.Errorf("%d bytes came back, equal: %v, error: %v", len(got), bytes.Equal(got, msg), err)
	}
}

func TestSendWhileReceiving(t *testing.T) {
	c := connect(t, listen(t, echoes), Options{})
	want := bytes.Repeat([]byte("hello\nNOTICE x\n\n"), 200_000)
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
}

func TestConcurrentEchoes(t *testing.T) {
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
}

// TestShutdown follows a drain: a notice in the middle of a message, the rest of
// that message, nothing new, and a clean end.
func TestShutdown(t *testing.T) {
	server := func(conn net.Conn) {
		after(6, "NOTICE soon\nhel\nSHUTDOWN 5 SIGTERM\nlo\n")(conn)
	}
	var notices []string
	c := connect(t, listen(t, server), Options{OnNotice: func(n Notice) { notices = append(notices, n.String()) }})
	mustEcho(t, c, "hello\n")
	if diff := cmp.Diff([]string{"NOTICE soon", "SHUTDOWN 5 SIGTERM"}, notices); diff != "" {
		t.Errorf("notices (-want +got):\n%s", diff)
	}
	err := c.Send(t.Context(), []byte("more\n"))
	wantNotice(t, err, "SHUTDOWN 5 SIGTERM")
	if errors.Is(err, io.EOF) {
		t.Errorf("Send: %v, although the connection stands", err)
	}
	_, err = c.Echo(t.Context(), []byte("more\n"))
	wantNotice(t, err, "SHUTDOWN 5 SIGTERM")
	for range 2 { // the second time the end is known
		_, err = c.Receive(t.Context(), make([]byte, 1))
		wantNotice(t, err, "SHUTDOWN 5 SIGTERM")
		if !errors.Is(err, io.EOF) || !strings.HasSuffix(err.Error(), "server is shutting down (SIGTERM): server closed the connection") {
			t.Errorf("Receive: %v", err)
		}
	}
}

func TestOutstandingAfterShutdown(t *testing.T) {
	c := connect(t, listen(t, after(4, "a\nSHUTDOWN 5 x\nb\n")), Options{})
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
}

// TestRejectedWhileSending is turned away by a server that reads nothing, while
// it still has much to send.
func TestRejectedWhileSending(t *testing.T) {
	server := func(conn net.Conn) {
		_, _ = io.WriteString(conn, "BUSY\n")
		halfClose(conn)
		stalls(t)(conn)
	}
	c := connect(t, listen(t, server), Options{})
	_, err := c.Echo(t.Context(), make([]byte, 64<<20))
	wantNotice(t, err, "BUSY")
}

// A mute connection cannot be written to.
type mute struct{ net.Conn }

func (mute) Write([]byte) (int, error) { return 0, errors.New("mute") }
func (m mute) CloseWrite() error       { return m.Close() }

func TestEchoCannotSend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dial := pipes(t, stalls(t))
		c := connect(t, "memory", Options{Dial: func(ctx context.Context, address string) (net.Conn, error) {
			conn, err := dial(ctx, address)
			return mute{conn}, err
		}})
		if _, err := c.Echo(t.Context(), []byte("x")); err == nil || c.Outstanding() != 0 {
			t.Errorf("Echo: %v; outstanding = %d", err, c.Outstanding())
		}
	})
}

func TestMessageIsNoError(t *testing.T) {
	c := connect(t, listen(t, after(2, "NOTICE lunch\na\n")), Options{})
	mustEcho(t, c, "a\n")
	_, err := c.Receive(t.Context(), make([]byte, 1))
	if _, ok := errors.AsType[*NoticeError](err); ok || !errors.Is(err, io.EOF) {
		t.Errorf("Receive: %v, want the plain end", err)
	}
}

func TestEndWithEchoMissing(t *testing.T) {
	c := connect(t, listen(t, after(6, "hel")), Options{})
	got, err := c.Echo(t.Context(), []byte("hello\n"))
	end, ok := errors.AsType[*EndError](err)
	if string(got) != "hel" || !ok || end.Missing != 3 || !errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		t.Errorf("Echo = %q, %v", got, err)
	}
}

func TestReset(t *testing.T) {
	server := func(conn net.Conn) {
		after(2, "a\n")(conn)
		_, _ = io.ReadFull(conn, make([]byte, 1))
		_ = conn.(*net.TCPConn).SetLinger(0)
	}
	c := connect(t, listen(t, server), Options{})
	mustEcho(t, c, "a\n")
	got, err := c.Echo(t.Context(), []byte("b"))
	end, ok := errors.AsType[*EndError](err)
	if !ok || end.Missing != 1 || errors.Is(err, io.EOF) || !strings.Contains(err.Error(), "connection lost") {
		t.Errorf("Echo = %q, %v, want a broken connection", got, err)
	}
}

func TestCorruption(t *testing.T) {
	c := connect(t, listen(t, after(6, "heLlo\n")), Options{Reconnect: &Backoff{}})
	got, err := c.Echo(t.Context(), []byte("hello\n"))
	corrupt, ok := errors.AsType[*CorruptionError](err)
	if !ok || corrupt.Offset != 2 {
		t.Errorf("Echo = %q, %v, want a CorruptionError at offset 2", got, err)
	}
}

func TestHalfClose(t *testing.T) {
	c := connect(t, listen(t, echoes), Options{})
	if err := c.Send(t.Context(), []byte("abc")); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := c.CloseWrite(); err != nil {
			t.Errorf("CloseWrite: %v", err)
		}
	}
	if err := c.Send(t.Context(), []byte("x")); !errors.Is(err, errHalfClosed) {
		t.Errorf("Send: %v, want %v", err, errHalfClosed)
	}
	if n := c.Outstanding(); n != 3 {
		t.Errorf("outstanding = %d, want 3", n)
	}
	got, err := receiveN(t, c, 4)
	if got != "abc" || !errors.Is(err, io.EOF) {
		t.Errorf("received %q, %v", got, err)
	}
}

func TestHalfCloseUnsupported(t *testing.T) {
	c := connect(t, "memory", Options{Dial: pipes(t, echoes)})
	if err := c.CloseWrite(); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("CloseWrite: %v", err)
	}
}

func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := connect(t, "memory", Options{Dial: pipes(t, stalls(t))})
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := c.Receive(t.Context(), make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Receive: %v", err)
			}
		})
		wg.Go(func() {
			if err := c.Send(t.Context(), []byte("x")); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Send: %v", err)
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

// TestContextInterrupts blocks every call and sees that it returns at the very
// instant its context ends, with the cause.
func TestContextInterrupts(t *testing.T) {
	errLate := errors.New("too late")
	hold := func(take func(*Client) ctxMutex) func(*testing.T, *Client) {
		return func(t *testing.T, c *Client) {
			if err := take(c).lock(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	sending, receiving := hold(func(c *Client) ctxMutex { return c.sendMu }), hold(func(c *Client) ctxMutex { return c.recvMu })
	send := func(ctx context.Context, c *Client) error { return c.Send(ctx, []byte("x")) }
	receive := func(ctx context.Context, c *Client) error { _, err := c.Receive(ctx, make([]byte, 1)); return err }
	receiveLine := func(ctx context.Context, c *Client) error { _, err := c.ReceiveLine(ctx); return err }
	echo := func(ctx context.Context, c *Client) error { _, err := c.Echo(ctx, []byte("x")); return err }
	for name, tt := range map[string]struct {
		before func(*testing.T, *Client)
		call   func(context.Context, *Client) error
	}{
		"Send":                     {nil, send},
		"Receive":                  {nil, receive},
		"ReceiveLine":              {nil, receiveLine},
		"Echo":                     {nil, echo},
		"Send, not its turn":       {sending, send},
		"Receive, not its turn":    {receiving, receive},
		"ReceiveLine, not in turn": {receiving, receiveLine},
		"Echo, not its turn":       {sending, echo},
		"Echo, not its other turn": {receiving, echo},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := connect(t, "memory", Options{Dial: pipes(t, stalls(t))})
				if tt.before != nil {
					tt.before(t, c)
				}
				ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, errLate)
				defer cancel()
				start := time.Now()
				err := tt.call(ctx, c)
				if took := time.Since(start); !errors.Is(err, errLate) || took != time.Minute {
					t.Errorf("after %v: %v", took, err)
				}
				if err := tt.call(ctx, c); !errors.Is(err, errLate) && !errors.Is(err, ErrOutstanding) {
					t.Errorf("with a context that has ended: %v", err)
				}
				if n := c.Outstanding(); n != 0 {
					t.Errorf("outstanding = %d, although nothing was taken", n)
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
			t.Fatalf("Echo: %v", err)
		}
		if _, err := c.Echo(t.Context(), []byte("x")); !errors.Is(err, ErrOutstanding) {
			t.Errorf("Echo: %v, want ErrOutstanding", err)
		}
		if line, err := c.ReceiveLine(t.Context()); err != nil || line != "hello" {
			t.Errorf("ReceiveLine = %q, %v", line, err)
		}
		mustEcho(t, c, "again\n")
	})
}
