package integration

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"echod/control"
)

// makePackage builds the .deb of a version as make dist does, and returns its path.
func makePackage(t *testing.T, version string) string {
	t.Helper()
	return makePackageOf(t, "deb", version)
}

// makePackageOf builds a package of a kind, deb or rpm.
func makePackageOf(t *testing.T, kind, version string) string {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.Command(gnuMake.find(t)[0], "-C", "..", "dist", "DIST="+dir, "VERSION="+version, "SYSTEMS=linux-"+runtime.GOARCH, "PACKAGES="+kind)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make dist: %v\n%s", err, out)
	}
	found, err := filepath.Glob(filepath.Join(dir, "*."+kind))
	check(t, err)
	if len(found) != 1 {
		t.Fatalf("make dist built %q, want one package", found)
	}
	return found[0]
}

// Each version that git describes sorts before the next one, for dpkg and for rpm.
func TestPackageVersions(t *testing.T) {
	t.Parallel()
	dpkg, rpm := dpkg.find(t)[0], rpm.look(t) // rpm is optional
	last := ""
	for _, c := range []struct{ described, version string }{
		{"abc1234", "0.0.0+abc1234"},
		{"v0.1.0", "0.1.0"},
		{"v0.1.0-3-gabc1234", "0.1.0+3.gabc1234"},
		{"v0.1.0-3-gabc1234-dirty", "0.1.0+3.gabc1234.dirty"},
		{"v0.1.0-12-g0123456", "0.1.0+12.g0123456"},
		{"v0.1.1", "0.1.1"},
		{"v3.0.0-rc.1", "3.0.0-rc.1"},
		{"v3.0.0-rc.1-1-gabc1234", "3.0.0-rc.1+1.gabc1234"},
		{"v3", "3.0.0"},
		{"v3.0.0-dirty", "3.0.0+dirty"},
		{"v12.0.0", "12.0.0"},
	} {
		cmd := commandOf("../scripts/dist.sh", "package-version")
		cmd.Env = environment("VERSION=" + c.described)
		r := run(t, cmd)
		if got := strings.TrimSpace(r.stdout); got != c.version {
			t.Errorf("%s gives the package version %q %s, want %s", c.described, got, r.stderr, c.version)
		}
		version := strings.ReplaceAll(c.version, "-", "~") // as nfpm writes it
		if last != "" {
			if r := run(t, commandOf(dpkg, "--compare-versions", last, "lt", version)); r.code != 0 {
				t.Errorf("dpkg does not sort %s before %s", last, version)
			}
			if rpm != nil {
				compare := fmt.Sprintf(`%%{lua:print(rpm.vercmp("%s","%s"))}`, last, version)
				if r := run(t, commandOf(rpm[0], "--eval", compare)); strings.TrimSpace(r.stdout) != "-1" {
					t.Errorf("rpm does not sort %s before %s: %+v", last, version, r)
				}
			}
		}
		last = version
	}
}

// dpkg runs dpkg in the namespaces of systemd and fails the test if it fails. Its triggers can take long.
func (s *systemd) dpkg(t *testing.T, args ...string) {
	t.Helper()
	if r := s.background(t, append([]string{"dpkg"}, args...)...)(); r.code != 0 {
		t.Fatalf("dpkg %s: %+v", strings.Join(args, " "), r)
	}
}

// databases are files that dpkg, man and systemd write.
var databases = regexp.MustCompile(`^/run/test/upper/(var/(lib/dpkg|log|cache/man)/|etc/\.pwd\.lock$)`)

// written lists the files that the machine itself does not have.
func (s *systemd) written(t *testing.T) (paths []string) {
	t.Helper()
	root := filepath.Join("/proc", s.pid, "root")
	for _, dir := range []string{"run/test/upper", "run/echod", "etc/systemd/system", "usr/lib/systemd/system"} {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, d fs.DirEntry, err error) error {
			name := strings.TrimPrefix(path, root)
			switch {
			case os.IsNotExist(err):
				return nil
			case err != nil:
				return err
			case !d.IsDir() && !databases.MatchString(name):
				paths = append(paths, name)
			}
			return nil
		})
		check(t, err)
	}
	return paths
}

