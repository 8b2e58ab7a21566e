package integration

import (
	"errors"
	"net"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"echod/control"
)

// controlUnit is the path of echod-control.socket, outside systemd's mount namespace.
func (s *systemd) controlUnit() string { return "/proc/" + s.pid + "/root/run/echod-control.sock" }

// freshWithControl is fresh with the control socket of echod-control.socket.
func (s *systemd) freshWithControl(t *testing.T) {
	t.Helper()
	s.ctl(t, "stop", "echod.socket", "echod.service")
	s.ctl(t, "daemon-reload")
	s.ctl(t, "start", "echod-control.socket")
	t.Cleanup(func() { s.ctl(t, "stop", "echod-control.socket", "echod.service") })
	s.fresh(t)
}

// testControlSocket uses a control socket that systemd owns, with its own owner and mode.
func (s *systemd) testControlSocket(t *testing.T) {
	s.freshWithControl(t)
	check(t, s.peer(t).leave())
	plane := control.NewClient(s.controlUnit())
	defer plane.Close()
	st, err := plane.Status(within(t, patience))
	check(t, err)
	if st.State != "running" || st.Accepted != 1 {
		t.Errorf("the control socket says %s, %d accepted", st.State, st.Accepted)
	}
	if r := run(t, s.command("/run/test/echod", "ctl", "status")); r.code != 0 { // finds the socket by itself
		t.Errorf("echod ctl status: %+v", r)
	}
	pid, restarts := s.property(t, "MainPID"), s.restarts(t)
	first := s.watchdogAt(t)
	poll(t, "watchdog pings for longer than WatchdogSec", func() bool { return s.watchdogAt(t)-first > 3*time.Second })
	if s.property(t, "MainPID") != pid || s.restarts(t) != restarts {
		t.Error("the watchdog killed a process that was alive")
	}
	s.ctl(t, "restart", "echod.service") // the socket stays
	st, err = plane.Status(within(t, patience))
	check(t, err)
	if strconv.Itoa(st.PID) == pid {
		t.Error("the old process answers")
	}
}

// watchdogAt is the time of the last watchdog ping, since boot.
func (s *systemd) watchdogAt(t *testing.T) time.Duration {
	t.Helper()
	us, err := strconv.ParseInt(s.property(t, "WatchdogTimestampMonotonic"), 10, 64)
	check(t, err)
	return time.Duration(us) * time.Microsecond
}

// testWedge blocks an accept loop or the control plane of a running process, and waits for the watchdog's restart.
// systemd shares its sockets with the service: making one of them blocking blocks the service's accept for good.
func (s *systemd) testWedge(t *testing.T) {
	_, port, err := net.SplitHostPort(s.addr)
	check(t, err)
	for name, isIt := range map[string]func(unix.Sockaddr) bool{
		"AcceptLoop": func(at unix.Sockaddr) bool {
			in, ok := at.(*unix.SockaddrInet4)
			return ok && strconv.Itoa(in.Port) == port
		},
		"ControlPlane": func(at unix.Sockaddr) bool {
			un, ok := at.(*unix.SockaddrUnix)
			return ok && un.Name == "/run/echod-control.sock"
		},
	} {
		t.Run(name, func(t *testing.T) {
			s.freshWithControl(t)
			s.peer(t)
			before, invocation := s.restarts(t), "_SYSTEMD_INVOCATION_ID="+s.property(t, "InvocationID")
			s.makeBlocking(t, isIt)
			poll(t, "a restart", func() bool { return s.restarts(t) > before })
			s.awaitProperty(t, "ActiveState", func(state string) bool { return state == "active" })
			s.peer(t)
			if len(s.entries(t, invocation, "PRIORITY=3")) == 0 {
				t.Error("the journal has no error of the liveness check")
			}
		})
	}
}

// makeBlocking makes one of systemd's listening sockets blocking: the first for whose address isIt returns true.
func (s *systemd) makeBlocking(t *testing.T, isIt func(unix.Sockaddr) bool) {
	t.Helper()
	pid, err := strconv.Atoi(s.pid)
	check(t, err)
	process, err := unix.PidfdOpen(pid, 0)
	check(t, err)
	defer unix.Close(process)
	for n := range 512 {
		fd, err := unix.PidfdGetfd(process, n, 0)
		if errors.Is(err, unix.EBADF) {
			continue
		}
		check(t, err)
		defer unix.Close(fd)
		at, err := unix.Getsockname(fd)
		if err != nil || !isIt(at) {
			continue
		}
		if listens, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err == nil && listens == 1 {
			check(t, unix.SetNonblock(fd, false))
			return
		}
	}
	t.Fatal("systemd has no such socket")
}
