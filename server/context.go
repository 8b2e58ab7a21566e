package server

import (
	"context"
	"time"
)

// connContext is a connection as the context that its handler is given. What package context would
// allocate for it, 190 bytes, is made when the handler asks for the first time, which an echo never does.
type connContext Conn

type cancelledByFate struct {
	context.Context
	cancel context.CancelCauseFunc
}

func (x *connContext) asked() (ctx context.Context) {
	(*Conn)(x).fate.With(func(f *fate) {
		if f.ctx == nil {
			f.ctx = new(cancelledByFate)
			f.ctx.Context, f.ctx.cancel = context.WithCancelCause(context.Background())
			if f.cause != nil {
				f.ctx.cancel(f.cause)
			}
		}
		ctx = f.ctx.Context
	})
	return ctx
}

func (x *connContext) Deadline() (time.Time, bool) { return time.Time{}, false }

func (x *connContext) Done() <-chan struct{} { return x.asked().Done() }

func (x *connContext) Err() error { return x.asked().Err() }

// Value is how context.Cause, and contexts derived from this one, find what is behind it.
func (x *connContext) Value(key any) any { return x.asked().Value(key) }
