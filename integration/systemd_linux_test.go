package integration

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// systemd is a systemd that runs as PID 1 in its own namespaces. It has this machine's programs and network, but
// not its services. What is written to its /etc, /usr and /var disappears with it.
type systemd struct {
	pid    string // in this test's namespace
	units  string // the first directory of its unit path
	path   string // its unit path
	addr   string // of echod.socket
	socket string // path of the control socket in this test's namespace
	log    *journal
}

// bootSystemd is the script that makes the mounts and becomes systemd. $1 is echod, $2 systemd.
const bootSystemd = `
set -e
mount -t proc proc /proc
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs -o mode=0755 tmpfs /run
[ ! -e /dev/console ] || mount --bind /dev/null /dev/console
mkdir -m 755 /run/test
install -m 755 "$1" /run/test/echod
for dir in etc usr var; do
	mkdir -p /run/test/upper/$dir /run/test/work/$dir
	mount -t overlay -o lowerdir=/$dir,upperdir=/run/test/upper/$dir,workdir=/run/test/work/$dir overlay /$dir
done
# Hide the machine's units, which would change the machine.
for dir in /etc/systemd/system /usr/lib/systemd/system; do
	mount -t tmpfs -o mode=0755 tmpfs $dir
done
echo ecececececececececececececececec >/etc/machine-id
rm -f /usr/sbin/policy-rc.d # can forbid to start services
mount --make-rshared / # as outside of containers: systemd mounts credentials in a namespace of their own
exec "$2" --system --unit=test.target --show-status=no`

// baseUnits replace the units that systemd needs, but whose originals would change the machine.
var baseUnits = map[string]string{
	"test.target":     "[Unit]\nRequires=systemd-journald.socket systemd-journald.service\nAfter=systemd-journald.service\n",
	"sysinit.target":  "[Unit]\nDescription=Nothing to initialize\n",
	"basic.target":    "[Unit]\nDescription=Nothing basic\n",
	"sockets.target":  "[Unit]\nDescription=No sockets\n",
	"shutdown.target": "[Unit]\nDescription=The end\nDefaultDependencies=no\n",
}

// startSystemd starts a systemd with these units, besides those that are installed in it. echod.socket listens on
// s.addr.
func startSystemd(t *testing.T, units map[string]string) *systemd {
	t.Helper()
	program := "/lib/systemd/systemd"
	if _, err := os.Stat(program); err != nil {
		missing(t, "systemd is not installed")
	}
	if os.Getuid() != 0 {
		missing(t, "systemd needs root")
	}
	nsenter.find(t)
	require(t, "systemctl")
	binary := built(t, echodBinary)
	s := &systemd{units: t.TempDir(), addr: "127.0.0.1:" + freePorts(t, 1)[0], log: newJournal()}
	s.path = s.units + ":/etc/systemd/system:/lib/systemd/system"
	for _, name := range []string{"systemd-journald.service", "systemd-journald.socket"} {
		s.write(t, name, readFile(t, "/lib/systemd/system/"+name))
	}
	s.write(t, "echod.socket.d/10-test.conf", "[Socket]\nListenStream=\nListenStream="+s.addr+"\n")
	for name, text := range baseUnits {
		s.write(t, name, text)
	}
	for name, text := range units {
		s.write(t, name, text)
	}

	group := makeCgroup(t)
	at, err := os.Open(group)
	check(t, err)
	defer at.Close()
	cmd := exec.Command("/bin/sh", "-c", bootSystemd, "sh", binary, program)
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "container=echod-test", "SYSTEMD_UNIT_PATH=" + s.path,
		"SYSTEMD_LOG_TARGET=journal",
	}
	cmd.Stdout, cmd.Stderr = s.log, s.log
	cmd.WaitDelay = patience
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS,
		// After it has entered its cgroup, which becomes its root.
		Unshareflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWCGROUP,
		UseCgroupFD:  true, CgroupFD: int(at.Fd()),
		Setsid: true, Pdeathsig: syscall.SIGKILL,
	}
	if err := cmd.Start(); errors.Is(err, fs.ErrPermission) {
		missing(t, "no namespaces: "+err.Error())
	} else {
		check(t, err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // and with it all of its PID namespace
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("output of systemd:\n%s", s.log)
		}
	})
	s.pid = strconv.Itoa(cmd.Process.Pid)
	s.socket = "/proc/" + s.pid + "/root/run/echod/control.sock"
	poll(t, "systemd to be up", func() bool {
		return strings.TrimSpace(run(t, s.command("systemctl", "is-active", "test.target")).stdout) == "active"
	})
	return s
}

func (s *systemd) write(t *testing.T, name, text string) {
	t.Helper()
	path := filepath.Join(s.units, name)
	check(t, os.MkdirAll(filepath.Dir(path), 0o755))
	check(t, os.WriteFile(path, []byte(text), 0o644))
}

// makeCgroup makes a cgroup, which the end of the test removes with all below it.
func makeCgroup(t *testing.T) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	check(t, err)
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "cgroup2" {
			dir, err := os.MkdirTemp(f[1], "echod-test-")
			if err != nil {
				missing(t, "cannot make a cgroup: "+err.Error())
			}
			t.Cleanup(func() { removeCgroup(t, dir) })
			return dir
		}
	}
	missing(t, "no cgroup2 mount")
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
	slices.Reverse(all) // children first
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

// command returns a command that runs in the namespaces of systemd.
func (s *systemd) command(argv ...string) *exec.Cmd {
	cmd := commandOf(append([]string{"nsenter", "-t", s.pid, "-a"}, argv...)...)
	cmd.Env = environment("SYSTEMD_UNIT_PATH="+s.path, "SYSTEMD_PAGER=cat")
	return cmd
}

// ctl runs systemctl and fails the test if it fails.
func (s *systemd) ctl(t *testing.T, args ...string) {
	t.Helper()
	if r := run(t, s.command(append([]string{"systemctl"}, args...)...)); r.code != 0 {
		status := run(t, s.command("systemctl", "status", "--no-pager", "-l", "echod.service", "echod.socket"))
		t.Fatalf("systemctl %s: %d\n%s%s\n%s", strings.Join(args, " "), r.code, r.stdout, r.stderr, status.stdout)
	}
}

// background starts a command. wait waits for its end.
func (s *systemd) background(t *testing.T, argv ...string) (wait func() result) {
	t.Helper()
	done := make(chan result, 1)
	cmd := s.command(argv...)
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

// property returns a property of the service.
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

// fresh restarts the service and its socket, with these lines in the [Service] section.
func (s *systemd) fresh(t *testing.T, lines ...string) {
	t.Helper()
	s.ctl(t, "stop", "echod.socket", "echod.service")
	s.write(t, "echod.service.d/20-test.conf", "[Service]\n"+strings.Join(lines, "\n")+"\n")
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the journal:\n%s", run(t, s.command("journalctl", "--no-pager", "-n", "60", "-o", "short-precise")).stdout)
		}
	})
	s.ctl(t, "daemon-reload")
	s.ctl(t, "start", "echod.socket", "echod.service")
}

// peer connects a client and waits until it is served.
func (s *systemd) peer(t *testing.T) *peer {
	t.Helper()
	p, err := connect(s.addr)
	check(t, err)
	t.Cleanup(func() { _ = p.Close() })
	check(t, p.echo("hello\n"))
	return p
}

// entries returns the service's journal entries that match.
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
