package server

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// reads is a handler that reads to the end and writes nothing.
var reads = HandlerFunc(func(_ context.Context, c *Conn) error {
	_, err := io.Copy(io.Discard, c)
	return err
})

// deferringClose adds a deferred Close to h.
func deferringClose(h Handler) Handler {
	return HandlerFunc(func(ctx context.Context, c *Conn) error {
		defer c.Close()
		return h.ServeConn(ctx, c)
	})
}

// stubbornUntilClosed ignores its context until its socket is closed.
var stubbornUntilClosed = HandlerFunc(func(_ context.Context, c *Conn) error {
	_, err := c.nc.(*fakeConn).withoutDeadlines().Read(make([]byte, 1))
	return err
})

func panics(context.Context, *Conn) error { panic("oh") }

func TestCloseReason(t *testing.T) {
	leave := func(t *testing.T, _ *rig, c *client) { c.leave(t) }
	reset := func(_ *testing.T, _ *rig, c *client) { c.Reset() }
	kill := func(_ *testing.T, r *rig, _ *client) { _ = r.Kill(1) }
	drain := func(_ *testing.T, r *rig, _ *client) { r.drain(Off, "x") }
	failed := errors.New("failed")
	readsOnce := HandlerFunc(func(_ context.Context, c *Conn) error { _, err := c.Read(make([]byte, 1)); return err })
	for name, tt := range map[string]struct {
		h    Handler
		o    Options
		does func(*testing.T, *rig, *client)
		want Reason
	}{
		"the client half-closes": {h: Echo, does: leave, want: ReasonClientClosed},
		"the client resets":      {h: Echo, does: reset, want: ReasonClientReset},
		"the client resets during a write": {h: Echo, does: func(t *testing.T, _ *rig, c *client) {
			c.SetWindow(0)
			c.send(t, "x")
			c.Reset()
		}, want: ReasonClientReset},
		"the client half-closes after the notice": {h: Echo, does: func(t *testing.T, r *rig, c *client) {
			r.drain(0, "x")
			pass(acceptorsTimeout)
			c.leave(t)
		}, want: ReasonClientLeft},
		"the handler returns nil":                       {h: returns(nil), does: leave, want: ReasonHandlerDone},
		"the handler returns an error":                  {h: returns(failed), does: leave, want: ReasonHandlerError},
		"the handler returns the EOF that it read":      {h: readsOnce, does: leave, want: ReasonClientClosed},
		"the handler returns the EOF of something else": {h: returns(io.EOF), does: leave, want: ReasonHandlerError},
		"the handler returns nil after a reset": {h: HandlerFunc(func(ctx context.Context, c *Conn) error {
			_ = readsOnce(ctx, c)
			return nil
		}), does: reset, want: ReasonClientReset},
		"the handler closes": {h: HandlerFunc(func(_ context.Context, c *Conn) error { return c.Close() }), does: leave, want: ReasonHandlerDone},
		"the handler closes and then reads": {h: HandlerFunc(func(ctx context.Context, c *Conn) error {
			_ = c.Close()
			return reads(ctx, c)
		}), does: leave, want: ReasonHandlerDone},
		"the handler returns ErrDraining": {h: HandlerFunc(func(ctx context.Context, c *Conn) error {
			c.MarkIdle()
			return readsOnce(ctx, c)
		}), does: func(_ *testing.T, r *rig, _ *client) { r.drain(time.Hour, "x") }, want: ReasonHandlerDone},
		"a deferred Close after EOF":             {h: deferringClose(reads), does: leave, want: ReasonClientClosed},
		"a deferred Close after an error":        {h: deferringClose(returns(failed)), does: leave, want: ReasonHandlerError},
		"a deferred Close after a reset":         {h: deferringClose(reads), does: reset, want: ReasonClientReset},
		"a deferred Close after a panic":         {h: deferringClose(HandlerFunc(panics)), does: leave, want: ReasonHandlerPanic},
		"a panic after the client has left":      {h: HandlerFunc(func(ctx context.Context, c *Conn) error { _ = reads(ctx, c); panic("oh") }), does: leave, want: ReasonHandlerPanic},
		"killed":                                 {h: Echo, does: kill, want: ReasonKilled},
		"killed, and then closed by force":       {h: stubbornUntilClosed, does: func(_ *testing.T, r *rig, _ *client) { _ = r.Kill(1); _ = r.Close() }, want: ReasonKilled},
		"closed by its handler, and then killed": {h: HandlerFunc(func(_ context.Context, c *Conn) error { _ = c.Close(); time.Sleep(time.Second); return nil }), does: kill, want: ReasonKilled},
		"the deadline":                           {h: Echo, does: drain, want: ReasonDeadline},
		"the handler's error at the deadline":    {h: untilDone, does: drain, want: ReasonDeadline},
		"closed by force":                        {h: Echo, does: func(_ *testing.T, r *rig, _ *client) { _ = r.Close() }, want: ReasonForced},
		"idle":                                   {h: Echo, o: Options{Timeouts: Timeouts{Idle: time.Second}}, does: func(*testing.T, *rig, *client) {}, want: ReasonIdleTimeout},
		"stalled":                                {h: Echo, does: func(t *testing.T, _ *rig, c *client) { c.SetWindow(0); c.send(t, "x") }, want: ReasonStalled},
	} {
		t.Run(name, inBubble(tt.h, tt.o, func(t *testing.T, r *rig) {
			tt.does(t, r, r.dial(t))
			pass(2 * DefaultStallTimeout)
			wantClosed(t, r.Server, map[Reason]uint64{tt.want: 1})
		}))
	}
}

