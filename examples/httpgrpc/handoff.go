package main

import (
	"context"
	"net"
	"sync"

	"echod/server"
)

// handoff passes connections from a server.Server on to another one. For the former it is a Handler, for the latter a
// net.Listener. A connection counts as served until the latter closes it.
type handoff struct {
	addr   net.Addr
	conns  chan net.Conn
	close  func()
	closed <-chan struct{}
}

func newHandoff(addr net.Addr) *handoff {
	closed := make(chan struct{})
	return &handoff{
		addr:   addr,
		conns:  make(chan net.Conn),
		close:  sync.OnceFunc(func() { close(closed) }),
		closed: closed,
	}
}

// ServeConn passes c on, and returns when its user has closed it. At the drain's deadline reads fail and writes have a
// second left, so that the user can still send an error and then close.
func (h *handoff) ServeConn(ctx context.Context, c *server.Conn) error {
	closed := make(chan struct{})
	select {
	case h.conns <- handedConn{c, sync.OnceFunc(func() { close(closed) })}:
		<-closed
	case <-h.closed:
	case <-ctx.Done():
	}
	return context.Cause(ctx)
}

// Accept, Close and Addr implement net.Listener.
func (h *handoff) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.closed:
		return nil, net.ErrClosed
	}
}

func (h *handoff) Close() error {
	h.close()
	return nil
}

func (h *handoff) Addr() net.Addr { return h.addr }

// handedConn tells its handoff when it is closed.
type handedConn struct {
	*server.Conn
	closed func()
}

func (c handedConn) Close() error {
	defer c.closed()
	return c.Conn.Close()
}
