//go:build unix

package server

import (
	"errors"
	"math"
	"net"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// acceptErrors are those after which accept(2) is to be tried again: the process or the system lacks something, or the
// error belongs to the one connection (accept(2), "Error handling").
var acceptErrors = []syscall.Errno{
	syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM,
	syscall.ECONNABORTED, syscall.ECONNRESET, syscall.EPROTO, syscall.EPERM, syscall.ETIMEDOUT,
	syscall.ENETDOWN, syscall.ENETUNREACH, syscall.EHOSTDOWN, syscall.EHOSTUNREACH, syscall.ENOPROTOOPT, syscall.EOPNOTSUPP,
}

func acceptRetryable(err error) bool {
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		return slices.Contains(acceptErrors, errno)
	}
	return isTemporary(err)
}

// rawConn gives access to the descriptor of nc. It is nil if what is written there is not what the client gets, as
// with TLS.
func rawConn(nc net.Conn) syscall.RawConn {
	switch nc := nc.(type) {
	case *net.TCPConn:
		raw, _ := nc.SyscallConn()
		return raw
	case *net.UnixConn:
		raw, _ := nc.SyscallConn()
		return raw
	default:
		return nil
	}
}

// writeNow writes without waiting. It uses Control, because RawConn.Write waits for a Write that is in progress.
func writeNow(raw syscall.RawConn, p []byte) (n int, err error) {
	if failed := raw.Control(func(fd uintptr) { n, err = writeFD(fd, p) }); failed != nil {
		return 0, failed
	}
	return n, err
}

func wouldBlock(err error) bool { return err == unix.EAGAIN }

// discardPending reads what has arrived, up to a bound, without waiting.
func discardPending(raw syscall.RawConn) {
	const most = 256 << 10
	_ = raw.Control(func(fd uintptr) {
		p := make([]byte, 8<<10)
		for read := 0; read < most; {
			n, _, err := unix.Recvfrom(int(fd), p, unix.MSG_DONTWAIT)
			if err != nil || n <= 0 {
				return
			}
			read += n
		}
	})
}

// peerGone reports whether the peer has reset the connection, or has closed it and everything from it was read.
func peerGone(nc net.Conn) (gone bool) {
	raw := rawConn(nc)
	if raw == nil {
		return false
	}
	_ = raw.Control(func(fd uintptr) {
		n, _, err := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
		gone = err == nil && n == 0 || err != nil && !wouldBlock(err) && err != unix.EINTR
	})
	return gone
}

// keepUrgentInline makes urgent data a part of the stream, in its place, for ln and the connections that it accepts
// (socket(7), SO_OOBINLINE; RFC 6093 advises against any other use).
func keepUrgentInline(ln net.Listener) {
	if ln.Addr().Network() != "unix" {
		_ = control(ln, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) })
	}
}

func setBacklog(ln net.Listener, n int) error {
	return control(ln, func(fd int) error { return unix.Listen(fd, n) })
}

// control calls f with the descriptor of ln. The error is errors.ErrUnsupported if ln does not give access to it.
func control(ln net.Listener, f func(fd int) error) error {
	sc, ok := ln.(syscall.Conn)
	if !ok {
		return errors.ErrUnsupported
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return err
	}
	failed := raw.Control(func(fd uintptr) { err = f(int(fd)) })
	return errors.Join(failed, err)
}

// socketOptions are settings that connections of an inherited listener keep.
type socketOptions struct {
	known     bool
	keepAlive net.KeepAliveConfig
	noDelay   bool
}

func (o socketOptions) apply(nc net.Conn) {
	tcp, ok := nc.(*net.TCPConn)
	if !ok || !o.known {
		return
	}
	_ = tcp.SetKeepAliveConfig(o.keepAlive)
	_ = tcp.SetNoDelay(o.noDelay)
	if raw, err := tcp.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) })
	}
}

// openFilesLimit is the process's soft RLIMIT_NOFILE, which Go raises to the hard one at start.
func openFilesLimit() (int, bool) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0, false
	}
	if n := uint64(limit.Cur); n < math.MaxInt32 { //nolint:unconvert // signed on freebsd
		return int(n), true
	}
	return 0, false // RLIM_INFINITY
}
