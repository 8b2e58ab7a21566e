package load

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fileLimit returns how many files this process may have open, and how many it has.
func fileLimit() (limit, used int) {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return 0, 0
	}
	return int(min(r.Cur, 1<<30)), openFiles()
}

// localPorts returns how many connections to one address this machine can have.
func localPorts() int {
	text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		return 0
	}
	var low, high int
	if _, err := fmt.Sscan(string(text), &low, &high); err != nil || high < low {
		return 0
	}
	return high - low + 1
}

// newPoller returns the poller that costs the least. raw says that connections are
// plain sockets.
func newPoller(raw, exclusive bool, p pace) (poller, error) {
	if !raw {
		return newConnPoller(), nil
	}
	return newEpoll(exclusive, p)
}

// An epoll serves sockets on the goroutine of its worker, with one read for
// everything that has arrived and one write for everything that is due.
type epoll struct {
	fd     int
	event  int // an eventfd, for wake
	timer  int // a timerfd: epoll_wait(2) waits for whole milliseconds
	users  []*user
	events [256]unix.EpollEvent
	batch  []*user

	exclusive bool // it may keep its processor while it waits; see rawSyscall
	pace      pace
	ticks     int  // a timerfd that fires at each tick of pace, or -1
	ticking   bool // ticks is set
	receiver  receiver
}

// What an event is about if it is not about a user.
const (
	aboutWake = -1 - iota
	aboutTimer
)

func newEpoll(exclusive bool, pc pace) (_ *epoll, err error) {
	p := &epoll{exclusive: exclusive, pace: pc, fd: -1, event: -1, timer: -1, ticks: -1}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	if p.fd, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("creating an epoll instance: %w", err)
	}
	if p.event, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, fmt.Errorf("creating an eventfd: %w", err)
	}
	if p.timer, err = unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK); err != nil {
		return nil, fmt.Errorf("creating a timerfd: %w", err)
	}
	if pc.every > 0 {
		if p.ticks, err = unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC); err != nil {
			return nil, fmt.Errorf("creating a timerfd: %w", err)
		}
	}
	for about, fd := range map[int32]int{aboutWake: p.event, aboutTimer: p.timer} {
		// These are edge-triggered, so they need not be read.
		if err = unix.EpollCtl(p.fd, unix.EPOLL_CTL_ADD, fd,
			&unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: about}); err != nil {
			return nil, fmt.Errorf("watching a timer: %w", err)
		}
	}
	return p, nil
}

// add duplicates the socket and closes conn. Otherwise the runtime's poller would wake
// up for it as well.
func (p *epoll) add(conn net.Conn, u *user) (socket, error) {
	defer conn.Close()
	rawConn, err := conn.(syscall.Conn).SyscallConn()
	if err != nil {
		return nil, err
	}
	s := &fdSocket{epoll: p, fd: -1, about: u.slot}
	var dupErr error
	if err := rawConn.Control(func(fd uintptr) {
		s.fd,
			dupErr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
	}); err != nil {
		return nil, err
	}
	if dupErr != nil {
		return nil, os.NewSyscallError("fcntl", dupErr)
	}
	// without a timestamp, what is read counts as just arrived
	_ = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1)
	if err := s.control(unix.EPOLL_CTL_ADD, unix.EPOLLIN|unix.EPOLLRDHUP); err != nil {
		unix.Close(s.fd)
		return nil, err
	}
	for len(p.users) <= u.slot {
		p.users = append(p.users, nil)
	}
	p.users[u.slot] = u
	return s, nil
}

func (p *epoll) wait(timeout time.Duration) ([]*user, error) {
	ms := int((timeout + time.Millisecond - 1) / time.Millisecond)
	switch {
	case p.ticks < 0 || timeout <= 0 || timeout >= 5*time.Millisecond:
	case timeout <= p.pace.every:
		// The next message is due so soon that everything else can wait until then:
		// waking up for an echo costs more than the echo. The kernel notes when it came.
		if err := p.awaitTick(); err != nil {
			return nil, err
		}
		ms = 0
	default:
		spec := unix.ItimerSpec{Value: unix.NsecToTimespec(int64(timeout))}
		if err := unix.TimerfdSettime(p.timer, 0, &spec, nil); err != nil {
			return nil, fmt.Errorf("setting a timer: %w", err)
		}
		ms = -1
	}
	n, err := p.block(unix.SYS_EPOLL_PWAIT, p.fd, unsafe.Pointer(&p.events), uintptr(len(p.events)),
		uintptr(ms))
	if err != nil && !errors.Is(err, unix.EINTR) {
		return nil, fmt.Errorf("waiting for the server: %w", err)
	}
	p.batch = p.batch[:0]
	for _, e := range p.events[:max(n, 0)] {
		if e.Fd >= 0 {
			p.batch = append(p.batch, p.users[e.Fd])
		}
	}
	return p.batch, nil
}