func TestHandlerPanic(t *testing.T) {
	t.Run("G10 it costs its own connection only",
		inBubble(commanded, Options{Limits: Limits{MaxConnsPerIP: 3}}, func(t *testing.T, r *rig) {
			a, b, c := r.dial(t), r.dial(t), r.dial(t)
			a.echoes(t, "a")
			b.send(t, "panic")
			b.ends(t, "")
			c.send(t, "nil panic")
			c.ends(t, "")
			a.echoes(t, "b")
			r.dial(t).echoes(t, "x") // the places are free again
			wantClosed(t, r.Server, map[Reason]uint64{ReasonHandlerPanic: 2})

			logged := r.messages("handler panicked")
			if len(logged) != 2 {
				t.Fatalf("%d panics logged, want 2", len(logged))
			}
			fields := logged[0].ContextMap()
			wantEqual(t, "panic", fields["panic"], any("as you wish"))
			wantEqual(t, "connection", fields["conn"], any(uint64(2)))
			wantEqual(t, "remote", fields["remote"], any(b.LocalAddr().String()))
			if stack, _ := fields["stack"].(string); !strings.Contains(stack, "panicOnCommand") {
				t.Errorf("the logged stack does not show the panicking function:\n%s", stack)
			}
		}))

	t.Run("runtime.Goexit costs its own connection only", inBubble(commanded, Options{}, func(t *testing.T, r *rig) {
		a, b := r.dial(t), r.dial(t)
		b.send(t, "goexit")
		b.ends(t, "")
		a.echoes(t, "a")
		a.leave(t)
		drainIn(r.Server, 1, "x") // waits for every connection's goroutine
		wantClosed(t, r.Server, map[Reason]uint64{ReasonHandlerError: 1, ReasonClientClosed: 1})
	}))
}

// commanded is a handler that reads a word, does what it says, and then echoes.
var commanded = HandlerFunc(func(ctx context.Context, c *Conn) error {
	buf := make([]byte, 10)
	n, err := c.Read(buf)
	switch string(buf[:n]) {
	case "panic":
		panicOnCommand()
	case "nil panic":
		panic(nil) //nolint:govet // a handler may do it
	case "goexit":
		runtime.Goexit()
	}
	if err != nil {
		return err
	}
	_, _ = c.Write(buf[:n])
	return Echo.ServeConn(ctx, c)
})

func panicOnCommand() { panic("as you wish") }

func TestHandlerError(t *testing.T) {
	failed := errors.New("failed")
	h := HandlerFunc(func(_ context.Context, c *Conn) error {
		if _, err := c.Read(make([]byte, 1)); err != nil {
			return err
		}
		return failed
	})
	t.Run("is logged with the client's address, and kept", inBubble(h, Options{}, func(t *testing.T, r *rig) {
		a, b := r.dial(t), r.dial(t)
		a.send(t, "x")
		_ = r.Kill(2) // its error comes from the server itself
		b.ends(t, "")
		logged := r.messages("handler returned an error")
		if len(logged) != 1 {
			t.Fatalf("%d errors logged, want 1", len(logged))
		}
		fields := logged[0].ContextMap()
		wantEqual(t, "logged remote", fields["remote"], any(a.LocalAddr().String()))
		wantEqual(t, "logged error", fields["error"], any("failed"))
		pass(lingerTimeout)
		for _, closed := range r.Closed() {
			wantErr(t, "ClosedConn.Err", closed.Err, map[uint64]error{1: failed, 2: ErrKilled}[closed.ID])
		}
	}))
}

// TestCause checks the errors that a handler gets when the server ends its connection.
func TestCause(t *testing.T) {
	for name, tt := range map[string]struct {
		end  func(*rig)
		want error
	}{
		"kill":     {func(r *rig) { _ = r.Kill(1) }, ErrKilled},
		"deadline": {func(r *rig) { r.drain(Off, "x") }, ErrDeadline},
		"idle":     {func(*rig) {}, ErrIdle},
	} {
		t.Run("context, reads and writes return it: "+name, bubbled(func(t *testing.T) {
			causes := make(chan error, 4)
			r := newRig(t, HandlerFunc(func(ctx context.Context, c *Conn) error {
				_, err := c.Read(make([]byte, 1)) // the cause is known before this returns
				causes <- err
				causes <- context.Cause(ctx)
				if err := c.SetDeadline(time.Time{}); err != nil { // has no effect any more
					t.Errorf("SetDeadline: %v", err)
				}
				_, err = c.Read(make([]byte, 1))
				causes <- err
				_, err = c.Write(make([]byte, 2*fakeWindow)) // the client does not read
				causes <- err
				return err
			}), Options{Timeouts: Timeouts{Idle: time.Minute}})
			r.dial(t)
			tt.end(r)
			for _, what := range []string{"read", "context", "second read", "write"} {
				err := <-causes
				wantErr(t, what, err, tt.want)
				wantErr(t, what, err, net.ErrClosed)
			}
		}))
	}
}

