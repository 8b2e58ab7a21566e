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

// newPoller returns the one that costs the least for connections of this kind.
func newPoller(tcp, exclusive bool, pace pace) (poller, error) {
	if !tcp {
		return newConnPoller(), nil
	}
	return newEpoll(exclusive, pace)
}

// An epoll serves TCP connections on the goroutine of its loop alone, by one read
// for all that has come and one write for all that is to go.
type epoll struct {
	fd     int
	event  int // an eventfd, for wake
	timer  int // a timerfd, since epoll_wait(2) waits for whole milliseconds
	users  []*user
	events [256]unix.EpollEvent
	batch  []*user

	exclusive bool // it need not give its processor to others while it waits
	pace      pace
	ticks     int  // a timerfd that fires at each moment of it, if it has any
	ticking   bool // it runs
	receiver  receiver
}

// What an event is about, if not a user.
const (
	aboutWake = -1 - iota
	aboutTimer
)

func newEpoll(exclusive bool, pace pace) (_ *epoll, err error) {
	p := &epoll{exclusive: exclusive, pace: pace, fd: -1, event: -1, timer: -1, ticks: -1}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	if p.fd, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("making an epoll instance: %w", err)
	}
	if p.event, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, fmt.Errorf("making an eventfd: %w", err)
	}
	if p.timer, err = unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK); err != nil {
		return nil, fmt.Errorf("making a timerfd: %w", err)
	}
	if pace.every > 0 {
		if p.ticks, err = unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC); err != nil {
			return nil, fmt.Errorf("making a timerfd: %w", err)
		}
	}
	for about, fd := range map[int32]int{aboutWake: p.event, aboutTimer: p.timer} {
		// Edge-triggered, so that nobody has to read them.
		if err = unix.EpollCtl(p.fd, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: about}); err != nil {
			return nil, fmt.Errorf("watching a timer: %w", err)
		}
	}
	return p, nil
}

// add takes the socket out of the runtime's poller, which would wake up for it too.
func (p *epoll) add(conn net.Conn, u *user) (socket, error) {
	defer conn.Close()
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err != nil {
		return nil, err
	}
	s := &fdSocket{epoll: p, fd: -1, about: u.slot}
	var dupErr error
	if err := raw.Control(func(fd uintptr) { s.fd, dupErr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
		return nil, err
	}
	if dupErr != nil {
		return nil, os.NewSyscallError("fcntl", dupErr)
	}
	_ = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1) // without, what was read has just come
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
		// Something is due so soon that all else can wait until then: to wake up for
		// each echo would cost more than the echo. The kernel notes when they came.
		if err := p.keepPace(); err != nil {
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
	n, err := p.block(unix.SYS_EPOLL_PWAIT, p.fd, unsafe.Pointer(&p.events), uintptr(len(p.events)), uintptr(ms))
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

// keepPace waits until the schedule's next moment.
func (p *epoll) keepPace() error {
	if !p.ticking {
		every := p.pace.every
		next := every - time.Since(p.pace.began)%every
		spec := unix.ItimerSpec{Value: unix.NsecToTimespec(int64(next)), Interval: unix.NsecToTimespec(int64(every))}
		if err := unix.TimerfdSettime(p.ticks, 0, &spec, nil); err != nil {
			return fmt.Errorf("setting a timer: %w", err)
		}
		p.ticking = true
	}
	var fired [8]byte
	if _, err := p.block(unix.SYS_READ, p.ticks, unsafe.Pointer(&fired), unsafe.Sizeof(fired), 0); err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("waiting for a timer: %w", err)
	}
	return nil
}

// block makes a system call that waits.
func (p *epoll) block(trap uintptr, fd int, what unsafe.Pointer, n, more uintptr) (int, error) {
	if p.exclusive {
		return raw(trap, fd, what, n, more)
	}
	r, _, errno := unix.Syscall6(trap, uintptr(fd), uintptr(what), n, more, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(r), nil
}

func (p *epoll) wake() {
	_, _ = unix.Write(p.event, []byte{1, 0, 0, 0, 0, 0, 0, 0}) // fails only when it is awake for sure
}

func (p *epoll) close() {
	for _, fd := range []int{p.fd, p.event, p.timer, p.ticks} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// An fdSocket is a TCP connection by its file descriptor.
type fdSocket struct {
	epoll *epoll
	fd    int
	about int // the user's slot
	room  bool
}

func (s *fdSocket) control(op int, events uint32) error {
	e := unix.EpollEvent{Events: events, Fd: int32(s.about)}
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(s.epoll.fd, op, s.fd, &e))
}

// read tells from the kernel's timestamp how long ago what it returns had come, so
// that this process may be late without making the server look slow.
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
		n, err := raw(unix.SYS_WRITE, s.fd, unsafe.Pointer(&p[0]), uintptr(len(p)), 0)
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
	if s.room == on {
		return nil
	}
	s.room = on
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
