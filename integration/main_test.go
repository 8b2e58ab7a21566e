//go:build unix

// Package integration tests the real binary against real programs, over loopback only.
//
// Goroutines: for each process that a test starts, os/exec has one that copies its stderr into a journal, and the
// test has one that waits for its exit. Both have ended when the test's cleanup ends. Tests wait for the clients that
// they run.
//
// A test that takes seconds calls slow; 'make test' skips it and 'make check' runs it.
package integration

import (
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// patience bounds each wait for something that should happen at once. No promise of the server depends on it.
const patience = 30 * time.Second

func TestMain(m *testing.M) {
	// These tests mostly wait for other processes, so more of them can run than there are CPUs.
	flag.Parse()
	if f := flag.Lookup("test.parallel"); f.Value.String() == f.DefValue {
		_ = f.Value.Set(strconv.Itoa(3 * runtime.GOMAXPROCS(0)))
	}
	// Children inherit that a signal is ignored, but not that it is caught. Under nohup this lets them see SIGHUP.
	if signal.Ignored(syscall.SIGHUP) {
		signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		_ = os.RemoveAll(builds())
		os.Exit(code)
	}))
}

// builds is the directory of the binaries that the tests build.
var builds = sync.OnceValue(func() string {
	dir, err := os.MkdirTemp("", "echod-it-")
	if err != nil {
		panic(err)
	}
	return dir
})

// echodBinary builds cmd/echod once, and returns its path.
var echodBinary = sync.OnceValues(func() (string, error) { return build("echod", "../cmd/echod", raceEnabled) })

// leanBinary builds cmd/echod without the race detector, for tests that measure it.
var leanBinary = sync.OnceValues(func() (string, error) { return build("echod-lean", "../cmd/echod", false) })

// embedBinary builds a program that embeds the library and whose handlers misbehave on request.
var embedBinary = sync.OnceValues(func() (string, error) { return build("embed", "./testdata/embed", raceEnabled) })

// build builds a package, with or without the race detector. 'go test' does not know what is built, and would take
// cached results. It does know which directories a test reads, so build reads those of the sources.
func build(name, pkg string, race bool) (string, error) {
	for _, dir := range []string{"../client", "../cmd", "../control", "../internal", "../metrics", "../server", "testdata"} {
		if err := filepath.WalkDir(dir, func(_ string, _ fs.DirEntry, err error) error { return err }); err != nil {
			return "", err
		}
	}
	path := filepath.Join(builds(), name)
	args := []string{"build", "-buildvcs=false", "-o", path}
	if race {
		args = append(args, "-race")
	}
	cmd := exec.Command("go", append(args, pkg)...)
	if !race {
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0") // as released
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building %s: %w\n%s", pkg, err, out)
	}
	return path, nil
}

// built returns the path of a binary, or ends the test.
func built(t testing.TB, binary func() (string, error)) string {
	t.Helper()
	path, err := binary()
	check(t, err)
	return path
}

// environment returns the environment of child processes: ours without the variables that echod reads, and with
// variables.
func environment(variables ...string) []string {
	var env []string
	for _, v := range os.Environ() {
		name, _, _ := strings.Cut(v, "=")
		if !strings.HasPrefix(name, "ECHOD_") && name != "RUNTIME_DIRECTORY" && name != "XDG_RUNTIME_DIR" && name != "NOTIFY_SOCKET" {
			env = append(env, v)
		}
	}
	// By default the race detector's runtime sleeps for a second at exit.
	return append(append(env, "GORACE=atexit_sleep_ms=0"), variables...)
}

// require returns the path of the first of the named programs that is installed. If none is, it skips the test; with
// ECHOD_TEST_REQUIRE=1 the test fails.
func require(t testing.TB, names ...string) string {
	t.Helper()
	for _, name := range names {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	missing(t, names[0]+" is not installed")
	return ""
}

// missing skips the test because the machine lacks something; with ECHOD_TEST_REQUIRE=1 the test fails.
func missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("ECHOD_TEST_REQUIRE") == "1" {
		t.Fatalf("%s, and ECHOD_TEST_REQUIRE=1", what)
	}
	t.Skip(what)
}

// slow skips a test that takes seconds, unless ECHOD_TEST_SLOW=1 asks for it, as make check does.
// It keeps make test quick.
func slow(t testing.TB) {
	t.Helper()
	if !slowToo() {
		t.Skip("slow: make check runs it, or ECHOD_TEST_SLOW=1")
	}
}

// slowToo reports whether the slow tests run too. A test that tries something often can try it more often then.
func slowToo() bool { return os.Getenv("ECHOD_TEST_SLOW") == "1" }

// long skips a test that takes minutes, unless ECHOD_TEST_LONG=1 asks for it, as make check-long does.
func long(t testing.TB) {
	t.Helper()
	if os.Getenv("ECHOD_TEST_LONG") != "1" {
		t.Skip("long: make check-long runs it, or ECHOD_TEST_LONG=1")
	}
}

// check ends the test on an error.
func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// each runs f(0) to f(n-1) concurrently, waits for all, and reports their errors.
func each(t testing.TB, n int, f func(i int) error) {
	t.Helper()
	errs := make([]error, n)
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { errs[i] = f(i) })
	}
	all.Wait()
	failed := 0
	for i, err := range errs {
		if err == nil {
			continue
		}
		if failed++; failed <= 5 {
			t.Errorf("%d of %d: %v", i, n, err)
		}
	}
	if failed > 0 {
		t.Fatalf("%d of %d failed", failed, n)
	}
}

func readFile(t testing.TB, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	check(t, err)
	return string(text)
}

// seconds parses a duration in the form that systemd, Kubernetes and Go share, such as 90s.
func seconds(t testing.TB, span string) time.Duration {
	t.Helper()
	d, err := time.ParseDuration(span)
	check(t, err)
	return d
}

// The ports of freePorts lie below those that Linux gives to clients and to listeners on port 0 (ip_local_port_range,
// from 32768), which would take them before the test does.
const firstFreePort, freePortCount = 15_000, 17_000

var nextFreePort atomic.Uint32

// freePorts returns n free ports, each only once.
func freePorts(t *testing.T, n int) []string {
	t.Helper()
	nextFreePort.CompareAndSwap(0, 1+rand.Uint32N(freePortCount)) // another run of the tests begins elsewhere
	var ports []string
	for range freePortCount {
		port := strconv.Itoa(firstFreePort + int(nextFreePort.Add(1)%freePortCount))
		if ln, err := net.Listen("tcp", "127.0.0.1:"+port); err == nil {
			check(t, ln.Close())
			if ports = append(ports, port); len(ports) == n {
				return ports
			}
		}
	}
	t.Fatalf("no %d ports are free", n)
	return nil
}

const pollEvery = 20 * time.Millisecond

// poll waits until done returns true. It is for states of other programs, which have no way to announce a change.
func poll(t testing.TB, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !done(); time.Sleep(pollEvery) {
		if time.Now().After(end) {
			t.Fatalf("timed out waiting for %s", what)
		}
	}
}
