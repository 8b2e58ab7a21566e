//go:build unix

package server

import (
	"errors"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

var errWouldBlock error = unix.EAGAIN

// rawConn gives access to the descriptor of nc, where bytes written to it are what the client gets.
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

// writeNow writes without waiting. It uses Control, since RawConn.Write waits for a Write under way.
func writeNow(raw syscall.RawConn, p []byte) (n int, err error) {
	failed := raw.Control(func(fd uintptr) {
		for {
			n, err = unix.Write(int(fd), p)
			if !errors.Is(err, unix.EINTR) {
				return
			}
		}
	})
	if failed != nil {
		return 0, failed
	}
	return max(n, 0), err
}
