package integration

import (
	"os/exec"
	"syscall"
	"testing"
)

// Messages of 1 MB on 64 connections take less than 64 MB of memory: the load generator
// keeps no copy of what is in flight.
func TestLoadMemory(t *testing.T) {
	t.Parallel()
	e := start(t)
	cmd := exec.Command(built(t, leanBinary), "load", "--address", e.addr, "--conns", "64", "--size", "1000000",
		"--duration", "1s", "--late", "1m", "--drain-wait", "1m", "--max-lost", "0")
	if got := run(t, cmd); got.code != 0 {
		t.Fatalf("exit status %d: %s%s", got.code, got.stdout, got.stderr)
	}
	const limit = 64 << 10
	if kib := cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss; kib > limit {
		t.Errorf("%d KiB, want at most %d", kib, limit)
	}
}
