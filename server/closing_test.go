package server

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// bubbled makes a test of a scenario: one client of a handler, and how the connection ends.
func bubbled(h Handler, o Options, scenario func(*testing.T, *rig, *client)) func(*testing.T) {
	return func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t, h, o)
			scenario(t, r, r.dial(t))
		})
	}
}

func TestEachConnectionHasTheReasonOfItsFirstCause(t *testing.T) {
	failed := errors.New("failed")
	returns := func(err error) Handler {
		return HandlerFunc(func(context.Context, *Conn) error { return err })
	}
	reads := HandlerFunc(func(_ context.Context, c *Conn) error { _, err := io.Copy(io.Discard, c); return err })
	leave := func(t *testing.T, _ *rig, c *client) { c.leave(t) }
	for name, tt := range map[string]struct {
		h    Handler
		o    Options
		does func(*testing.T, *rig, *client)
		want Reason
	}{
		"EOF":   {h: Echo, does: leave, want: ReasonClientClosed},
		"reset": {h: Echo, does: func(_ *testing.T, _ *rig, c *client) { c.Reset() }, want: ReasonClientReset},
		"reset while written to": {h: Echo, does: func(t *testing.T, _ *rig, c *client) {
			c.SetWindow(0)
			c.send(t, "x")
			c.Reset()
		}, want: ReasonClientReset},
		"EOF after the notice": {h: Echo, does: func(t *testing.T, r *rig, c *client) {
			r.StartDrain(DrainOptions{Grace: 0, Reason: "x"})
			pass(acceptorsStop)
			c.leave(t)
		}, want: ReasonClientLeft},
		"handler returns nil":   {h: returns(nil), does: leave, want: ReasonHandlerDone},
		"handler returns error": {h: returns(failed), does: leave, want: ReasonHandlerError},
		"handler returns the EOF that it read": {h: HandlerFunc(func(_ context.Context, c *Conn) error {
			_, err := c.Read(make([]byte, 1))
			return err
		}), does: leave, want: ReasonClientClosed},
		"handler returns EOF of something else":   {h: returns(io.EOF), does: leave, want: ReasonHandlerError},
		"handler returns nil after a reset":       {h: HandlerFunc(func(_ context.Context, c *Conn) error { _, _ = c.Read(make([]byte, 1)); return nil }), does: func(_ *testing.T, _ *rig, c *client) { c.Reset() }, want: ReasonClientReset},
		"handler closes and returns nil":          {h: HandlerFunc(func(_ context.Context, c *Conn) error { return c.Close() }), does: leave, want: ReasonHandlerDone},
		"handler closes and reads on":             {h: HandlerFunc(func(ctx context.Context, c *Conn) error { _ = c.Close(); return reads(ctx, c) }), does: leave, want: ReasonHandlerDone},
		"handler with a deferred Close reads EOF": {h: deferringClose(reads), does: leave, want: ReasonClientClosed},
		"handler with a deferred Close fails":     {h: deferringClose(returns(failed)), does: leave, want: ReasonHandlerError},
		"handler with a deferred Close is reset":  {h: deferringClose(reads), does: func(_ *testing.T, _ *rig, c *client) { c.Reset() }, want: ReasonClientReset},
		"killed":                                  {h: Echo, does: func(_ *testing.T, r *rig, _ *client) { _ = r.Kill(1) }, want: ReasonKilled},
		"killed, and then forced":                 {h: stubbornUntilForced, does: func(_ *testing.T, r *rig, _ *client) { _ = r.Kill(1); _ = r.Close() }, want: ReasonKilled},
		"closed by its handler, and killed":       {h: HandlerFunc(func(ctx context.Context, c *Conn) error { _ = c.Close(); time.Sleep(time.Second); return nil }), does: func(_ *testing.T, r *rig, _ *client) { _ = r.Kill(1) }, want: ReasonKilled},
		"deadline":                                {h: Echo, does: func(_ *testing.T, r *rig, _ *client) { r.StartDrain(DrainOptions{Grace: Off, Reason: "x"}) }, want: ReasonDeadline},
		"handler's error because of the deadline": {h: untilDone, does: func(_ *testing.T, r *rig, _ *client) { r.StartDrain(DrainOptions{Grace: Off, Reason: "x"}) }, want: ReasonDeadline},
		"forced":  {h: Echo, does: func(_ *testing.T, r *rig, _ *client) { _ = r.Close() }, want: ReasonForced},
		"idle":    {h: Echo, o: Options{Timeouts: Timeouts{Idle: time.Second}}, does: func(*testing.T, *rig, *client) {}, want: ReasonIdleTimeout},
		"stalled": {h: Echo, does: func(t *testing.T, _ *rig, c *client) { c.SetWindow(0); c.send(t, "x") }, want: ReasonStalled},
		"handler panics after the client has left": {h: HandlerFunc(func(ctx context.Context, c *Conn) error { _ = reads(ctx, c); panic("oh") }), does: leave, want: ReasonHandlerPanic},
		"handler with a deferred Close panics":     {h: deferringClose(HandlerFunc(func(context.Context, *Conn) error { panic("oh") })), does: leave, want: ReasonHandlerPanic},
	} {
		t.Run(name, bubbled(tt.h, tt.o, func(t *testing.T, r *rig, c *client) {
			tt.does(t, r, c)
			pass(2 * DefaultStallTimeout)
			wantClosed(t, r.Server, map[Reason]uint64{tt.want: 1})
		}))
	}
}

