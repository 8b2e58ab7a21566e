package integration

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"echod/control"
)

// TestSystemd runs the real units under a real systemd.
func TestSystemd(t *testing.T) {
	slow(t)
	s := startSystemd(t, map[string]string{
		"echod.service": readFile(t, "../packaging/systemd/echod.service"),
		"echod.socket":  readFile(t, "../packaging/systemd/echod.socket"),
		// The service itself cannot connect to a socket of this mode.
		"echod-control.socket":                readFile(t, "../packaging/systemd/echod-control.socket"),
		"echod-control.socket.d/10-test.conf": "[Socket]\nSocketMode=0600\n",
		"echod.service.d/10-test.conf": "[Service]\nExecStart=\nExecStart=/run/test/echod serve\nWatchdogSec=2s\nTimeoutAbortSec=1s\n" +
			"Environment=ECHOD_GRACE=20s GORACE=atexit_sleep_ms=0\n",
	})
	t.Run("the service is ready and reports its status", s.testReady)
	t.Run("a stop is a drain", s.testStop)
	t.Run("a restart refuses no client", s.testRestart)
	t.Run("the watchdog restarts a stopped process", s.testWatchdog)
	t.Run("the watchdog restarts a hanging process", s.testWedge)
	t.Run("a crash refuses no client", s.testCrash)
	t.Run("echod-control.socket passes the control socket", s.testControlSocket)
	t.Run("the documented commands work", s.testDocumentedCommands)
	t.Run("the journal has fields", s.testJournal)
	t.Run("a drain may outlast the stop timeout", s.testStopTimeout)
	t.Run("a forced stop is no failure", s.testForce)
	t.Run("settings are applied", s.testSettings)
	t.Run("other users cannot open the runtime directory", s.testRuntimeDirectory)
	t.Run("the log names the uid of control clients", s.testAudit)
	t.Run("certificates are credentials", s.testTLSCredentials)
	t.Run("certificates in files are replaced", s.testTLSFiles)
	t.Run("a late address does not stop the socket", s.testLateAddress)
	t.Run("without its socket the service does not start", s.testNoSocket)
	t.Run("start failures are errors and retried slowly", s.testStartFailure)
	if len(s.entries(t, "MESSAGE=WARNING: DATA RACE")) > 0 {
		t.Error("the race detector found a race")
	}
}

func (s *systemd) testReady(t *testing.T) {
	s.fresh(t)
	if got := s.property(t, "ActiveState"); got != "active" {
		t.Errorf("the service is %s, want active", got)
	}
	s.peer(t)
	s.awaitProperty(t, "StatusText", func(text string) bool { return text == "running: 1 connection, 1 accepted" })
	plane := control.NewClient(s.socket)
	defer plane.Close()
	st, err := plane.Status(within(t, patience))
	check(t, err)
	if st.State != "running" || st.Accepted != 1 {
		t.Errorf("the status is %s, %d accepted", st.State, st.Accepted)
	}
}

func (s *systemd) testStop(t *testing.T) {
	s.fresh(t)
	p := s.peer(t)
	wait := s.background(t, "systemctl", "stop", "echod.service")
	check(t, p.expect("SHUTDOWN 20 SIGTERM\n"))
	s.awaitProperty(t, "StatusText", func(text string) bool { return strings.HasPrefix(text, "draining until ") })
	check(t, p.echo("still here\n"))
	check(t, p.leave())
	if r := wait(); r.code != 0 {
		t.Errorf("systemctl stop: %+v", r)
	}
	if state, why := s.property(t, "ActiveState"), s.property(t, "Result"); state != "inactive" || why != "success" {
		t.Errorf("the service is %s, its result %s; want inactive, success", state, why)
	}

	// The next client starts the service again, unless the socket is closed too.
	check(t, s.peer(t).leave())
	s.awaitProperty(t, "ActiveState", func(state string) bool { return state == "active" })
	s.ctl(t, "stop", "echod.socket", "echod.service")
	if p, err := connectSoon(s.addr); err == nil {
		_ = p.Close()
		t.Error("connected, though the socket and the service are stopped")
	}
}

