package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"echod/control"
)

// systemd is one that runs in namespaces of its own, where it is PID 1, with the units of packaging/systemd. The network is
// this machine's.
type systemd struct {
	pid    string // as seen from here
	units  string // the folder of all units that it knows
	addr   string // where echod.socket listens
	socket string // the control socket, as seen from here
	log    *journal
}

// bootSystemd makes the mounts and becomes systemd. $1 is the test's folder, $2 the echod, $3 systemd. /etc is replaced, too: systemd
// might write there.
const bootSystemd = `
set -e
mount -t proc proc /proc
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs -o mode=0755 tmpfs /run
mount --bind "$1/etc" /etc
[ ! -e /dev/console ] || mount --bind /dev/null /dev/console
mkdir -m 755 /run/test
install -m 755 "$2" /run/test/echod
exec "$3" --system --unit=test.target --show-status=no`

// The units besides the real ones, and what the test changes about those.
var testUnits = map[string]string{
	"test.target":     "[Unit]\nRequires=systemd-journald.socket systemd-journald.service\nAfter=systemd-journald.service\n",
	"sysinit.target":  "[Unit]\nDescription=Nothing to initialize\n",
	"basic.target":    "[Unit]\nDescription=Nothing basic\n",
	"sockets.target":  "[Unit]\nDescription=No sockets\n",
	"shutdown.target": "[Unit]\nDescription=The end\nDefaultDependencies=no\n",
	"echod.service.d/10-test.conf": "[Unit]\nStartLimitIntervalSec=0\n" +
		"[Service]\nExecStart=\nExecStart=/run/test/echod serve\nWatchdogSec=2s\nTimeoutAbortSec=1s\nEnvironment=ECHOD_GRACE=20s GORACE=atexit_sleep_ms=0\n",
}

func startSystemd(t *testing.T) *systemd {
	t.Helper()
	program := "/lib/systemd/systemd"
	if _, err := os.Stat(program); err != nil {
		missing(t, "systemd is not installed")
	}
	if os.Getuid() != 0 {
		missing(t, "a systemd takes root")
	}
	require(t, "nsenter")
	require(t, "systemctl")
	binary := built(t, echodBinary)
	dir := t.TempDir()
	port := freePorts(t, 1)[0]
	s := &systemd{units: filepath.Join(dir, "units"), addr: "127.0.0.1:" + port, log: newJournal()}
	s.install(t, port)
	check(t, os.Mkdir(filepath.Join(dir, "etc"), 0o755))
	for _, name := range []string{"passwd", "group", "nsswitch.conf", "ld.so.cache"} {
		if text, err := os.ReadFile(filepath.Join("/etc", name)); err == nil {
			check(t, os.WriteFile(filepath.Join(dir, "etc", name), text, 0o644))
		}
	}
	check(t, os.WriteFile(filepath.Join(dir, "etc", "machine-id"), []byte(strings.Repeat("ec", 16)+"\n"), 0o444))

	group := makeCgroup(t)
	at, err := os.Open(group)
	check(t, err)
	defer at.Close()
	cmd := exec.Command("/bin/sh", "-c", bootSystemd, "sh", dir, binary, program)
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "container=echod-test", "SYSTEMD_UNIT_PATH=" + s.units,
		"SYSTEMD_LOG_TARGET=journal",
	}
	cmd.Stdout, cmd.Stderr = s.log, s.log
	cmd.WaitDelay = patience
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS,
		// Only once it is in its cgroup, which is to be the root of what it sees.
		Unshareflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWCGROUP,
		UseCgroupFD:  true, CgroupFD: int(at.Fd()),
		Setsid: true, Pdeathsig: syscall.SIGKILL,
	}
	if err := cmd.Start(); errors.Is(err, fs.ErrPermission) {
		missing(t, "there are no namespaces to be had: "+err.Error())
	} else {
		check(t, err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // and so all in its PID namespace
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("on the way to systemd:\n%s", s.log)
		}
	})
	s.pid = strconv.Itoa(cmd.Process.Pid)
	s.socket = "/proc/" + s.pid + "/root/run/echod/control.sock"
	poll(t, "systemd to be up", func() bool {
		return strings.TrimSpace(run(t, s.command("systemctl", "is-active", "test.target")).stdout) == "active"
	})
	return s
}