func deferringClose(h Handler) Handler {
	return HandlerFunc(func(ctx context.Context, c *Conn) error {
		defer c.Close()
		return h.ServeConn(ctx, c)
	})
}

// stubbornUntilForced ignores its context until its connection is closed under it.
var stubbornUntilForced = HandlerFunc(func(_ context.Context, c *Conn) error {
	_, err := c.nc.(*fakeConn).deafToDeadlines().Read(make([]byte, 1))
	return err
})

func TestHandlerHearsTheCauseFromItsContextItsReadsAndItsWrites(t *testing.T) {
	for name, tt := range map[string]struct {
		end  func(*rig)
		want error
	}{
		"kill":     {func(r *rig) { _ = r.Kill(1) }, ErrKilled},
		"deadline": {func(r *rig) { r.StartDrain(DrainOptions{Grace: Off, Reason: "x"}) }, ErrDeadline},
		"idle":     {func(*rig) {}, ErrIdle},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				causes := make(chan error, 4)
				r := newRig(t, HandlerFunc(func(ctx context.Context, c *Conn) error {
					_, err := c.Read(make([]byte, 1)) // returns because of the end: the cause must stand already
					causes <- err
					causes <- context.Cause(ctx)
					if err := c.SetDeadline(time.Time{}); err != nil { // too late to gain time
						t.Errorf("SetDeadline: %v", err)
					}
					_, err = c.Read(make([]byte, 1))
					causes <- err
					_, err = c.Write(make([]byte, 2*fakeWindow)) // which the client does not read
					causes <- err
					return err
				}), Options{Timeouts: Timeouts{Idle: time.Minute}})
				r.dial(t)
				tt.end(r)
				for _, what := range []string{"read", "context", "second read", "write"} {
					wantErr(t, what, <-causes, tt.want)
				}
			})
		})
	}
}

func TestDeadlinesOfTheHandlerDoNotBreakTheConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := HandlerFunc(func(ctx context.Context, c *Conn) error {
			_ = c.SetReadDeadline(time.Now().Add(time.Second))
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("Read after its deadline: %v", err)
			}
			_ = c.SetReadDeadline(time.Time{})
			return Echo.ServeConn(ctx, c)
		})
		r := newRig(t, h, Options{})
		c := r.dial(t)
		pass(2 * time.Second)
		c.send(t, "x")
		c.has(t, "x")
		c.leave(t)
		wantClosed(t, r.Server, map[Reason]uint64{ReasonClientClosed: 1})
	})
}

