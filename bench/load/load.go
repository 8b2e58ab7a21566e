// Package load is the benchmark's load generator: one thread with an epoll loop, fast enough to keep a server busy
// from another CPU. It checks every byte that comes back.
//
// All functions run on the caller's goroutine and start no others.
package load

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// A Spec describes a load.
type Spec struct {
	Address string // numeric, IPv4: 127.0.0.1:7000
	PID     int    // the server's process, whose CPU time is measured
	Conns   int    // concurrent connections
	Size    int    // bytes of a message
	Depth   int    // messages in flight on each connection
	Churn   bool   // each connection carries one message
	Notice  string // a line that may come between echoes; empty: none may

	TLS       bool // over TLS; Depth and Notice are not used
	BehindPID int  // a server behind the server, whose CPU time counts too; zero: none

	Warmup   time.Duration // not measured
	Duration time.Duration // measured
	Timeout  time.Duration // for the last echoes; zero means 10 s

	// Corrected corrects latencies for coordinated omission, as HdrHistogram does: it accounts for messages that were
	// not sent while the load waited for an echo.
	Corrected bool
}

// A Result is what was measured after the warm-up.
type Result struct {
	Echoes    int64         // complete and correct echoes
	Elapsed   time.Duration // wall time
	ServerCPU time.Duration // user and system time of the server's process
	LoadCPU   time.Duration // of this process
	// Latencies: from the write of a message, or with Churn from the connect, to the read of its last byte.
	P50, P99, P999, Max time.Duration
}

// CPUPerEcho returns the server's CPU time per message.
func (r Result) CPUPerEcho() time.Duration { return r.ServerCPU / time.Duration(max(1, r.Echoes)) }

// PerSecond returns the echoes per second.
func (r Result) PerSecond() float64 { return float64(r.Echoes) / r.Elapsed.Seconds() }

// Each connection sends an endless random pattern from a different offset. So a byte that is lost, duplicated or
// misdelivered is noticed.
const (
	period  = 65521   // a prime, so that no message size divides it
	longest = 1 << 20 // bytes that expect returns at most
)

var pattern = func() []byte {
	random := rand.New(rand.NewPCG(1, 2))
	p := make([]byte, period+longest)
	for i := range period {
		p[i] = byte(random.Uint32())
	}
	for i := period; i < len(p); i += period {
		copy(p[i:], p[:period])
	}
	return p
}()

// expect returns the n bytes that are sent from offset on; n is at most longest.
func expect(phase int, offset int64, n int) []byte {
	at := int((int64(phase) + offset) % period)
	return pattern[at : at+n]
}

// matches reports whether got is what was sent from offset on.
func matches(phase int, offset int64, got []byte) bool {
	return bytes.Equal(got, expect(phase, offset, len(got)))
}

func resolve(address string) (*unix.SockaddrInet4, error) {
	ap, err := netip.ParseAddrPort(address)
	if err != nil || !ap.Addr().Is4() {
		return nil, fmt.Errorf("address %q: want IPv4 and a port, such as 127.0.0.1:7000", address)
	}
	return &unix.SockaddrInet4{Addr: ap.Addr().As4(), Port: int(ap.Port())}, nil
}

// source returns the loopback address of the nth connection. There are many, so that no pair of addresses and ports
// is used again within the minute for which the kernel remembers it; reusing one sometimes delays the connection by a
// second.
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
		{unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT}, // connect chooses the port, knowing both ends
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

// cpuTime returns the user and system time of a process; pid 0 is this process.
func cpuTime(pid int) (time.Duration, error) {
	// The process's clock, as clock_getcpuclockid(3) computes it. /proc counts only in hundredths of a second.
	const scheduled = 2
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|scheduled), &ts); err != nil {
		return 0, fmt.Errorf("reading the CPU time of process %d: %w", pid, err)
	}
	return time.Duration(ts.Nano()), nil
}
