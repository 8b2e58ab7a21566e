package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestUpgradeSupervised upgrades a server that another program supervises: that program must see the process that it
// started until the service ends, and its exit code.
func TestUpgradeSupervised(t *testing.T) {
	slow(t)
	t.Parallel()
	t.Run("supervisord", testSupervisord)
	t.Run("runit", testRunit)
	t.Run("tini", func(t *testing.T) { t.Parallel(); testContainer(t, require(t, "tini"), "--") })
	t.Run("PID 1 of a container", func(t *testing.T) { t.Parallel(); testContainer(t) })
	t.Run("a terminal", testUpgradeTerminal)
	t.Run("the pid file names the process that serves", testPIDFile)
	t.Run("the predecessor is shown and can be told to end", testPredecessor)
	t.Run("the keeper needs little memory", testKeeperMemory)
	t.Run("the death of the keeper drains", testKeeperDeath)
}

// supervised is a server that a supervisor starts, from a copy of the program.
type supervised struct {
	*echod
	program string
	command string // that starts it
}

// underSupervisor prepares a server that listens on a fixed port.
func underSupervisor(t *testing.T) *supervised {
	t.Helper()
	s := &supervised{program: filepath.Join(shortDir(t), "echod")}
	copyFile(t, built(t, leanBinary), s.program)
	s.echod = &echod{t: t, socket: filepath.Join(shortDir(t), "c"), addr: "127.0.0.1:" + freePorts(t, 1)[0], log: newJournal()}
	s.connectWithin = func(timeout time.Duration) (*peer, error) { return connectOver("tcp", s.addr, timeout) }
	s.command = fmt.Sprintf("%s serve --grace 20s --listen %s --control %s", s.program, s.addr, s.socket)
	t.Cleanup(func() { killAll(t, s.program) })
	return s
}

// await waits until the server answers, and returns the process that does.
func (s *supervised) await(t *testing.T) (pid int) {
	t.Helper()
	poll(t, "the server", func() bool { return s.ctl("wait", "--state", "running", "--timeout", "1s").code == 0 })
	return s.pidOf(t)
}

func (s *supervised) pidOf(t *testing.T) (pid int) {
	t.Helper()
	for line := range strings.Lines(s.ctl("status").stdout) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "process" {
			pid, err := strconv.Atoi(strings.TrimSuffix(f[1], ","))
			check(t, err)
			return pid
		}
	}
	t.Fatal("the status has no process")
	return 0
}

// upgradeTwice upgrades twice under clients, which go on.
func (s *supervised) upgradeTwice(t *testing.T) []*peer {
	t.Helper()
	peers := s.crowd(20)
	for range 2 {
		before := s.pidOf(t)
		if got := s.ctl("upgrade"); got.code != 0 || !strings.Contains(got.stdout, "20 connections handed over") {
			t.Fatalf("upgrade: %+v", got)
		}
		if s.pidOf(t) == before {
			t.Error("the same process answers")
		}
		each(t, len(peers), func(i int) error { return peers[i].echo("after an upgrade\n") })
	}
	return peers
}

// told checks that each client is told once of the drain, and leaves.
func told(t *testing.T, peers []*peer, reason string) {
	t.Helper()
	each(t, len(peers), func(i int) error {
		if err := peers[i].expect("SHUTDOWN 20 " + reason + "\n"); err != nil {
			return err
		}
		return peers[i].leave()
	})
}

// running lists the processes of the program.
func (s *supervised) running(t *testing.T) (pids []string) {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/exe")
	check(t, err)
	for _, link := range links {
		if exe, err := os.Readlink(link); err == nil && strings.TrimSuffix(exe, " (deleted)") == s.program {
			pids = append(pids, filepath.Base(filepath.Dir(link)))
		}
	}
	return pids
}

func testSupervisord(t *testing.T) {
	t.Parallel()
	s := underSupervisor(t)
	dir := shortDir(t)
	conf := filepath.Join(dir, "conf")
	check(t, os.WriteFile(conf, fmt.Appendf(nil, `[supervisord]
nodaemon=true
user=root
logfile=/dev/null
logfile_maxbytes=0
pidfile=%[1]s/pid
[unix_http_server]
file=%[1]s/s
[supervisorctl]
serverurl=unix://%[1]s/s
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
[program:echod]
command=%[2]s
stopwaitsecs=30
startsecs=0
autorestart=true
`, dir, s.command), 0o644))
	supervisor := commandOf(require(t, "supervisord"), "-c", conf)
	check(t, supervisor.Start())
	t.Cleanup(func() {
		_ = supervisor.Process.Kill()
		_ = supervisor.Wait()
	})
	ctl := func(args ...string) string {
		r := run(t, commandOf(append([]string{"supervisorctl", "-c", conf}, args...)...))
		return strings.TrimSpace(r.stdout)
	}
	s.await(t)
	pid := ctl("pid", "echod")
	peers := s.upgradeTwice(t)
	if now := ctl("pid", "echod"); now != pid || !strings.Contains(ctl("status", "echod"), "RUNNING") {
		t.Errorf("supervisord sees process %s, it was %s: %s", now, pid, ctl("status", "echod"))
	}
	stopped := make(chan string, 1)
	go func() { stopped <- ctl("stop", "echod") }()
	told(t, peers, "SIGTERM")
	if got := <-stopped; got != "echod: stopped" {
		t.Errorf("supervisorctl stop: %s", got)
	}
	if left := s.running(t); len(left) > 0 {
		t.Errorf("after the stop the processes %q are left", left)
	}

	// A successor that dies is noticed, and the service restarted.
	ctl("start", "echod")
	s.await(t)
	pid = ctl("pid", "echod")
	s.upgradeTwice(t)
	check(t, syscall.Kill(s.pidOf(t), syscall.SIGKILL))
	poll(t, "a restart", func() bool { now := ctl("pid", "echod"); return now != pid && now != "0" })
	s.await(t)
	p := s.served()
	check(t, p.leave())
	ctl("stop", "echod")
}

