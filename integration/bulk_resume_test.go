//go:build unix

package integration

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

func TestSendResume(t *testing.T) {
	t.Run("after SIGKILL", testResumeAfterKill)
	t.Run("after SIGHUP", testResumeAfterHangup)
	t.Run("after the reader of the output has gone", testResumeAfterBrokenPipe)
	t.Run("after the output reached a size limit", testResumeAfterFileLimit)
	t.Run("after a full disk", testResumeAfterFullDisk)
	t.Run("after SIGINT", testResumeAfterInterrupt)
	t.Run("after a second SIGTERM", testResumeAfterSecondSignal)
	t.Run("failures of the earlier run count", testResumeRemembersFailures)
	t.Run("--strict stops at the same record again", testResumeStrict)
	t.Run("a URL that changed", testResumeChangedURL)
	t.Run("another standard input", testResumeAnotherInput)
	t.Run("a URL by Range", testResumeURLByRange)
}

// The same command continues an interrupted run, and each record is written once.
func testResumeAfterInterrupt(t *testing.T) {
	t.Parallel()
	e := start(t)
	const rows = 1500
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

	// Another command line is refused, and changes nothing.
	check(t, os.WriteFile(filepath.Join(dir, "other"), []byte("x\n"), 0o600))
	if got := e.bulk("--csv", "--resume", state, filepath.Join(dir, "other")); got.code != 1 ||
		!strings.Contains(got.stderr, "the earlier run read "+table) {
		t.Errorf("with another input: %+v", got)
	}

	if got := e.bulk("--csv", "--output", filepath.Join(dir, "other"), "--resume", state, table); got.code != 1 || !strings.Contains(got.stderr, "the earlier run wrote to "+out) {
		t.Errorf("with another output: %+v", got)
	}
	if kept := readFile(t, filepath.Join(dir, "other")); kept != "x\n" {
		t.Errorf("another output is %q now", kept)
	}

	got := e.bulk(args...)
	if got.code != 0 || !strings.Contains(got.stderr, "done before") {
		t.Errorf("continuing: %+v", got)
	}
	expectRows(t, out, rows)
	if _, err := os.Stat(state); !os.IsNotExist(err) {
		t.Errorf("the state is still there: %v", err)
	}
}

// The second signal stops at once. What had not come back is sent by the next run.
func testResumeAfterSecondSignal(t *testing.T) {
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
	if !strings.Contains(line, "a second signal") {
		t.Errorf("it says %q (%v)", line, err)
	}
	check(t, cmd.Process.Signal(syscall.SIGTERM))
	rest, _ := io.ReadAll(said)
	_ = cmd.Wait()
	if code := exitCode(cmd.ProcessState); code != 143 || !strings.Contains(string(rest), "10 not finished") ||
		strings.Contains(string(rest), "gave up") {
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
		t.Errorf("the records are in the state and in the failed: %v", err)
	}
	if got := e.ctl("resume"); got.code != 0 {
		t.Fatal(got)
	}
	if got := e.bulk(args...); got.code != 0 {
		t.Errorf("continuing: %+v", got)
	}
	if n := strings.Count(readFile(t, out), "a line\n"); n != 1000 {
		t.Errorf("%d lines were written, want 1000", n)
	}
}

// Without a server it gives up, and keeps what it did not send.
func TestSendGivesUp(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	input, failed := filepath.Join(dir, "in"), filepath.Join(dir, "failed")
	check(t, os.WriteFile(input, []byte("one\ntwo\n"), 0o600))
	got := echodRun(t, "send", "--address", "127.0.0.1:"+freePorts(t, 1)[0], "--lines", "--give-up", "300ms", "--failed", failed, input)
	if got.code != 1 || !strings.Contains(got.stderr, "gave up after 300ms: connect to 127.0.0.1:") ||
		!strings.Contains(got.stderr, "2 not finished") {
		t.Errorf("got %+v", got)
	}
	if kept := readFile(t, failed); kept != "one\ntwo\n" {
		t.Errorf("the failed are %q", kept)
	}
	if !strings.Contains(got.stderr, "connection refused: connecting again, for at most 300ms without an echo\n") || strings.Count(got.stderr, "connecting again") != 1 {
		t.Errorf("the reason to connect again is not reported once: %s", got.stderr)
	}
	check(t, os.WriteFile(input, []byte(strings.Repeat("a line\n", 1000)), 0o600))
	got = echodRun(t, "send", "--timeout", "1ns", "--lines", "--give-up", "100ms", input)
	for _, want := range []string{"64 not finished", "not all of the input was read", "not within 1ns", "a run with --resume FILE can be continued"} {
		if !strings.Contains(got.stderr, want) {
			t.Errorf("stderr lacks %q: %s", want, got.stderr)
		}
	}
}

