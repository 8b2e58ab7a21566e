package server

import (
	"errors"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// dropHandshakes makes the kernel drop each SYN for ln, so that its accept queue only gets those whose
// handshake was under way. The filter looks at the TCP header's flags (RFC 9293, 3.1: byte 13), see
// socket(7), SO_ATTACH_FILTER.
func dropHandshakes(ln net.Listener) error {
	const (
		flags     = 13
		syn       = 0x02
		dropAll   = 0
		acceptAll = 0xffff
	)
	program := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: flags},
		{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: syn, Jt: 0, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: dropAll},
		{Code: unix.BPF_RET | unix.BPF_K, K: acceptAll},
	}
	return control(ln, func(fd int) error {
		return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
			&unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]})
	})
}

// acceptQueue reads how many clients wait in ln's accept queue, and how many can: for a listener
// the kernel gives them as tcpi_unacked and tcpi_sacked (tcp_get_info in net/ipv4/tcp.c).
func acceptQueue(ln net.Listener) (length, limit int, ok bool) {
	err := control(ln, func(fd int) error {
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err == nil {
			length, limit = int(info.Unacked), int(info.Sacked)
		}
		return err
	})
	return length, limit, err == nil
}

// acknowledged reads how many bytes the peer has acknowledged.
func acknowledged(raw syscall.RawConn) (n uint64, ok bool) {
	var err error
	failed := raw.Control(func(fd uintptr) {
		var info *unix.TCPInfo
		if info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			n = info.Bytes_acked
		}
	})
	return n, failed == nil && err == nil
}

func control(ln net.Listener, f func(fd int) error) error {
	tcp, ok := ln.(*net.TCPListener)
	if !ok {
		return errors.ErrUnsupported
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return err
	}
	failed := raw.Control(func(fd uintptr) { err = f(int(fd)) })
	return errors.Join(failed, err)
}
