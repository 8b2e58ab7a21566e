//go:build unix

package integration

import (
	"os"
	"syscall"
	"testing"

	"echod/control"
)

// TestKilledServer checks that a killed server keeps no successor from starting: with the same control socket and port,
// while the clients of the first are still there.
func TestKilledServer(t *testing.T) {
	t.Parallel()
	first := start(t)
	peers := first.crowd(20)
	first.pause(control.PauseRequest{})
	peers = append(peers, first.dial())
	first.signal(syscall.SIGKILL)
	first.wait(137)
	if _, err := os.Lstat(first.socket); err != nil {
		t.Errorf("a killed server cannot remove its control socket, yet it is gone: %v", err)
	}
	first.ctl("status").expect(t, 2, ``, "no server answers on control socket "+first.socket+": ")

	second := start(t, "--control", first.socket, "--listen", first.addr, "--grace", "20s")
	second.expectState("running")
	p := second.served()
	second.expectAccounts(map[string]uint64{})
	for _, old := range peers {
		_, _ = old.rest() // closed or reset
		_ = old.Close()
	}
	second.signal(syscall.SIGTERM)
	check(t, p.expect("SHUTDOWN 20 SIGTERM\n"))
	check(t, p.leave())
	second.wait(0)
	if _, err := os.Lstat(second.socket); err == nil {
		t.Error("the control socket is still there")
	}
}

// TestKilledClients kills client processes while running, during a pause, and in a drain. Each must be counted.
func TestKilledClients(t *testing.T) {
	t.Parallel()
	nc := openbsdNC.find(t)[0]
	e := start(t, "--grace", "20s")
	host, port := e.hostPort()
	const each = 5
	begin := func() []*program {
		clients := make([]*program, each)
		for i := range clients {
			clients[i] = startProgram(t, nc, host, port)
			clients[i].say("hello\n")
		}
		return clients
	}
	kill := func(clients []*program) {
		for _, p := range clients {
			check(t, p.cmd.Process.Kill())
			p.exits(137)
		}
	}
	echo := func(clients []*program) {
		for _, p := range clients {
			p.reads("hello\n")
		}
	}

	running, stays, drained := begin(), begin(), begin()
	echo(running)
	echo(stays)
	echo(drained)
	kill(running)
	e.awaitOpen(2 * each)
	e.expectAccounts(map[string]uint64{"client-closed": each})

	e.pause(control.PauseRequest{})
	kill(begin()) // they die in the accept queue
	e.expectState("paused")
	e.resume()
	survivor := e.served() // behind them in the queue
	e.awaitOpen(2*each + 1)
	if st := e.status(); st.Accepted < 3*each+1 || st.Connections != 2*each+1 {
		t.Errorf("the status is %+v", st)
	}
	check(t, balanced(e.status()))

	e.signal(syscall.SIGTERM)
	check(t, survivor.expect("SHUTDOWN 20 SIGTERM\n"))
	for _, p := range append(stays, drained...) {
		p.reads("SHUTDOWN 20 SIGTERM\n")
	}
	kill(drained)
	e.awaitOpen(each + 1)
	check(t, balanced(e.status()))
	kill(stays)
	check(t, survivor.leave())
	e.wait(0)
	sum := e.awaitLog("drained")
	if sum.num("notified") != 2*each+1 || sum.num("left_by_themselves") != 2*each+1 {
		t.Errorf("the summary is %s", sum.text)
	}
}

// TestKilledControlClients checks that waits, event streams and holds end with the process that requested them.
func TestKilledControlClients(t *testing.T) {
	t.Parallel()
	e := start(t)
	e.expectState("running")
	before := e.files()
	for range 3 {
		callers := []*program{
			startProgram(t, e.ctlCommand("wait", "--connections", "77").Args...),
			startProgram(t, e.ctlCommand("events").Args...),
			startProgram(t, e.ctlCommand("pause", "--", require(t, "cat")).Args...),
		}
		e.awaitState("paused")
		for _, p := range callers {
			check(t, p.cmd.Process.Kill())
			check(t, p.stdin.Close()) // ends cat, which has lost its parent
			p.exits(137)
		}
		e.awaitState("running")
	}
	e.awaitFiles(before)
	check(t, e.served().leave())
}
