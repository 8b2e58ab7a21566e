package integration

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"echod/control"
)

// engine runs buildah and podman with a separate store.
type engine struct {
	t               *testing.T
	buildah, podman []string
}

func newEngine(t *testing.T) *engine {
	t.Helper()
	builder, runner := require(t, "buildah"), require(t, "podman")
	require(t, "runc")
	if os.Getuid() != 0 {
		missing(t, "containers need root here")
	}
	dir := shortDir(t)
	store := []string{
		"--root", filepath.Join(dir, "root"), "--runroot", filepath.Join(dir, "run"), "--storage-driver", "vfs",
	}
	return &engine{
		t: t, buildah: append([]string{builder}, store...),
		podman: slices.Concat([]string{runner}, store, []string{"--runtime", "runc", "--cgroup-manager", "cgroupfs"}),
	}
}

// do runs a command, and returns what it prints.
func (e *engine) do(program []string, args ...string) string {
	e.t.Helper()
	got := run(e.t, commandOf(slices.Concat(program, args)...))
	if got.code != 0 {
		name := filepath.Base(program[0])
		e.t.Fatalf("%s %s: exit code %d\n%s%s", name, strings.Join(args, " "), got.code, got.stdout, got.stderr)
	}
	return strings.TrimSpace(got.stdout)
}

// build builds the image of packaging/kubernetes.
func (e *engine) build(tag string) {
	e.t.Helper()
	sources := e.t.TempDir()
	check(e.t, os.Mkdir(filepath.Join(sources, "dist"), 0o755))
	copyFile(e.t, built(e.t, leanBinary), filepath.Join(sources, "dist", "echod-linux-"+runtime.GOARCH))
	e.do(e.buildah, "bud", "--isolation=chroot", "--build-arg", "TARGETARCH="+runtime.GOARCH,
		"-f", "../packaging/kubernetes/Dockerfile", "-t", tag, sources)
}