// TestContext checks the handler's context, which is made when the handler first uses it.
func TestContext(t *testing.T) {
	for name, usedBefore := range map[string]bool{"used before the end": true, "used after the end": false} {
		t.Run("has the cause, "+name, bubbled(func(t *testing.T) {
			causes := make(chan error, 2)
			r := newRig(t, HandlerFunc(func(ctx context.Context, c *Conn) error {
				if usedBefore {
					if ctx.Err() != nil || context.Cause(ctx) != nil {
						t.Errorf("before the end: %v, cause %v", ctx.Err(), context.Cause(ctx))
					}
				} else {
					_, _ = c.Read(make([]byte, 1)) // fails at the end
				}
				child, cancel := context.WithCancel(ctx)
				defer cancel()
				<-child.Done()
				wantErr(t, "Err", ctx.Err(), context.Canceled)
				causes <- context.Cause(ctx)
				causes <- context.Cause(child)
				return nil
			}), Options{})
			r.dial(t)
			_ = r.Kill(1)
			wantErr(t, "cause", <-causes, ErrKilled)
			wantErr(t, "cause of a derived context", <-causes, ErrKilled)
		}))
	}

	t.Run("derives from BaseContext and ConnContext", bubbled(func(t *testing.T) {
		type key string
		base, stop := context.WithCancelCause(context.WithValue(t.Context(), key("base"), "b"))
		shutDown := errors.New("the program shuts down")
		causes := make(chan error, 1)
		r := newRig(t, HandlerFunc(func(ctx context.Context, _ *Conn) error {
			wantEqual(t, "value of BaseContext", ctx.Value(key("base")), any("b"))
			wantEqual(t, "value of ConnContext", ctx.Value(key("conn")), any(uint64(1)))
			<-ctx.Done()
			causes <- context.Cause(ctx)
			return nil
		}), Options{
			BaseContext: func(ln net.Listener) context.Context {
				if _, ok := ln.(*fakeListener); !ok {
					t.Errorf("BaseContext got a %T, want the listener that was served", ln)
				}
				return base
			},
			ConnContext: func(ctx context.Context, c *Conn) context.Context { return context.WithValue(ctx, key("conn"), c.ID()) },
		})
		r.dial(t)
		stop(shutDown)
		wantErr(t, "cause", <-causes, shutDown)
	}))
}

func TestHandlerDeadlines(t *testing.T) {
	t.Run("a read deadline does not break the connection", bubbled(func(t *testing.T) {
		r := newRig(t, HandlerFunc(func(ctx context.Context, c *Conn) error {
			_ = c.SetReadDeadline(time.Now().Add(time.Second))
			_, err := c.Read(make([]byte, 1))
			wantErr(t, "Read", err, os.ErrDeadlineExceeded)
			_ = c.SetReadDeadline(time.Time{})
			return Echo.ServeConn(ctx, c)
		}), Options{})
		c := r.dial(t)
		pass(2 * time.Second)
		c.echoes(t, "x")
		c.leave(t)
		wantClosed(t, r.Server, map[Reason]uint64{ReasonClientClosed: 1})
	}))

	t.Run("an expired write deadline does not stop notices", bubbled(func(t *testing.T) {
		r := newRig(t, HandlerFunc(func(ctx context.Context, c *Conn) error {
			_ = c.SetWriteDeadline(time.Now().Add(time.Second))
			if _, err := c.Write([]byte("hi\n")); err != nil {
				return err
			}
			return untilDone(ctx, c)
		}), Options{})
		c := r.dial(t)
		pass(time.Minute)
		if sent, failed, err := r.Notify(t.Context(), "hello"); sent != 1 || failed != 0 || err != nil {
			t.Errorf("Notify: %d sent, %d failed, %v; want 1 sent", sent, failed, err)
		}
		c.has(t, "hi\nNOTICE hello\n")
	}))

	t.Run("a write deadline does not cut short a notice that is being sent", bubbled(func(t *testing.T) {
		told := make(chan struct{})
		r := newRig(t, HandlerFunc(func(ctx context.Context, c *Conn) error {
			<-c.Draining()
			_ = c.SetWriteDeadline(time.Now().Add(time.Second))
			close(told)
			return untilDone(ctx, c)
		}), Options{})
		c := r.dial(t)
		c.SetWindow(3)
		r.drain(time.Minute, "x")
		<-told
		pass(5 * time.Second)
		c.SetWindow(fakeWindow)
		c.has(t, "SHUTDOWN 60 x\n")
	}))

	t.Run("a write deadline that is set during a write ends it", bubbled(func(t *testing.T) {
		errs := make(chan error, 1)
		r := newRig(t, HandlerFunc(func(ctx context.Context, c *Conn) error {
			time.AfterFunc(time.Second, func() { _ = c.SetWriteDeadline(time.Now()) })
			_, err := c.Write(make([]byte, 2*fakeWindow))
			errs <- err
			return err
		}), Options{})
		r.dial(t)
		took := elapsed(func() { wantErr(t, "Write", <-errs, os.ErrDeadlineExceeded) })
		wantEqual(t, "duration of the write", took, time.Second)
	}))
}