func (s *systemd) testRestart(t *testing.T) {
	s.fresh(t)
	s.restartUnderLoad(t, "systemctl", "restart", "echod.service")
}

// heeding is a client that reconnects on each notice, and counts its messages and echoes.
type heeding struct {
	sent, back, notices, connects int
}

func (h *heeding) run(front string, stop *atomic.Bool) error {
	for !stop.Load() {
		h.connects++
		if err := h.connection(front, stop); err != nil {
			return fmt.Errorf("after %d messages and %d notices: %w", h.sent, h.notices, err)
		}
	}
	return nil
}

// connection sends messages until it gets a notice.
func (h *heeding) connection(front string, stop *atomic.Bool) error {
	p, err := connect(front)
	if err != nil {
		return err
	}
	defer p.Close()
	for told := false; !told && !stop.Load(); {
		message := fmt.Sprintf("message %d\n", h.sent)
		if err := p.send(message); err != nil {
			return err
		}
		h.sent++
		for answered := false; !answered; {
			_ = p.SetDeadline(time.Now().Add(patience))
			line, err := p.in.ReadString('\n')
			switch {
			case err != nil:
				return fmt.Errorf("no echo of %q: %w", message, err)
			case strings.HasPrefix(line, "SHUTDOWN "):
				told = true
				h.notices++
			case line != message:
				return fmt.Errorf("got %q, want %q", line, message)
			default:
				answered = true
				h.back++
			}
		}
	}
	if err := p.CloseWrite(); err != nil {
		return err
	}
	rest, err := p.rest()
	if strings.HasPrefix(rest, "SHUTDOWN ") { // the notice came while this client was leaving
		rest = ""
	}
	if err == nil && rest != "" {
		err = fmt.Errorf("got %q before the end of the stream", rest)
	}
	return err
}

// restartUnderLoad runs a command that restarts the service. One client delays the end of the drain, so that the new
// process has to serve those that connect in the meantime. No client may be refused, and clients that leave when they
// are notified may not lose data.
func (s *systemd) restartUnderLoad(t *testing.T, argv ...string) {
	t.Helper()
	holder := s.peer(t)
	before := s.property(t, "MainPID")
	var stop atomic.Bool
	var clients sync.WaitGroup
	staying := make([]heeding, 20)
	errs := make([]error, len(staying))
	for i := range staying {
		clients.Go(func() { errs[i] = staying[i].run(s.addr, &stop) })
	}
	defer clients.Wait()
	defer stop.Store(true)
	plane := control.NewClient(s.socket)
	defer plane.Close()
	poll(t, "all clients to be served", func() bool { // so that some are notified
		st, err := plane.Status(within(t, patience))
		check(t, err)
		return st.Connections == 1+len(staying)
	})

	wait := s.background(t, argv...)
	check(t, holder.expect("SHUTDOWN 20 SIGTERM\n"))
	peers := make([]*peer, 1000)
	each(t, len(peers), func(i int) (err error) {
		peers[i], err = connect(s.addr)
		return err
	})
	if now := s.property(t, "MainPID"); now != before {
		t.Fatalf("process %s replaced %s during its drain", now, before)
	}
	check(t, holder.leave())
	each(t, len(peers), func(i int) error {
		defer peers[i].Close()
		if err := peers[i].echo(fmt.Sprintf("hello from %d\n", i)); err != nil {
			return err
		}
		return peers[i].leave()
	})
	if r := wait(); r.code != 0 {
		t.Errorf("%q: %+v", argv, r)
	}
	stop.Store(true)
	clients.Wait()
	sent, back, notices := 0, 0, 0
	for i, h := range staying {
		if errs[i] != nil {
			t.Errorf("client %d: %v", i, errs[i])
		}
		sent, back, notices = sent+h.sent, back+h.back, notices+h.notices
	}
	if sent != back || notices == 0 {
		t.Errorf("%d messages sent, %d echoed, %d notices", sent, back, notices)
	}
	if now := s.property(t, "MainPID"); now == before || now == "0" {
		t.Errorf("the main process is %s, was %s", now, before)
	}
	t.Logf("%d clients connected during the restart; %d messages, %d notices", len(peers), sent, notices)
}

