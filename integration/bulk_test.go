//go:build unix

package integration

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
)

// writeCSV writes a table of so many rows, and returns its path.
func writeCSV(t *testing.T, rows int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "table.csv")
	file, err := os.Create(path)
	check(t, err)
	w := bufio.NewWriterSize(file, 1<<20)
	_, _ = w.WriteString("id,name,city\n")
	for i := range rows {
		fmt.Fprintf(w, "%d,\"user, %d\",a city with a rather long name\n", i, i%9973)
	}
	check(t, w.Flush())
	check(t, file.Close())
	return path
}

// expectRows checks that a file has what comes back for each row of writeCSV, once and in order.
func expectRows(t *testing.T, path string, rows int) {
	t.Helper()
	file, err := os.Open(path)
	check(t, err)
	defer file.Close()
	lines := bufio.NewScanner(file)
	i := 0
	var want []byte
	for ; lines.Scan(); i++ {
		want = fmt.Appendf(want[:0], `{"line":%d,"id":"%d","name":"user, %d","city":"a city with a rather long name"}`, i+2, i, i%9973)
		if !bytes.Equal(lines.Bytes(), want) {
			t.Fatalf("line %d is %q, want %q", i, lines.Bytes(), want)
		}
	}
	if i != rows || lines.Err() != nil {
		t.Errorf("%d rows have come back (%v), want %d", i, lines.Err(), rows)
	}
}

// Two million rows through 16 connections, while the server is killed twice and restarted once: each row comes back once and in order,
// and the client stays small.
func TestBulkOfTwoMillionRowsSurvivesThreeRestarts(t *testing.T) {
	const rows, mostMemory = 2_000_000, 64 << 10 // KiB
	binary := built(t, leanBinary)
	table := writeCSV(t, rows)
	if info, err := os.Stat(table); err != nil || info.Size() < 100_000_000 {
		t.Fatalf("the table is too small: %v", info.Size())
	}
	socket := filepath.Join(shortDir(t), "c")
	addr := "127.0.0.1:" + freePorts(t, 1)[0]
	serve := func() *echod {
		return launch(t, exec.Command(binary, "serve", "--log-format", "json", "--log-level", "info", "--listen", addr, "--control", socket, "--grace", "5s"), socket)
	}
	server := serve()
	out := filepath.Join(t.TempDir(), "out.jsonl")
	cmd := exec.Command(binary, "send", "--address", addr, "--csv", "--conns", "16", "--ordered", "--output", out, table)
	cmd.Env = environment()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	check(t, cmd.Start())
	memory := watchMemory(cmd.Process.Pid)
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		memory()
	}()
	const moved = rows / 8 * 90 // bytes of an eighth of the rows
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM, syscall.SIGKILL} {
		poll(t, "some rows to pass", func() bool { return server.status().BytesOut > moved })
		server.signal(sig)
		<-server.exited
		server = serve()
	}
	_ = cmd.Wait()
	if code := exitCode(cmd.ProcessState); code != 0 {
		t.Fatalf("exit code %d: %s", code, stderr.String())
	}
	expectRows(t, out, rows)
	if most, known := memory(); known {
		t.Logf("%d KiB at the most; %s", most, stderr.String())
		if most > mostMemory {
			t.Errorf("the client has taken %d KiB, want at most %d", most, mostMemory)
		}
	}
	if !regexp.MustCompile(`all 2,000,000 records came back: .*reconnects`).MatchString(stderr.String()) {
		t.Errorf("the summary is %s", stderr.String())
	}
}

// watchMemory watches how much a process takes, until it is gone; the function that it returns awaits that, and tells the most, in KiB, if
// the system does. (What the kernel says at a process's end begins with that of its parent.)
func watchMemory(pid int) (most func() (kib int, known bool)) {
	peak := regexp.MustCompile(`VmHWM:\s+(\d+) kB`)
	seen := make(chan int, 1)
	go func() {
		last := 0
		for {
			text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
			found := peak.FindSubmatch(text)
			if err != nil || found == nil { // gone, or not awaited yet
				seen <- last
				return
			}
			last, _ = strconv.Atoi(string(found[1]))
			time.Sleep(pollEvery)
		}
	}()
	return sync.OnceValues(func() (int, bool) {
		last := <-seen
		return last, last > 0
	})
}

