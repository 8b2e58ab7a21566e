package integration

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"echod/control"
)

// upgradable starts a server from a copy of the program, which a test can replace.
func upgradable(t *testing.T, flags ...string) (e *echod, program string) {
	t.Helper()
	return upgradableAt(t, append([]string{"--listen", "127.0.0.1:0"}, flags...)...)
}

// upgradableAt is upgradable for a server whose flags say where it listens.
func upgradableAt(t *testing.T, flags ...string) (e *echod, program string) {
	t.Helper()
	program = filepath.Join(shortDir(t), "echod")
	copyFile(t, built(t, leanBinary), program)
	socket := filepath.Join(shortDir(t), "c")
	flags = append([]string{"serve", "--log-format", "json", "--control", socket}, flags...)
	cmd := commandOf(append([]string{program}, flags...)...)
	cmd.Env = environment()
	e = launch(t, cmd, socket)
	t.Cleanup(func() { killAll(t, program) })
	return e, program
}

// killAll ends the successors that a failed test leaves: the processes of this copy of the program.
func killAll(t *testing.T, program string) {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/exe")
	check(t, err)
	for _, link := range links {
		if exe, err := os.Readlink(link); err == nil && strings.TrimSuffix(exe, " (deleted)") == program {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(link)))
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	check(t, err)
	writeProgram(t, to, data)
}

// writeProgram writes a program. A running program cannot be written to, and one that is open for writing, in this
// process or a child that it is starting, cannot be run.
func writeProgram(t *testing.T, path string, content []byte) {
	t.Helper()
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	check(t, os.WriteFile(path+".new", content, 0o755))
	check(t, os.Rename(path+".new", path))
}

// TestG12Upgrade upgrades the real program. Package server tests the handover itself.
func TestG12Upgrade(t *testing.T) {
	t.Parallel()
	t.Run("connections, holds and counters continue", func(t *testing.T) {
		t.Parallel()
		overSome(t, []transport{transportTCP, transportUnix}, testUpgradeGoesOn) // TLS connections stay behind
	})

	t.Run("a signal reaches the process that serves, while those before it still drain", func(t *testing.T) {
		t.Parallel()
		e, _ := upgradable(t, "--grace", "20s", "--proxy-protocol", "127.0.0.1")
		silent := e.dial() // it never sends its PROXY header, so it stays with the first process
		p := e.dial()
		check(t, p.send("PROXY UNKNOWN\r\nhello\n"))
		check(t, p.expect("hello\n"))
		e.awaitOpen(2)
		for range 2 {
			if got := e.ctl("upgrade"); got.code != 0 {
				t.Fatal(got.stderr)
			}
		}
		e.signal(syscall.SIGTERM)
		check(t, p.expect("SHUTDOWN 20 SIGTERM\n"))
		check(t, p.leave())
		check(t, silent.Close())
		e.wait(0)
	})

	for name, replace := range map[string]func(t *testing.T, program string){
		"a program that exits":             func(t *testing.T, p string) { script(t, p, "exit 3") },
		"a program that hangs":             func(t *testing.T, p string) { script(t, p, "exec sleep 60") },
		"a program that is not executable": func(t *testing.T, p string) { check(t, os.Chmod(p, 0o644)) },
		"a program that is gone":           func(t *testing.T, p string) { check(t, os.Remove(p)) },
	} {
		t.Run(name+" changes nothing", func(t *testing.T) {
			t.Parallel()
			e, program := upgradable(t, "--upgrade-timeout", "2s")
			c := e.served()
			pid := e.status().PID
			replace(t, program)
			got := e.ctl("upgrade")
			if got.code != 1 || !strings.Contains(got.stderr, "rolled back") {
				t.Errorf("exit code %d, %q; want 1 and the reason", got.code, got.stderr)
			}
			if st := e.status(); st.PID != pid || st.State != "running" || st.Connections != 1 {
				t.Errorf("process %d (it was %d), state %s, %d connections", st.PID, pid, st.State, st.Connections)
			}
			check(t, c.echo("still here\n"))
			check(t, e.dial().echo("and new\n"))
			if got := e.ctl("pause"); got.code != 0 {
				t.Error(got.stderr)
			}
			e.signal(syscall.SIGTERM)
			check(t, c.expect("SHUTDOWN 5 SIGTERM\n"))
		})
	}

	t.Run("callers of the control socket continue", testUpgradeCallers)

	t.Run("SIGUSR2 upgrades", func(t *testing.T) {
		t.Parallel()
		e, _ := upgradable(t)
		c := e.served()
		pid := e.status().PID
		e.signal(syscall.SIGUSR2)
		e.awaitLog("took over", "connections", "1")
		poll(t, "the successor answers", func() bool {
			got := e.ctl("status", "--json")
			return got.code == 0 && !strings.Contains(got.stdout, fmt.Sprintf(`"pid":%d,`, pid))
		})
		check(t, c.echo("here\n"))
	})

	t.Run("the first process exits with the code of the last", func(t *testing.T) {
		t.Parallel()
		e, _ := upgradable(t, "--grace", "1m")
		e.served()
		if got := e.ctl("upgrade"); got.code != 0 {
			t.Fatal(got.stderr)
		}
		e.signal(syscall.SIGTERM)
		e.awaitLog("draining")
		e.signal(syscall.SIGTERM)
		e.wait(128 + int(syscall.SIGTERM))
	})
}

