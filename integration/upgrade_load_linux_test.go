package integration

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestG12UpgradeUnderLoad upgrades 20 times under 2,000 connections that send, and of which some come and go all the
// time.
func TestG12UpgradeUnderLoad(t *testing.T) {
	slow(t)
	e, _ := upgradable(t)
	l := startLoad(t, e.addr, "--conns", "2000", "--rate", "4000", "--churn", "5s", "--ramp", "2s", "--duration", "30s", "--json",
		"--max-refused", "0", "--max-disconnects", "0")
	poll(t, "the load", func() bool { return e.status().Connections > 1900 })
	for i := range 20 {
		if got := e.ctl("upgrade"); got.code != 0 {
			t.Fatalf("upgrade %d: %+v", i, got)
		}
		st := e.status()
		if st.State != "running" {
			t.Errorf("after upgrade %d it is %s", i, st.State)
		}
		check(t, balanced(st))
	}
	if r := l.report(0); len(r.Failed) > 0 { // lost, closed, reset, refused or timed out
		t.Errorf("the report says %q", r.Failed)
	}
	e.signal(syscall.SIGTERM)
	e.wait(0)
}

// TestG12UpgradeAtAnyTime sends signals at random moments of an upgrade: the drain is carried out once, by one process.
func TestG12UpgradeAtAnyTime(t *testing.T) {
	slow(t)
	t.Parallel()
	t.Run("a drain is carried out once", func(t *testing.T) {
		t.Parallel()
		for range 15 {
			e, _ := upgradable(t, "--grace", "20s")
			peers := e.crowd(20)
			upgrade := e.ctlCommand("upgrade")
			check(t, upgrade.Start())
			time.Sleep(time.Duration(rand.IntN(120)) * time.Millisecond) // an upgrade takes about as long
			e.signal(syscall.SIGTERM)
			each(t, len(peers), func(i int) error {
				if err := peers[i].expect("SHUTDOWN 20 SIGTERM\n"); err != nil {
					return err
				}
				return peers[i].leave()
			})
			e.wait(0)
			_ = upgrade.Wait() // done, or refused because of the drain
		}
	})
	t.Run("the death of the successor costs no connection or, if it owned them, all", func(t *testing.T) {
		t.Parallel()
		rolledBack := 0
		for range 15 {
			e, program := upgradable(t)
			peers := e.crowd(20)
			upgrade := e.ctlCommand("upgrade")
			check(t, upgrade.Start())
			time.Sleep(time.Duration(rand.IntN(80)) * time.Millisecond)
			for _, pid := range processesOf(t, program) {
				if pid != e.pid {
					_ = syscall.Kill(pid, syscall.SIGKILL)
				}
			}
			_ = upgrade.Wait()
			var served atomic.Int64
			each(t, len(peers), func(i int) error {
				if peers[i].echo("still here\n") == nil {
					served.Add(1)
				}
				return nil
			})
			code := exitCode(upgrade.ProcessState)
			if n := served.Load(); n != int64(len(peers)) && (n != 0 || code == 1) {
				t.Errorf("%d of %d clients are served; the upgrade's exit code is %d", n, len(peers), code)
			}
			if code == 1 {
				rolledBack++
			}
			_ = e.cmd.Process.Kill()
		}
		t.Logf("%d of 15 upgrades were rolled back", rolledBack)
	})
}

// processesOf lists the processes of a program.
func processesOf(t *testing.T, program string) (pids []int) {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/exe")
	check(t, err)
	for _, link := range links {
		var pid int
		if exe, err := os.Readlink(link); err == nil && exe == program {
			_, err := fmt.Sscanf(link, "/proc/%d/exe", &pid)
			check(t, err)
			pids = append(pids, pid)
		}
	}
	return pids
}

// TestUpgradeOfManyIdle upgrades an idle server with 9,000 connections: from the command to its answer it takes at most
// two seconds.
func TestUpgradeOfManyIdle(t *testing.T) {
	slow(t)
	const clients = 9000
	var limit unix.Rlimit
	check(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	if limit.Max < clients+1000 {
		missing(t, fmt.Sprintf("%d open files are too few", limit.Max))
	}
	e, _ := upgradable(t)
	conns := make([]net.Conn, clients)
	for i := range conns {
		c, err := net.Dial("tcp", e.addr)
		check(t, err)
		defer c.Close()
		conns[i] = c
	}
	e.awaitOpen(clients)
	got := e.ctl("upgrade", "--json")
	if got.code != 0 {
		t.Fatalf("upgrade: %+v", got)
	}
	t.Logf("%s", got.stdout)
	var answer struct {
		HandedOver  int     `json:"handed_over"`
		TookSeconds float64 `json:"took_seconds"`
	}
	check(t, json.Unmarshal([]byte(got.stdout), &answer))
	if answer.HandedOver != clients || answer.TookSeconds > 2 {
		t.Errorf("%d handed over in %v s, want %d in 2 s", answer.HandedOver, answer.TookSeconds, clients)
	}
	if got := e.ctl("shutdown", "--now"); got.code != 0 {
		t.Error(got.stderr)
	}
	e.wait(0)
}