// restarts returns how often systemd has restarted the service automatically.
func (s *systemd) restarts(t *testing.T) int {
	t.Helper()
	n, err := strconv.Atoi(s.property(t, "NRestarts"))
	check(t, err)
	return n
}

func (s *systemd) testWatchdog(t *testing.T) {
	s.fresh(t)
	before, invocation := s.restarts(t), "_SYSTEMD_INVOCATION_ID="+s.property(t, "InvocationID")
	s.peer(t)
	s.ctl(t, "kill", "--kill-whom=main", "-s", "STOP", "echod.service")
	poll(t, "a restart", func() bool { return s.restarts(t) > before })
	s.peer(t)
	s.awaitProperty(t, "ActiveState", func(state string) bool { return state == "active" })
	if len(s.entries(t, invocation, "MESSAGE=SIGABRT: abort")) != 1 {
		t.Error("the journal does not have the stacks of the hanging process")
	}
	t.Logf("%d restarts", s.restarts(t)-before)
}

func (s *systemd) testCrash(t *testing.T) {
	s.fresh(t)
	s.peer(t)
	var stop atomic.Bool
	var connects atomic.Int64
	var clients sync.WaitGroup
	errs := make([]error, 8)
	for i := range errs {
		clients.Go(func() {
			for !stop.Load() && errs[i] == nil {
				p, err := connect(s.addr)
				if err == nil {
					connects.Add(1)
					_ = p.echo("hello\n") // fails if the crashed process had accepted it
					_ = p.Close()
				}
				errs[i] = err
			}
		})
	}
	defer clients.Wait()
	defer stop.Store(true)
	const crashes = 7 // by default systemd gives up after 5 in 10 s
	for range crashes {
		pid := s.property(t, "MainPID")
		s.ctl(t, "kill", "--kill-whom=main", "-s", "SEGV", "echod.service")
		s.awaitProperty(t, "MainPID", func(now string) bool { return now != pid })
		s.peer(t)
	}
	stop.Store(true)
	clients.Wait()
	check(t, errors.Join(errs...))
	if connects.Load() == 0 {
		t.Error("no client connected")
	}
	t.Logf("%d crashes, %d connections, none refused", crashes, connects.Load())
}

func (s *systemd) testJournal(t *testing.T) {
	s.fresh(t, "Environment=ECHOD_STOP_TIMEOUT=1s")
	invocation := "_SYSTEMD_INVOCATION_ID=" + s.property(t, "InvocationID")
	p := s.peer(t)
	check(t, p.leave())
	var found []map[string]any
	poll(t, "the connection in the journal", func() bool {
		found = s.entries(t, "CONN=1", invocation)
		return len(found) >= 2
	})
	for i, want := range []string{"connection opened", "connection closed"} {
		if text, _ := found[i]["MESSAGE"].(string); !strings.HasPrefix(text, want) || found[i]["PRIORITY"] != "6" {
			t.Errorf("entry %d is %v, want %q with priority 6", i, found[i], want)
		}
	}
	warnings := s.entries(t, "PRIORITY=4", "STOP_TIMEOUT=1s", invocation)
	if len(warnings) != 1 {
		t.Errorf("%d warnings about the stop timeout, want 1: %v", len(warnings), warnings)
	}
}

func (s *systemd) testStopTimeout(t *testing.T) {
	s.fresh(t, "TimeoutStopSec=2s", "Environment=ECHOD_STOP_TIMEOUT=2s ECHOD_GRACE=5s")
	invocation := "_SYSTEMD_INVOCATION_ID=" + s.property(t, "InvocationID")
	poll(t, "the warning", func() bool {
		return slices.ContainsFunc(s.entries(t, "PRIORITY=4", invocation), func(e map[string]any) bool {
			text, _ := e["MESSAGE"].(string)
			return strings.HasPrefix(text, "a drain can take longer than --stop-timeout")
		})
	})
	p := s.peer(t)
	began := time.Now()
	wait := s.background(t, "systemctl", "stop", "echod.service")
	check(t, p.expect("SHUTDOWN 5 SIGTERM\n"))
	check(t, p.expectRest("")) // FIN at the deadline, not RST
	if r := wait(); r.code != 0 {
		t.Errorf("systemctl stop: %+v", r)
	}
	if took := time.Since(began); took < 5*time.Second {
		t.Errorf("the drain took %s, want 5s of grace", took)
	}
	if why := s.property(t, "Result"); why != "success" {
		t.Errorf("the result is %s, want success", why)
	}
}