// TestClose covers the end of a connection: flush, half-close, linger, close.
func TestClose(t *testing.T) {
	goodbye := HandlerFunc(func(_ context.Context, c *Conn) error {
		_, err := c.Write([]byte("goodbye\n"))
		return err
	})
	t.Run("unread input does not reset the client", inBubble(goodbye, Options{}, func(t *testing.T, r *rig) {
		nc, err := r.ln.dialFrom("198.51.100.1")
		if err != nil {
			t.Fatal(err)
		}
		c := &client{nc}
		c.send(t, "never read\n")
		c.send(t, "never read either\n")
		pass(lingerTimeout / 2)
		c.send(t, "nor this\n")
		wantPhases(t, r.Server, PhaseClosing)
		if took := elapsed(func() { c.ends(t, "goodbye\n") }); took != 0 {
			t.Errorf("the FIN came after %v, want at once", took)
		}
		wantState(t, r.Server, StateRunning, 0)
	}))

	t.Run("the linger ends when the client closes", inBubble(returns(nil), Options{}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		pass(100 * time.Millisecond)
		wantState(t, r.Server, StateRunning, 1)
		c.ends(t, "")
		wantState(t, r.Server, StateRunning, 0)
	}))

	t.Run("the linger is bounded for a client that floods", inBubble(returns(nil), Options{}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		began := time.Now()
		var err error
		for err == nil {
			pass(time.Millisecond)
			_, err = c.Write(make([]byte, 100))
		}
		wantEqual(t, "linger", time.Since(began).Round(10*time.Millisecond), lingerTimeout)
		wantState(t, r.Server, StateRunning, 0)
	}))

	t.Run("there is no linger if the client has half-closed", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		_ = r.dial(t).CloseWrite()
		synctest.Wait()
		wantState(t, r.Server, StateRunning, 0)
	}))

	t.Run("a killed client gets everything that was read from it", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		c.SetWindow(1)
		c.send(t, "all of this")
		if err := r.Kill(1); err != nil {
			t.Fatalf("Kill: %v", err)
		}
		wantErr(t, "second Kill", r.Kill(1), ErrNoConn)
		c.SetWindow(fakeWindow)
		c.ends(t, "all of this")
	}))

	// A reset would discard what is in the client's receive buffer.
	t.Run("a killed client that keeps sending gets everything that was read from it", func(t *testing.T) {
		const before, after = 512 << 10, 1 << 20
		var received int64
		var err error
		for range 3 { // the client has lingerTimeout to send: a busy machine may need several attempts
			s, addr := serveTCP(t, Echo, Options{})
			c := dialTCP(t, addr)
			_ = c.SetReadBuffer(32 << 10) // the rest of the echo stays in the server's kernel
			if _, err := c.Write(make([]byte, before)); err != nil {
				t.Fatal(err)
			}
			awaitConns(t, s, 1)
			conn := s.openConns()[0]
			await(t, "an echo that the kernel took", func() bool { return conn.BytesOut() == before })
			wantErr(t, "Kill", s.Kill(conn.ID()), nil)
			await(t, "the linger", func() bool { return Phase(conn.phase.Load()) == PhaseClosing })
			_, _ = c.Write(make([]byte, after))
			_ = c.CloseWrite()
			awaitConns(t, s, 0)
			if received, err = io.Copy(io.Discard, c); err == nil {
				wantEqual(t, "bytes received", received, int64(before))
				return
			}
		}
		t.Errorf("the client received %d bytes of %d and %v, want a FIN", received, before, err)
	})

	// The rest of a stalled client's stream is lost anyway. The reset frees the kernel's memory.
	t.Run("a stalled client is not flushed", inBubble(Echo, Options{Timeouts: Timeouts{Stall: time.Second}}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		c.SetWindow(1)
		c.send(t, strings.Repeat("x", 100))
		took := elapsed(func() { awaitConns(t, r.Server, 0) })
		if most := time.Second + time.Second/4 + time.Second/8 + flushTimeout; took > most {
			t.Errorf("the stalled client was closed after %v, want at most %v", took, most)
		}
	}))

	// The answer is longer than the client's receive window when the server closes.
	t.Run("G5 an answer in flight survives the close", func(t *testing.T) {
		onEachTransport(t, Options{}, func(t *testing.T, serve func(Handler) (*Server, func() stream)) {
			answer := strings.Repeat("answer\n", 40_000)
			_, dial := serve(HandlerFunc(func(_ context.Context, c *Conn) error {
				_, err := io.WriteString(c, answer)
				return err
			}))
			for range 5 {
				c := dial()
				if tcp, ok := c.(*net.TCPConn); ok {
					_ = tcp.SetReadBuffer(32 << 10)
				}
				send(t, c, "never read")
				got, err := io.ReadAll(c)
				if err != nil {
					t.Error(err)
				}
				wantBytes(t, "answer", got, []byte(answer))
			}
		})
	})

	t.Run("a reset by the client is counted as one", func(t *testing.T) {
		s, addr := serveTCP(t, Echo, Options{})
		c := dialTCP(t, addr)
		echoed(t, c, "x")
		_ = c.SetLinger(0)
		_ = c.Close()
		awaitConns(t, s, 0)
		wantClosed(t, s, map[Reason]uint64{ReasonClientReset: 1})
	})
}

