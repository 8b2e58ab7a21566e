package server

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A recvArgs holds the arguments of a read that also returns how many bytes are left in the socket. That saves a
// second read that would find nothing. See TCP_INQ in the kernel's include/uapi/linux/tcp.h.
type recvArgs struct {
	msg     unix.Msghdr
	vec     unix.Iovec
	control [unix.SizeofCmsghdr + 8]byte
}

// queueReportWorks reports whether the kernel counts a pending FIN as a byte that is left. Linux does since 5.1.
// Older kernels may not, and gVisor, which reports itself as Linux 4.4, does not.
var queueReportWorks = sync.OnceValue(func() bool {
	var name unix.Utsname
	if unix.Uname(&name) != nil {
		return false
	}
	return atLeast(unix.ByteSliceToString(name.Release[:]), 5, 1)
})

// atLeast compares a kernel's release, such as 6.1.0-13-amd64, with a version.
func atLeast(release string, major, minor int) bool {
	first, rest, _ := strings.Cut(release, ".")
	if end := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' }); end >= 0 {
		rest = rest[:end]
	}
	hasMajor, err := strconv.Atoi(first)
	hasMinor, failed := strconv.Atoi(rest)
	return err == nil && failed == nil && (hasMajor > major || hasMajor == major && hasMinor >= minor)
}

// reportQueue asks the kernel to report what is left in the receive queue. It returns whether the kernel does.
func reportQueue(fd uintptr) bool {
	return queueReportWorks() && unix.SetsockoptInt(int(fd), unix.SOL_TCP, unix.TCP_INQ, 1) == nil
}

// readFD reads into b. left is how many bytes remain to be read, where a FIN counts as one; it is negative if that is
// not known. reported is what reportQueue returned: other sockets than TCP's must not be asked for control messages,
// which can bring file descriptors.
func readFD(fd uintptr, b *buffer, reported bool) (n, left int, err error) {
	if reported {
		r := &b.recvArgs
		r.vec.Base = &b.bytes[0]
		r.vec.SetLen(len(b.bytes))
		r.msg.Iov = &r.vec
		r.msg.SetIovlen(1)
		r.msg.Control = &r.control[0]
		r.msg.SetControllen(len(r.control))
		n, err = syscallNoWait(unix.SYS_RECVMSG, fd, unsafe.Pointer(&r.msg), unix.MSG_DONTWAIT, 0, len(b.bytes))
		if err == nil {
			raceRead(fd, b.bytes[:n])
		}
		return n, r.left(), err
	}
	for {
		n, err = syscall.Read(int(fd), b.bytes)
		if err != unix.EINTR {
			return max(0, n), -1, err
		}
	}
}

// left returns the number of bytes that the kernel reported as left; -1 if it reported none.
func (r *recvArgs) left() int {
	head := (*unix.Cmsghdr)(unsafe.Pointer(&r.control))
	if r.msg.Controllen < unix.SizeofCmsghdr+4 || head.Level != unix.SOL_TCP || head.Type != unix.TCP_CM_INQ {
		return -1
	}
	return int(int32(binary.NativeEndian.Uint32(r.control[unix.SizeofCmsghdr:])))
}

// writeFD uses send(2), which is slightly cheaper than write(2).
func writeFD(fd uintptr, p []byte) (int, error) {
	raceWrite()
	return syscallNoWait(unix.SYS_SENDTO, fd, unsafe.Pointer(unsafe.SliceData(p)), len(p),
		unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, len(p))
}

// rawCallBytes is the maximum number of bytes for a system call that is made without telling the scheduler. Copying
// them takes a few microseconds.
const rawCallBytes = 64 << 10

// syscallNoWait makes a system call that does not block, and that copies at most the given number of bytes.
func syscallNoWait(number, fd uintptr, what unsafe.Pointer, third, fourth, copies int) (int, error) {
	for {
		var n uintptr
		var errno unix.Errno
		if copies <= rawCallBytes {
			n, _, errno = unix.RawSyscall6(number, fd, uintptr(what), uintptr(third), uintptr(fourth), 0, 0)
		} else {
			n, _, errno = unix.Syscall6(number, fd, uintptr(what), uintptr(third), uintptr(fourth), 0, 0)
		}
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// stopHandshakes keeps new clients out of ln's accept queue, so that it can be emptied. For TCP a filter drops each
// SYN; handshakes in progress complete. The filter looks at the flags in the TCP header (RFC 9293, 3.1: byte 13); see
// socket(7), SO_ATTACH_FILTER. For a Unix socket the kernel refuses clients after shutdown(2).
func stopHandshakes(ln net.Listener) error {
	if knownAddr(ln.Addr()).Network() == "unix" {
		return controlListener(ln, func(fd int) error { return unix.Shutdown(fd, unix.SHUT_RD) })
	}
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
	return controlListener(ln, func(fd int) error {
		return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
			&unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]})
	})
}

