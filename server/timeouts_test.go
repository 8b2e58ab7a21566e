package server

import (
	"context"
	"io"
	"testing"
	"time"
)

// wantClosesAfter checks that the only connection is closed after d, or up to a sweep and the end of a connection
// later.
func wantClosesAfter(t *testing.T, r *rig, d time.Duration) {
	t.Helper()
	took := elapsed(func() {
		_ = r.AwaitStatus(t.Context(), func(_ State, n int) bool { return n == 0 })
	})
	if took < d || took > d+min(d/8, maxSweep)+flushTimeout {
		t.Errorf("the connection was closed after %v, want %v, or a sweep and a flush more", took, d)
	}
}

func TestIdleTimeout(t *testing.T) {
	idle := func(d time.Duration) Options { return Options{Timeouts: Timeouts{Idle: d}} }

	t.Run("closes a connection on which no byte moves", inBubble(Echo, idle(time.Minute), func(t *testing.T, r *rig) {
		c := r.dial(t)
		for range 3 {
			pass(50 * time.Second)
			c.send(t, "x")
			for info := range r.Conns() {
				wantEqual(t, "idle", info.Idle, time.Duration(0))
			}
		}
		wantClosesAfter(t, r, time.Minute)
		c.ends(t, "xxx")
		wantClosed(t, r.Server, map[Reason]uint64{ReasonIdleTimeout: 1})
	}))

	t.Run("a handler that only writes is not idle", inBubble(HandlerFunc(func(ctx context.Context, c *Conn) error {
		tick := time.NewTicker(30 * time.Second)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				if _, err := c.Write([]byte("tick\n")); err != nil {
					return err
				}
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	}), idle(time.Minute), func(t *testing.T, r *rig) {
		r.dial(t)
		pass(time.Hour)
		wantState(t, r.Server, StateRunning, 1)
	}))

	t.Run("a handler that only reads is not idle", inBubble(HandlerFunc(func(_ context.Context, c *Conn) error {
		_, err := io.Copy(io.Discard, struct{ io.Reader }{c})
		return err
	}), idle(time.Minute), func(t *testing.T, r *rig) {
		c := r.dial(t)
		for range 10 {
			pass(50 * time.Second)
			c.send(t, "x")
		}
		wantState(t, r.Server, StateRunning, 1)
	}))

	t.Run("is off by default", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		pass(10 * time.Hour)
		c.echoes(t, "x")
	}))

	t.Run("does not touch connections that wait or linger", inBubble(Echo, idle(40*time.Millisecond), func(t *testing.T, r *rig) {
		r.ln.slip(1)
		h := r.pause(t, PauseOptions{})
		c := r.dial(t)
		pass(time.Minute)
		wantPhases(t, r.Server, PhaseWaiting)
		h.Release()
		c.send(t, "x")
		c.ends(t, "x")
	}))

	// A client that echoes every tenth of the timeout over a real socket.
	t.Run("an echo counts as activity on every path", func(t *testing.T) {
		const idle = time.Hour // inspect is called by hand
		onEachPathWith(t, Options{Timeouts: Timeouts{Idle: idle}}, func(t *testing.T, serve func(Handler) (*Server, func() stream)) {
			s, dial := serve(Echo)
			c := dial()
			echoed(t, c, "x")
			echoed(t, c, "y")
			conn := s.openConns()[0]
			lastEcho := s.timeAt(conn.lastActive.Load())
			sw := newSweeper(s)
			sw.sweep(lastEcho.Add(idle - 1))
			if why := conn.closeReason(); why != 0 {
				t.Errorf("the connection ended as %v before its time", why)
			}
			echoed(t, c, "z")
			await(t, "the end of the write, and acknowledgements, which the client's kernel may delay", func() bool {
				q, ok := sw.queues.read(conn.sock)
				return conn.writeStarted.Load() == 0 && (!ok || q.waiting == 0)
			})
			sw.sweep(lastEcho.Add(idle))
			if why := conn.closeReason(); why != 0 {
				t.Errorf("the connection ended as %v although it had echoed", why)
			}
			sw.sweep(time.Now().Add(idle))
			wantEqual(t, "reason in the end", conn.closeReason(), ReasonIdleTimeout)
		})
	})
}

func TestStallTimeout(t *testing.T) {
	const withSlack = DefaultStallTimeout + DefaultStallTimeout/4
	for name, o := range map[string]Options{
		"by default":                    {},
		"although Idle is shorter":      {Timeouts: Timeouts{Idle: time.Second}},
		"as set, which is half as long": {Timeouts: Timeouts{Stall: DefaultStallTimeout / 2}},
	} {
		t.Run("closes a client that reads nothing "+name, inBubble(Echo, o, func(t *testing.T, r *rig) {
			c := r.dial(t)
			c.SetWindow(0)
			c.send(t, "x")
			want := withSlack
			if o.Timeouts.Stall > 0 {
				want /= 2
			}
			wantClosesAfter(t, r, want)
			wantClosed(t, r.Server, map[Reason]uint64{ReasonStalled: 1})
		}))
	}

	t.Run("Off never closes", inBubble(Echo, Options{Timeouts: Timeouts{Stall: Off}}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		c.SetWindow(0)
		c.send(t, "x")
		pass(time.Hour)
		c.SetWindow(1)
		c.has(t, "x")
	}))

	t.Run("each write that the client takes restarts it", inBubble(HandlerFunc(func(ctx context.Context, c *Conn) error {
		if _, err := c.Read(make([]byte, 1)); err != nil {
			return err
		}
		for _, b := range []byte("abcdefgh") {
			if _, err := c.Write([]byte{b}); err != nil {
				return err
			}
		}
		return untilDone(ctx, c)
	}), Options{Timeouts: Timeouts{Stall: time.Second}}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		c.SetWindow(1)
		c.send(t, "x")
		for _, want := range "abcdefgh" {
			pass(900 * time.Millisecond)
			c.has(t, string(want))
		}
		wantState(t, r.Server, StateRunning, 1)
	}))

	t.Run("a notice that is not read stalls", inBubble(untilDone, Options{}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		c.SetWindow(3)
		rep, took := drainIn(r.Server, time.Hour, "x")
		if took < withSlack || took > withSlack+maxSweep+flushTimeout {
			t.Errorf("drain took %v, want the stall timeout and a quarter, %v, and the flush", took, withSlack)
		}
		wantClosed(t, r.Server, map[Reason]uint64{ReasonStalled: 1})
		if rep.NoticeFailed != 1 || rep.Notified != 0 {
			t.Errorf("report %+v, want one failed notice", rep)
		}
	}))
}
