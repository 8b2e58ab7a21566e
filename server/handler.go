package server

import (
	"context"
	"io"
	"reflect"
	"runtime"
)

// A Handler serves one connection at a time on the connection's own goroutine; one Handler serves
// many connections concurrently.
//
// ServeConn returns when it is done with the connection; the server then writes out what is pending,
// half-closes, lingers for the client's end of stream, and closes. There is no need to call Close.
//
// A graceful handler does two things. It heeds c.Draining(), the soft signal that the server would
// like to stop: it may finish what it is at and return, or go on until the client leaves. And it
// returns when ctx is done, the hard signal: context.Cause(ctx) says why, c's reads fail at once
// and its writes have at most a second left.
//
// A panic costs this connection only; it is logged with its stack and counted.
type Handler interface {
	ServeConn(ctx context.Context, c *Conn) error
}

// HandlerFunc makes a function a Handler.
type HandlerFunc func(ctx context.Context, c *Conn) error

// ServeConn calls f.
func (f HandlerFunc) ServeConn(ctx context.Context, c *Conn) error { return f(ctx, c) }

// Echo sends back every byte as it comes, until the client ends its stream (RFC 862).
var Echo Handler = HandlerFunc(echo)

func echo(_ context.Context, c *Conn) error {
	_, err := io.Copy(c, c)
	return err
}

// handlerName names h as its author would, for the log.
func handlerName(h Handler) string {
	if v := reflect.ValueOf(h); v.Kind() == reflect.Func {
		if f := runtime.FuncForPC(v.Pointer()); f != nil {
			return f.Name()
		}
	}
	return reflect.TypeOf(h).String()
}