// bulk runs 'echod send' to a server.
func (e *echod) bulk(args ...string) result {
	e.t.Helper()
	return run(e.t, e.sendCommand(args...))
}

func TestBulkReadsFilesURLsAndStandardInput(t *testing.T) {
	t.Parallel()
	e := start(t)
	dir := t.TempDir()
	const text = "one\ntwo\nthree"
	files := map[string][]byte{"plain": []byte(text), "empty": nil}
	var zipped bytes.Buffer
	gz := gzip.NewWriter(&zipped)
	_, _ = gz.Write([]byte(text))
	check(t, gz.Close())
	files["text.gz"] = zipped.Bytes()
	zst, err := zstd.NewWriter(nil)
	check(t, err)
	files["no ending"] = zst.EncodeAll([]byte(text), nil)
	check(t, zst.Close())
	for name, data := range files {
		check(t, os.WriteFile(filepath.Join(dir, name), data, 0o600))
	}
	web := httptest.NewServer(http.FileServer(http.Dir(dir)))
	defer web.Close()

	for name, c := range map[string]struct {
		args  []string
		stdin string
		want  string
	}{
		"file":           {[]string{"--lines", dir + "/plain"}, "", text},
		"gzip":           {[]string{"--lines", dir + "/text.gz"}, "", text},
		"zstd, by magic": {[]string{"--lines", dir + "/no ending"}, "", text},
		"URL":            {[]string{"--lines", web.URL + "/text.gz"}, "", text},
		"standard input": {[]string{"--lines"}, text, text},
		"several":        {[]string{"--lines", "--conns", "3", "--ordered", dir + "/plain", "-", dir + "/empty", web.URL + "/plain"}, "four\n", text + "\nfour\n" + text},
		"blocks":         {[]string{"--raw", "--block-size", "2B", "--conns", "3", "--ordered", dir + "/plain"}, "", text},
		"packed blocks":  {[]string{"--raw", "--verbatim", dir + "/text.gz"}, "", zipped.String()},
		"csv":            {[]string{"--csv", "--delimiter", ";"}, "a;b\n1;2\n", `{"line":2,"a":"1","b":"2"}` + "\n"},
		"no header":      {[]string{"--csv", "--no-header"}, "1,2\n", `{"line":1,"fields":["1","2"]}` + "\n"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := e.sendCommand(c.args...)
			cmd.Stdin = strings.NewReader(c.stdin)
			got := run(t, cmd)
			if got.code != 0 || got.stdout != c.want || !strings.Contains(got.stderr, " came back: ") {
				t.Errorf("got %+v, want %q and a summary", got, c.want)
			}
		})
	}
}

// A malformed row is named, kept, and does not stop the rest; with --strict it does.
func TestBulkNamesMalformedRows(t *testing.T) {
	t.Parallel()
	e := start(t)
	dir := t.TempDir()
	table, failed := filepath.Join(dir, "t.csv"), filepath.Join(dir, "failed.csv")
	check(t, os.WriteFile(table, []byte("a,b\n1,2\n3\n5,x\"y\n7,8\n"), 0o600))
	got := e.bulk("--csv", "--failed", failed, table)
	if want := `{"line":2,"a":"1","b":"2"}` + "\n" + `{"line":5,"a":"7","b":"8"}` + "\n"; got.stdout != want || got.code != 1 {
		t.Errorf("got %+v, want %q and code 1", got, want)
	}
	for _, want := range []string{table + ":3:1: wrong number of fields: 1 instead of 2\n", table + ":4:4: bare \" in non-quoted-field\n", "2 of 4 records came back", "2 malformed"} {
		if !strings.Contains(got.stderr, want) {
			t.Errorf("stderr lacks %q:\n%s", want, got.stderr)
		}
	}
	if kept, want := readFile(t, failed), "a,b\n3\n5,x\"y\n"; kept != want {
		t.Errorf("the failed are %q, want %q", kept, want)
	}
	got = e.bulk("--csv", "--strict", table)
	if want := `{"line":2,"a":"1","b":"2"}` + "\n"; got.stdout != want || got.code != 1 || !strings.Contains(got.stderr, "stopped at a malformed record") {
		t.Errorf("--strict: got %+v, want %q and code 1", got, want)
	}
}

