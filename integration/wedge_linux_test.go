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

// controlUnit is where echod-control.socket listens, as seen from here.
func (s *systemd) controlUnit() string { return "/proc/" + s.pid + "/root/run/echod-control.sock" }

// freshWithControl is fresh, with the control socket of its own unit.
func (s *systemd) freshWithControl(t *testing.T) {
	t.Helper()
	s.ctl(t, "stop", "echod.socket", "echod.service")
	s.ctl(t, "daemon-reload")
	s.ctl(t, "start", "echod-control.socket")
	t.Cleanup(func() { s.ctl(t, "stop", "echod-control.socket", "echod.service") })
	s.fresh(t)
}

// The service can neither open this socket nor choose who may.
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
	if r := run(t, s.command("/run/test/echod", "ctl", "status")); r.code != 0 { // which looks for it by itself
		t.Errorf("echod ctl status: %+v", r)
	}
	pid, restarts := s.property(t, "MainPID"), s.restarts(t)
	first := s.watchdogAt(t)
	poll(t, "the watchdog to be told for longer than WatchdogSec", func() bool { return s.watchdogAt(t)-first > 3*time.Second })
	if s.property(t, "MainPID") != pid || s.restarts(t) != restarts {
		t.Error("the watchdog has ended a process that was alive")
	}
	s.ctl(t, "restart", "echod.service") // the socket stays
	st, err = plane.Status(within(t, patience))
	check(t, err)
	if strconv.Itoa(st.PID) == pid {
		t.Error("the old process answers")
	}
}

// watchdogAt is when systemd was told last that the service is alive, since the machine was started.
func (s *systemd) watchdogAt(t *testing.T) time.Duration {
	t.Helper()
	us, err := strconv.ParseInt(s.property(t, "WatchdogTimestampMonotonic"), 10, 64)
	check(t, err)
	return time.Duration(us) * time.Microsecond
}

// A process that runs, and whose accept loop or control plane does not come round any more. Both are wedged in the same way: systemd shares
// its sockets with the service, and one that is made to block holds up whoever accepts from it, for good.
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
				t.Error("the journal does not say that it was not alive")
			}
		})
	}
}

// makeBlocking makes the listening socket of systemd's blocking whose address isIt says so of.
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
