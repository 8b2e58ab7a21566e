//go:build linux

package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// TestUpgrade builds the program, upgrades it three times with a client connected, and stops the last process.
func TestUpgrade(t *testing.T) {
	program := filepath.Join(t.TempDir(), "greeter")
	if out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "-listen", "127.0.0.1:0")
	cmd.Stderr = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = w.Close() // the pipe ends with the last process
	pid := cmd.Process.Pid
	t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGKILL) })
	log := bufio.NewReader(r)
	// await reads the log up to a line that has text after the pid, and returns the pid and the rest.
	await := func(text string) (pid int, rest string) {
		t.Helper()
		for {
			line, err := log.ReadString('\n')
			if err != nil {
				t.Fatalf("no line %q in the log: %v", text, err)
			}
			id, message, _ := strings.Cut(strings.TrimSpace(line), ": ")
			if rest, ok := strings.CutPrefix(message, text); ok {
				pid, _ = strconv.Atoi(id)
				return pid, rest
			}
		}
	}
	_, address := await("serving ")
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	answers := bufio.NewReader(c)
	ask := func(request, want string) {
		t.Helper()
		if _, err := io.WriteString(c, request); err != nil {
			t.Fatal(err)
		}
		if got, err := answers.ReadString('\n'); err != nil || got != want {
			t.Fatalf("answer to %q is %q, %v; want %q", request, got, err, want)
		}
	}
	ask("hello\n", "hello, stranger\n")
	for i := range 3 {
		name := fmt.Sprintf("Ada %d", i)
		ask("name "+name+"\nhello\n", "hello, "+name+"\n")
		if err := syscall.Kill(pid, syscall.SIGUSR2); err != nil {
			t.Fatal(err)
		}
		next, _ := await("serving ")
		if next == pid {
			t.Fatal("the process is the same")
		}
		pid = next
		ask("hello\n", "hello, "+name+"\n")
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the first process: %v", err)
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(answers); err != nil || len(rest) > 0 {
		t.Errorf("after the signal: %q, %v; want a clean end", rest, err)
	}
	_, _ = io.Copy(io.Discard, log) // until the last process has exited
}