// The operator intended a forced stop: it counts as success, and systemd does not restart the service.
func (s *systemd) testForce(t *testing.T) {
	for _, sig := range []string{"INT", "QUIT", "TERM"} {
		s.fresh(t)
		restarts := s.restarts(t)
		p := s.peer(t)
		s.ctl(t, "kill", "--kill-whom=main", "-s", sig, "echod.service")
		check(t, p.expect("SHUTDOWN 20 SIG"+sig+"\n"))
		s.ctl(t, "kill", "--kill-whom=main", "-s", sig, "echod.service")
		s.awaitProperty(t, "ActiveState", func(state string) bool { return state == "inactive" || state == "failed" })
		if state, why := s.property(t, "ActiveState"), s.property(t, "Result"); state != "inactive" || why != "success" || s.restarts(t) != restarts {
			t.Errorf("after SIG%s twice the service is %s, its result %s, with %d restarts", sig, state, why, s.restarts(t)-restarts)
		}
	}
}

// The process gets the settings in /etc/default/echod, and the unit's limit of open files.
func (s *systemd) testSettings(t *testing.T) {
	settings := filepath.Join("/proc", s.pid, "root/etc/default/echod")
	check(t, os.WriteFile(settings, []byte("ECHOD_GRACE=33s\n"), 0o644))
	defer func() { check(t, os.Remove(settings)) }()
	s.fresh(t)
	limit, err := strconv.ParseUint(s.property(t, "LimitNOFILE"), 10, 64)
	check(t, err)
	var ours unix.Rlimit // systemd cannot raise the limit beyond the machine's
	check(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &ours))
	want := strconv.FormatUint(min(limit, ours.Max), 10)
	p := s.peer(t)
	limits := run(t, s.command("cat", "/proc/"+s.property(t, "MainPID")+"/limits")).stdout
	if !regexp.MustCompile(`Max open files\s+` + want + `\s+` + want + `\s`).MatchString(limits) {
		t.Errorf("the unit has LimitNOFILE=%d, the process\n%s", limit, limits)
	}
	wait := s.background(t, "systemctl", "stop", "echod.service")
	check(t, p.expect("SHUTDOWN 33 SIGTERM\n"))
	check(t, p.leave())
	wait()
}

// Otherwise any user could lock the directory, and the next start would wait for the lock.
func (s *systemd) testRuntimeDirectory(t *testing.T) {
	s.fresh(t)
	open := func(user string) int {
		return run(t, s.command(setpriv.find(t)[0], "--reuid="+user, "--regid="+user, "--clear-groups", "ls", "/run/echod")).code
	}
	if open("0") != 0 || open("65534") == 0 {
		t.Errorf("ls /run/echod exits with %d for root and %d for nobody", open("0"), open("65534"))
	}
}

// A sandbox with its own user namespace would show all clients but root as nobody.
func (s *systemd) testAudit(t *testing.T) {
	s.fresh(t, "Environment=ECHOD_CONTROL_MODE=0666")
	const uid = "12345"
	pause := run(t, s.command(setpriv.find(t)[0], "--reuid="+uid, "--regid="+uid, "--clear-groups",
		"/run/test/echod", "ctl", "--control", "/run/echod/control.sock", "pause", "--reason", "audit"))
	if pause.code != 0 {
		t.Fatalf("pause: %+v", pause)
	}
	poll(t, "the pause in the journal", func() bool { return len(s.entries(t, "REASON=audit", "PLACED_BY_UID="+uid)) == 1 })
}

