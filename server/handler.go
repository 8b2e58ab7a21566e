package server

import (
	"context"
	"net"
	"reflect"
	"runtime"
)

// A Handler serves connections. The server calls ServeConn once for each connection, on a goroutine of its own, so
// one Handler serves many connections concurrently.
//
// When ServeConn returns, the server writes what is pending, half-closes, waits a moment for the client's FIN, and
// closes. The handler need not call Close.
//
// A graceful handler reacts to two signals. Conn.Draining is closed when the drain begins. The handler may then finish its
// work and return, or continue until the client leaves. If the handler calls Conn.MarkIdle between two requests, the drain
// also interrupts the Read that waits for the next one. When ctx is done, the handler must return. context.Cause(ctx) is
// then the reason, reads fail at once, and writes fail after at most a second.
//
// The result determines the log line, the close reason and ClosedConn.Err. A handler can return the errors of its
// reads and writes unchanged: the server recognises an end of stream, a reset, ErrDraining and its own causes. It
// logs any other error, and counts it as ReasonHandlerError.
//
// A panic costs only this connection. The server logs it with its stack and counts it.
type Handler interface {
	ServeConn(ctx context.Context, c *Conn) error
}

// HandlerFunc makes a function a Handler.
type HandlerFunc func(ctx context.Context, c *Conn) error

// ServeConn calls f.
func (f HandlerFunc) ServeConn(ctx context.Context, c *Conn) error { return f(ctx, c) }

// A Resumer is a Handler whose connections can be handed over to another process; see Server.HandOver. The handler
// opts in by returning at a safe point, between two requests: when Conn.HandingOver is closed, or when a Read fails with
// ErrHandover after Conn.MarkIdle, ServeConn returns Handover(state).
//
// At the safe point all that was read is answered, or is part of the state, and no other goroutine of the handler reads
// or writes the connection. A handler that reads into a buffer of its own may call MarkIdle before each Read, and put an
// unfinished request into the state. The other process may run another version of the program.
type Resumer interface {
	Handler
	// ResumeConn is like ServeConn, for a connection that was handed over. state is the argument of Handover, in this
	// process or in another one.
	ResumeConn(ctx context.Context, c *Conn, state []byte) error
}

// Echo sends every byte back as it arrives, until the client ends its stream (RFC 862). It is a Resumer.
var Echo Handler = echoHandler{}

type echoHandler struct{}

func (echoHandler) ServeConn(_ context.Context, c *Conn) error { return c.echo(nil) }

func (echoHandler) ResumeConn(_ context.Context, c *Conn, state []byte) error { return c.echo(state) }

// WrapConn prepares a connection before it is admitted, on the connection's own goroutine. It may read from nc, and
// returns the connection to serve: nc itself, or one on top of it, such as a tls.Conn. Its RemoteAddr is the client's
// address for limits and logs; a PROXY header is read by returning a connection with another RemoteAddr.
//
// When ctx ends, by Timeouts.Handshake or because the connection is to end, reads and writes of nc fail. The server
// logs an error with the client's address, counts it as ReasonRejectedHandshake, and closes the connection without
// sending anything. An error that wraps io.EOF means that the client left before it sent anything; that is not
// logged.
type WrapConn func(ctx context.Context, nc net.Conn) (net.Conn, error)

// handlerName returns the name of h's function or type, for the log.
func handlerName(h Handler) string {
	if v := reflect.ValueOf(h); v.Kind() == reflect.Func {
		if f := runtime.FuncForPC(v.Pointer()); f != nil {
			return f.Name()
		}
	}
	return reflect.TypeOf(h).String()
}
