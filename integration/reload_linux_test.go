package integration

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"echod/control"
)

// TestReload reloads the real unit under a real systemd: the program is replaced, and no client notices.
func TestReload(t *testing.T) {
	slow(t)
	s := startSystemd(t, map[string]string{
		"echod.service":                       readFile(t, "../packaging/systemd/echod.service"),
		"echod.socket":                        readFile(t, "../packaging/systemd/echod.socket"),
		"echod-control.socket":                readFile(t, "../packaging/systemd/echod-control.socket"),
		"echod-control.socket.d/10-test.conf": "[Socket]\nSocketMode=0600\n", // the service itself cannot open it
		"echod.service.d/10-test.conf": "[Service]\nExecStart=\nExecStart=/run/test/echod serve\nWatchdogSec=2s\nTimeoutAbortSec=1s\n" +
			strings.ReplaceAll(reloadLines(t), "/usr/bin/echod", "/run/test/echod") +
			"Environment=ECHOD_GRACE=20s GORACE=atexit_sleep_ms=0\n",
	})
	t.Run("G12 clients and the accept queue continue", s.testReload)
	t.Run("it works with echod-control.socket", s.testReloadControlSocket)
	t.Run("one of two upgrades at once is refused", s.testReloadTwice)
	t.Run("the watchdog and signals know the successor", s.testReloadWatchdog)
	t.Run("a program that fails changes nothing", s.testReloadFails)
	t.Run("the end of the successor is noticed while its predecessor drains", s.testReloadCrash)
	if len(s.entries(t, "MESSAGE=WARNING: DATA RACE")) > 0 {
		t.Error("the race detector found a race")
	}
}

// reloadLines returns the unit's lines for a reload.
func reloadLines(t *testing.T) string {
	t.Helper()
	lines := regexp.MustCompile(`(?m)^ExecReload=.*\n`).FindAllString(readFile(t, "../packaging/systemd/echod.service"), -1)
	if len(lines) == 0 {
		t.Fatal("the unit has no ExecReload=")
	}
	return "ExecReload=\n" + strings.Join(lines, "")
}

// replace replaces the program that the service runs.
func (s *systemd) replace(t *testing.T, program string) {
	t.Helper()
	copyFile(t, program, filepath.Join("/proc", s.pid, "root/run/test/echod"))
}

// crowd connects n clients and waits until they are served.
func (s *systemd) crowd(t *testing.T, n int) []*peer {
	t.Helper()
	peers := make([]*peer, n)
	for i := range peers {
		peers[i] = s.peer(t)
	}
	return peers
}

// reload reloads the service, and checks that these clients are still served, and that another process serves them.
func (s *systemd) reload(t *testing.T, peers []*peer) {
	t.Helper()
	before := s.property(t, "MainPID")
	s.ctl(t, "reload", "echod.service")
	after := s.property(t, "MainPID")
	if after == before || after == "0" {
		t.Errorf("the main process is %s, it was %s", after, before)
	}
	each(t, len(peers), func(i int) error { return peers[i].echo(fmt.Sprintf("after the reload %d\n", i)) })
	if state, why := s.property(t, "ActiveState"), s.property(t, "Result"); state != "active" || why != "success" {
		t.Errorf("the service is %s, its result %s", state, why)
	}
}