func testUpgradeGoesOn(t *testing.T, over transport) {
	t.Parallel()
	var program string
	e := over.startWith(t, func(flags ...string) (e *echod) {
		e, program = upgradableAt(t, flags...)
		return e
	}, "--grace", "20s")
	old := e.crowd(20)
	if got := e.ctl("pause", "--reason", "backup"); got.code != 0 {
		t.Fatal(got.stderr)
	}
	queued := e.dial()
	check(t, queued.send("queued\n"))
	pid := e.status().PID
	for i := range 3 {
		copyFile(t, built(t, leanBinary), program)
		got := e.ctl("upgrade")
		if got.code != 0 || !strings.Contains(got.stdout, "20 connections handed over") {
			t.Fatalf("upgrade %d: exit code %d, %q, %q", i, got.code, got.stdout, got.stderr)
		}
		st := e.status()
		if st.PID == pid || st.State != "paused" || len(st.Holds) != 1 || st.Holds[0].Reason != "backup" {
			t.Errorf("after upgrade %d: process %d (it was %d), state %s, holds %+v", i, st.PID, pid, st.State, st.Holds)
		}
		if err := balanced(st); err != nil {
			t.Error(err)
		}
		pid = st.PID
		each(t, len(old), func(k int) error { return old[k].echo(fmt.Sprintf("after upgrade %d\n", i)) })
	}
	if got := e.ctl("resume"); got.code != 0 {
		t.Fatal(got.stderr)
	}
	check(t, queued.expect("queued\n"))

	// The first process passes the signal on. Each client is told once, by the process that serves it.
	e.signal(syscall.SIGTERM)
	each(t, len(old), func(k int) error {
		if err := old[k].expect("SHUTDOWN 20 SIGTERM\n"); err != nil {
			return err
		}
		return old[k].leave()
	})
	check(t, queued.expect("SHUTDOWN 20 SIGTERM\n"))
	check(t, queued.leave())
	e.wait(0)
	if _, err := os.Stat(e.socket); err == nil {
		t.Error("the control socket is still there")
	}
}

// testUpgradeCallers upgrades under callers of the control socket that last.
func testUpgradeCallers(t *testing.T) {
	t.Parallel()
	e, _ := upgradable(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	var followers sync.WaitGroup
	var events []control.Event
	seen := make(chan string, 1000)
	c := control.NewClient(e.socket)
	defer c.Close()
	followers.Go(func() {
		for ev, err := range c.Events(ctx) {
			if err != nil {
				t.Error(err)
				return
			}
			events = append(events, ev)
			seen <- ev.Type
		}
	})
	await := func(want string) {
		t.Helper()
		for {
			select {
			case got := <-seen:
				if got == want {
					return
				}
			case <-within(t, patience).Done():
				t.Fatalf("no event %q", want)
			}
		}
	}
	poll(t, "the events to be followed", func() bool {
		check(t, e.served().Close())
		return len(seen) > 0
	})

	// A command whose pause outlives two upgrades, a caller by hand, and a wait.
	job := startProgram(t, built(t, echodBinary), "ctl", "--control", e.socket, "pause", "--reason", "job", "--", "cat")
	await("hold")
	byHand, err := net.Dial("unix", e.socket)
	check(t, err)
	defer byHand.Close()
	check(t, byHand.SetDeadline(time.Now().Add(patience)))
	_, err = byHand.Write([]byte("POST /v1/pause?while=connected HTTP/1.1\r\nHost: echod\r\nContent-Length: 0\r\n\r\n"))
	check(t, err)
	await("hold")
	waiting := e.ctlCommand("wait", "--state", "running", "--timeout", "30s")
	check(t, waiting.Start())
	for range 2 {
		if got := e.ctl("upgrade"); got.code != 0 {
			t.Fatal(got.stderr)
		}
		await("upgraded")
		if st := e.status(); st.State != "paused" || len(st.Holds) != 2 {
			t.Fatalf("after the upgrade it is %s with the holds %+v", st.State, st.Holds)
		}
	}
	if got := e.ctl("resume", e.status().Holds[1].ID); got.code != 0 {
		t.Fatal(got.stderr)
	}
	answer, err := io.ReadAll(byHand)
	check(t, err)
	if lines := strings.Split(strings.TrimSpace(string(answer)), "\n"); !strings.Contains(lines[len(lines)-1], `{"released":`) {
		t.Errorf("the caller by hand got %q, want a last line that says who released it", answer)
	}
	await("released")
	e.expectState("paused")
	job.say("done\n")
	job.reads("done\n")
	check(t, job.stdin.Close())
	job.ends("")
	await("released")
	check(t, waiting.Wait())
	e.expectState("running")

	// A caller that dies releases its hold in the successor.
	killed := e.ctlCommand("pause", "--", "sleep", "60")
	check(t, killed.Start())
	await("hold")
	if got := e.ctl("upgrade"); got.code != 0 {
		t.Fatal(got.stderr)
	}
	check(t, killed.Process.Kill())
	_ = killed.Wait()
	await("released")
	e.expectState("running")

	cancel(nil)
	followers.Wait()
	for i, ev := range events {
		if ev.ID != events[0].ID+uint64(i) || ev.Type == "missed" {
			t.Errorf("event %d is %s with the id %d, after %d", i, ev.Type, ev.ID, events[max(0, i-1)].ID)
		}
	}
	again := 0
	for ev, err := range c.EventsAfter(t.Context(), events[0].ID) { // a caller that was away during all upgrades
		check(t, err)
		if again++; ev.Type != events[again].Type || ev.ID != events[again].ID {
			t.Errorf("for a later caller event %d is %s with the id %d, want %s", again, ev.Type, ev.ID, events[again].Type)
		}
		if again == len(events)-1 {
			break
		}
	}
	e.signal(syscall.SIGTERM)
	e.wait(0)
}

// script replaces a program by a shell script.
func script(t *testing.T, program, commands string) {
	t.Helper()
	writeProgram(t, program, []byte("#!/bin/sh\n"+commands+"\n"))
}
