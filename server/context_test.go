package server

import (
	"context"
	"errors"
	"testing"
)

// The handler's context is made when it is asked for: before the end or after it, it must say the same.
func TestHandlersContextTellsItsCause(t *testing.T) {
	for name, askFirst := range map[string]bool{"asked before the end": true, "asked after the end": false} {
		t.Run(name, func(t *testing.T) {
			conns, causes, derived := make(chan *Conn, 1), make(chan error, 1), make(chan error, 1)
			_, address := serveTCP(t, HandlerFunc(func(ctx context.Context, c *Conn) error {
				var child context.Context
				if askFirst {
					if ctx.Err() != nil || context.Cause(ctx) != nil {
						t.Errorf("before the end: %v, cause %v", ctx.Err(), context.Cause(ctx))
					}
					var cancel context.CancelFunc
					child, cancel = context.WithCancel(ctx)
					defer cancel()
				}
				conns <- c
				_, _ = c.Read(make([]byte, 1)) // fails at the end
				if !askFirst {
					var cancel context.CancelFunc
					child, cancel = context.WithCancel(ctx)
					defer cancel()
				}
				<-ctx.Done()
				<-child.Done()
				if !errors.Is(ctx.Err(), context.Canceled) {
					t.Errorf("Err() = %v, want context.Canceled", ctx.Err())
				}
				causes <- context.Cause(ctx)
				derived <- context.Cause(child)
				return nil
			}), Options{})
			dialTCP(t, address)
			c := <-conns
			if err := c.srv.Kill(c.ID()); err != nil {
				t.Fatal(err)
			}
			if got := <-causes; !errors.Is(got, ErrKilled) {
				t.Errorf("cause %v, want ErrKilled", got)
			}
			if got := <-derived; !errors.Is(got, ErrKilled) {
				t.Errorf("cause of a derived context %v, want ErrKilled", got)
			}
		})
	}
}