// serving checks that both units are active and that this version serves clients.
func (s *systemd) serving(t *testing.T, version string) {
	t.Helper()
	r := run(t, s.command("systemctl", "is-active", "echod.socket", "echod.service"))
	if r.stdout != "active\nactive\n" {
		t.Fatalf("socket and service are %q, want both active", r.stdout)
	}
	p := s.peer(t)
	check(t, p.leave())
	plane := control.NewClient(s.socket)
	defer plane.Close()
	st, err := plane.Status(within(t, patience))
	check(t, err)
	if st.Version != version {
		t.Errorf("version %s is running, want %s", st.Version, version)
	}
}

// upgradeUnderLoad runs a command that upgrades the service with 1,000 live connections, while others connect and leave.
// None may be closed, refused or lose a byte.
func (s *systemd) upgradeUnderLoad(t *testing.T, argv ...string) {
	t.Helper()
	before := s.property(t, "MainPID")
	peers := make([]*peer, 1000)
	each(t, len(peers), func(i int) (err error) {
		if peers[i], err = connect(s.addr); err != nil {
			return err
		}
		return peers[i].echo("hello\n")
	})
	defer func() {
		for _, p := range peers {
			_ = p.Close()
		}
	}()
	var stop atomic.Bool
	var clients sync.WaitGroup
	var come atomic.Int64
	errs := make([]error, 4)
	for i := range errs {
		clients.Go(func() {
			for !stop.Load() && errs[i] == nil {
				p, err := connect(s.addr)
				if err == nil {
					err = p.echo("new\n")
					_ = p.Close()
				}
				errs[i] = err
				come.Add(1)
			}
		})
	}
	r := s.background(t, argv...)()
	stop.Store(true)
	clients.Wait()
	if r.code != 0 {
		t.Fatalf("%q: %+v", argv, r)
	}
	check(t, errors.Join(errs...))
	each(t, len(peers), func(i int) error { return peers[i].echo(fmt.Sprintf("still here %d\n", i)) })
	if now := s.property(t, "MainPID"); now == before || now == "0" {
		t.Errorf("the main process is %s, it was %s: %s", now, before, r.stdout)
	}
	t.Logf("%q: %d clients came and went", argv[0], come.Load())
}

// broken repacks a package with a program that does not run.
func broken(t *testing.T, pkg string) (path string) {
	t.Helper()
	dir := t.TempDir()
	path = filepath.Join(t.TempDir(), "broken.deb")
	for _, argv := range [][]string{
		{"dpkg-deb", "--raw-extract", pkg, dir},
		{"sh", "-c", `printf '#!/bin/sh\necho "echod: boom" >&2; exit 1\n' >"$1/usr/bin/echod"`, "sh", dir},
		{"dpkg-deb", "--root-owner-group", "--build", dir, path},
	} {
		if r := run(t, commandOf(argv...)); r.code != 0 {
			t.Fatalf("%q: %+v", argv, r)
		}
	}
	return path
}