// TestImage builds the image and runs it as packaging/kubernetes/echod.yaml says: without privileges, with a
// read-only root, without /tmp, and within its memory limit while clients stall.
func TestImage(t *testing.T) {
	slow(t)
	t.Parallel()
	e := newEngine(t)
	const tag, name = "localhost/echod:test", "echod"
	began := time.Now()
	e.build(tag)
	t.Logf("built in %v", time.Since(began).Round(10*time.Millisecond))

	c := example(t)
	sockets, certs := shortDir(t), t.TempDir()
	check(t, os.Chown(sockets, 65532, 65532))
	roots := certificate(t, certs, "secret")
	// As the kubelet mounts a Secret with defaultMode 0440 and fsGroup.
	for from, to := range map[string]string{"cert.pem": "tls.crt", "key.pem": "tls.key"} {
		check(t, os.Rename(filepath.Join(certs, from), filepath.Join(certs, to)))
		check(t, os.Chmod(filepath.Join(certs, to), 0o440))
		check(t, os.Chown(filepath.Join(certs, to), 0, 65532))
	}
	check(t, os.Chmod(certs, 0o755))
	ports := freePorts(t, 3)
	plain, encrypted, web := "127.0.0.1:"+ports[0], "127.0.0.1:"+ports[1], "127.0.0.1:"+ports[2]
	args := slices.Clone(c.Args)
	for i, a := range args {
		switch a {
		case "--listen=:9999":
			args[i] = "--listen=" + plain
		case "--listen=tls://:9998":
			args[i] = "--listen=tls://" + encrypted
		case "--http=:9090":
			args[i] = "--http=" + web
		}
	}
	const delay, grace = time.Second, 3 * time.Second
	args = append(args, "--drain-delay", delay.String(), "--grace", grace.String())
	limit := c.Resources.Limits.bytes(t)
	runArgs := []string{
		"run", "-d", "--name", name, "--pull", "never", "--network=host", "--read-only", "--read-only-tmpfs=false",
		"--cap-drop", "all", "--security-opt", "no-new-privileges", "--memory", strconv.Itoa(limit),
		// podman's own limits are higher than a machine may allow.
		"--ulimit", "nofile=10000:10000", "--ulimit", "nproc=1024:1024",
		"-v", sockets + ":/run/echod", "-v", certs + ":/etc/echod/tls:ro",
	}
	for _, v := range c.Env {
		runArgs = append(runArgs, "--env", v.Name+"="+v.Value)
	}
	t.Cleanup(func() {
		if t.Failed() {
			got := run(t, commandOf(append(slices.Clone(e.podman), "logs", name)...))
			t.Logf("log of the container:\n%.5000s", got.stderr)
		}
		_ = run(t, commandOf(append(slices.Clone(e.podman), "rm", "-f", "-t", "0", name)...))
	})
	e.do(e.podman, slices.Concat(runArgs, []string{tag}, args)...)
	poll(t, "the startup probe", func() bool {
		resp, err := http.Get("http://" + web + c.StartupProbe.HTTPGet.Path)
		if err != nil {
			return false
		}
		_ = resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	for _, path := range []string{c.ReadinessProbe.HTTPGet.Path, c.LivenessProbe.HTTPGet.Path} {
		if status, body := ask(t, http.MethodGet, web, path); status != http.StatusOK {
			t.Errorf("%s: %d %q", path, status, body)
		}
	}

	pid := e.do(e.podman, "inspect", "-f", "{{.State.Pid}}", name)
	if got := readFile(t, "/proc/"+pid+"/status"); !strings.Contains(got, "\nUid:\t65532\t65532\t65532\t65532\n") {
		t.Errorf("the process has another user:\n%s", got)
	}
	readOnly := false
	for line := range strings.Lines(readFile(t, "/proc/"+pid+"/mountinfo")) {
		f := strings.Fields(line)
		readOnly = readOnly || f[4] == "/" && strings.HasPrefix(f[5], "ro")
	}
	if !readOnly {
		t.Error("the root is not read-only")
	}
	if _, err := os.Stat("/proc/" + pid + "/root/tmp"); err == nil {
		t.Error("the container has /tmp")
	}

	secure, err := tls.Dial("tcp", encrypted, &tls.Config{RootCAs: roots, ServerName: "localhost"})
	check(t, err)
	defer secure.Close()
	check(t, secure.SetDeadline(time.Now().Add(patience)))
	check(t, echoOn(secure, "hello over TLS\n"))

	testStalledClients(t, plain, pid, limit)

	plane := control.NewClient(filepath.Join(sockets, "control.sock"))
	defer plane.Close()
	st, err := plane.Status(within(t, patience))
	check(t, err)
	check(t, balanced(st))
	p, err := connect(plain)
	check(t, err)
	defer p.Close()
	check(t, p.echo("hello\n"))
	stopping := time.Now()
	e.do(e.podman, "stop", "-t", "20", name)
	took := time.Since(stopping)
	check(t, p.expectRest("SHUTDOWN 3 SIGTERM\n"))
	var state struct {
		ExitCode  int
		OOMKilled bool
	}
	check(t, json.Unmarshal([]byte(e.do(e.podman, "inspect", "-f", "{{json .State}}", name)), &state))
	if state.ExitCode != 0 || state.OOMKilled || took < delay+grace || took > delay+grace+4*time.Second {
		t.Errorf("stopped after %v with %+v; want exit code 0 after the grace period", took, state)
	}
	t.Logf("stopped in %v, of which %v are drain delay and grace", took.Round(10*time.Millisecond), delay+grace)
}

// testStalledClients lets clients send and not read. The kernel's buffers fill; the process stays far below its
// limit, and other clients are served.
func testStalledClients(t *testing.T, addr, pid string, limit int) {
	t.Helper()
	const stalled = 200
	block := make([]byte, 64<<10)
	var all []net.Conn
	var filling sync.WaitGroup
	for range stalled {
		c, err := net.Dial("tcp", addr)
		check(t, err)
		defer c.Close()
		all = append(all, c)
		filling.Go(func() {
			for { // until neither side's buffers take more
				_ = c.SetWriteDeadline(time.Now().Add(2 * time.Second))
				if _, err := c.Write(block); err != nil {
					return
				}
			}
		})
	}
	filling.Wait()
	p, err := connect(addr)
	check(t, err)
	defer p.Close()
	check(t, p.echo("served beside them\n"))
	resident := 0
	for line := range strings.Lines(readFile(t, "/proc/"+pid+"/status")) {
		if _, err := fmt.Sscanf(line, "VmRSS: %d kB", &resident); err == nil {
			break
		}
	}
	sockets := 0
	for line := range strings.Lines(readFile(t, "/proc/"+pid+"/net/sockstat")) {
		if strings.HasPrefix(line, "TCP:") {
			f := strings.Fields(line)
			sockets, _ = strconv.Atoi(f[len(f)-1])
		}
	}
	t.Logf("%d stalled clients: the process has %d MiB, the machine's sockets have %d MiB; the limit is %d MiB",
		stalled, resident>>10, sockets*os.Getpagesize()>>20, limit>>20)
	if resident == 0 || resident<<10 > limit/2 {
		t.Errorf("the process has %d KiB, more than half of the limit", resident)
	}
	for _, c := range all {
		_ = c.(*net.TCPConn).SetLinger(0)
	}
}
