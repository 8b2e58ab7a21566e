//go:build unix

package server

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// rawConn gives access to the descriptor of nc; nil when what is written there is not what the client
// gets, as with TLS.
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
	if failed := raw.Control(func(fd uintptr) { n, err = writeFD(fd, p) }); failed != nil {
		return 0, failed
	}
	return n, err
}

func wouldBlock(err error) bool { return err == unix.EAGAIN }
