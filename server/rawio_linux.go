package server

import (
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A receiver is what it takes to learn, with what is read from a socket, how much there is left: that
// saves the second read which would find nothing. See TCP_INQ in the kernel's include/uapi/linux/tcp.h.
type receiver struct {
	msg     unix.Msghdr
	vec     unix.Iovec
	control [unix.SizeofCmsghdr + 8]byte
}

// announceLeft makes the kernel tell what is left, and reports whether it does.
func announceLeft(fd uintptr) bool {
	return unix.SetsockoptInt(int(fd), unix.SOL_TCP, unix.TCP_INQ, 1) == nil
}

// readFD reads into b. More is false when it is known that there is nothing left to read, nor an end of stream.
// announced is what announceLeft said: a socket that is not TCP's is not to be asked for control messages, which
// can bring file descriptors.
func readFD(fd uintptr, b *buffer, announced bool) (n int, more bool, err error) {
	if !announced {
		n, err = once(unix.SYS_READ, fd, unsafe.Pointer(&b.bytes[0]), len(b.bytes), 0)
		return n, true, err
	}
	r := &b.receiver
	r.vec.Base = &b.bytes[0]
	r.vec.SetLen(len(b.bytes))
	r.msg.Iov = &r.vec
	r.msg.SetIovlen(1)
	r.msg.Control = &r.control[0]
	r.msg.SetControllen(len(r.control))
	n, err = once(unix.SYS_RECVMSG, fd, unsafe.Pointer(&r.msg), 0, 0)
	return n, r.left() != 0, err
}

// left is how many bytes the kernel said are left, where a pending end of stream counts as one; -1 when it has
// not said.
func (r *receiver) left() int32 {
	head := (*unix.Cmsghdr)(unsafe.Pointer(&r.control))
	if r.msg.Controllen < unix.SizeofCmsghdr+4 || head.Level != unix.SOL_TCP || head.Type != unix.TCP_CM_INQ {
		return -1
	}
	return int32(binary.NativeEndian.Uint32(r.control[unix.SizeofCmsghdr:]))
}

// writeFD uses send(2), which has a little less to do than write(2).
func writeFD(fd uintptr, p []byte) (int, error) {
	return once(unix.SYS_SENDTO, fd, unsafe.Pointer(unsafe.SliceData(p)), len(p), unix.MSG_NOSIGNAL)
}

// once makes a system call that does not wait, so that the scheduler need not be told of it.
func once(call, fd uintptr, what unsafe.Pointer, length, flags int) (int, error) {
	for {
		n, _, errno := unix.RawSyscall6(call, fd, uintptr(what), uintptr(length), uintptr(flags), 0, 0)
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}
