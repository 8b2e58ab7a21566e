//go:build unix

package integration

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"echod/control"
)

// files counts the server's open file descriptors.
func (e *echod) files() int {
	e.t.Helper()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", e.pid))
	if err != nil {
		missing(e.t, "/proc is not there: "+err.Error())
	}
	return len(fds)
}

// TestG9NothingLeaks uses a server in many ways. Afterwards it must have as many open files as before, and as many
// goroutines as a server that was never used. A second SIGQUIT writes their stacks.
func TestG9NothingLeaks(t *testing.T) {
	t.Parallel()
	overEach(t, testNothingLeaks)
}

func testNothingLeaks(t *testing.T, over transport) {
	t.Parallel()
	fresh, used := over.start(t, "--grace", "20s"), over.start(t, "--grace", "20s")
	fresh.served()
	used.served()
	fresh.awaitOpen(1)
	before := used.files()

	peers := used.crowd(200)
	each(t, 100, func(i int) error { return peers[i].leave() })
	each(t, 50, func(i int) error { return peers[100+i].vanish() })
	conns, err := used.control.Conns(within(t, patience), -1, control.ConnFilter{})
	check(t, err)
	for _, c := range conns.Connections[1:] {
		_, _ = used.control.Kill(within(t, patience), c.ID) // an error for those that have just left
	}
	for _, p := range peers {
		_ = p.Close()
	}
	for range 10 {
		lease, err := used.control.PauseWhileConnected(within(t, patience), control.PauseRequest{Mode: "reject"})
		check(t, err)
		check(t, used.dial().expectRest("PAUSED\n"))
		lease.Close()
	}
	_, err = used.control.Notify(within(t, patience), "hello")
	check(t, err)
	used.awaitOpen(1)
	used.awaitState("running")
	fresh.control.Close()
	used.control.Close()

	// These requests leave one control connection open in each server.
	fresh.expectState("running")
	used.expectState("running")
	used.awaitFiles(before + 1)
	want, got := fresh.goroutines(), used.goroutines()
	if got > want {
		t.Errorf("%d goroutines, an unused server has %d; the log has their stacks", got, want)
	}
}

// awaitFiles waits until at most n files are open.
func (e *echod) awaitFiles(n int) {
	e.t.Helper()
	poll(e.t, fmt.Sprintf("at most %d open files", n), func() bool { return e.files() <= n })
}

// goroutines forces the server to stop with SIGQUIT, and counts the goroutines in the stacks that it writes.
func (e *echod) goroutines() int {
	e.t.Helper()
	e.signal(syscall.SIGQUIT)
	e.awaitLog("draining")
	e.signal(syscall.SIGQUIT)
	e.wait(128 + int(syscall.SIGQUIT))
	n := strings.Count("\n"+e.log.String(), "\ngoroutine ")
	if n == 0 {
		e.t.Error("the second SIGQUIT wrote no stacks")
	}
	return n
}

// awaitState waits for a state.
func (e *echod) awaitState(state string) {
	e.t.Helper()
	_, err := e.control.Wait(within(e.t, patience), control.WaitRequest{State: state})
	if err != nil {
		e.t.Fatalf("waiting for state %s: %v", state, err)
	}
}

// TestG10PanicClosesOneConnection panics in a program that embeds the library.
func TestG10PanicClosesOneConnection(t *testing.T) {
	t.Parallel()
	overEach(t, testPanicClosesOneConnection)
}

func testPanicClosesOneConnection(t *testing.T, over transport) {
	t.Parallel()
	e := over.startEmbedding(t)
	bystander, panicking := e.served(), e.served()
	check(t, panicking.send("panic\n"))
	check(t, panicking.expectRest(""))
	line := e.awaitLog("handler panicked")
	if line.str("panic") != "as asked" || !strings.Contains(line.str("stack"), "main.misbehave") {
		t.Errorf("the log has %s", line.text)
	}
	check(t, bystander.echo("still served\n"))
	check(t, panicking.Close())
	e.awaitOpen(1)
	e.expectAccounts(map[string]uint64{"handler-panic": 1})
	e.signal(syscall.SIGTERM)
	check(t, bystander.expect("SHUTDOWN 1 SIGTERM\n"))
	check(t, bystander.leave())
	e.wait(0)
}

