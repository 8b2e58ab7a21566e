package load

import (
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

func resolve(address string) (*unix.SockaddrInet4, error) {
	ap, err := netip.ParseAddrPort(address)
	if err != nil || !ap.Addr().Is4() {
		return nil, fmt.Errorf("address %q: want IPv4 and a port, such as 127.0.0.1:7000", address)
	}
	return &unix.SockaddrInet4{Addr: ap.Addr().As4(), Port: int(ap.Port())}, nil
}

// source is the loopback address that the nth connection comes from. There are so many of them that no
// pair of addresses and ports is used again while the kernel remembers it, for a minute: it would
// now and then let such a connection wait for a second.
func source(n int) *unix.SockaddrInet4 {
	const each = 250
	return &unix.SockaddrInet4{Addr: [4]byte{127, 0, byte(1 + n/each%each), byte(1 + n%each)}}
}

// connect opens the nth connection to target, and leaves it non-blocking.
func connect(target *unix.SockaddrInet4, n int, wait bool) (fd int, err error) {
	kind := unix.SOCK_STREAM | unix.SOCK_CLOEXEC
	if !wait {
		kind |= unix.SOCK_NONBLOCK
	}
	fd, err = unix.Socket(unix.AF_INET, kind, 0)
	if err != nil {
		return -1, fmt.Errorf("opening a socket: %w", err)
	}
	for _, option := range []struct{ level, name int }{
		{unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT}, // a port is chosen by connect, which knows both ends
		{unix.SOL_TCP, unix.TCP_NODELAY},
	} {
		if err == nil {
			err = unix.SetsockoptInt(fd, option.level, option.name, 1)
		}
	}
	if err == nil {
		err = unix.Bind(fd, source(n))
	}
	if err == nil {
		err = unix.Connect(fd, target)
		if !wait && err == unix.EINPROGRESS {
			err = nil
		}
	}
	if err == nil && wait {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("connecting: %w", err)
	}
	return fd, nil
}

// cpuTime is the user and system time that a process has used so far; its id 0 means this one.
func cpuTime(pid int) (time.Duration, error) {
	// The clock of a process, as clock_getcpuclockid(3) makes it; /proc counts in hundredths of a second only.
	const scheduled = 2
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|scheduled), &ts); err != nil {
		return 0, fmt.Errorf("reading the CPU time of process %d: %w", pid, err)
	}
	return time.Duration(ts.Nano()), nil
}