// A run reports what failed in an earlier one.
func testResumeRemembersFailures(t *testing.T) {
	t.Parallel()
	e := start(t)
	dir := t.TempDir()
	table, out, failed := filepath.Join(dir, "t.csv"), filepath.Join(dir, "out"), filepath.Join(dir, "failed")
	check(t, os.WriteFile(table, []byte("a,b\n1,2\n3\n"+strings.Repeat("4,5\n", 1500)+"6\n"), 0o600))
	args := []string{"--csv", "--output", out, "--failed", failed, "--resume", filepath.Join(dir, "state"), table}
	if got := e.interrupted(syscall.SIGINT, out, args...); got.code != 130 {
		t.Errorf("interrupted: %+v", got)
	}
	if got := e.bulk(args...); got.code != 1 || !strings.Contains(got.stderr, "1 failed before") ||
		!strings.Contains(got.stderr, "1 malformed") {
		t.Errorf("continuing: %+v", got)
	}
	if kept := readFile(t, failed); kept != "a,b\n3\n6\n" {
		t.Errorf("the failed are %q", kept)
	}
}

// With --strict the next run begins with the record at which the first stopped.
func testResumeStrict(t *testing.T) {
	t.Parallel()
	e := start(t)
	dir := t.TempDir()
	table := filepath.Join(dir, "t.csv")
	check(t, os.WriteFile(table, []byte("a,b\n1,2\n3\n4,5\n"), 0o600))
	args := []string{"--csv", "--strict", "--resume", filepath.Join(dir, "state"), table}
	for i, want := range []string{`{"line":2,"a":"1","b":"2"}` + "\n", ""} {
		if got := e.bulk(args...); got.code != 1 || got.stdout != want ||
			!strings.Contains(got.stderr, "stopped at the first malformed record or input") {
			t.Errorf("run %d: %+v, want %q", i+1, got, want)
		}
	}
}

// A URL that changed is refused.
func testResumeChangedURL(t *testing.T) {
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
	if got := e.bulk(args...); got.code != 1 || !strings.Contains(got.stderr, `/x?...: it changed since `) ||
		strings.Contains(got.stderr, "secret") {
		t.Errorf("another version: %+v", got)
	}
	version.Add(-1)
	if got := e.bulk(args...); got.code != 0 || readFile(t, out) != strings.Repeat("a line\n", 3000) {
		t.Errorf("the same: %+v", got)
	}
}

// A named pipe without a writer does not keep an interrupted run from ending.
func TestSendPipeWithoutWriter(t *testing.T) {
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

// interrupted runs 'echod send' slowly, sends it a signal once more is in the file out, and returns the result.
func (e *echod) interrupted(sig syscall.Signal, out string, args ...string) result {
	e.t.Helper()
	size := func() int64 {
		if info, err := os.Stat(out); err == nil {
			return info.Size()
		}
		return 0
	}
	before := size()
	cmd := e.sendCommand(append([]string{"--rate", "500"}, args...)...)
	cmd.Env = environment()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	check(e.t, cmd.Start())
	poll(e.t, "some to be written", func() bool { return size() > before })
	check(e.t, cmd.Process.Signal(sig))
	_ = cmd.Wait()
	return result{stderr: stderr.String(), code: exitCode(cmd.ProcessState)}
}

// The first run and later ones are killed. Each record is written once.
func testResumeAfterKill(t *testing.T) {
	t.Parallel()
	e := start(t)
	const rows = 1500
	table, dir := writeCSV(t, rows), t.TempDir()
	out := filepath.Join(dir, "out")
	args := []string{"--csv", "--conns", "4", "--ordered", "--output", out, "--resume", filepath.Join(dir, "state"), table}
	e.interrupted(syscall.SIGKILL, out, args...)
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGKILL} {
		e.interrupted(sig, out, args...)
	}
	if got := e.bulk(args...); got.code != 0 || !strings.Contains(got.stderr, "done before") {
		t.Errorf("continuing: %+v", got)
	}
	expectRows(t, out, rows)
}

// The closing of a terminal stops a run as an interrupt does.
func testResumeAfterHangup(t *testing.T) {
	t.Parallel()
	e := start(t)
	dir := t.TempDir()
	input, out, state := filepath.Join(dir, "in"), filepath.Join(dir, "out"), filepath.Join(dir, "state")
	check(t, os.WriteFile(input, []byte(strings.Repeat("a line\n", 3000)), 0o600))
	got := e.interrupted(syscall.SIGHUP, out, "--lines", "--output", out, "--resume", state, input)
	if got.code != 129 || !strings.Contains(got.stderr, "--resume "+state) ||
		strings.Contains(got.stderr, "echod: all ") ||
		!strings.Contains(got.stderr, "; not all of the input was read\n") {
		t.Errorf("got %+v", got)
	}
}