// corrupting is an echo server that changes lines with the word "bad" while bad is set.
func corrupting(t *testing.T, bad *atomic.Bool) (address string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	t.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				lines := bufio.NewReader(conn)
				for {
					line, err := lines.ReadString('\n')
					if err != nil {
						return
					}
					if bad.Load() {
						line = strings.ReplaceAll(line, "bad", "BAD")
					}
					if _, err := io.WriteString(conn, line); err != nil {
						return
					}
				}
			}()
		}
	}()
	return ln.Addr().String()
}

// What did not come back right is kept in a form that can be sent again.
func TestBulkKeepsWhatFailed(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ flag, input, kept, again string }{
		"lines": {"--lines", "good\nbad 1\ngood\nbad 2\n", "bad 1\nbad 2\n", "bad 1\nbad 2\n"},
		"csv":   {"--csv", "line,b\n1,good\n2,\"bad \"\"one\"\"\"\n", "line,b\n2,\"bad \"\"one\"\"\"\n", `{"line":2,"line_2":"2","b":"bad \"one\""}` + "\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var bad atomic.Bool
			bad.Store(true)
			address := corrupting(t, &bad)
			failed := filepath.Join(t.TempDir(), "failed")
			cmd := exec.Command(built(t, echodBinary), "send", "--address", address, c.flag, "--failed", failed)
			cmd.Stdin = strings.NewReader(c.input)
			got := run(t, cmd)
			if got.code != 1 || !strings.Contains(got.stderr, "echo differs") {
				t.Errorf("got %+v, want code 1 and what differs", got)
			}
			if kept := readFile(t, failed); kept != c.kept {
				t.Errorf("the failed are %q, want %q", kept, c.kept)
			}
			bad.Store(false)
			got = run(t, exec.Command(built(t, echodBinary), "send", "--address", address, c.flag, failed))
			if got.code != 0 || got.stdout != c.again {
				t.Errorf("sent again, %+v, want %q", got, c.again)
			}
		})
	}
}