func (s *systemd) testReload(t *testing.T) {
	s.fresh(t)
	restarts := s.restarts(t)
	peers := s.crowd(t, 100)
	stop, counted := make(chan struct{}), make(chan error, 1)
	n := 0
	go func() { // new clients come all the time
		for ; ; n++ {
			select {
			case <-stop:
				counted <- nil
				return
			default:
			}
			p, err := connect(s.addr)
			if err == nil {
				err = p.echo("new\n")
				_ = p.Close()
			}
			if err != nil {
				counted <- err
				return
			}
		}
	}()
	for range 3 {
		s.replace(t, built(t, echodBinary))
		s.reload(t, peers)
	}
	close(stop)
	check(t, <-counted)
	if n == 0 {
		t.Error("no client connected")
	}
	if s.restarts(t) != restarts {
		t.Error("systemd restarted the service")
	}
	s.awaitProperty(t, "StatusText", func(text string) bool { return strings.HasPrefix(text, "running: 100 connections, ") })
	plane := control.NewClient(s.socket)
	defer plane.Close()
	st, err := plane.Status(within(t, patience))
	check(t, err)
	check(t, balanced(st))
	if main := s.property(t, "MainPID"); fmt.Sprint(st.PID) != main {
		t.Errorf("process %d answers, the main process is %s", st.PID, main)
	}

	// A stop reaches the successor, and each client is told once.
	wait := s.background(t, "systemctl", "stop", "echod.service")
	each(t, len(peers), func(i int) error {
		if err := peers[i].expect("SHUTDOWN 20 SIGTERM\n"); err != nil {
			return err
		}
		return peers[i].leave()
	})
	if r := wait(); r.code != 0 {
		t.Errorf("systemctl stop: %+v", r)
	}
	if state, why := s.property(t, "ActiveState"), s.property(t, "Result"); state != "inactive" || why != "success" {
		t.Errorf("the service is %s, its result %s; want inactive, success", state, why)
	}
	t.Logf("%d clients connected during the reloads", n)
}

func (s *systemd) testReloadControlSocket(t *testing.T) {
	s.freshWithControl(t)
	peers := s.crowd(t, 10)
	for range 2 {
		s.reload(t, peers)
	}
	plane := control.NewClient(s.controlUnit())
	defer plane.Close()
	_, err := plane.Status(within(t, patience))
	check(t, err)
	each(t, len(peers), func(i int) error { return peers[i].leave() })
	// The socket belongs to systemd: it stays when the service stops, and starts the service again.
	s.ctl(t, "stop", "echod.service")
	_, err = plane.Status(within(t, patience))
	check(t, err)
}

func (s *systemd) testReloadTwice(t *testing.T) {
	s.fresh(t)
	peers := s.crowd(t, 10)
	var waits []func() result
	for range 2 {
		waits = append(waits, s.background(t, "systemctl", "reload", "echod.service"))
	}
	for _, wait := range waits {
		if r := wait(); r.code != 0 {
			t.Errorf("systemctl reload: %+v", r)
		}
	}
	// Without systemd, which does one reload after the other, the second is refused or comes after the first.
	pid := s.property(t, "MainPID")
	waits = nil
	for range 2 {
		waits = append(waits, s.background(t, "/run/test/echod", "ctl", "upgrade", "--pid", pid))
	}
	done := 0
	for _, wait := range waits {
		if r := wait(); r.code == 0 {
			done++
		} else if !strings.Contains(r.stdout, "in progress") && !strings.Contains(r.stdout, "is that of process") {
			t.Errorf("the second upgrade: %+v", r)
		}
	}
	if done != 1 {
		t.Errorf("%d of two upgrades of the same process succeeded", done)
	}
	each(t, len(peers), func(i int) error { return peers[i].echo("still here\n") })
}

func (s *systemd) testReloadWatchdog(t *testing.T) {
	s.fresh(t)
	peers := s.crowd(t, 10)
	s.reload(t, peers)
	before := s.restarts(t)
	pid := s.property(t, "MainPID")
	environ := run(t, s.command("cat", "/proc/"+pid+"/environ")).stdout
	for _, name := range []string{"WATCHDOG_PID=", "LISTEN_PID=", "LISTEN_FDS="} {
		if strings.Contains(environ, name) {
			t.Errorf("the successor has %s, which names its predecessor", name)
		}
	}
	first := s.property(t, "WatchdogTimestampMonotonic")
	s.awaitProperty(t, "WatchdogTimestampMonotonic", func(now string) bool { return now != first })
	if s.restarts(t) != before {
		t.Error("the watchdog restarted a healthy successor")
	}
	s.ctl(t, "kill", "--kill-whom=main", "-s", "STOP", "echod.service")
	poll(t, "a restart", func() bool { return s.restarts(t) > before })
	s.awaitProperty(t, "ActiveState", func(state string) bool { return state == "active" })
	s.peer(t)
}