// awaitTick waits for the next tick of the schedule.
func (p *epoll) awaitTick() error {
	if !p.ticking {
		every := p.pace.every
		next := every - time.Since(p.pace.began)%every
		spec := unix.ItimerSpec{
			Value:    unix.NsecToTimespec(int64(next)),
			Interval: unix.NsecToTimespec(int64(every)),
		}
		if err := unix.TimerfdSettime(p.ticks, 0, &spec, nil); err != nil {
			return fmt.Errorf("setting a timer: %w", err)
		}
		p.ticking = true
	}
	var fired [8]byte
	if _, err := p.block(unix.SYS_READ, p.ticks, unsafe.Pointer(&fired), unsafe.Sizeof(fired),
		0); err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("waiting for a timer: %w", err)
	}
	return nil
}

// block makes a system call that waits.
func (p *epoll) block(trap uintptr, fd int, what unsafe.Pointer, n, more uintptr) (int, error) {
	if p.exclusive {
		return rawSyscall(trap, fd, what, n, more)
	}
	r, _, errno := unix.Syscall6(trap, uintptr(fd), uintptr(what), n, more, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(r), nil
}

func (p *epoll) wake() {
	_, _ = unix.Write(p.event, []byte{1, 0, 0, 0, 0, 0, 0, 0}) // fails only if a wake is pending
}

func (p *epoll) close() {
	for _, fd := range []int{p.fd, p.event, p.timer, p.ticks} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// rawSyscall makes a system call without telling the scheduler. Telling it costs as much
// as a short call. In return the goroutine keeps its processor while it waits, for up to
// sweepEvery, so there must be others.
func rawSyscall(trap uintptr, fd int, p unsafe.Pointer, n, more uintptr) (int, error) {
	r, _, errno := unix.RawSyscall6(trap, uintptr(fd), uintptr(p), n, more, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(r), nil
}

// A receiver reads from sockets and learns when the data had arrived.
type receiver struct {
	msg     unix.Msghdr
	vec     unix.Iovec
	control [unix.SizeofCmsghdr + unsafe.Sizeof(unix.Timespec{})]byte
}

// receive reads from a socket without blocking.
func (r *receiver) receive(fd int, p []byte) (int, error) {
	r.vec.Base = &p[0]
	r.vec.SetLen(len(p))
	r.msg.Iov = &r.vec
	r.msg.SetIovlen(1)
	r.msg.Control = &r.control[0]
	r.msg.SetControllen(len(r.control))
	return rawSyscall(unix.SYS_RECVMSG, fd, unsafe.Pointer(&r.msg), unix.MSG_DONTWAIT, 0)
}

// ago returns how long ago the last byte that was read arrived. It returns zero if the
// kernel does not report it, or if its clock was set meanwhile.
func (r *receiver) ago() time.Duration {
	if int(r.msg.Controllen) < len(r.control) {
		return 0
	}
	header := (*unix.Cmsghdr)(unsafe.Pointer(&r.control[0]))
	if header.Level != unix.SOL_SOCKET || header.Type != unix.SO_TIMESTAMPNS {
		return 0
	}
	arrived := *(*unix.Timespec)(unsafe.Pointer(&r.control[unix.SizeofCmsghdr]))
	ago := time.Duration(time.Now().UnixNano() - arrived.Nano())
	if ago < 0 || ago > time.Minute {
		return 0
	}
	return ago
}

// An fdSocket is a stream socket, by its file descriptor.
type fdSocket struct {
	epoll   *epoll
	fd      int
	about   int // the user's slot
	waiting bool
}

func (s *fdSocket) control(op int, events uint32) error {
	e := unix.EpollEvent{Events: events, Fd: int32(s.about)}
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(s.epoll.fd, op, s.fd, &e))
}

func (s *fdSocket) read(p []byte) (n int, ago time.Duration, err error) {
	r := &s.epoll.receiver
	for {
		n, err := r.receive(s.fd, p)
		switch {
		case err == nil && n == 0:
			return 0, 0, io.EOF
		case err == nil:
			return n, r.ago(), nil
		case errors.Is(err, unix.EAGAIN):
			return 0, 0, errWouldBlock
		case !errors.Is(err, unix.EINTR):
			return 0, 0, os.NewSyscallError("read", err)
		}
	}
}

func (s *fdSocket) write(p []byte) (int, error) {
	for {
		n, err := rawSyscall(unix.SYS_WRITE, s.fd, unsafe.Pointer(&p[0]), uintptr(len(p)), 0)
		switch {
		case err == nil:
			return n, nil
		case errors.Is(err, unix.EAGAIN):
			return 0, errWouldBlock
		case !errors.Is(err, unix.EINTR):
			return 0, os.NewSyscallError("write", err)
		}
	}
}

func (s *fdSocket) awaitRoom(on bool) error {
	if s.waiting == on {
		return nil
	}
	s.waiting = on
	events := uint32(unix.EPOLLIN | unix.EPOLLRDHUP)
	if on {
		events |= unix.EPOLLOUT
	}
	return s.control(unix.EPOLL_CTL_MOD, events)
}

func (s *fdSocket) closeWrite() error {
	return os.NewSyscallError("shutdown", unix.Shutdown(s.fd, unix.SHUT_WR))
}

func (s *fdSocket) close() { unix.Close(s.fd) }