func testRunit(t *testing.T) {
	t.Parallel()
	s := underSupervisor(t)
	dir := filepath.Join(shortDir(t), "echod")
	check(t, os.Mkdir(dir, 0o755))
	check(t, os.WriteFile(filepath.Join(dir, "run"), []byte("#!/bin/sh\nexec "+s.command+"\n"), 0o755))
	runsv := commandOf(require(t, "runsv"), dir)
	check(t, runsv.Start())
	t.Cleanup(func() {
		_ = runsv.Process.Signal(syscall.SIGTERM) // it ends when the service has
		_ = runsv.Wait()
	})
	s.await(t)
	sv := func(args ...string) string {
		return run(t, commandOf(append([]string{"sv"}, append(args, dir)...)...)).stdout
	}
	pid := func() string {
		_, rest, _ := strings.Cut(sv("status"), "(pid ")
		pid, _, _ := strings.Cut(rest, ")")
		return pid
	}
	before := pid()
	peers := s.upgradeTwice(t)
	if now := pid(); now != before {
		t.Errorf("runsv sees process %s, it was %s: %s", now, before, sv("status"))
	}
	sv("down")
	told(t, peers, "SIGTERM")
	poll(t, "the service to be down", func() bool { return strings.HasPrefix(sv("status"), "down:") })
	if left := s.running(t); len(left) > 0 {
		t.Errorf("the processes %q are left", left)
	}
}

// testContainer runs the server in a PID namespace, as PID 1 or under the given init.
func testContainer(t *testing.T, init ...string) {
	t.Helper()
	s := underSupervisor(t)
	argv := append([]string{require(t, "unshare"), "--pid", "--fork", "--kill-child", "--mount-proc"}, init...)
	cmd := exec.Command(argv[0], append(argv[1:], strings.Fields(s.command)...)...)
	cmd.Env = environment()
	addr, dial := s.addr, s.connectWithin
	s.echod = spawn(t, cmd, s.socket)
	s.addr, s.connectWithin = addr, dial
	s.await(t)
	peers := s.upgradeTwice(t)
	children := readFile(t, fmt.Sprintf("/proc/%d/task/%[1]d/children", s.pid)) // of unshare: PID 1
	first, err := strconv.Atoi(strings.TrimSpace(children))
	check(t, err)
	check(t, syscall.Kill(first, syscall.SIGTERM))
	told(t, peers, "SIGTERM")
	s.wait(0)
	if left := s.running(t); len(left) > 0 {
		t.Errorf("the processes %q are left", left)
	}
}

// Ctrl-Z in a terminal stops all processes, and fg continues them. Ctrl-C drains the successor once, and the shell gets
// its prompt back when that has ended.
func testUpgradeTerminal(t *testing.T) {
	t.Parallel()
	term, socket := openTerminal(t)
	term.types("stty tostop\n") // the successor is in the background, and still may write its log
	p := term.serveIn("--grace 20s")
	got := run(t, commandOf(built(t, echodBinary), "ctl", "--control", socket, "upgrade"))
	var successor int
	if _, err := fmt.Sscanf(got.stdout, "upgraded to process %d:", &successor); err != nil {
		t.Fatalf("upgrade: %+v", got)
	}
	check(t, p.echo("after the upgrade\n"))
	stopped := func() bool {
		_, rest, _ := strings.Cut(readFile(t, fmt.Sprintf("/proc/%d/stat", successor)), ") ")
		return strings.HasPrefix(rest, "T")
	}
	term.types(ctrlZ)
	term.awaits("Stopped")
	poll(t, "the successor to stop", stopped)
	term.types("fg\n")
	check(t, p.echo("continued\n"))
	term.types(ctrlC)
	check(t, p.expect("SHUTDOWN 20 SIGINT\n"))
	check(t, p.leave())
	term.awaits(`drained +\{"reason": "SIGINT"`)
	term.types("echo over=$?\n")
	term.awaits("over=0")
}

// privateMemory returns the bytes of memory that a process shares with no file and with no other process. There are none
// while it executes a program.
func privateMemory(t *testing.T, pid int) (bytes int, ok bool) {
	t.Helper()
	rollup, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, false
	}
	for line := range strings.Lines(string(rollup)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "Pss_Anon:" {
			n, err := strconv.Atoi(f[1])
			check(t, err)
			return n << 10, true
		}
	}
	t.Fatal("smaps_rollup has no Pss_Anon")
	return 0, false
}