// fewFiles is a command that runs its arguments with a limit of n open files.
func fewFiles(t testing.TB, n int) []string {
	return []string{require(t, "sh"), "-c", fmt.Sprintf(`ulimit -n %d; exec "$0" "$@"`, n)}
}

func TestG11OutOfFiles(t *testing.T) {
	t.Parallel()
	// More clients than the process can have files for: they are served as places become free, the control socket answers,
	// nothing spins, and a drain tells every one of them.
	t.Run("clients beyond the open files limit wait", func(t *testing.T) {
		t.Parallel()
		overEach(t, testClientsBeyondTheFilesWait)
	})

	t.Run("clients beyond the open files limit are told BUSY", func(t *testing.T) {
		t.Parallel()
		overEach(t, testClientsBeyondTheFilesAreBusy)
	})

	// The server lingers for a bounded number of rejected clients at a time. It closes others at once, and these may see a
	// reset instead of BUSY.
	t.Run("a flood of rejections leaves files to others", func(t *testing.T) {
		t.Parallel()
		overEach(t, testFloodOfRejections)
	})

	t.Run("accepting recovers when the limit is lowered and raised again", func(t *testing.T) {
		t.Parallel()
		overEach(t, testFilesLoweredAndRaised)
	})

	// The kernel's errors, injected by strace, for the listener and for the control socket.
	t.Run("accept errors are retried", func(t *testing.T) {
		t.Parallel()
		strace := require(t, "strace")
		for _, errno := range []string{"EMFILE", "ENFILE", "ENOBUFS", "ENOMEM"} {
			t.Run(errno, func(t *testing.T) {
				e := startAs(t, []string{
					strace, "-D", "-f", "-qq", "-o", os.DevNull, "-e", "trace=accept4", "-e", "inject=accept4:error=" + errno + ":when=1..2",
				})
				e.expectState("running")
				check(t, e.served().leave())
				e.expectState("running")
			})
		}
	})
}

func testClientsBeyondTheFilesWait(t *testing.T, over transport) {
	t.Parallel()
	e := over.startAs(t, fewFiles(t, 64), "--grace", "20s")
	const clients, places = 100, 32
	peers := make([]*peer, clients)
	for i := range peers {
		peers[i] = e.dial()
		check(t, peers[i].send("mine\n"))
	}
	each(t, places, func(i int) error { return peers[i].expect("mine\n") })
	// A handshake takes no place, so more TLS clients than there are places may be accepted.
	st := e.status()
	if n := len(e.admitted()); n != places || st.Connections != places && over.name != transportTLS.name {
		t.Errorf("%d admitted of %d open, want %d", n, st.Connections, places)
	}
	if st.Listeners[0].AcceptQueue != nil && st.Connections+e.queued(st) != clients { // of a Unix socket Linux does not tell it
		t.Errorf("%d open and %d waiting, want %d", st.Connections, e.queued(st), clients)
	}
	e.expectIdle()

	each(t, places, func(i int) error { return peers[i].leave() })
	each(t, places, func(i int) error { return peers[places+i].expect("mine\n") })

	begun := e.signal(syscall.SIGTERM)
	rest := peers[places:]
	late := 0
	notice := regexp.MustCompile(`^SHUTDOWN \d+ SIGTERM\n$`)
	var mu sync.Mutex
	each(t, len(rest), func(i int) error {
		defer rest[i].Close()
		received, err := rest[i].in.ReadString('\n')
		if received == "mine\n" {
			received, err = rest[i].in.ReadString('\n')
		}
		if err != nil || !notice.MatchString(received) {
			return fmt.Errorf("told %q (%w)", received, err)
		}
		if received == "SHUTDOWN 0 SIGTERM\n" { // the server had no file to serve it
			mu.Lock()
			defer mu.Unlock()
			late++
		}
		return nil
	})
	t.Logf("all were told after %s; the server had no files to serve %d of %d", time.Since(begun), late, len(rest))
	e.wait(0)
	sum := e.awaitLog("drained")
	if sum.num("notified") != len(rest)-late || sum.num("rejected") != late {
		t.Errorf("the summary is %s", sum.text)
	}
}

