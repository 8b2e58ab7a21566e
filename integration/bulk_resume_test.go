//go:build unix

package integration

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Who interrupts a run goes on from there, and each record is written once.
func TestBulkIsInterruptedAndGoesOn(t *testing.T) {
	t.Parallel()
	e := start(t)
	const rows = 3000
	table := writeCSV(t, rows)
	dir := t.TempDir()
	out, state := filepath.Join(dir, "out"), filepath.Join(dir, "state.json")
	args := []string{"--csv", "--conns", "4", "--ordered", "--output", out, "--resume", state, table}
	slow := e.interrupted(syscall.SIGINT, out, args...)
	if slow.code != 130 {
		t.Errorf("code %d, want 130: %s", slow.code, slow.stderr)
	}
	for _, want := range []string{"finishing what is in flight", "--resume " + state} {
		if !strings.Contains(slow.stderr, want) {
			t.Errorf("stderr lacks %q: %s", want, slow.stderr)
		}
	}
	if strings.Contains(slow.stderr, "not finished") {
		t.Errorf("what was in flight was not finished: %s", slow.stderr)
	}
	half := strings.Count(readFile(t, out), "\n")
	if half == 0 || half == rows {
		t.Fatalf("%d of %d rows were written when it was interrupted", half, rows)
	}

	// Another command line is refused, and nothing is lost.
	check(t, os.WriteFile(filepath.Join(dir, "other"), []byte("x\n"), 0o600))
	if got := e.bulk("--csv", "--resume", state, filepath.Join(dir, "other")); got.code != 1 || !strings.Contains(got.stderr, "is about "+table) {
		t.Errorf("with another input: %+v", got)
	}

	if got := e.bulk("--csv", "--output", filepath.Join(dir, "other"), "--resume", state, table); got.code != 1 || !strings.Contains(got.stderr, "has written to "+out) {
		t.Errorf("with another output: %+v", got)
	}
	if kept := readFile(t, filepath.Join(dir, "other")); kept != "x\n" {
		t.Errorf("another output is %q now", kept)
	}

	got := e.bulk(args...)
	if got.code != 0 || !strings.Contains(got.stderr, "done before") {
		t.Errorf("going on: %+v", got)
	}
	expectRows(t, out, rows)
	if _, err := os.Stat(state); !os.IsNotExist(err) {
		t.Errorf("the state is still there: %v", err)
	}
}

// The second interrupt ends it, and what had not come back is still to be sent.
func TestBulkIsInterruptedTwice(t *testing.T) {
	t.Parallel()
	e := start(t)
	if got := e.ctl("pause"); got.code != 0 {
		t.Fatal(got)
	}
	dir := t.TempDir()
	input, out, state := filepath.Join(dir, "in"), filepath.Join(dir, "out"), filepath.Join(dir, "state")
	check(t, os.WriteFile(input, []byte(strings.Repeat("a line\n", 1000)), 0o600))
	failed := filepath.Join(dir, "failed")
	args := []string{"--lines", "--in-flight", "10", "--failed", failed, "--output", out, "--resume", state, input}
	cmd := e.sendCommand(args...)
	cmd.Env = environment()
	stderr, err := cmd.StderrPipe()
	check(t, err)
	check(t, cmd.Start())
	poll(t, "it to have connected", func() bool { return e.queued(e.status()) > 0 })
	check(t, cmd.Process.Signal(syscall.SIGTERM))
	said := bufio.NewReader(stderr)
	line, err := said.ReadString('\n')
	if !strings.Contains(line, "once more") {
		t.Errorf("it says %q (%v)", line, err)
	}
	check(t, cmd.Process.Signal(syscall.SIGTERM))
	rest, _ := io.ReadAll(said)
	_ = cmd.Wait()
	if code := exitCode(cmd.ProcessState); code != 143 || !strings.Contains(string(rest), "10 not finished") || strings.Contains(string(rest), "gave up") {
		t.Errorf("code %d, want 143: %s", code, rest)
	}
	var saved struct {
		Inputs []struct {
			Records int
			Missing []int
		}
	}
	check(t, json.Unmarshal([]byte(readFile(t, state)), &saved))
	if len(saved.Inputs) != 1 || saved.Inputs[0].Records != 10 || len(saved.Inputs[0].Missing) != 10 {
		t.Errorf("the state is %+v, want 10 records, all of them missing", saved)
	}
	if _, err := os.Stat(failed); !os.IsNotExist(err) {
		t.Errorf("what is in the state is in the failed, too: %v", err)
	}
	if got := e.ctl("resume"); got.code != 0 {
		t.Fatal(got)
	}
	if got := e.bulk(args...); got.code != 0 {
		t.Errorf("going on: %+v", got)
	}
	if n := strings.Count(readFile(t, out), "a line\n"); n != 1000 {
		t.Errorf("%d lines were written, want 1000", n)
	}
}

