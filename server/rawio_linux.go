package server

import (
	"encoding/binary"
	"strconv"
	"strings"
	"sync"
	"syscall"
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

// tellsLeft reports whether the kernel can be believed that nothing is left, which takes that it counts a pending end of
// stream. Old kernels may not, and gVisor, which calls itself Linux 4.4, does not.
var tellsLeft = sync.OnceValue(func() bool {
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

// announceLeft makes the kernel tell what is left, and reports whether it does.
func announceLeft(fd uintptr) bool {
	return tellsLeft() && unix.SetsockoptInt(int(fd), unix.SOL_TCP, unix.TCP_INQ, 1) == nil
}

// readFD reads into b. Left says how much there is still to be read, where an end of stream counts as a byte; it is negative where
// that is not known. announced is what announceLeft said: a socket that is not TCP's is not to be asked for control messages,
// which can bring file descriptors.
func readFD(fd uintptr, b *buffer, announced bool) (n, left int, err error) {
	if announced {
		r := &b.receiver
		r.vec.Base = &b.bytes[0]
		r.vec.SetLen(len(b.bytes))
		r.msg.Iov = &r.vec
		r.msg.SetIovlen(1)
		r.msg.Control = &r.control[0]
		r.msg.SetControllen(len(r.control))
		n, err = once(unix.SYS_RECVMSG, fd, unsafe.Pointer(&r.msg), unix.MSG_DONTWAIT, 0, len(b.bytes))
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

// left is what the kernel said is left; -1 when it did not say.
func (r *receiver) left() int {
	head := (*unix.Cmsghdr)(unsafe.Pointer(&r.control))
	if r.msg.Controllen < unix.SizeofCmsghdr+4 || head.Level != unix.SOL_TCP || head.Type != unix.TCP_CM_INQ {
		return -1
	}
	return int(int32(binary.NativeEndian.Uint32(r.control[unix.SizeofCmsghdr:])))
}

// writeFD uses send(2), which has a little less to do than write(2).
func writeFD(fd uintptr, p []byte) (int, error) {
	raceWrite()
	return once(unix.SYS_SENDTO, fd, unsafe.Pointer(unsafe.SliceData(p)), len(p), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, len(p))
}

// quick is how many bytes a system call may copy that the scheduler is not told of: it takes some microseconds.
const quick = 64 << 10

// once makes a system call that does not wait, and copies so many bytes at the most.
func once(call, fd uintptr, what unsafe.Pointer, third, fourth, copies int) (int, error) {
	for {
		var n uintptr
		var errno unix.Errno
		if copies <= quick {
			n, _, errno = unix.RawSyscall6(call, fd, uintptr(what), uintptr(third), uintptr(fourth), 0, 0)
		} else {
			n, _, errno = unix.Syscall6(call, fd, uintptr(what), uintptr(third), uintptr(fourth), 0, 0)
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