// Who interrupts a run goes on from there, and each record is written once.
func TestBulkIsInterruptedAndGoesOn(t *testing.T) {
	t.Parallel()
	e := start(t)
	const rows = 3000
	table := writeCSV(t, rows)
	dir := t.TempDir()
	out, state := filepath.Join(dir, "out"), filepath.Join(dir, "state.json")
	args := []string{"--csv", "--conns", "4", "--ordered", "--output", out, "--resume", state, table}
	slow := e.sendCommand(append([]string{"--rate", "1000"}, args...)...)
	slow.Env = environment()
	var stderr bytes.Buffer
	slow.Stderr = &stderr
	check(t, slow.Start())
	poll(t, "some to be written", func() bool {
		info, err := os.Stat(out)
		return err == nil && info.Size() > 0
	})
	check(t, slow.Process.Signal(syscall.SIGINT))
	_ = slow.Wait()
	if code := exitCode(slow.ProcessState); code != 130 {
		t.Errorf("code %d, want 130: %s", code, stderr.String())
	}
	for _, want := range []string{"finishing what is in flight", "--resume " + state} {
		if !strings.Contains(stderr.String(), want) {
			t.Errorf("stderr lacks %q: %s", want, stderr.String())
		}
	}
	if strings.Contains(stderr.String(), "not finished") {
		t.Errorf("what was in flight was not finished: %s", stderr.String())
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
	args := []string{"--lines", "--in-flight", "10", "--output", out, "--resume", state, input}
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
	if code := exitCode(cmd.ProcessState); code != 143 || !strings.Contains(string(rest), "10 not finished") {
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
}

func TestBulkSaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	e := start(t)
	dir := t.TempDir()
	path := func(name, text string) string {
		name = filepath.Join(dir, name)
		check(t, os.WriteFile(name, []byte(text), 0o600))
		return name
	}
	table, other, plain := path("a.csv", "a,b\n1,2\n"), path("b.csv", "c,d\n1,2\n"), path("x.gz", "plain\n")
	for name, c := range map[string]struct {
		args []string
		code int
		want string
	}{
		"no such file":         {[]string{"--lines", dir + "/nosuch"}, 1, "read " + dir + "/nosuch: no such file or directory\n"},
		"a directory":          {[]string{"--lines", dir}, 1, "is a directory"},
		"not packed":           {[]string{"--lines", plain}, 1, "not packed by gzip, whatever its name says"},
		"two formats":          {[]string{"--lines", "--csv", table}, 2, "--lines, --csv and --raw: only one of them"},
		"text with a flag":     {[]string{"--conns", "4", table}, 2, "--conns: arguments are text, unless"},
		"flag of CSV":          {[]string{"--lines", "--no-header", table}, 2, "--no-header: only with --csv"},
		"flag of blocks":       {[]string{"--csv", "--block-size", "1MiB", table}, 2, "--block-size: only with --raw"},
		"delimiter":            {[]string{"--csv", "--delimiter", "ab", table}, 2, `--delimiter "ab": want one character`},
		"size":                 {[]string{"--raw", "--block-size", "big", table}, 2, `--block-size "big": want a size`},
		"no connections":       {[]string{"--lines", "--conns", "0", table}, 2, "--conns 0: want a number from 1"},
		"its own output":       {[]string{"--lines", "--output", table, table}, 2, table + " is to be read, and not to be written to"},
		"other columns":        {[]string{"--csv", "--failed", dir + "/f", table, other}, 1, "b.csv has other columns"},
		"an output that fails": {[]string{"--lines", "--output", "/dev/full", table}, 1, "writing what came back: "},
		"a broken state":       {[]string{"--lines", "--resume", plain, table}, 1, "x.gz is not what an earlier run has left"},
	} {
		t.Run(name, func(t *testing.T) {
			got := e.bulk(c.args...)
			if got.code != c.code || !strings.Contains(got.stderr, c.want) {
				t.Errorf("got %+v, want code %d and %q", got, c.code, c.want)
			}
		})
	}
	if readFile(t, table) != "a,b\n1,2\n" {
		t.Error("an input was written to")
	}
}

// On a terminal there are bars: one an input, and one for all.
func TestBulkDrawsBarsOnATerminal(t *testing.T) {
	t.Parallel()
	e := start(t)
	table := writeCSV(t, 3000)
	small := filepath.Join(t.TempDir(), "small.csv")
	check(t, os.WriteFile(small, []byte("a,b\n1\n"), 0o600))
	term, _ := openTerminal(t)
	term.types(fmt.Sprintf("$ECHOD send --address %s --csv --rate 1500 --output /dev/null %s %s; echo \"code=$?\"\n", e.addr, small, table))
	term.awaits(`small\.csv +\[=+>?\] +100 % of 6 B +0 records`)
	term.awaits(`table\.csv +\[=+> +\] +\d+ % of \d+ kB +[\d,]+ records`)
	term.awaits(`total +\[=+> +\] +\d+ % of \d+ kB +[\d,]+ records +[\d,]+/s +\d+s left +1 failed`)
	term.awaits(`small\.csv:2:1: wrong number of fields`)
	term.awaits(`code=1`)
	term.awaits(`3,000 of 3,001 records came back`)
}

// Without a terminal there is a line from time to time.
func TestBulkTellsItsProgressInLines(t *testing.T) {
	t.Parallel()
	e := start(t)
	cmd := e.sendCommand("--lines", "--output", "/dev/null")
	cmd.Env = environment()
	in, err := cmd.StdinPipe()
	check(t, err)
	stderr, err := cmd.StderrPipe()
	check(t, err)
	check(t, cmd.Start())
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	_, err = io.WriteString(in, "one\ntwo\n")
	check(t, err)
	overdue := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
	defer overdue.Stop()
	line, err := bufio.NewReader(stderr).ReadString('\n') // after five seconds
	if want := regexp.MustCompile(`^echod: 2 records, 8 B back, 8 B read, \d/s\n$`); !want.MatchString(line) {
		t.Errorf("the progress is %q (%v)", line, err)
	}
}

func TestBulkIsQuietOnRequest(t *testing.T) {
	t.Parallel()
	e := start(t)
	cmd := e.sendCommand("--lines", "--quiet")
	cmd.Stdin = strings.NewReader("one\n")
	if got, want := run(t, cmd), (result{stdout: "one\n"}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}
