//go:build !unix

package server

import (
	"errors"
	"net"
	"syscall"
)

var errWouldBlock = errors.New("would block")

// rawConn is nil here: notices are written by goroutines, which may wait.
func rawConn(net.Conn) syscall.RawConn { return nil }

func writeNow(syscall.RawConn, []byte) (int, error) { return 0, errWouldBlock }
