package load

import (
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A receiver is what it takes to learn, with what is read from a socket, when it had
// come.
type receiver struct {
	msg     unix.Msghdr
	vec     unix.Iovec
	control [unix.SizeofCmsghdr + unsafe.Sizeof(unix.Timespec{})]byte
}

// receive reads from a socket that does not block.
func (r *receiver) receive(fd int, p []byte) (int, error) {
	r.vec.Base = &p[0]
	r.vec.SetLen(len(p))
	r.msg.Iov = &r.vec
	r.msg.SetIovlen(1)
	r.msg.Control = &r.control[0]
	r.msg.SetControllen(len(r.control))
	return raw(unix.SYS_RECVMSG, fd, unsafe.Pointer(&r.msg), unix.MSG_DONTWAIT, 0)
}

// raw makes a system call that the scheduler is not told of. To tell it wakes up its
// monitor now and then, which costs as much as the call, even one that waits. In
// return the goroutine keeps its processor while it waits, for up to sweepEvery; so
// there must be others.
func raw(trap uintptr, fd int, p unsafe.Pointer, n, more uintptr) (int, error) {
	r, _, errno := unix.RawSyscall6(trap, uintptr(fd), uintptr(p), n, more, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(r), nil
}

// ago returns how long before now the last that was read had come; zero when the
// kernel does not tell, or its clock was set meanwhile.
func (r *receiver) ago() time.Duration {
	if int(r.msg.Controllen) < len(r.control) {
		return 0
	}
	head := (*unix.Cmsghdr)(unsafe.Pointer(&r.control[0]))
	if head.Level != unix.SOL_SOCKET || head.Type != unix.SO_TIMESTAMPNS {
		return 0
	}
	came := *(*unix.Timespec)(unsafe.Pointer(&r.control[unix.SizeofCmsghdr]))
	ago := time.Duration(time.Now().UnixNano() - came.Nano())
	if ago < 0 || ago > time.Minute {
		return 0
	}
	return ago
}