func TestWriteAfterTheEnd(t *testing.T) {
	write := func(c *Conn) error {
		_, err := c.Write([]byte("x"))
		return err
	}

	t.Run("after CloseWrite", inBubble(HandlerFunc(func(ctx context.Context, c *Conn) error {
		wantErr(t, "CloseWrite", c.CloseWrite(), nil)
		wantErr(t, "Write", write(c), ErrWriteClosed)
		wantErr(t, "second CloseWrite", c.CloseWrite(), ErrWriteClosed)
		return reads(ctx, c)
	}), Options{}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		c.send(t, "the client can still send")
		wantEqual(t, "bytes in", r.Status().BytesIn, uint64(25))
		c.ends(t, "")
	}))

	t.Run("after Close", inBubble(HandlerFunc(func(_ context.Context, c *Conn) error {
		wantErr(t, "Close", c.Close(), nil)
		_, readErr := c.Read(make([]byte, 1))
		for what, err := range map[string]error{"Write": write(c), "Read": readErr} {
			wantErr(t, what, err, ErrConnClosed)
			wantErr(t, what, err, net.ErrClosed)
		}
		return nil
	}), Options{}, func(t *testing.T, r *rig) {
		r.dial(t).ends(t, "")
	}))

	t.Run("after the handler returned", bubbled(func(t *testing.T) {
		conns := make(chan *Conn, 1)
		r := newRig(t, HandlerFunc(func(_ context.Context, c *Conn) error {
			conns <- c
			return nil
		}), Options{})
		r.dial(t).ends(t, "")
		wantErr(t, "Write", write(<-conns), ErrConnClosed)
	}))

	t.Run("after a write that was cut short", inBubble(HandlerFunc(func(ctx context.Context, c *Conn) error {
		_, _ = c.Read(make([]byte, 1)) // the client has set its window
		_ = c.SetWriteDeadline(time.Now().Add(time.Second))
		n, err := c.Write([]byte("half|half"))
		wantErr(t, "Write", err, os.ErrDeadlineExceeded)
		wantEqual(t, "written", n, 5)
		_ = c.SetWriteDeadline(time.Time{})
		wantErr(t, "Write", write(c), ErrWriteBroken)
		return untilDone(ctx, c)
	}), Options{}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		c.SetWindow(5)
		c.send(t, "x")
		pass(2 * time.Second)
		c.SetWindow(fakeWindow)
		if sent, failed, _ := r.Notify(t.Context(), "hello"); sent != 0 || failed != 1 {
			t.Errorf("Notify: %d sent, %d failed; want 0 and 1", sent, failed)
		}
		rep, _ := drainIn(r.Server, time.Second, "x")
		wantEqual(t, "failed notices", rep.NoticeFailed, 1)
		c.ends(t, "half|")
	}))

	t.Run("an unsupported CloseWrite leaves writing possible", inBubble(HandlerFunc(func(_ context.Context, c *Conn) error {
		wantErr(t, "CloseWrite", c.CloseWrite(), errors.ErrUnsupported)
		return write(c)
	}), Options{}, func(t *testing.T, r *rig) {
		near, far := net.Pipe()
		r.ln.hand(near)
		receivesAll(t, far, "x")
		_ = far.Close()
		synctest.Wait()
		wantClosed(t, r.Server, map[Reason]uint64{ReasonHandlerDone: 1})
	}))
}

// lineProtocol is a handler that answers each line with the same line, and marks itself idle between two of them. On
// ErrDraining it returns, or continues.
func lineProtocol(goesOn bool) Handler {
	return HandlerFunc(func(_ context.Context, c *Conn) error {
		in := bufio.NewReader(c)
		for {
			if in.Buffered() == 0 {
				c.MarkIdle()
			}
			line, err := in.ReadString('\n')
			switch {
			case errors.Is(err, ErrDraining) && goesOn:
				if _, err := io.WriteString(c, "draining\n"); err != nil {
					return err
				}
				continue
			case errors.Is(err, ErrDraining):
				return nil
			case err != nil:
				return err
			}
			if _, err := io.WriteString(c, line); err != nil {
				return err
			}
		}
	})
}

