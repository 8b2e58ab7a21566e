//go:build unix

// Package integration runs the real binary against real programs, over loopback only.
//
// Its goroutines: for each process that a test starts, one of os/exec that copies its stderr into a journal and one that
// awaits its end, both over before the test's cleanup is; and the clients that a test plays, which the test awaits.
package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// patience bounds every wait for something that should come at once; it is no promise of the server's.
const patience = 30 * time.Second

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		_ = os.RemoveAll(builds())
		os.Exit(code)
	}))
}

// builds is the directory for what was built.
var builds = sync.OnceValue(func() string {
	dir, err := os.MkdirTemp("", "echod-it-")
	if err != nil {
		panic(err)
	}
	return dir
})

// echodBinary is the path of the real thing, built once.
var echodBinary = sync.OnceValues(func() (string, error) { return build("echod", "../cmd/echod", raceEnabled) })

// leanBinary is the same without the race detector, for where it matters how much it takes.
var leanBinary = sync.OnceValues(func() (string, error) { return build("echod-lean", "../cmd/echod", false) })

// embedBinary is the path of a program that embeds the library, with handlers that misbehave on request.
var embedBinary = sync.OnceValues(func() (string, error) { return build("embed", "./testdata/embed", raceEnabled) })

// build builds with the race detector, or without, and for coverage data where GOCOVERDIR says to collect it.
func build(name, pkg string, race bool) (string, error) {
	path := filepath.Join(builds(), name)
	args := []string{"build", "-buildvcs=false", "-o", path}
	if race {
		args = append(args, "-race")
	}
	if os.Getenv("GOCOVERDIR") != "" {
		args = append(args, "-cover", "-covermode=atomic", "-coverpkg=echod/...")
	}
	if out, err := exec.Command("go", append(args, pkg)...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("building %s: %w\n%s", pkg, err, out)
	}
	return path, nil
}

// built gives the path of a binary, or ends the test.
func built(t testing.TB, binary func() (string, error)) string {
	t.Helper()
	path, err := binary()
	check(t, err)
	return path
}

// environment is what children get: ours without what would steer echod, and with variables of the test's.
func environment(variables ...string) []string {
	var env []string
	for _, v := range os.Environ() {
		name, _, _ := strings.Cut(v, "=")
		if !strings.HasPrefix(name, "ECHOD_") && name != "RUNTIME_DIRECTORY" && name != "XDG_RUNTIME_DIR" && name != "NOTIFY_SOCKET" {
			env = append(env, v)
		}
	}
	// The race detector's runtime would sleep for a second at exit, in vain: all goroutines have been awaited.
	return append(append(env, "GORACE=atexit_sleep_ms=0"), variables...)
}

// require gives the path of the first of the named programs that is there. Without any the test is
// skipped, or fails where ECHOD_TEST_REQUIRE=1 says that all must be there.
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

// missing skips the test for want of something.
func missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("ECHOD_TEST_REQUIRE") == "1" {
		t.Fatalf("%s, and ECHOD_TEST_REQUIRE=1", what)
	}
	t.Skip(what)
}

// check ends the test on an error.
func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// each runs f for 0 to n-1 at the same time, awaits them all, and reports their errors.
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
		t.Fatalf("%d of %d have failed", failed, n)
	}
}

func readFile(t testing.TB, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	check(t, err)
	return string(text)
}

// seconds reads a span of time as systemd, Kubernetes and Go all write it, such as 90s.
func seconds(t testing.TB, span string) time.Duration {
	t.Helper()
	d, err := time.ParseDuration(span)
	check(t, err)
	return d
}

const pollEvery = 20 * time.Millisecond

// poll waits for what another program does, and tells nobody.
func poll(t testing.TB, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !done(); time.Sleep(pollEvery) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}