func (s *systemd) testReloadFails(t *testing.T) {
	s.fresh(t)
	peers := s.crowd(t, 10)
	defer s.replace(t, built(t, echodBinary))
	pid := s.property(t, "MainPID")
	invocation := "_SYSTEMD_INVOCATION_ID=" + s.property(t, "InvocationID")
	dir := t.TempDir()
	const others = "#!/bin/sh\ncase $* in *ctl*|*--check*) exec /run/test/old \"$@\" ;; esac\n"
	for name, program := range map[string]string{
		"a program that exits":           others + "exit 3\n",
		"a wrong setting":                others + "export ECHOD_GRACE=soon\nexec /run/test/old serve\n",
		"a flag that it does not know":   others + "exec /run/test/old serve --unknown\n",
		"a configuration check fails":    "#!/bin/sh\necho the check failed >&2\nexit 1\n",
		"a program that is not for here": "not a program\n",
	} {
		copyFile(t, built(t, echodBinary), filepath.Join("/proc", s.pid, "root/run/test/old"))
		path := filepath.Join(dir, "echod")
		check(t, os.WriteFile(path, []byte(program), 0o755))
		s.replace(t, path)
		if r := run(t, s.command("systemctl", "reload", "echod.service")); r.code == 0 {
			t.Errorf("%s: the reload succeeded", name)
		}
		if now := s.property(t, "MainPID"); now != pid {
			t.Errorf("%s: the main process is %s, it was %s", name, now, pid)
		}
		if state := s.property(t, "ActiveState"); state != "active" {
			t.Errorf("%s: the service is %s", name, state)
		}
		each(t, len(peers), func(i int) error { return peers[i].echo("still here\n") })
		check(t, s.peer(t).leave())
	}
	text := run(t, s.command("journalctl", "--no-pager", "-o", "cat", invocation)).stdout
	for _, why := range []string{
		"echod: the upgrade was rolled back, and nothing has changed: starting the successor: the program on disk did not start, or does not support upgrades",
		`ECHOD_GRACE: invalid argument "soon"`, "unknown flag: --unknown", "the check failed",
	} {
		if !strings.Contains(text, why) {
			t.Errorf("the journal does not have %q:\n%s", why, text)
		}
	}
}

func (s *systemd) testReloadCrash(t *testing.T) {
	dir := filepath.Join("/proc", s.pid, "root/run/test")
	pool, addr := s.freshWithTLS(t, dir)
	c, err := tls.Dial("tcp", addr, &tls.Config{RootCAs: pool, ServerName: "localhost"})
	check(t, err)
	defer c.Close()
	check(t, c.SetDeadline(time.Now().Add(patience)))
	echo := func() error {
		if _, err := c.Write([]byte("secret\n")); err != nil {
			return err
		}
		got := make([]byte, len("secret\n"))
		_, err := c.Read(got)
		return err
	}
	check(t, echo())
	peers := s.crowd(t, 10)
	s.reload(t, peers)
	check(t, echo()) // the predecessor still serves it
	restarts := s.restarts(t)
	s.ctl(t, "kill", "--kill-whom=main", "-s", "KILL", "echod.service")
	// Systemd ends the predecessor too, which drains its client.
	got := make([]byte, 64)
	n, err := c.Read(got)
	if err != nil || !strings.HasPrefix(string(got[:n]), "SHUTDOWN ") {
		t.Errorf("the client of the predecessor got %q (%v), want a notice", got[:n], err)
	}
	check(t, c.CloseWrite())
	poll(t, "a restart", func() bool { return s.restarts(t) > restarts })
	s.awaitProperty(t, "ActiveState", func(state string) bool { return state == "active" })
	check(t, s.peer(t).leave())
}

// freshWithTLS is fresh with a further listener for TLS.
func (s *systemd) freshWithTLS(t *testing.T, dir string) (pool *x509.CertPool, addr string) {
	t.Helper()
	pool = certificate(t, dir, "localhost")
	for _, name := range []string{"cert.pem", "key.pem"} {
		check(t, os.Chmod(filepath.Join(dir, name), 0o644)) // for the service's user
	}
	addr = "127.0.0.1:" + freePorts(t, 1)[0]
	s.fresh(t, "Environment=ECHOD_LISTEN=tls://"+addr+" ECHOD_TLS_CERT=/run/test/cert.pem ECHOD_TLS_KEY=/run/test/key.pem ECHOD_UPGRADE_KEEP=1m")
	return pool, addr
}
