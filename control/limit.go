package control

import (
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// limit bounds how many connections of ln are open at once; more wait in the kernel's queue.
func limit(ln net.Listener, n int) *limitedListener {
	l := &limitedListener{
		Listener: ln, places: make(chan struct{}, n), probes: make(chan net.Conn, 1), closed: make(chan struct{}),
	}
	l.waker, _ = ln.(interface{ SetDeadline(time.Time) error })
	return l
}

type limitedListener struct {
	net.Listener
	waker     interface{ SetDeadline(time.Time) error } // nil when Accept cannot be woken
	places    chan struct{}
	probes    chan net.Conn // the far ends of probes, which take no place
	closeOnce sync.Once
	closed    chan struct{}
}

// Accept returns the next connection: a probe's at once, another once there is a place for it.
func (l *limitedListener) Accept() (net.Conn, error) {
	for {
		select {
		case c := <-l.probes:
			return c, nil
		default:
		}
		select {
		case c := <-l.probes:
			return c, nil
		case l.places <- struct{}{}:
		case <-l.closed:
			return nil, net.ErrClosed
		}
		c, err := l.Listener.Accept()
		if err == nil {
			return &limitedConn{Conn: c, leave: sync.OnceFunc(func() { <-l.places })}, nil
		}
		<-l.places
		if l.waker == nil || !errors.Is(err, os.ErrDeadlineExceeded) {
			return nil, passing(err)
		}
		_ = l.waker.SetDeadline(time.Time{}) // woken by dial; before probes is looked at, or one could be overlooked
	}
}

// dial connects from within the process, past the kernel and the limit. Whoever waits in Accept is made to come round for it, so
// that an answer proves that it does.
func (l *limitedListener) dial(ctx context.Context) (net.Conn, error) {
	if l.waker == nil {
		return nil, errors.New("its listener cannot be woken")
	}
	near, far := net.Pipe()
	select {
	case l.probes <- probeConn{far}:
	case <-l.closed:
		return nil, net.ErrClosed
	case <-ctx.Done(): // nobody has come round for an earlier one
		return nil, context.Cause(ctx)
	}
	_ = l.waker.SetDeadline(time.Unix(1, 0)) // after the sending, for the same reason
	return near, nil
}

// probeConn is the far end of a probe.
type probeConn struct{ net.Conn }

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
