//go:build !unix

package server

import (
	"errors"
	"net"
	"os"
	"syscall"
)

// Errors of Windows Sockets after which accepting is to be tried again.
const (
	wsaEMFILE       = syscall.Errno(10024)
	wsaENETDOWN     = syscall.Errno(10050)
	wsaECONNABORTED = syscall.Errno(10053)
	wsaECONNRESET   = syscall.Errno(10054)
	wsaENOBUFS      = syscall.Errno(10055)
)

func acceptRetryable(err error) bool {
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		switch errno {
		case wsaEMFILE, wsaENETDOWN, wsaECONNABORTED, wsaECONNRESET, wsaENOBUFS:
			return true
		case syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ECONNABORTED, syscall.ECONNRESET:
			return true // of portable listeners; the system does not return them
		default:
			return false
		}
	}
	return isTemporary(err)
}

// rawConn returns nil: notices are written by goroutines, which may wait, and WriteTo uses Read and Write.
func rawConn(net.Conn) syscall.RawConn { return nil }

func writeNow(syscall.RawConn, []byte) (int, error) { return 0, errors.ErrUnsupported }

type recvArgs struct{}

func reportQueue(uintptr) bool { return false }

func readFD(uintptr, *buffer, bool) (int, int, error) { return 0, -1, errors.ErrUnsupported }

func writeFD(uintptr, []byte) (int, error) { return 0, errors.ErrUnsupported }

func wouldBlock(error) bool { return false }

func discardPending(syscall.RawConn) {}

type readWaiter struct{}

func newReadWaiter(syscall.RawConn) *readWaiter                     { return &readWaiter{} }
func (*readWaiter) wait(bufferSize) (buf *buffer, n int, err error) { return nil, 0, nil }

func peerGone(net.Conn) bool { return false }

func stopHandshakes(net.Listener) error { return errors.ErrUnsupported }

func handshakesInProgress(net.Listener) bool { return false }

func acceptQueue(net.Listener) (length, limit int, ok bool) { return 0, 0, false }

type sendQueueReader struct{}

func newSendQueueReader() *sendQueueReader { return nil }

func (*sendQueueReader) read(net.Conn) (q sendQueueInfo, ok bool) { return q, false }

func setOrphanTimeout(net.Conn) {}

func keepUrgentInline(syscall.RawConn) {}

func setBacklog(net.Listener, int) error { return errors.ErrUnsupported }

type socketOptions struct{}

func readSocketOptions(net.Listener) (o socketOptions) { return o }

func (socketOptions) apply(net.Conn) {}

func peerCredentials(net.Conn) (cred Credentials, ok bool) { return cred, false }

func openFilesLimit() (int, bool) { return 0, false }

const linkSupported = false

func sendHeader(*net.UnixConn, []byte, []any) error { return errors.ErrUnsupported }

func receiveHeader(*net.UnixConn) ([]byte, []*os.File, error) { return nil, nil, errors.ErrUnsupported }

func isListening(*os.File) (bool, error) { return false, errors.ErrUnsupported }
