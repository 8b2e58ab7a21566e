package integration

import (
	"errors"
	"fmt"
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

// The real units under a real systemd.
func TestSystemd(t *testing.T) {
	slow(t)
	s := startSystemd(t, map[string]string{
		"echod.service": readFile(t, "../packaging/systemd/echod.service"),
		"echod.socket":  readFile(t, "../packaging/systemd/echod.socket"),
		// With a mode that keeps the service itself out.
		"echod-control.socket":                readFile(t, "../packaging/systemd/echod-control.socket"),
		"echod-control.socket.d/10-test.conf": "[Socket]\nSocketMode=0600\n",
		"echod.service.d/10-test.conf": "[Service]\nExecStart=\nExecStart=/run/test/echod serve\nWatchdogSec=2s\nTimeoutAbortSec=1s\n" +
			"Environment=ECHOD_GRACE=20s GORACE=atexit_sleep_ms=0\n",
	})
	t.Run("ServiceIsReadyAndSaysWhatItDoes", s.testReady)
	t.Run("StopIsADrain", s.testStop)
	t.Run("RestartRefusesNobody", s.testRestart)
	t.Run("WatchdogEndsAStoppedProcess", s.testWatchdog)
	t.Run("WatchdogEndsAWedgedProcess", s.testWedge)
	t.Run("CrashRefusesNobody", s.testCrash)
	t.Run("ControlSocketOfASocketUnit", s.testControlSocket)
	t.Run("JournalHasFields", s.testJournal)
	t.Run("DrainOutlastsTheStopTimeout", s.testStopTimeout)
	t.Run("ForceIsNoFailure", s.testForce)
	t.Run("SettingsAreInForce", s.testSettings)
	if len(s.entries(t, "MESSAGE=WARNING: DATA RACE")) > 0 {
		t.Error("the race detector has found something")
	}
}

func (s *systemd) testReady(t *testing.T) {
	s.fresh(t)
	if got := s.property(t, "ActiveState"); got != "active" {
		t.Errorf("the service is %s, want active", got)
	}
	s.peer(t)
	s.awaitProperty(t, "StatusText", func(text string) bool { return text == "running: 1 connections, 1 accepted" })
	plane := control.NewClient(s.socket)
	defer plane.Close()
	st, err := plane.Status(within(t, patience))
	check(t, err)
	if st.State != "running" || st.Accepted != 1 {
		t.Errorf("the control socket says %s, %d accepted", st.State, st.Accepted)
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

	// The next client starts it anew, unless the socket has been closed too.
	check(t, s.peer(t).leave())
	s.awaitProperty(t, "ActiveState", func(state string) bool { return state == "active" })
	s.ctl(t, "stop", "echod.socket", "echod.service")
	if p, err := connectSoon(s.addr); err == nil {
		_ = p.Close()
		t.Error("somebody listens though the socket and the service are stopped")
	}
}

func (s *systemd) testRestart(t *testing.T) {
	s.fresh(t)
	s.restartUnderLoad(t, "systemctl", "restart", "echod.service")
}

// restartUnderLoad runs a command that restarts the service. Somebody holds up the drain, so that whoever comes meanwhile is the new
// process's to serve: nobody is refused, and those who stay and heed the notice lose nothing.
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
	poll(t, "all of them to be served", func() bool { // or none may be there to be told
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
		t.Fatalf("process %s has replaced %s while that drains", now, before)
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
			t.Errorf("client %d that heeds the notice: %v", i, errs[i])
		}
		sent, back, notices = sent+h.sent, back+h.back, notices+h.notices
	}
	if sent != back || notices == 0 {
		t.Errorf("%d messages were sent and %d came back, with %d notices", sent, back, notices)
	}
	if now := s.property(t, "MainPID"); now == before || now == "0" {
		t.Errorf("the main process is %s, was %s", now, before)
	}
	t.Logf("%d connects while it restarted, all served; %d messages, %d notices", len(peers), sent, notices)
}

// restarts is how often systemd has started the service anew by itself.
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
		t.Error("the journal has no stacks of the process that the watchdog has ended")
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
					_ = p.echo("hello\n") // which fails where the old process had taken it
					_ = p.Close()
				}
				errs[i] = err
			}
		})
	}
	defer clients.Wait()
	defer stop.Store(true)
	const crashes = 7 // by default systemd gives up after 5 in 10 seconds
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
		t.Error("nobody has connected")
	}
	t.Logf("%d crashes, %d connects, none refused", crashes, connects.Load())
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
	warnings := s.entries(t, "PRIORITY=4", "STOP_TIMEOUT=1", invocation)
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
			return strings.HasPrefix(text, "a drain may take longer than the supervisor waits")
		})
	})
	p := s.peer(t)
	began := time.Now()
	wait := s.background(t, "systemctl", "stop", "echod.service")
	check(t, p.expect("SHUTDOWN 5 SIGTERM\n"))
	check(t, p.expectRest("")) // the deadline's end of stream, not a reset
	if r := wait(); r.code != 0 {
		t.Errorf("systemctl stop: %+v", r)
	}
	if took := time.Since(began); took < 5*time.Second {
		t.Errorf("the drain was over after %s, want 5s of grace", took)
	}
	if why := s.property(t, "Result"); why != "success" {
		t.Errorf("the result is %s, want success", why)
	}
}

// Who stops it by force gets what they want: systemd takes that for success, and does not start it anew.
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

// What /etc/default/echod says is heeded, and the process has the files that the unit gives it.
func (s *systemd) testSettings(t *testing.T) {
	settings := filepath.Join("/proc", s.pid, "root/etc/default/echod")
	check(t, os.WriteFile(settings, []byte("ECHOD_GRACE=33s\n"), 0o644))
	defer func() { check(t, os.Remove(settings)) }()
	s.fresh(t)
	limit, err := strconv.ParseUint(s.property(t, "LimitNOFILE"), 10, 64)
	check(t, err)
	var ours unix.Rlimit // systemd has no more to give than this machine has
	check(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &ours))
	want := strconv.FormatUint(min(limit, ours.Max), 10)
	p := s.peer(t)
	limits := run(t, s.command("cat", "/proc/"+s.property(t, "MainPID")+"/limits")).stdout
	if !regexp.MustCompile(`Max open files\s+` + want + `\s+` + want + `\s`).MatchString(limits) {
		t.Errorf("the unit says LimitNOFILE=%d, and the process has\n%s", limit, limits)
	}
	wait := s.background(t, "systemctl", "stop", "echod.service")
	check(t, p.expect("SHUTDOWN 33 SIGTERM\n"))
	check(t, p.leave())
	wait()
}