func TestMarkIdle(t *testing.T) {
	silent := Options{Notifier: NotifierFunc(func(Notice) []byte { return nil })}

	t.Run("an idle client leaves when the drain begins", inBubble(lineProtocol(false), Options{}, func(t *testing.T, r *rig) {
		fresh, used := r.dial(t), r.dial(t)
		used.echoes(t, "x\n")
		began := time.Now()
		r.drain(time.Hour, "x")
		fresh.ends(t, "SHUTDOWN 3600 x\n")
		used.ends(t, "SHUTDOWN 3600 x\n")
		<-r.Done()
		if took := time.Since(began); took > acceptorsTimeout {
			t.Errorf("the drain took %v, want no time after its begin", took)
		}
		wantClosed(t, r.Server, map[Reason]uint64{ReasonHandlerDone: 2})
	}))

	t.Run("a request that is half received keeps the whole grace period", inBubble(lineProtocol(false), silent, func(t *testing.T, r *rig) {
		c := r.dial(t)
		c.send(t, "hal")
		r.drain(time.Hour, "x")
		pass(59 * time.Minute)
		c.send(t, "f\n")
		c.ends(t, "half\n") // answered, and then the handler would be idle
		wantClosed(t, r.Server, map[Reason]uint64{ReasonHandlerDone: 1})
	}))

	t.Run("a handler that is busy when the drain begins is interrupted at its next idle read", bubbled(func(t *testing.T) {
		work := make(chan struct{})
		errs := make(chan error, 1)
		r := newRig(t, HandlerFunc(func(_ context.Context, c *Conn) error {
			<-work
			c.MarkIdle()
			_, err := c.Read(make([]byte, 1))
			errs <- err
			return nil
		}), silent)
		r.dial(t)
		r.drain(time.Hour, "x")
		close(work)
		wantErr(t, "Read", <-errs, ErrDraining)
	}))

	t.Run("a handler that continues is interrupted once and keeps the grace period", inBubble(lineProtocol(true), silent, func(t *testing.T, r *rig) {
		c := r.dial(t)
		c.echoes(t, "before\n")
		r.drain(time.Minute, "x")
		c.has(t, "draining\n")
		pass(30 * time.Second)
		c.echoes(t, "after\n")
		c.echoes(t, "again\n")
		pass(30 * time.Second)
		c.ends(t, "")
		wantClosed(t, r.Server, map[Reason]uint64{ReasonDeadline: 1})
	}))

	t.Run("marking twice does not lose the interruption", bubbled(func(t *testing.T) {
		marked := make(chan struct{})
		errs := make(chan error, 2)
		r := newRig(t, HandlerFunc(func(_ context.Context, c *Conn) error {
			c.MarkIdle()
			<-marked // the drain begins
			c.MarkIdle()
			_, err := c.Read(make([]byte, 1))
			errs <- err
			_, err = c.Read(make([]byte, 1))
			errs <- err
			return nil
		}), silent)
		c := r.dial(t)
		r.drain(time.Hour, "x")
		close(marked)
		wantErr(t, "first Read", <-errs, ErrDraining)
		c.send(t, "x")
		wantErr(t, "second Read", <-errs, nil)
	}))

	t.Run("the handler's read deadline is in force again after the interruption", bubbled(func(t *testing.T) {
		errs := make(chan error, 2)
		r := newRig(t, HandlerFunc(func(_ context.Context, c *Conn) error {
			_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
			for range 2 {
				c.MarkIdle()
				_, err := c.Read(make([]byte, 1))
				errs <- err
			}
			return nil
		}), silent)
		r.dial(t)
		began := time.Now()
		r.drain(time.Hour, "x")
		wantErr(t, "first Read", <-errs, ErrDraining)
		wantErr(t, "second Read", <-errs, os.ErrDeadlineExceeded)
		wantEqual(t, "time of the deadline", time.Since(began), 10*time.Second)
	}))

	t.Run("a killed connection returns the cause", bubbled(func(t *testing.T) {
		work := make(chan struct{})
		errs := make(chan error, 1)
		r := newRig(t, HandlerFunc(func(_ context.Context, c *Conn) error {
			<-work
			c.MarkIdle()
			_, err := c.Read(make([]byte, 1))
			errs <- err
			return nil
		}), silent)
		r.dial(t)
		r.drain(time.Hour, "x")
		_ = r.Kill(1)
		close(work)
		wantErr(t, "Read", <-errs, ErrKilled)
	}))

	t.Run("an echo is not interrupted", inBubble(Echo, silent, func(t *testing.T, r *rig) {
		c := r.dial(t)
		r.drain(time.Minute, "x")
		pass(59 * time.Second)
		c.echoes(t, "x")
	}))

	t.Run("WriteTo is interrupted as Read is", func(t *testing.T) {
		onEachPath(t, func(t *testing.T, serve func(Handler) (*Server, func() stream)) {
			errs := make(chan error, 3)
			s, dial := serve(HandlerFunc(func(ctx context.Context, c *Conn) error {
				c.MarkIdle()
				_, err := io.Copy(c, c)
				errs <- err
				_, err = io.Copy(c, c)
				errs <- err
				return err
			}))
			c := dial()
			awaitConns(t, s, 1)
			s.StartDrain(DrainOptions{Grace: time.Minute})
			wantErr(t, "first WriteTo", next(t, errs), ErrDraining)
			send(t, c, "x")
			_ = c.CloseWrite()
			wantErr(t, "second WriteTo", next(t, errs), nil)
		})
	})

	// No byte may be lost, whether the request or the drain comes first.
	t.Run("a request that arrives in the same instant is answered by a handler that continues", func(t *testing.T) {
		onEachPath(t, func(t *testing.T, serve func(Handler) (*Server, func() stream)) {
			for range 2 {
				s, dial := serve(lineProtocol(true))
				clients := make([]stream, 20)
				for i := range clients {
					clients[i] = dial()
					echoed(t, clients[i], "warm\n")
				}
				var asking sync.WaitGroup
				for _, c := range clients {
					asking.Go(func() {
						for range 50 {
							if _, err := io.WriteString(c, "request\n"); err != nil {
								t.Error(err)
							}
						}
						_ = c.CloseWrite()
						all, err := io.ReadAll(c)
						if n := strings.Count(string(all), "request\n"); n != 50 || err != nil {
							t.Errorf("%d of 50 requests were answered, %v", n, err)
						}
					})
				}
				s.StartDrain(DrainOptions{Grace: 20 * time.Second})
				asking.Wait()
				<-s.Done()
			}
		})
	})

	t.Run("4,000 idle clients leave soon after the drain begins", func(t *testing.T) {
		clients := unlessRace(4000)
		if limit, ok := openFilesLimit(); ok && limit < 2*clients+500 {
			t.Skipf("the process may have %d open files only", limit)
		}
		s, addr := serveTCP(t, lineProtocol(false), Options{})
		var leaving sync.WaitGroup
		for range clients {
			c := dialTCP(t, addr)
			leaving.Go(func() {
				_, _ = io.Copy(io.Discard, c)
				_ = c.Close()
			})
		}
		awaitConns(t, s, clients)
		const grace = 10 * time.Minute
		rep, took := drainIn(s, grace, "x")
		leaving.Wait()
		if took > grace/10 { // far more than a busy machine needs
			t.Errorf("the drain took %v of the grace period of %v", took, grace)
		}
		t.Logf("the drain took %v", took)
		wantEqual(t, "clients that left by themselves", rep.Left, clients)
	})
}

