//go:build unix

package integration

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// interrupted runs 'echod send' slowly, ends it by a signal once more is in the file out, and returns what it said.
func (e *echod) interrupted(sig syscall.Signal, out string, args ...string) result {
	e.t.Helper()
	size := func() int64 {
		if info, err := os.Stat(out); err == nil {
			return info.Size()
		}
		return 0
	}
	before := size()
	cmd := e.sendCommand(append([]string{"--rate", "1000"}, args...)...)
	cmd.Env = environment()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	check(e.t, cmd.Start())
	poll(e.t, "some to be written", func() bool { return size() > before })
	check(e.t, cmd.Process.Signal(sig))
	_ = cmd.Wait()
	return result{stderr: stderr.String(), code: exitCode(cmd.ProcessState)}
}

// Runs that are killed, the first and those that go on, are gone on with; what they have written and not settled is written once.
func TestBulkGoesOnAfterItWasKilled(t *testing.T) {
	t.Parallel()
	e := start(t)
	const rows = 3000
	table, dir := writeCSV(t, rows), t.TempDir()
	out := filepath.Join(dir, "out")
	args := []string{"--csv", "--conns", "4", "--ordered", "--output", out, "--resume", filepath.Join(dir, "state"), table}
	e.interrupted(syscall.SIGKILL, out, args...)
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGKILL} {
		e.interrupted(sig, out, args...)
	}
	if got := e.bulk(args...); got.code != 0 || !strings.Contains(got.stderr, "done before") {
		t.Errorf("going on: %+v", got)
	}
	expectRows(t, out, rows)
}

// A closed terminal ends it as an interrupt does.
func TestBulkGoesOnAfterAHangup(t *testing.T) {
	t.Parallel()
	e := start(t)
	dir := t.TempDir()
	input, out, state := filepath.Join(dir, "in"), filepath.Join(dir, "out"), filepath.Join(dir, "state")
	check(t, os.WriteFile(input, []byte(strings.Repeat("a line\n", 3000)), 0o600))
	got := e.interrupted(syscall.SIGHUP, out, "--lines", "--output", out, "--resume", state, input)
	if got.code != 129 || !strings.Contains(got.stderr, "--resume "+state) || strings.Contains(got.stderr, "echod: all ") || !strings.Contains(got.stderr, "; not all of the input was read\n") {
		t.Errorf("got %+v", got)
	}
}

// A reader that goes away is an error like others: it is told, and the state has what it did not get.
func TestBulkGoesOnAfterItsReaderHasGone(t *testing.T) {
	t.Parallel()
	e := start(t)
	dir := t.TempDir()
	input, state := filepath.Join(dir, "in"), filepath.Join(dir, "state")
	check(t, os.WriteFile(input, []byte(strings.Repeat("a line\n", 3000)), 0o600))
	cmd := e.sendCommand("--lines", "--resume", state, input)
	read, write, err := os.Pipe()
	check(t, err)
	check(t, read.Close())
	cmd.Stdout, cmd.Env = write, environment()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	_ = cmd.Run()
	check(t, write.Close())
	if exitCode(cmd.ProcessState) != 1 || !strings.Contains(stderr.String(), "writing what came back: ") || !strings.Contains(stderr.String(), "broken pipe (the same command") {
		t.Errorf("code %d: %s", exitCode(cmd.ProcessState), stderr.String())
	}
	if got := e.bulk("--lines", "--resume", state, input); got.code != 0 || strings.Count(got.stdout, "a line\n") != 3000 {
		t.Errorf("going on: code %d, %d lines; %s", got.code, strings.Count(got.stdout, "a line\n"), got.stderr)
	}
}

// A file that can grow no more has a torn end, which is cut off when there is room again.
func TestBulkGoesOnAfterItsFileWasFull(t *testing.T) {
	t.Parallel()
	e := start(t)
	dir := t.TempDir()
	input, out, state := filepath.Join(dir, "in"), filepath.Join(dir, "out"), filepath.Join(dir, "state")
	var text strings.Builder
	for i := range 50_000 {
		fmt.Fprintf(&text, "this is line %d\n", i)
	}
	check(t, os.WriteFile(input, []byte(text.String()), 0o600))
	args := []string{"--lines", "--resume", state, "--output", out, input}
	full := commandOf(append([]string{"sh", "-c", `ulimit -f 401 && exec "$0" send --address "$@"`, built(t, echodBinary), e.addr}, args...)...)
	if got := run(t, full); got.code != 1 || !strings.Contains(got.stderr, "file too large (the same command") {
		t.Fatalf("got %+v", got)
	}
	if torn := readFile(t, out); torn == "" || strings.HasSuffix(torn, "\n") {
		t.Fatalf("the output ends with %q, want a torn line", torn[max(0, len(torn)-20):])
	}
	if got := e.bulk(args...); got.code != 0 {
		t.Errorf("going on: %+v", got)
	}
	if readFile(t, out) != text.String() {
		t.Error("the output is not the input")
	}
}

// What came back and could not be written is sent another time.
func TestBulkGoesOnAfterItsDiskWasFull(t *testing.T) {
	t.Parallel()
	e := start(t)
	dir := t.TempDir()
	input, state := filepath.Join(dir, "in"), filepath.Join(dir, "state")
	check(t, os.WriteFile(input, []byte(strings.Repeat("a line\n", 3000)), 0o600))
	if got := e.bulk("--lines", "--output", "/dev/full", "--resume", state, input); got.code != 1 || !strings.Contains(got.stderr, "no space left on device (the same command goes on from here") {
		t.Errorf("got %+v", got)
	}
	if got := e.bulk("--lines", "--resume", state, input); got.code != 0 || strings.Count(got.stdout, "a line\n") != 3000 {
		t.Errorf("going on: code %d, %d lines, want 3000; %s", got.code, strings.Count(got.stdout, "a line\n"), got.stderr)
	}
}