// With --resume, a reader that goes away is an error, and the state has what it did not get.
func testResumeAfterBrokenPipe(t *testing.T) {
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
	if exitCode(cmd.ProcessState) != 1 || !strings.Contains(stderr.String(), "writing the echoes: ") ||
		!strings.Contains(stderr.String(), "broken pipe (the same command") {
		t.Errorf("code %d: %s", exitCode(cmd.ProcessState), stderr.String())
	}
	if got := e.bulk("--lines", "--resume", state, input); got.code != 0 ||
		strings.Count(got.stdout, "a line\n") != 3000 {
		t.Errorf("continuing: code %d, %d lines; %s", got.code, strings.Count(got.stdout, "a line\n"), got.stderr)
	}
}

// A file that cannot grow ends with part of a line, which the next run removes.
func testResumeAfterFileLimit(t *testing.T) {
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
		t.Errorf("continuing: %+v", got)
	}
	if readFile(t, out) != text.String() {
		t.Error("the output is not the input")
	}
}

// What came back and could not be written is sent again.
func testResumeAfterFullDisk(t *testing.T) {
	t.Parallel()
	e := start(t)
	dir := t.TempDir()
	input, state := filepath.Join(dir, "in"), filepath.Join(dir, "state")
	check(t, os.WriteFile(input, []byte(strings.Repeat("a line\n", 3000)), 0o600))
	if got := e.bulk("--lines", "--output", "/dev/full", "--resume", state, input); got.code != 1 ||
		!strings.Contains(got.stderr, "no space left on device (the same command continues from here") {
		t.Errorf("got %+v", got)
	}
	if got := e.bulk("--lines", "--resume", state, input); got.code != 0 ||
		strings.Count(got.stdout, "a line\n") != 3000 {
		t.Errorf("continuing: code %d, %d lines, want 3000; %s", got.code, strings.Count(got.stdout,
			"a line\n"), got.stderr)
	}
}

// Another standard input is refused, and nothing of it is sent.
func testResumeAnotherInput(t *testing.T) {
	t.Parallel()
	e := start(t)
	dir := t.TempDir()
	out := filepath.Join(dir, "out")
	args := []string{"--lines", "--output", out, "--resume", filepath.Join(dir, "state")}
	input := strings.Repeat("a line\n", 3000)
	slow := e.sendCommand(append([]string{"--rate", "1000"}, args...)...)
	slow.Stdin, slow.Env = strings.NewReader(input), environment()
	check(t, slow.Start())
	poll(t, "some to be written", func() bool { info, err := os.Stat(out); return err == nil && info.Size() > 0 })
	check(t, slow.Process.Signal(syscall.SIGINT))
	_ = slow.Wait()
	before := readFile(t, out)
	other := e.sendCommand(args...)
	other.Stdin = strings.NewReader(strings.Repeat("b line\n", 3000))
	if got := run(t, other); got.code != 1 ||
		!strings.Contains(got.stderr, "it is not the input that the earlier run read") ||
		readFile(t, out) != before {
		t.Errorf("another input: %+v", got)
	}
	same := e.sendCommand(args...)
	same.Stdin = strings.NewReader(input)
	if got := run(t, same); got.code != 0 || readFile(t, out) != input {
		t.Errorf("the same input: %+v", got)
	}
}

// A URL is not read again from its beginning if its server supports ranges.
func testResumeURLByRange(t *testing.T) {
	t.Parallel()
	e := start(t)
	text := strings.Repeat("a line\n", 3000)
	var ranges []string
	var mu sync.Mutex
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		mu.Lock()
		ranges = append(ranges, req.Header.Get("Range"))
		mu.Unlock()
		w.Header().Set("ETag", `"1"`)
		http.ServeContent(w, req, "", time.Time{}, strings.NewReader(text))
	}))
	defer web.Close()
	dir := t.TempDir()
	out := filepath.Join(dir, "out")
	args := []string{"--lines", "--output", out, "--resume", filepath.Join(dir, "state"), web.URL}
	e.interrupted(syscall.SIGINT, out, args...)
	if got := e.bulk(args...); got.code != 0 || readFile(t, out) != text ||
		!strings.Contains(got.stderr, "done before") {
		t.Errorf("continuing: %+v", got)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(ranges) != 2 || ranges[0] != "" || !strings.HasPrefix(ranges[1], "bytes=") {
		t.Errorf("the ranges asked for are %q", ranges)
	}
}
