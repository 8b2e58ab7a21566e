//go:build unix

package integration

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"
)

// writeCSV writes a table with this number of rows, and returns its path.
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

// expectRows checks that a file has the echo of each row of writeCSV, once and in order.
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
		t.Errorf("%d rows came back (%v), want %d", i, lines.Err(), rows)
	}
}

// Two million rows are sent over 16 connections, while the server is killed twice and drained once. Each row
// comes back once and in order, and the client needs little memory.
func TestSendTwoMillionRowsOverThreeRestarts(t *testing.T) {
	slow(t)
	const rows, mostMemory = 2_000_000, 32 << 10 // KiB
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
		t.Logf("%d KiB at most; %s", most, stderr.String())
		if most > mostMemory {
			t.Errorf("the client used %d KiB, want at most %d", most, mostMemory)
		}
	}
	if !regexp.MustCompile(`all 2,000,000 records came back: .*reconnect`).MatchString(stderr.String()) {
		t.Errorf("the summary is %s", stderr.String())
	}
}

// watchMemory samples the peak memory of a process until it is gone. The returned function waits for that, and
// returns the peak in KiB, if the system reports it. (The peak that wait4 returns includes that of the parent.)
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