// handshakesInProgress reports whether TCP handshakes with ln are in progress. A client counts itself as connected as
// soon as it has received the SYN-ACK. The kernel lists them in state SYN_RECV (proc(5), /proc/net/tcp). With
// SYN cookies it keeps no state, so those clients cannot be seen.
func handshakesInProgress(ln net.Listener) bool {
	addr, ok := ln.Addr().(*net.TCPAddr)
	if !ok {
		return false
	}
	for _, name := range []string{"tcp", "tcp6"} {
		f, err := os.Open("/proc/thread-self/net/" + name)
		if err != nil {
			continue
		}
		found := listsHandshake(bufio.NewScanner(f), addr.Port)
		_ = f.Close()
		if found {
			return true
		}
	}
	return false
}

// listsHandshake looks for a connection to port in state SYN_RECV, which is 3.
func listsHandshake(lines *bufio.Scanner, port int) bool {
	suffix := fmt.Sprintf(":%04X", port)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) > 3 && fields[3] == "03" && strings.HasSuffix(fields[1], suffix) {
			return true
		}
	}
	return false
}

// acceptQueue returns the length of ln's accept queue and its limit. For a listener the kernel reports them as
// tcpi_unacked and tcpi_sacked (tcp_get_info in net/ipv4/tcp.c).
func acceptQueue(ln net.Listener) (length, limit int, ok bool) {
	err := controlListener(ln, func(fd int) error {
		info, err := tcpInfo(fd)
		if err == nil {
			length, limit = int(info.Unacked), int(info.Sacked)
		}
		return err
	})
	return length, limit, err == nil
}

// tcpInfo reads TCP_INFO. The error is errors.ErrUnsupported on systems that fill in only its beginning, such as qemu-user.
func tcpInfo(fd int) (*unix.TCPInfo, error) {
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err == nil && info.Snd_cwnd == 0 { // on Linux it is at least 1, also for a listener
		return nil, errUnsupported
	}
	return info, err
}

// A sendQueueReader reads the send queues of sockets, one after another. For each it allocates only the syscall.RawConn
// that package net makes.
type sendQueueReader struct {
	isUnix bool
	info   sendQueueInfo
	err    error
	readFD func(fd uintptr) // bound once
}

func newSendQueueReader() *sendQueueReader {
	r := new(sendQueueReader)
	r.readFD = r.readDescriptor
	return r
}

// read returns how much data is on its way to the peer. The unit is bytes or segments for TCP, and bytes of memory for a
// Unix socket.
func (r *sendQueueReader) read(nc net.Conn) (q sendQueueInfo, ok bool) {
	raw := rawConn(nc)
	if raw == nil {
		return q, false
	}
	_, r.isUnix = nc.(*net.UnixConn)
	err := raw.Control(r.readFD)
	return r.info, err == nil && r.err == nil
}

func (r *sendQueueReader) readDescriptor(fd uintptr) {
	// The ioctl comes first, because usually nothing waits and TCP_INFO takes memory.
	var waiting uint32
	waiting, r.err = unix.IoctlGetUint32(int(fd), unix.SIOCOUTQ)
	r.info = sendQueueInfo{waiting: int(waiting), acked: uint64(waiting)}
	if r.err != nil || r.isUnix || waiting == 0 {
		return
	}
	var info *unix.TCPInfo
	switch info, r.err = tcpInfo(int(fd)); {
	case r.err == nil:
		r.info = sendQueueInfo{waiting: int(info.Unacked) + int(info.Notsent_bytes), acked: info.Bytes_acked}
	case errors.Is(r.err, errUnsupported):
		r.err = nil
	}
}

// setOrphanTimeout bounds how long the kernel keeps unsent data after the close: TCP_USER_TIMEOUT, tcp(7).
func setOrphanTimeout(nc net.Conn) {
	if tcp, ok := nc.(*net.TCPConn); ok {
		setSocketOption(tcp, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(orphanTimeout/time.Millisecond))
	}
}

func setSocketOption(sc syscall.Conn, level, option, value int) {
	if raw, err := sc.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), level, option, value) })
	}
}

// readSocketOptions reads the settings of an inherited listener, which package net replaces on accepted connections.
func readSocketOptions(ln net.Listener) (o socketOptions) {
	if knownAddr(ln.Addr()).Network() == "unix" {
		return o
	}
	err := controlListener(ln, func(fd int) error {
		var errs [5]error
		get := func(i, level, option int) (n int) {
			n, errs[i] = unix.GetsockoptInt(fd, level, option)
			return n
		}
		o.keepAlive = net.KeepAliveConfig{
			Enable:   get(0, unix.SOL_SOCKET, unix.SO_KEEPALIVE) != 0,
			Idle:     time.Duration(get(1, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE)) * time.Second,
			Interval: time.Duration(get(2, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL)) * time.Second,
			Count:    get(3, unix.IPPROTO_TCP, unix.TCP_KEEPCNT),
		}
		o.noDelay = get(4, unix.IPPROTO_TCP, unix.TCP_NODELAY) != 0
		return errors.Join(errs[:]...)
	})
	o.known = err == nil
	return o
}

func peerCredentials(nc net.Conn) (cred Credentials, ok bool) {
	uc, ok := nc.(*net.UnixConn)
	if !ok {
		return cred, false
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return cred, false
	}
	failed := raw.Control(func(fd uintptr) {
		var u *unix.Ucred
		if u, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			cred = Credentials{PID: int(u.Pid), UID: int(u.Uid), GID: int(u.Gid)}
		}
	})
	return cred, failed == nil && err == nil
}
