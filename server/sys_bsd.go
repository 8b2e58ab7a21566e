//go:build unix && !linux

package server

import (
	"errors"
	"net"

	"golang.org/x/sys/unix"
)

type recvArgs struct{}

// reportQueue returns false: these systems do not report what is left together with a read.
func reportQueue(uintptr) bool { return false }

func readFD(fd uintptr, b *buffer, _ bool) (n, left int, err error) {
	n, err = retryEINTR(unix.Read, fd, b.bytes)
	return n, -1, err
}

func writeFD(fd uintptr, p []byte) (int, error) { return retryEINTR(unix.Write, fd, p) }

// retryEINTR calls f until it is not interrupted by a signal.
func retryEINTR(f func(int, []byte) (int, error), fd uintptr, p []byte) (int, error) {
	for {
		n, err := f(int(fd), p)
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

func stopHandshakes(net.Listener) error { return errors.ErrUnsupported }

func handshakesInProgress(net.Listener) bool { return false }

func acceptQueue(net.Listener) (length, limit int, ok bool) { return 0, 0, false }

type sendQueueReader struct{}

func newSendQueueReader() *sendQueueReader { return nil }

func (*sendQueueReader) read(net.Conn) (q sendQueueInfo, ok bool) { return q, false }

func setOrphanTimeout(net.Conn) {}

func readSocketOptions(net.Listener) (o socketOptions) { return o }

func peerCredentials(net.Conn) (cred Credentials, ok bool) { return cred, false }
