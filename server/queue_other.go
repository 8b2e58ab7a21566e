//go:build !linux

package server

import (
	"errors"
	"net"
	"syscall"
)

func dropHandshakes(net.Listener) error { return errors.ErrUnsupported }

func acceptQueue(net.Listener) (length, limit int, ok bool) { return 0, 0, false }

func acknowledged(syscall.RawConn) (n uint64, ok bool) { return 0, false }