// install writes the units.
func (s *systemd) install(t *testing.T, port string) {
	t.Helper()
	units := map[string]string{"echod.socket.d/10-test.conf": "[Socket]\nListenStream=\nListenStream=127.0.0.1:" + port + "\n"}
	maps.Copy(units, testUnits)
	for name, from := range map[string]string{
		"echod.service": "../packaging/systemd", "echod.socket": "../packaging/systemd",
		"systemd-journald.service": "/lib/systemd/system", "systemd-journald.socket": "/lib/systemd/system",
	} {
		text, err := os.ReadFile(filepath.Join(from, name))
		check(t, err)
		units[name] = string(text)
	}
	for name, text := range units {
		s.write(t, name, text)
	}
}

func (s *systemd) write(t *testing.T, name, text string) {
	t.Helper()
	path := filepath.Join(s.units, name)
	check(t, os.MkdirAll(filepath.Dir(path), 0o755))
	check(t, os.WriteFile(path, []byte(text), 0o644))
}

// makeCgroup makes a cgroup, which is removed with all below it after the test.
func makeCgroup(t *testing.T) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	check(t, err)
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "cgroup2" {
			dir, err := os.MkdirTemp(f[1], "echod-test-")
			if err != nil {
				missing(t, "no cgroup can be made: "+err.Error())
			}
			t.Cleanup(func() { removeCgroup(t, dir) })
			return dir
		}
	}
	missing(t, "there is no cgroup2")
	return ""
}

func removeCgroup(t *testing.T, dir string) {
	var all []string
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			all = append(all, path)
		}
		return nil
	})
	slices.Reverse(all) // the lower ones first
	for _, path := range all {
		var err error
		for end := time.Now().Add(patience); ; time.Sleep(pollEvery) {
			if err = unix.Rmdir(path); !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
				break
			}
		}
		if err != nil {
			t.Errorf("removing a cgroup: %v", err)
		}
	}
}

// command is a command that runs beside systemd.
func (s *systemd) command(argv ...string) *exec.Cmd {
	cmd := commandOf(append([]string{"nsenter", "-t", s.pid, "-a"}, argv...)...)
	cmd.Env = environment("SYSTEMD_UNIT_PATH="+s.units, "SYSTEMD_PAGER=cat")
	return cmd
}

// ctl runs systemctl, which must succeed.
func (s *systemd) ctl(t *testing.T, args ...string) {
	t.Helper()
	if r := run(t, s.command(append([]string{"systemctl"}, args...)...)); r.code != 0 {
		status := run(t, s.command("systemctl", "status", "--no-pager", "-l", "echod.service", "echod.socket"))
		t.Fatalf("systemctl %s: %d\n%s%s\n%s", strings.Join(args, " "), r.code, r.stdout, r.stderr, status.stdout)
	}
}

// background runs systemctl; the function that it returns awaits that, and must be called.
func (s *systemd) background(t *testing.T, args ...string) (wait func() result) {
	t.Helper()
	done := make(chan result, 1)
	cmd := s.command(append([]string{"systemctl"}, args...)...)
	go func() {
		out, err := cmd.CombinedOutput()
		r := result{stdout: string(out)}
		if err != nil {
			r.code, r.stderr = 1, err.Error()
		}
		done <- r
	}()
	wait = sync.OnceValue(func() result { return <-done })
	t.Cleanup(func() { wait() })
	return wait
}

// property asks systemd about the service.
func (s *systemd) property(t *testing.T, name string) string {
	t.Helper()
	r := run(t, s.command("systemctl", "show", "-p", name, "--value", "echod.service"))
	if r.code != 0 {
		t.Fatalf("systemctl show: %+v", r)
	}
	return strings.TrimSpace(r.stdout)
}

func (s *systemd) awaitProperty(t *testing.T, name string, want func(string) bool) {
	t.Helper()
	got := ""
	defer func() {
		if t.Failed() {
			t.Logf("%s=%s", name, got)
		}
	}()
	poll(t, name, func() bool {
		got = s.property(t, name)
		return want(got)
	})
}