func testClientsBeyondTheFilesAreBusy(t *testing.T, over transport) {
	t.Parallel()
	e := over.startAs(t, fewFiles(t, 64), "--at-limit", "reject")
	const places = 32
	const clients = places + 32 // the server lingers for so many rejected clients at a time
	var mu sync.Mutex
	var served []*peer
	busy := 0
	each(t, clients, func(int) error {
		p, err := e.connect()
		if err != nil {
			return err
		}
		if err := p.send("mine\n"); err != nil {
			return err
		}
		line, err := p.in.ReadString('\n')
		if line == "mine\n" {
			mu.Lock()
			defer mu.Unlock()
			served = append(served, p)
			return nil
		}
		defer p.Close()
		if line != "BUSY\n" {
			return fmt.Errorf("got %q (%w)", line, err)
		}
		mu.Lock()
		busy++
		mu.Unlock()
		return p.expectRest("")
	})
	if len(served) != places || busy != clients-places {
		t.Errorf("%d served and %d rejected, want %d and %d", len(served), busy, places, clients-places)
	}
	e.awaitOpen(places)
	for _, p := range served {
		check(t, p.echo("still served\n"))
		check(t, p.leave())
		_ = p.Close()
	}
	e.awaitOpen(0)
	e.served()
	e.expectAccounts(map[string]uint64{"rejected-limit": uint64(busy), "client-closed": places})
}

func testFloodOfRejections(t *testing.T, over transport) {
	t.Parallel()
	e := over.startAs(t, fewFiles(t, 64), "--at-limit", "reject", "--max-conns", "1")
	mine := e.served()
	const clients = 300
	each(t, clients, func(int) error {
		p, err := e.connect()
		if err != nil {
			return err
		}
		defer p.Close()
		if err := p.send("mine\n"); err != nil && !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
			return err
		}
		if got, err := p.rest(); got != "BUSY\n" && (got != "" || !errors.Is(err, syscall.ECONNRESET)) {
			return fmt.Errorf("got %q (%w)", got, err)
		}
		return nil
	})
	check(t, mine.echo("still served\n"))
	if st := e.status(); st.Accepted != clients+1 {
		t.Errorf("%d accepted, want %d", st.Accepted, clients+1)
	}
	check(t, mine.leave())
	e.awaitOpen(0)
	e.expectAccounts(map[string]uint64{"rejected-limit": clients, "client-closed": 1})
}

func testFilesLoweredAndRaised(t *testing.T, over transport) {
	t.Parallel()
	prlimit := require(t, "prlimit")
	e := over.start(t)
	old := e.served()
	e.expectState("running")
	limit := func(n int) {
		t.Helper()
		got := run(t, exec.Command(prlimit, "--pid", strconv.Itoa(e.pid), fmt.Sprintf("--nofile=%d:", n)))
		if got.code != 0 {
			missing(t, "prlimit may not change the limit: "+got.stderr)
		}
	}
	limit(e.files() + 5)
	const clients = 40
	peers := make([]*peer, clients)
	for i := range peers {
		peers[i] = e.dial()
		check(t, peers[i].send("mine\n"))
	}
	e.awaitLog("cannot accept, retrying")
	check(t, old.echo("still served\n"))
	e.expectIdle()
	check(t, peers[0].expect("mine\n")) // a place becomes free
	check(t, peers[0].leave())
	limit(4096)
	each(t, clients-1, func(i int) error { return peers[1+i].expect("mine\n") })
	e.awaitLog("accepting again")
	e.awaitOpen(clients)
	e.expectAccounts(map[string]uint64{"client-closed": 1})
}

// expectIdle checks that the server does not spin: in a second, it uses at most a quarter of one CPU.
func (e *echod) expectIdle() {
	e.t.Helper()
	const span = time.Second
	before := e.processorTime()
	e.pass(span)
	if used := e.processorTime() - before; used > span/4 {
		e.t.Errorf("in %s without traffic the server used %s of CPU time", span, used)
	}
}

// processorTime is the CPU time that the process has used.
func (e *echod) processorTime() time.Duration {
	e.t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", e.pid))
	if err != nil {
		missing(e.t, "/proc is not there: "+err.Error())
	}
	// proc_pid_stat(5): utime and stime are fields 14 and 15. Field 2, the name, may contain spaces.
	_, rest, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(rest)
	ticks := 0
	for _, field := range fields[11:13] {
		n, err := strconv.Atoi(field)
		check(e.t, err)
		ticks += n
	}
	return time.Duration(ticks) * (time.Second / 100)
}
