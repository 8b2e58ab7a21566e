package server

import (
	"context"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
)

// commanded reads a word and does what it says.
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

func TestG10APanicCostsItsOwnConnectionOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, commanded, Options{Limits: Limits{MaxConnsPerIP: 3}})
		a, b, c := r.dial(t), r.dial(t), r.dial(t)
		a.send(t, "a")
		b.send(t, "panic")
		b.ends(t, "")
		c.send(t, "nil panic")
		c.ends(t, "")
		a.send(t, "b")
		a.has(t, "ab")
		next := r.dial(t) // the places are free again
		next.send(t, "x")
		next.has(t, "x")
		wantClosed(t, r.Server, map[Reason]uint64{ReasonHandlerPanic: 2})

		entries := r.messages("handler panicked")
		if len(entries) != 2 {
			t.Fatalf("%d panics logged, want 2", len(entries))
		}
		fields := entries[0].ContextMap()
		wantEqual(t, "panic", fields["panic"], "as you wish")
		wantEqual(t, "connection", fields["conn"], uint64(2))
		if stack, _ := fields["stack"].(string); !strings.Contains(stack, "panicOnCommand") {
			t.Errorf("the logged stack does not show who panicked:\n%s", stack)
		}
	})
}

func TestG10GoexitCostsItsOwnConnectionOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, commanded, Options{})
		a, b := r.dial(t), r.dial(t)
		b.send(t, "goexit")
		b.ends(t, "")
		a.send(t, "a")
		a.has(t, "a")
		wantClosed(t, r.Server, map[Reason]uint64{ReasonHandlerError: 1})
		wantState(t, r.Server, StateRunning, 1)
		a.leave(t)
		shutdownIn(t, r.Server, 1, "x") // whose end waits for every connection's goroutine
		wantClosed(t, r.Server, map[Reason]uint64{ReasonHandlerError: 1, ReasonClientClosed: 1})
	})
}

func TestHandlersErrorIsLoggedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := HandlerFunc(func(_ context.Context, c *Conn) error {
			_, err := c.Read(make([]byte, 1))
			if err == nil {
				err = context.Canceled
			}
			return err
		})
		r := newRig(t, h, Options{})
		a, _ := r.dial(t), r.dial(t)
		a.send(t, "x")
		_ = r.Kill(2) // its error is the server's own doing
		synctest.Wait()
		entries := r.messages("handler returned an error")
		if len(entries) != 1 || entries[0].ContextMap()["conn"] != uint64(1) {
			t.Errorf("errors logged: %v, want one, of connection 1", entries)
		}
	})
}