// Without a server for long it gives up, says so, and keeps where it was.
func TestBulkGivesUp(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	input, failed := filepath.Join(dir, "in"), filepath.Join(dir, "failed")
	check(t, os.WriteFile(input, []byte("one\ntwo\n"), 0o600))
	got := echodRun(t, "send", "--address", "127.0.0.1:"+freePorts(t, 1)[0], "--lines", "--give-up", "300ms", "--failed", failed, input)
	if got.code != 1 || !strings.Contains(got.stderr, "gave up after 300ms: connect to 127.0.0.1:") || !strings.Contains(got.stderr, "2 not finished") {
		t.Errorf("got %+v", got)
	}
	if kept := readFile(t, failed); kept != "one\ntwo\n" {
		t.Errorf("the failed are %q", kept)
	}
	if !strings.Contains(got.stderr, "connection refused: connecting again, for at most 300ms without an echo\n") || strings.Count(got.stderr, "connecting again") != 1 {
		t.Errorf("it does not say once why it connects again: %s", got.stderr)
	}
	check(t, os.WriteFile(input, []byte(strings.Repeat("a line\n", 1000)), 0o600))
	got = echodRun(t, "send", "--timeout", "1ns", "--lines", "--give-up", "100ms", input)
	for _, want := range []string{"64 not finished", "not all of the input was read", "not within 1ns", "a run with --resume FILE can be gone on with"} {
		if !strings.Contains(got.stderr, want) {
			t.Errorf("stderr lacks %q: %s", want, got.stderr)
		}
	}
}

// What came to nothing in one run is not forgotten by the next.
func TestBulkRemembersFailuresWhenItGoesOn(t *testing.T) {
	t.Parallel()
	e := start(t)
	dir := t.TempDir()
	table, out, failed := filepath.Join(dir, "t.csv"), filepath.Join(dir, "out"), filepath.Join(dir, "failed")
	check(t, os.WriteFile(table, []byte("a,b\n1,2\n3\n"+strings.Repeat("4,5\n", 3000)+"6\n"), 0o600))
	args := []string{"--csv", "--output", out, "--failed", failed, "--resume", filepath.Join(dir, "state"), table}
	if got := e.interrupted(syscall.SIGINT, out, args...); got.code != 130 {
		t.Errorf("interrupted: %+v", got)
	}
	if got := e.bulk(args...); got.code != 1 || !strings.Contains(got.stderr, "1 failed before") || !strings.Contains(got.stderr, "1 malformed") {
		t.Errorf("going on: %+v", got)
	}
	if kept := readFile(t, failed); kept != "a,b\n3\n6\n" {
		t.Errorf("the failed are %q", kept)
	}
}

// With --strict the record at which it stopped is still to come.
func TestBulkIsStrictAgainWhenItGoesOn(t *testing.T) {
	t.Parallel()
	e := start(t)
	dir := t.TempDir()
	table := filepath.Join(dir, "t.csv")
	check(t, os.WriteFile(table, []byte("a,b\n1,2\n3\n4,5\n"), 0o600))
	args := []string{"--csv", "--strict", "--resume", filepath.Join(dir, "state"), table}
	for i, want := range []string{`{"line":2,"a":"1","b":"2"}` + "\n", ""} {
		if got := e.bulk(args...); got.code != 1 || got.stdout != want || !strings.Contains(got.stderr, "stopped at a malformed record") {
			t.Errorf("run %d: %+v, want %q", i+1, got, want)
		}
	}
}

// A URL that gives something else than it did is not gone on with.
func TestBulkNoticesThatAURLHasChanged(t *testing.T) {
	t.Parallel()
	e := start(t)
	var version atomic.Int64
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("ETag", fmt.Sprintf(`"%d"`, version.Load()))
		_, _ = io.WriteString(w, strings.Repeat("a line\n", 3000))
	}))
	defer web.Close()
	dir := t.TempDir()
	out := filepath.Join(dir, "out")
	args := []string{"--lines", "--output", out, "--resume", filepath.Join(dir, "state"), web.URL + "/x?token=secret"}
	e.interrupted(syscall.SIGINT, out, args...)
	version.Add(1)
	if got := e.bulk(args...); got.code != 1 || !strings.Contains(got.stderr, `/x?... has changed since `) || strings.Contains(got.stderr, "secret") {
		t.Errorf("another version: %+v", got)
	}
	version.Add(-1)
	if got := e.bulk(args...); got.code != 0 || readFile(t, out) != strings.Repeat("a line\n", 3000) {
		t.Errorf("the same: %+v", got)
	}
}

// A named pipe to which nobody writes keeps nobody waiting.
func TestBulkLeavesAPipeWithoutAWriter(t *testing.T) {
	t.Parallel()
	e := start(t)
	pipe := filepath.Join(t.TempDir(), "pipe")
	check(t, syscall.Mkfifo(pipe, 0o600))
	cmd := e.sendCommand("--lines", "-", pipe)
	cmd.Env, cmd.Stdin = environment(), strings.NewReader("one\n")
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	overdue := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
	defer overdue.Stop()
	_, err = bufio.NewReader(out).ReadString('\n')
	check(t, err)
	check(t, cmd.Process.Signal(syscall.SIGINT))
	_ = cmd.Wait()
	if code := exitCode(cmd.ProcessState); code != 130 {
		t.Errorf("code %d, want 130", code)
	}
}