// fresh starts the service anew, with these lines in its [Service] section, and a socket that nobody waits at.
func (s *systemd) fresh(t *testing.T, lines ...string) {
	t.Helper()
	s.ctl(t, "stop", "echod.socket", "echod.service")
	s.write(t, "echod.service.d/20-test.conf", "[Service]\n"+strings.Join(lines, "\n")+"\n")
	s.ctl(t, "daemon-reload")
	s.ctl(t, "start", "echod.socket", "echod.service")
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the journal:\n%s", run(t, s.command("journalctl", "--no-pager", "-n", "60", "-o", "short-precise")).stdout)
		}
	})
}

// peer connects somebody who is being served.
func (s *systemd) peer(t *testing.T) *peer {
	t.Helper()
	p, err := connect(s.addr)
	check(t, err)
	t.Cleanup(func() { _ = p.Close() })
	check(t, p.echo("hello\n"))
	return p
}

// entries are the service's in the journal that match.
func (s *systemd) entries(t *testing.T, matches ...string) (found []map[string]any) {
	t.Helper()
	argv := append([]string{"journalctl", "-o", "json", "--no-pager", "-u", "echod.service"}, matches...)
	r := run(t, s.command(argv...))
	for line := range strings.Lines(r.stdout) {
		var e map[string]any
		check(t, json.Unmarshal([]byte(line), &e))
		found = append(found, e)
	}
	return found
}

// The real units under a real systemd.
func TestSystemd(t *testing.T) {
	s := startSystemd(t)
	t.Run("ServiceIsReadyAndSaysWhatItDoes", s.testReady)
	t.Run("StopIsADrain", s.testStop)
	t.Run("RestartRefusesNobody", s.testRestart)
	t.Run("WatchdogEndsAStoppedProcess", s.testWatchdog)
	t.Run("CrashRefusesNobody", s.testCrash)
	t.Run("JournalHasFields", s.testJournal)
	t.Run("DrainOutlastsTheStopTimeout", s.testStopTimeout)
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
	wait := s.background(t, "stop", "echod.service")
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
}

// testRestart has somebody hold up the drain, so that whoever comes meanwhile is the new process's to serve.
func (s *systemd) testRestart(t *testing.T) {
	s.fresh(t)
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

	wait := s.background(t, "restart", "echod.service")
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
		t.Errorf("systemctl restart: %+v", r)
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
	before := s.restarts(t)
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
	s.ctl(t, "kill", "--kill-whom=main", "-s", "SEGV", "echod.service")
	poll(t, "a restart", func() bool { return s.restarts(t) > before })
	s.peer(t)
	stop.Store(true)
	clients.Wait()
	check(t, errors.Join(errs...))
	if connects.Load() == 0 {
		t.Error("nobody has connected")
	}
	t.Logf("%d restarts, %d connects, none refused", s.restarts(t)-before, connects.Load())
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
	wait := s.background(t, "stop", "echod.service")
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

// maxExposure is what systemd may think of the service: 0 is nothing, 10 is everything.
const maxExposure = "15" // tenths

func TestSystemdUnitsAreTightAndSound(t *testing.T) {
	analyze := require(t, "systemd-analyze")
	r := run(t, commandOf(analyze, "security", "--offline=true", "--threshold="+maxExposure, "--no-pager", "../packaging/systemd/echod.service"))
	overall := regexp.MustCompile(`Overall exposure level.*`).FindString(r.stdout)
	if r.code != 0 || overall == "" {
		t.Errorf("systemd-analyze security: %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	t.Log(overall)

	s := &systemd{units: t.TempDir()}
	for _, name := range []string{"echod.service", "echod.socket"} {
		text, err := os.ReadFile(filepath.Join("../packaging/systemd", name))
		check(t, err)
		// It is not installed where this runs.
		s.write(t, name, strings.ReplaceAll(string(text), "/usr/bin/echod", built(t, echodBinary)))
	}
	verify := commandOf(analyze, "verify", "--man=no", filepath.Join(s.units, "echod.service"), filepath.Join(s.units, "echod.socket"))
	if r := run(t, verify); r.code != 0 || r.stdout+r.stderr != "" {
		t.Errorf("systemd-analyze verify: %d\n%s%s", r.code, r.stdout, r.stderr)
	}
}