func testKeeperMemory(t *testing.T) {
	t.Parallel()
	e, program := upgradable(t, "--grace", "1m")
	name := func() string { return strings.TrimSpace(readFile(t, fmt.Sprintf("/proc/%d/comm", e.pid))) }
	called := name()
	for _, p := range e.crowd(1000) {
		check(t, p.leave())
	}
	served, _ := privateMemory(t, e.pid)
	peers := e.crowd(20)
	if got := e.ctl("upgrade"); got.code != 0 {
		t.Fatal(got.stderr)
	}
	check(t, os.Remove(program)) // the keeper does not need it
	const most = 2 << 20
	poll(t, "the keeper to free its memory", func() bool {
		kept, ok := privateMemory(t, e.pid)
		// It takes its name back once it catches signals.
		if !ok || kept >= most || name() != called {
			return false
		}
		t.Logf("%d kB while it served, %d kB as the keeper", served>>10, kept>>10)
		return true
	})

	// It passes signals on, also to later processes, and has the exit code of the last one.
	copyFile(t, built(t, leanBinary), program)
	first := e.status().PID
	e.signal(syscall.SIGUSR2)
	poll(t, "the second upgrade", func() bool {
		got := e.ctl("status", "--json")
		return got.code == 0 && !strings.Contains(got.stdout, fmt.Sprintf(`"pid":%d,`, first))
	})
	each(t, len(peers), func(i int) error { return peers[i].echo("here\n") })
	e.signal(syscall.SIGTERM)
	each(t, len(peers), func(i int) error { return peers[i].expect("SHUTDOWN 60 SIGTERM\n") })
	e.signal(syscall.SIGTERM)
	e.wait(128 + int(syscall.SIGTERM))
}

// A supervisor whose process was killed starts another one, which needs the addresses.
func testKeeperDeath(t *testing.T) {
	t.Parallel()
	e, program := upgradable(t, "--grace", "20s")
	p := e.served()
	for range 2 {
		if got := e.ctl("upgrade"); got.code != 0 {
			t.Fatal(got.stderr)
		}
	}
	check(t, syscall.Kill(e.pid, syscall.SIGKILL))
	check(t, p.expect("SHUTDOWN 20 orphaned\n"))
	check(t, p.leave())
	poll(t, "all processes to end", func() bool { return len(processesOf(t, program)) == 0 })
}

func testPIDFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(shortDir(t), "pid")
	e, _ := upgradable(t, "--pid-file", path)
	named := func() string { return strings.TrimSpace(readFile(t, path)) }
	for range 3 {
		if got, want := named(), strconv.Itoa(e.status().PID); got != want {
			t.Errorf("the file has %s, want %s", got, want)
		}
		if got := e.ctl("upgrade"); got.code != 0 {
			t.Fatal(got.stderr)
		}
	}
	e.signal(syscall.SIGTERM)
	e.wait(0)
	if _, err := os.Stat(path); err == nil {
		t.Error("the file is still there")
	}
}

func testPredecessor(t *testing.T) {
	t.Parallel()
	e, _ := upgradable(t, "--proxy-protocol", "127.0.0.0/8", "--upgrade-keep", "1h", "--http", "127.0.0.1:0")
	if got := e.ctl("shutdown", "--predecessor"); got.code != 1 || !strings.Contains(got.stderr, "there is no predecessor") {
		t.Errorf("without a predecessor: %+v", got)
	}
	p := e.dial() // its PROXY header is half read
	check(t, p.send("PROXY "))
	e.awaitOpen(1)
	first := e.status().PID
	if got := e.ctl("upgrade"); got.code != 0 || !strings.Contains(got.stdout, "stayed with the old process") {
		t.Fatalf("upgrade: %+v", got)
	}
	st := e.status()
	if st.Predecessor == nil || st.Predecessor.PID != first || st.Predecessor.Connections != 1 || st.Connections != 1 {
		t.Errorf("the predecessor is %+v, want process %d with 1 connection", st.Predecessor, first)
	}
	if got := e.ctl("status").stdout; !strings.Contains(got, fmt.Sprintf("process %d, version", first)) {
		t.Errorf("ctl status does not show the predecessor:\n%s", got)
	}
	check(t, p.send("TCP4 10.0.0.1 10.0.0.2 1 2\r\nhello\n")) // still served
	check(t, p.expect("hello\n"))
	if got := e.ctl("shutdown", "--predecessor"); got.code != 0 {
		t.Errorf("shutdown --predecessor: %+v", got)
	}
	check(t, p.expect("SHUTDOWN 5 upgrade\n"))
	check(t, p.leave())
	e.awaitLog("the predecessor has ended")
	st = e.status()
	if st.Predecessor != nil || st.State != "running" || st.Connections != 0 || st.Closed["client-left"] != 1 {
		t.Errorf("after its end: %+v", st)
	}
	check(t, balanced(st))
	e.signal(syscall.SIGTERM)
	e.wait(0)
}
