//go:build !unix

package server

import (
	"errors"
	"net"
	"syscall"
)

// rawConn is nil here: notices are written by goroutines, which may wait, and WriteTo takes its plain path.
func rawConn(net.Conn) syscall.RawConn { return nil }

func writeNow(syscall.RawConn, []byte) (int, error) { return 0, errors.ErrUnsupported }

type receiver struct{}

func announceLeft(uintptr) bool { return false }

func readFD(uintptr, *buffer, bool) (int, int, error) { return 0, -1, errors.ErrUnsupported }

func writeFD(uintptr, []byte) (int, error) { return 0, errors.ErrUnsupported }

func wouldBlock(error) bool { return false }