// startTLS is a handler that reads a line, changes to TLS, and echoes.
func startTLS(config *tls.Config, before, after func(*Conn)) Handler {
	return HandlerFunc(func(ctx context.Context, c *Conn) error {
		if _, err := c.Read(make([]byte, len("STARTTLS\n"))); err != nil {
			return err
		}
		before(c)
		err := c.Wrap(ctx, func(ctx context.Context, nc net.Conn) (net.Conn, error) {
			if _, err := io.WriteString(nc, "OK\n"); err != nil { // in wrap, so that no notice follows it in the clear
				return nil, err
			}
			return TLS(config)(ctx, nc)
		})
		if err != nil {
			return err
		}
		after(c)
		return Echo.ServeConn(ctx, c)
	})
}

func TestWrap(t *testing.T) {
	nothing := func(*Conn) {}
	forServer, forClient := tlsConfigs(t)
	start := func(t *testing.T, addr net.Addr) *tls.Conn {
		c := dialTCP(t, addr)
		send(t, c, "STARTTLS\n")
		receives(t, c, "OK\n")
		return tls.Client(c, forClient)
	}

	t.Run("the new stream is used from then on", func(t *testing.T) {
		s, addr := serveTCP(t, startTLS(forServer, func(c *Conn) {
			if _, ok := c.TLS(); ok {
				t.Error("TLS says that there is a session before the handshake")
			}
		}, func(c *Conn) {
			if state, ok := c.TLS(); !ok || !state.HandshakeComplete {
				t.Errorf("TLS: %+v, %t; want a complete handshake", state, ok)
			}
			if _, ok := c.NetConn().(*tls.Conn); !ok {
				t.Errorf("NetConn is a %T, want *tls.Conn", c.NetConn())
			}
			if _, err := c.SyscallConn(); err != nil {
				t.Errorf("SyscallConn: %v", err)
			}
		}), Options{})
		c := start(t, addr)
		echoed(t, c, "secret")
		for info := range s.Conns() {
			wantEqual(t, "remote", info.Remote.String(), c.LocalAddr().String())
		}
		s.StartDrain(DrainOptions{Grace: time.Minute, Reason: "x"})
		receives(t, c, "\nSHUTDOWN 60 x\n")
		_ = c.CloseWrite()
		receivesAll(t, c, "")
	})

	t.Run("a notice waits for the end of the handshake", func(t *testing.T) {
		told := make(chan struct{})
		s, addr := serveTCP(t, startTLS(forServer, nothing, nothing), Options{})
		s.RegisterOnShutdown(func() { close(told) })
		c := start(t, addr)
		s.StartDrain(DrainOptions{Grace: time.Minute, Reason: "x"})
		next(t, told)
		next(t, s.Draining())
		receives(t, c, "SHUTDOWN 60 x\n") // begins with the handshake
		echoed(t, c, "secret")
	})

	t.Run("a failed handshake leaves the connection silent", func(t *testing.T) {
		s, addr := serveTCP(t, startTLS(forServer, nothing, nothing), Options{})
		c := dialTCP(t, addr)
		send(t, c, "STARTTLS\n")
		receives(t, c, "OK\n")
		send(t, c, "this is no handshake\n")
		s.StartDrain(DrainOptions{Grace: time.Minute, Reason: "x"})
		rest, err := io.ReadAll(c)
		if err != nil || strings.Contains(string(rest), "SHUTDOWN") {
			t.Errorf("client read %q, %v; want no notice", rest, err)
		}
		_ = c.Close()
		awaitConns(t, s, 0)
		wantClosed(t, s, map[Reason]uint64{ReasonHandlerError: 1})
	})

	t.Run("a notice that waits for a handshake that fails is dropped", inBubble(HandlerFunc(func(ctx context.Context, c *Conn) error {
		failed := errors.New("failed")
		wantErr(t, "Wrap", c.Wrap(ctx, func(context.Context, net.Conn) (net.Conn, error) {
			<-c.Draining()
			return nil, failed
		}), failed)
		return untilDone(ctx, c)
	}), Options{}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		r.drain(time.Minute, "x")
		pass(acceptorsTimeout)
		c.has(t, "")
		if sent, failed, err := r.Notify(t.Context(), "hello"); sent+failed != 0 || err != nil {
			t.Errorf("Notify: %d sent, %d failed, %v; want neither", sent, failed, err)
		}
	}))

	t.Run("a kill ends a handshake", func(t *testing.T) {
		s, addr := serveTCP(t, startTLS(forServer, nothing, nothing), Options{})
		c := dialTCP(t, addr)
		send(t, c, "STARTTLS\n")
		receives(t, c, "OK\n")
		if err := s.Kill(1); err != nil {
			t.Fatal(err)
		}
		receivesAll(t, c, "")
		_ = c.Close()
		awaitConns(t, s, 0)
		wantClosed(t, s, map[Reason]uint64{ReasonKilled: 1})
	})

	t.Run("the address stays the one that limits count", bubbled(func(t *testing.T) {
		r := newRig(t, HandlerFunc(func(ctx context.Context, c *Conn) error {
			if err := c.Wrap(ctx, func(_ context.Context, nc net.Conn) (net.Conn, error) {
				return WithRemoteAddr(nc, fakeAddr("203.0.113.1", 1)), nil
			}); err != nil {
				return err
			}
			return Echo.ServeConn(ctx, c)
		}), Options{Limits: Limits{MaxConnsPerIP: 1}})
		for range 3 {
			c := r.dial(t)
			c.echoes(t, "x")
			c.leave(t)
		}
	}))
}