// Without the linger the client would be reset here, since some of what it sent was never read.
func TestUnreadInputDoesNotResetTheClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := HandlerFunc(func(_ context.Context, c *Conn) error {
			_, err := c.Write([]byte("goodbye\n"))
			return err
		})
		r := newRig(t, h, Options{})
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
			t.Errorf("the end of stream came after %v, want at once", took)
		}
		wantState(t, r.Server, StateRunning, 0)
	})
}

func TestLingerEndsWithTheClientsEndOrAfterAMoment(t *testing.T) {
	done := HandlerFunc(func(context.Context, *Conn) error { return nil })
	t.Run("client leaves", bubbled(done, Options{}, func(t *testing.T, r *rig, c *client) {
		pass(100 * time.Millisecond)
		wantState(t, r.Server, StateRunning, 1)
		c.ends(t, "")
		wantState(t, r.Server, StateRunning, 0)
	}))
	t.Run("client stays and floods", bubbled(done, Options{}, func(t *testing.T, r *rig, c *client) {
		began := time.Now()
		var err error
		for err == nil {
			pass(time.Millisecond)
			_, err = c.Write(make([]byte, 100))
		}
		if took := time.Since(began).Round(10 * time.Millisecond); took != lingerTimeout {
			t.Errorf("the linger took %v, want %v", took, lingerTimeout)
		}
		wantState(t, r.Server, StateRunning, 0)
	}))
	t.Run("client has left already", bubbled(Echo, Options{}, func(t *testing.T, r *rig, c *client) {
		_ = c.CloseWrite()
		synctest.Wait()
		wantState(t, r.Server, StateRunning, 0)
	}))
}

func TestKilledClientGetsAllThatWasReadFromIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		c := r.dial(t)
		c.SetWindow(1)
		c.send(t, "all of this")
		if err := r.Kill(1); err != nil {
			t.Fatalf("Kill: %v", err)
		}
		wantErr(t, "second Kill", r.Kill(1), ErrNoConn)
		c.SetWindow(fakeWindow)
		c.ends(t, "all of this")
	})
}

// Half of a stalled client's stream is lost anyway; a reset says so, and frees our kernel's memory.
func TestStalledClientIsNotFlushed(t *testing.T) {
	t.Run("", bubbled(Echo, Options{Timeouts: Timeouts{Stall: time.Second}}, func(t *testing.T, r *rig, c *client) {
		c.SetWindow(1)
		c.send(t, strings.Repeat("x", 100))
		began := time.Now()
		if err := r.AwaitStatus(t.Context(), func(_ State, n int) bool { return n == 0 }); err != nil {
			t.Fatal(err)
		}
		if took, most := time.Since(began), time.Second+time.Second/4+time.Second/8+flushTimeout; took > most {
			t.Errorf("the stalled client was gone after %v, want at most %v", took, most)
		}
	}))
}

func TestConnsWithoutHalfCloseAreServedToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := HandlerFunc(func(ctx context.Context, c *Conn) error {
			wantErr(t, "CloseWrite", c.CloseWrite(), errors.ErrUnsupported)
			return nil
		})
		near, far := net.Pipe()
		ln := newFakeListener()
		r := newRigOn(t, ln, ln, h, Options{})
		ln.hand(near)
		if _, err := far.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("client read: %v, want the end of the stream", err)
		}
		_ = far.Close()
		synctest.Wait()
		wantClosed(t, r.Server, map[Reason]uint64{ReasonHandlerDone: 1})
	})
}

func TestOnCloseIsCalledOnceForEachWithWhatWasBooked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
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
	})
}

func TestReasonsAndPhasesHaveNames(t *testing.T) {
	seen := make(map[string]bool)
	for _, why := range Reasons() {
		if name := why.String(); name == "" || strings.Contains(name, "(") || seen[name] {
			t.Errorf("reason %d has the name %q", int(why), name)
		}
		seen[why.String()] = true
	}
	wantEqual(t, "number of reasons", len(seen), 17)
	for got, want := range map[string]string{
		Reason(0).String(): "Reason(0)", Reason(99).String(): "Reason(99)",
		Phase(0).String(): "Phase(0)", Phase(99).String(): "Phase(99)", PhaseClosing.String(): "closing",
	} {
		wantEqual(t, "name", got, want)
	}
}
