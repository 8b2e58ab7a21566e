package integration

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
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
			time.Sleep(time.Duration(rand.IntN(120)) * time.Millisecond) // a random moment of the upgrade
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
	t.Run("the death of a process costs no connection or, if it owned them, all", func(t *testing.T) {
		t.Parallel()
		for i := range 30 {
			e, program := upgradable(t, "--grace", "20s")
			peers := e.crowd(20)
			upgrade := e.ctlCommand("upgrade")
			check(t, upgrade.Start())
			time.Sleep(time.Duration(rand.IntN(120)) * time.Millisecond) // a random moment of the upgrade
			if predecessor := i%2 == 0; predecessor {
				check(t, syscall.Kill(e.pid, syscall.SIGKILL))
				_ = upgrade.Wait()
				expectOrphans(t, peers)
				poll(t, "all processes to end", func() bool { return len(processesOf(t, program)) == 0 })
				continue
			}
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
			_ = e.cmd.Process.Kill()
		}
	})
}

// expectOrphans checks that the clients of a first process that was killed are all cut off, because it owned them, or
// all told to leave, by its successor.
func expectOrphans(t *testing.T, peers []*peer) {
	t.Helper()
	var told atomic.Int64
	each(t, len(peers), func(i int) error {
		if peers[i].expect("SHUTDOWN 20 orphaned\n") != nil {
			return nil
		}
		told.Add(1)
		return peers[i].leave()
	})
	if n := told.Load(); n != 0 && n != int64(len(peers)) {
		t.Errorf("%d of %d clients were told", n, len(peers))
	}
}

// TestUpgradeAndDrain asks for an upgrade just before, during and after a drain.
func TestUpgradeAndDrain(t *testing.T) {
	slow(t)
	t.Parallel()
	refused := func(t *testing.T, e *echod, pid int) {
		t.Helper()
		if got := e.ctl("upgrade"); got.code != 1 || !strings.Contains(got.stderr, "draining") {
			t.Errorf("an upgrade during the drain: %+v", got)
		}
		e.signal(syscall.SIGUSR2)
		e.awaitLog("upgrade failed")
		if now := e.status().PID; now != pid {
			t.Errorf("process %d answers, it was %d", now, pid)
		}
	}
	upgraded := func(t *testing.T, e *echod) {
		t.Helper()
		if got := e.ctl("upgrade"); got.code != 0 {
			t.Fatalf("upgrade: %+v", got)
		}
	}
	t.Run("it is refused during a drain", func(t *testing.T) {
		t.Parallel()
		e, _ := upgradable(t, "--grace", "20s")
		peers := e.crowd(20)
		e.signal(syscall.SIGTERM)
		refused(t, e, e.pid)
		told(t, peers, "SIGTERM")
		e.wait(0)
	})
	t.Run("a drain right after it is carried out by the successor", func(t *testing.T) {
		t.Parallel()
		e, _ := upgradable(t, "--grace", "20s")
		peers := e.crowd(20)
		upgraded(t, e)
		if got := e.ctl("shutdown", "--reason", "deploy"); got.code != 0 {
			t.Errorf("shutdown: %+v", got)
		}
		refused(t, e, e.status().PID)
		told(t, peers, "deploy")
		e.wait(0)
	})
	t.Run("a drain that is still delayed refuses it, and allows it once cancelled", func(t *testing.T) {
		t.Parallel()
		e, _ := upgradable(t, "--grace", "20s", "--drain-delay", "1h")
		peers := e.crowd(20)
		upgraded(t, e) // the delay goes along
		if got := e.ctl("shutdown", "--reason", "deploy"); got.code != 0 {
			t.Errorf("shutdown: %+v", got)
		}
		pid := e.status().PID
		refused(t, e, pid)
		if got := e.ctl("shutdown", "--cancel"); got.code != 0 {
			t.Errorf("shutdown --cancel: %+v", got)
		}
		upgraded(t, e)
		if now := e.status(); now.PID == pid || now.State != "running" {
			t.Errorf("process %d is %s, the predecessor was %d", now.PID, now.State, pid)
		}
		each(t, len(peers), func(i int) error { return peers[i].echo("nobody was told\n") })
		if got := e.ctl("shutdown", "--now"); got.code != 0 {
			t.Errorf("shutdown --now: %+v", got)
		}
		e.wait(0)
	})
	t.Run("a drain that is spread refuses it, and tells each client once", func(t *testing.T) {
		t.Parallel()
		e, _ := upgradable(t, "--grace", "20s")
		peers := e.crowd(20)
		upgraded(t, e)
		if got := e.ctl("shutdown", "--spread", "2s", "--reason", "deploy"); got.code != 0 {
			t.Errorf("shutdown: %+v", got)
		}
		refused(t, e, e.status().PID)
		told(t, peers, "deploy")
		e.wait(0)
	})
	t.Run("it is refused during another one", func(t *testing.T) {
		t.Parallel()
		e, program := upgradable(t, "--upgrade-timeout", "3s")
		p := e.served()
		script(t, program, "exec sleep 60")
		first := e.ctlCommand("upgrade")
		check(t, first.Start())
		poll(t, "the second upgrade to be refused", func() bool {
			got := e.ctl("upgrade", "--timeout", "1ms")
			return got.code == 1 && strings.Contains(got.stderr, "in progress")
		})
		_ = first.Wait()
		if code := exitCode(first.ProcessState); code != 1 {
			t.Errorf("the first upgrade's exit code is %d, want 1", code)
		}
		copyFile(t, built(t, leanBinary), program)
		upgraded(t, e)
		check(t, p.echo("still here\n"))
		e.signal(syscall.SIGTERM)
		check(t, p.expect("SHUTDOWN 5 SIGTERM\n"))
		check(t, p.leave())
		e.wait(0)
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