func TestLabels(t *testing.T) {
	t.Run("appear in listings and logs, and are bounded", bubbled(func(t *testing.T) {
		conns := make(chan *Conn, 1)
		r := newRig(t, HandlerFunc(func(ctx context.Context, c *Conn) error {
			conns <- c
			return reads(ctx, c)
		}), Options{})
		client := r.dial(t)
		c := <-conns
		if c.Labels() != nil {
			t.Errorf("labels %v, want none", c.Labels())
		}
		for key, value := range map[string]string{"user": "ann", "gone": "x"} {
			if err := c.SetLabel(key, value); err != nil {
				t.Error(err)
			}
		}
		_ = c.SetLabel("gone", "")
		want := map[string]string{"user": "ann"}
		c.Labels()["user"] = "changed" // a copy
		for info := range r.Conns() {
			wantEqual(t, "listed labels", info.Labels, want)
		}
		for key, value := range map[string]string{"a\nb": "x", "a": "x\ny", "long": strings.Repeat("x", maxLabelLength+1)} {
			if err := c.SetLabel(key, value); err == nil {
				t.Errorf("SetLabel(%.10q, %.10q) took it", key, value)
			}
		}
		for i := range maxLabels - 1 {
			if err := c.SetLabel(fmt.Sprint(i), "x"); err != nil {
				t.Error(err)
			}
		}
		wantErrText(t, "SetLabel", c.SetLabel("one more", "x"), "has 16 labels already")
		if err := c.SetLabel("user", "bob"); err != nil { // a known key can change
			t.Error(err)
		}
		client.leave(t)
		wantEqual(t, "label of a closed connection", r.Closed()[0].Labels["user"], "bob")
		logged := r.messages("connection closed")
		if len(logged) != 1 || !strings.Contains(fmt.Sprint(logged[0].ContextMap()["labels"]), "user:bob") {
			t.Errorf("logged %v, want the labels", logged)
		}
	}))
}

func TestConnHooks(t *testing.T) {
	t.Run("OnClose is called once for each connection", bubbled(func(t *testing.T) {
		calls := make(chan ClosedConn, 3)
		r := newRig(t, Echo, Options{OnClose: func(c ClosedConn) {
			calls <- c
			panic("in OnClose")
		}})
		for range 2 {
			c := r.dial(t)
			c.send(t, "four")
			c.leave(t)
		}
		close(calls)
		n := 0
		for got := range calls {
			n++
			if got.ID != uint64(n) || got.Reason != ReasonClientClosed || got.BytesIn != 4 || got.BytesOut != 4 {
				t.Errorf("call %d got %+v, want connection %d, client-closed, 4 bytes each way", n, got, n)
			}
		}
		wantEqual(t, "calls", n, 2)
		wantEqual(t, "panics logged", len(r.messages("OnClose panicked")), 2)
	}))

	t.Run("ConnState sees each phase in order", bubbled(func(t *testing.T) {
		var phases lockedValue[map[uint64][]Phase]
		r := newRig(t, Echo, Options{
			Limits: Limits{MaxConns: 1, AtLimit: LimitReject},
			ConnState: func(c *Conn, p Phase) {
				phases.With(func(m *map[uint64][]Phase) {
					if *m == nil {
						*m = make(map[uint64][]Phase)
					}
					(*m)[c.ID()] = append((*m)[c.ID()], p)
				})
			},
		})
		served, rejected := r.dial(t), r.dial(t)
		rejected.ends(t, "BUSY\n")
		served.leave(t)
		phases.With(func(m *map[uint64][]Phase) {
			wantEqual(t, "phases", *m, map[uint64][]Phase{
				1: {PhaseWaiting, PhaseServing, PhaseClosing, PhaseClosed},
				2: {PhaseWaiting, PhaseRejecting, PhaseClosing, PhaseClosed},
			})
		})
	}))
}