// TestDebianPackage installs, upgrades, removes and purges the real package on a real systemd.
func TestDebianPackage(t *testing.T) {
	slow(t)
	dpkg.find(t)
	s := startSystemd(t, nil)
	const newer = "v3.0.0-2-gabc1234" // two commits later
	first, second := makePackage(t, "v3.0.0"), makePackage(t, newer)
	before := s.written(t)

	s.dpkg(t, "--install", first)
	s.serving(t, "v3.0.0")
	for _, unit := range []string{"echod.socket", "echod.service"} {
		if r := run(t, s.command("systemctl", "is-enabled", unit)); r.stdout != "enabled\n" {
			t.Errorf("%s is %q, want enabled", unit, r.stdout)
		}
	}
	for _, argv := range [][]string{{"echod", "version"}, {"echod", "ctl", "status"}, {"man", "--path", "echod-serve"}} {
		if _, err := exec.LookPath(argv[0]); argv[0] == "man" && err != nil {
			continue // man is optional
		}
		if r := run(t, s.command(argv...)); r.code != 0 || r.stdout == "" {
			t.Errorf("%q: %+v", argv, r)
		}
	}

	// An upgrade keeps the administrator's settings, and all connections. So does a downgrade.
	settings := filepath.Join("/proc", s.pid, "root/etc/default/echod")
	const changed = "ECHOD_GRACE=20s\n"
	check(t, os.WriteFile(settings, []byte(changed), 0o644))
	s.ctl(t, "restart", "echod.service")
	s.upgradeUnderLoad(t, "dpkg", "--refuse-downgrade", "--install", second)
	s.serving(t, newer)
	s.upgradeUnderLoad(t, "dpkg", "--install", first)
	s.serving(t, "v3.0.0")

	// A program that does not run leaves the old one running, and the installation succeeds.
	kept, pid := s.peer(t), s.property(t, "MainPID")
	r := s.background(t, "dpkg", "--install", broken(t, first))()
	if r.code != 0 || !strings.Contains(r.stdout, "the old program keeps running:\n  boom\n") {
		t.Errorf("dpkg --install with a broken program: %+v", r)
	}
	if now := s.property(t, "MainPID"); now != pid {
		t.Errorf("the main process is %s, it was %s", now, pid)
	}
	check(t, kept.echo("still here\n"))
	check(t, kept.leave())
	s.upgradeUnderLoad(t, "dpkg", "--install", second)
	s.serving(t, newer)
	if got := readFile(t, settings); got != changed {
		t.Errorf("after the upgrade /etc/default/echod is %q", got)
	}

	p := s.peer(t)
	wait := s.background(t, "dpkg", "--remove", "echod")
	check(t, p.expect("SHUTDOWN 20 SIGTERM\n"))
	check(t, p.echo("still here\n"))
	check(t, p.leave())
	if r := wait(); r.code != 0 {
		t.Fatalf("dpkg --remove: %+v", r)
	}
	if p, err := connect(s.addr); err == nil {
		_ = p.Close()
		t.Error("connected after the removal")
	}
	if got := readFile(t, settings); got != changed {
		t.Errorf("after the removal /etc/default/echod is %q", got)
	}

	s.dpkg(t, "--install", second) // with the same settings
	s.serving(t, newer)

	s.dpkg(t, "--purge", "echod")
	after := s.written(t)
	if left := slices.DeleteFunc(after, func(path string) bool { return slices.Contains(before, path) }); len(left) > 0 {
		t.Errorf("the purge left %q", left)
	}
	if r := run(t, s.command("systemctl", "list-units", "--all", "--no-legend", "--plain", "echod*")); r.stdout != "" {
		t.Errorf("systemd still knows %q", r.stdout)
	}
}

// An upgrade does not start a disabled service.
func TestDebianPackageDisabled(t *testing.T) {
	slow(t)
	dpkg.find(t)
	s := startSystemd(t, nil)
	pkg := makePackage(t, "1.0.0")
	s.dpkg(t, "--install", pkg)
	s.serving(t, "1.0.0")
	s.ctl(t, "disable", "--now", "echod.socket", "echod.service")
	s.dpkg(t, "--install", pkg)
	if r := run(t, s.command("systemctl", "is-active", "echod.socket", "echod.service")); r.stdout != "inactive\ninactive\n" {
		t.Errorf("socket and service are %q, want both inactive", r.stdout)
	}
}

