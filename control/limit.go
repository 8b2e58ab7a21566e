package control

import (
	"errors"
	"net"
	"sync"
	"syscall"
)

// limit bounds how many connections of ln are open at once; more wait in the kernel's queue.
func limit(ln net.Listener, n int) net.Listener {
	return &limitedListener{Listener: ln, places: make(chan struct{}, n), closed: make(chan struct{})}
}

type limitedListener struct {
	net.Listener
	places    chan struct{}
	closeOnce sync.Once
	closed    chan struct{}
}

func (l *limitedListener) Accept() (net.Conn, error) {
	select {
	case l.places <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.places
		return nil, passing(err)
	}
	return &limitedConn{Conn: c, leave: sync.OnceFunc(func() { <-l.places })}, nil
}

// passing marks what accept(2) reports of the system's state, and not of the listener's, as an error after
// which net/http backs off and tries again. By itself it knows fewer, and a server is not to stop for want of memory.
func passing(err error) error {
	errno, ok := errors.AsType[syscall.Errno](err)
	if !ok || errno == syscall.EBADF || errno == syscall.EINVAL || errno == syscall.ENOTSOCK {
		return err
	}
	return passingError{err}
}

type passingError struct{ error }

func (e passingError) Unwrap() error   { return e.error }
func (e passingError) Timeout() bool   { return false }
func (e passingError) Temporary() bool { return true }

func (l *limitedListener) Close() error {
	l.closeOnce.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

type limitedConn struct {
	net.Conn
	leave func()
}

// CloseWrite lets net/http end an answer before it hangs up.
func (c *limitedConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}

func (c *limitedConn) Close() error {
	err := c.Conn.Close()
	c.leave()
	return err
}
