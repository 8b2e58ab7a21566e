//go:build !unix

package server

import (
	"errors"
	"syscall"
)

// Windows Sockets' error numbers for: out of files, out of buffers, network down, connection aborted, and
// connection reset.
const (
	wsaEMFILE       = syscall.Errno(10024)
	wsaENETDOWN     = syscall.Errno(10050)
	wsaECONNABORTED = syscall.Errno(10053)
	wsaECONNRESET   = syscall.Errno(10054)
	wsaENOBUFS      = syscall.Errno(10055)
)

// acceptRetryable says that accepting is to be tried again after err.
func acceptRetryable(err error) bool {
	errno, ok := errors.AsType[syscall.Errno](err)
	if !ok {
		return false
	}
	switch errno {
	case wsaEMFILE, wsaENETDOWN, wsaECONNABORTED, wsaECONNRESET, wsaENOBUFS:
		return true
	default:
		return false
	}
}
