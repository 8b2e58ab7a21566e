package main

import (
	"context"
	"net"
	"sync"
)

// pipeListener is a listener in memory, for tests under testing/synctest: sockets do not work there. Its connections
// are those of net.Pipe. They have no buffer: a write waits for the reader.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	close  func()
}

func newPipeListener() *pipeListener {
	closed := make(chan struct{})
	return &pipeListener{
		conns:  make(chan net.Conn),
		closed: closed,
		close:  sync.OnceFunc(func() { close(closed) }),
	}
}

// Dial connects to the listener.
func (ln *pipeListener) Dial(ctx context.Context) (net.Conn, error) {
	client, server := net.Pipe()
	select {
	case ln.conns <- server:
		return client, nil
	case <-ln.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Accept, Close and Addr implement net.Listener.
func (ln *pipeListener) Accept() (net.Conn, error) {
	select {
	case nc := <-ln.conns:
		return nc, nil
	case <-ln.closed:
		return nil, net.ErrClosed
	}
}

func (ln *pipeListener) Close() error {
	ln.close()
	return nil
}

func (ln *pipeListener) Addr() net.Addr { return pipeAddr{} }

type pipeAddr struct{}

func (pipeAddr) Network() string { return "pipe" }
func (pipeAddr) String() string  { return "pipe" }