// A running version that knows no upgrade is restarted, and is not sent SIGUSR2, which would end it.
func TestPackageReplacesOldVersion(t *testing.T) {
	slow(t)
	s := startSystemd(t, map[string]string{
		"echod.service": readFile(t, "../packaging/systemd/echod.service"),
		"echod.socket":  readFile(t, "../packaging/systemd/echod.socket"),
	})
	root := filepath.Join("/proc", s.pid, "root/run/test")
	copyFile(t, built(t, embedBinary), filepath.Join(root, "embed")) // its control plane has no /v1/upgrade
	copyFile(t, "../packaging/upgrade-service.sh", filepath.Join(root, "upgrade-service"))
	addr := "127.0.0.1:" + freePorts(t, 1)[0]
	s.fresh(t, "Type=simple", "ExecStart=", "ExecStart=/run/test/embed --listen "+addr+" --control /run/echod/control.sock",
		strings.ReplaceAll(reloadLines(t), "/usr/bin/echod", "/run/test/echod"), "WatchdogSec=0")
	var c *peer
	poll(t, "the old version to serve", func() (ok bool) {
		var err error
		c, err = connect(addr)
		return err == nil
	})
	check(t, c.echo("hello\n"))
	restarts, pid := s.restarts(t), s.property(t, "MainPID")
	r := s.background(t, "/run/test/upgrade-service")()
	if r.code != 0 || !strings.Contains(r.stdout, "the running version cannot be upgraded: restarting it") {
		t.Errorf("upgrade-service: %+v", r)
	}
	check(t, c.expect("SHUTDOWN 1 SIGTERM\n")) // not ended by a signal that it does not know
	if now := s.property(t, "MainPID"); now == pid || s.restarts(t) != restarts {
		t.Errorf("the main process is %s, it was %s; %d automatic restarts", now, pid, s.restarts(t)-restarts)
	}
}

// The installation succeeds where the port is in use, and the service does not listen elsewhere.
func TestDebianPackagePortInUse(t *testing.T) {
	slow(t)
	dpkg.find(t)
	s := startSystemd(t, nil)
	taken, err := net.Listen("tcp", s.addr)
	check(t, err)
	defer taken.Close()
	s.dpkg(t, "--install", makePackage(t, "1.0.0"))
	if r := run(t, s.command("systemctl", "is-active", "echod.socket", "echod.service")); r.stdout != "failed\ninactive\n" {
		t.Errorf("the socket and the service are %q, want failed and inactive", r.stdout)
	}
	if n := s.restarts(t); n != 0 {
		t.Errorf("systemd restarted the service %d times", n)
	}
}

// TestRPMPackage installs, upgrades, downgrades and removes the real package with rpm, on a real systemd.
func TestRPMPackage(t *testing.T) {
	slow(t)
	program := require(t, "rpm")
	s := startSystemd(t, nil)
	const newer = "v3.0.0-2-gabc1234" // two commits later
	first, second := makePackageOf(t, "rpm", "v3.0.0"), makePackageOf(t, "rpm", newer)
	rpm := func(args ...string) []string { // Debian's rpm wants to be asked twice
		return append([]string{program, "--force-debian", "--nodeps", "--dbpath", "/run/test/rpm"}, args...)
	}
	succeeds := func(argv ...string) {
		t.Helper()
		if r := s.background(t, argv...)(); r.code != 0 {
			t.Fatalf("%q: %+v", argv, r)
		}
	}

	succeeds(rpm("--install", first)...)
	succeeds("systemctl", "enable", "--now", "echod.socket", "echod.service") // if the system's presets do not
	s.serving(t, "v3.0.0")
	settings := filepath.Join("/proc", s.pid, "root/etc/default/echod")
	const changed = "ECHOD_GRACE=20s\n"
	check(t, os.WriteFile(settings, []byte(changed), 0o644))
	s.ctl(t, "restart", "echod.service")

	s.upgradeUnderLoad(t, rpm("--upgrade", second)...)
	s.serving(t, newer)
	s.upgradeUnderLoad(t, rpm("--upgrade", "--oldpackage", first)...)
	s.serving(t, "v3.0.0")
	if got := readFile(t, settings); got != changed {
		t.Errorf("after the upgrade and the downgrade /etc/default/echod is %q", got)
	}

	p := s.peer(t)
	wait := s.background(t, rpm("--erase", "echod")...)
	check(t, p.expect("SHUTDOWN 20 SIGTERM\n"))
	check(t, p.leave())
	if r := wait(); r.code != 0 {
		t.Fatalf("rpm --erase: %+v", r)
	}
	if p, err := connect(s.addr); err == nil {
		_ = p.Close()
		t.Error("connected after the removal")
	}
	for _, path := range []string{"/usr/bin/echod", "/lib/systemd/system/echod.service"} {
		if _, err := os.Stat(filepath.Join("/proc", s.pid, "root", path)); err == nil {
			t.Errorf("the removal left %s", path)
		}
	}
}