// At boot the network may bring up an address after the socket.
func (s *systemd) testLateAddress(t *testing.T) {
	s.fresh(t)
	s.ctl(t, "stop", "echod.socket", "echod.service")
	_, port, _ := strings.Cut(s.addr, ":")
	s.write(t, "echod.socket.d/20-test.conf", "[Socket]\nListenStream=\nListenStream=192.0.2.10:"+port+"\n") // TEST-NET-1
	defer s.removeDropIn(t, "echod.socket.d/20-test.conf")
	s.ctl(t, "daemon-reload")
	s.ctl(t, "start", "echod.socket", "echod.service")
	plane := control.NewClient(s.socket)
	defer plane.Close()
	st, err := plane.Status(within(t, patience))
	check(t, err)
	if len(st.Listeners) != 1 || st.Listeners[0].Address != "192.0.2.10:"+port {
		t.Errorf("listens on %+v, want only 192.0.2.10:%s", st.Listeners, port)
	}
}

// The service must not listen on its default address, which is not configured here.
func (s *systemd) testNoSocket(t *testing.T) {
	s.fresh(t)
	s.ctl(t, "stop", "echod.socket", "echod.service")
	taken, err := net.Listen("tcp", s.addr)
	check(t, err)
	defer taken.Close()
	if r := run(t, s.command("systemctl", "start", "echod.service")); r.code == 0 {
		t.Error("the service started without its socket")
	}
	if state := s.property(t, "ActiveState"); state != "inactive" {
		t.Errorf("the service is %s, want inactive", state)
	}
}

func (s *systemd) testStartFailure(t *testing.T) {
	s.fresh(t)
	s.ctl(t, "stop", "echod.service")
	s.write(t, "echod.service.d/20-test.conf", "[Service]\nEnvironment=ECHOD_GRACE=soon\n")
	defer s.removeDropIn(t, "echod.service.d/20-test.conf")
	s.ctl(t, "daemon-reload")
	before := s.restarts(t)
	began := time.Now()
	run(t, s.command("systemctl", "start", "echod.service"))
	poll(t, "two retries", func() bool { return s.restarts(t) >= before+2 })
	if took := time.Since(began); took < 4*time.Second {
		t.Errorf("two retries within %v", took)
	}
	if len(s.entries(t, "PRIORITY=3", `MESSAGE=echod: environment variable ECHOD_GRACE: invalid argument "soon" for "--grace" flag: time: invalid duration "soon"`)) == 0 {
		t.Error("the journal does not have the reason with error priority")
	}
}

// removeDropIn removes a drop-in, for the tests that follow.
func (s *systemd) removeDropIn(t *testing.T, name string) {
	t.Helper()
	s.ctl(t, "stop", "echod.socket", "echod.service")
	check(t, os.Remove(filepath.Join(s.units, name)))
	s.ctl(t, "daemon-reload")
}

// Each of the commands that docs/operations.md has, and variants, changes the address on a running service.
func (s *systemd) testDocumentedCommands(t *testing.T) {
	s.fresh(t)
	defer s.removeDropIn(t, "echod.socket.d/20-test.conf")
	for _, restart := range []string{"echod.socket echod.service", "echod.service echod.socket", "echod.socket"} {
		addr := "127.0.0.1:" + freePorts(t, 1)[0]
		s.write(t, "echod.socket.d/20-test.conf", "[Socket]\nListenStream=\nListenStream="+addr+"\n")
		s.ctl(t, "daemon-reload")
		s.ctl(t, append([]string{"restart"}, strings.Fields(restart)...)...)
		s.awaitProperty(t, "ActiveState", func(state string) bool { return state == "active" })
		plane := control.NewClient(s.socket)
		st, err := plane.Status(within(t, patience))
		plane.Close()
		check(t, err)
		if len(st.Listeners) != 1 || st.Listeners[0].Address != addr {
			t.Errorf("after restart %s it listens on %+v, want %s", restart, st.Listeners, addr)
		}
	}
	s.ctl(t, "enable", "echod-control.socket")
	defer s.ctl(t, "disable", "--now", "echod-control.socket")
	s.ctl(t, "restart", "echod.service")
	plane := control.NewClient("/proc/" + s.pid + "/root/run/echod-control.sock")
	defer plane.Close()
	_, err := plane.Status(within(t, patience))
	check(t, err)
}
