//go:build unix

package integration

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"echod/control"
)

// exitLimit is how long after a signal that starts a drain the process must have exited. The promise is grace + 2 s. The rest
// allows for this test process, which runs hundreds of clients at that moment.
func exitLimit(grace time.Duration) time.Duration {
	const ownScheduling = 250 * time.Millisecond
	return grace + 2*time.Second + ownScheduling
}

func TestG4DrainTellsEveryClientOnce(t *testing.T) {
	t.Parallel()

	// A client that the server lets connect must be told, though clients keep coming while the drain begins.
	t.Run("clients of a connect storm", func(t *testing.T) {
		t.Parallel()
		overEach(t, testDrainInAStorm)
	})

	t.Run("clients that a pause keeps in the accept queue", func(t *testing.T) {
		t.Parallel()
		overEach(t, testDrainOfPausedClients)
	})

	t.Run("after the last listener has stopped accepting", func(t *testing.T) {
		t.Parallel()
		e := start(t, "--grace", "20s", "--listen", "127.0.0.1:0", "--listen", "127.0.0.1:0")
		peers, first := e.crowd(20), e.served()
		e.signal(syscall.SIGHUP)
		check(t, first.expect("SHUTDOWN 20 SIGHUP\n"))
		if st := e.status(); len(st.Listeners) != 0 {
			t.Errorf("still listening: %+v", st.Listeners)
		}
		check(t, first.leave())
		each(t, len(peers), func(i int) error {
			if err := peers[i].expect("SHUTDOWN 20 SIGHUP\n"); err != nil {
				return err
			}
			for _, addr := range e.addrs {
				if p, err := connectSoon(addr); err == nil {
					_ = p.Close()
					return fmt.Errorf("%s accepts a client after the notice", addr)
				}
			}
			return peers[i].leave()
		})
		e.wait(0)
	})

	t.Run("on a line of its own", func(t *testing.T) {
		t.Parallel()
		overEach(t, testNoticeOnALineOfItsOwn)
	})
}

func testNoticeOnALineOfItsOwn(t *testing.T, over transport) {
	t.Parallel()
	e := over.start(t, "--grace", "20s")
	silent, midLine, atLine := e.dial(), e.dial(), e.served()
	check(t, midLine.echo("no newline"))
	e.awaitOpen(3)
	e.signal(syscall.SIGINT)
	check(t, silent.expect("SHUTDOWN 20 SIGINT\n"))
	check(t, midLine.expect("\nSHUTDOWN 20 SIGINT\n"))
	check(t, atLine.expect("SHUTDOWN 20 SIGINT\n"))
	for _, p := range []*peer{silent, midLine, atLine} {
		check(t, p.leave())
	}
	e.wait(0)
}

func testDrainInAStorm(t *testing.T, over transport) {
	t.Parallel()
	e := over.start(t, "--grace", "20s")
	const workers, least, most = 8, 20, 2000
	var told atomic.Int64
	var connected, signalled sync.WaitGroup
	connected.Add(workers) // done when a worker has its first clients, or none
	signalled.Go(func() {
		connected.Wait()
		_ = e.cmd.Process.Signal(syscall.SIGTERM)
	})
	each(t, workers, func(int) error {
		var peers []*peer
		for len(peers) < most {
			p, err := e.connectWithin(aMoment)
			if err != nil {
				break // the server accepts no more
			}
			defer p.Close()
			if peers = append(peers, p); len(peers) == least {
				connected.Done()
			}
		}
		if len(peers) < least {
			connected.Done()
			return fmt.Errorf("only %d clients could connect", len(peers))
		}
		for _, p := range peers {
			if err := p.expectToldAndEnd(); err != nil { // a TLS client may be told later, after its handshake
				return err
			}
			told.Add(1)
		}
		return nil
	})
	signalled.Wait()
	e.wait(0)
	if sum := e.awaitLog("drained"); sum.num("notified") != int(told.Load()) {
		t.Errorf("%d clients were told; the summary is %s", told.Load(), sum.text)
	}
}

// Clients in the accept queue are served, told once, and have the whole grace period.
func testDrainOfPausedClients(t *testing.T, over transport) {
	t.Parallel()
	e := over.start(t, "--grace", "20s")
	old := e.served()
	e.pause(control.PauseRequest{})
	const clients, notice = 50, "SHUTDOWN 20 SIGTERM\n"
	peers := make([]*peer, clients)
	for i := range peers {
		peers[i] = e.dial()
		check(t, peers[i].send("first\n"))
	}
	e.signal(syscall.SIGTERM)
	check(t, old.expect(notice))
	each(t, clients, func(i int) error {
		p := peers[i]
		got := make([]byte, len("first\n"+notice))
		if _, err := io.ReadFull(p.in, got); err != nil {
			return fmt.Errorf("after %q: %w", got, err)
		}
		if echoed, err := onlyOnce(string(got), notice); err != nil || echoed != "first\n" {
			return fmt.Errorf("got %q, %w", got, err)
		}
		if err := p.echo("served during the grace period\n"); err != nil {
			return err
		}
		return p.leave()
	})
	check(t, old.leave())
	e.wait(0)
	if sum := e.awaitLog("drained"); sum.num("notified") != clients+1 || sum.num("left_by_themselves") != clients+1 {
		t.Errorf("the summary is %s", sum.text)
	}
}

// TestG6DrainOfFifteenThousandClients: half of the clients leave when told. The others have the whole grace period, and
// then read a FIN. It does not run beside other tests, because it uses all CPUs. One goroutine runs all clients, one
// after another: what the others receive meanwhile waits in their sockets.
func TestG6DrainOfFifteenThousandClients(t *testing.T) {
	slow(t)
	const n = 15_000
	var limit syscall.Rlimit
	check(t, syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit))
	const others = 256 // files that this process and the server have besides
	if files := uint64(limit.Cur); files < n+others {
		missing(t, fmt.Sprintf("the limit on open files, %d, is too low for %d clients", files, n))
	}
	const grace = 10 * time.Second // telling and leaving take a fraction of it, on a busy machine too
	e := start(t, "--grace", grace.String())
	peers := make([]*peer, n)
	began := time.Now()
	for i := range peers {
		peers[i] = e.served()
	}
	t.Logf("%d clients were served after %s", n, time.Since(began))

	checkPeer := func(i int, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("client %d of %d: %v", i, n, err)
		}
	}
	begun := e.signal(syscall.SIGTERM)
	for i, p := range peers {
		checkPeer(i, p.SetDeadline(time.Now().Add(patience)))
		checkPeer(i, p.expect("SHUTDOWN 10 SIGTERM\n"))
	}
	t.Logf("the last was told %s after the signal", time.Since(begun))

	stay := n / 2 // the first of those that stay
	for i, p := range peers[:stay] {
		checkPeer(i, p.CloseWrite())
	}
	for i, p := range peers[:stay] {
		checkPeer(i, p.expectRest(""))
		checkPeer(i, p.Close())
	}
	for i, p := range peers[stay:] {
		checkPeer(stay+i, p.expectRest("")) // a FIN: a reset is an error
		if took := time.Since(begun); took < grace {
			t.Fatalf("client %d was closed %s before the deadline", stay+i, grace-took)
		}
		checkPeer(stay+i, p.Close())
	}
	t.Logf("the last was closed %s after the deadline", time.Since(begun)-grace)

	e.wait(0)
	if took := e.gone.Sub(begun); took > exitLimit(grace) {
		t.Errorf("the process exited after %s, want at most %s", took, exitLimit(grace))
	}
	sum := e.awaitLog("drained")
	if sum.num("notified") != n || sum.num("notices_failed") != 0 ||
		sum.num("left_by_themselves") != stay || sum.num("closed_at_deadline") != n-stay {
		t.Errorf("the summary is %s", sum.text)
	}
}

func TestG5DrainLosesNoByte(t *testing.T) {
	t.Parallel()

	t.Run("clients that stream random bytes", func(t *testing.T) {
		t.Parallel()
		overEach(t, testDrainOfStreams)
	})

	// Not even a client that keeps sending until it reads the FIN sees a reset.
	t.Run("clients that read to the end and never stop sending", func(t *testing.T) {
		t.Parallel()
		overEach(t, testDrainOfSenders)
	})

	// The client has read nothing yet, and keeps sending. Unread input at close would make the kernel send an RST and
	// discard what waits to be sent.
	t.Run("a killed client", func(t *testing.T) {
		t.Parallel()
		overEach(t, testKillLosesNoByte)
	})
}

func testKillLosesNoByte(t *testing.T, over transport) {
	t.Parallel()
	e := over.start(t)
	p := e.dial()
	check(t, p.socket().SetReadBuffer(16<<10))
	const size = 128 << 10
	data := string(randomBytes(1, size))
	check(t, p.send(data))
	poll(t, "the echo of all bytes", func() bool { return e.status().BytesOut == size })
	_, err := e.control.Kill(within(t, patience), 1)
	check(t, err)
	for range 10 {
		check(t, p.send("x"))
	}
	got, err := p.rest()
	check(t, err)
	// A read that was in progress when the connection was killed may return these bytes too.
	if more, ok := strings.CutPrefix(got, data); !ok || strings.Trim(more, "x") != "" {
		t.Errorf("got %d bytes, want the %d that the server had read", len(got), len(data))
	}
	_ = p.Close()
	e.awaitOpen(0)
	e.expectAccounts(map[string]uint64{"killed": 1})
}

func testDrainOfSenders(t *testing.T, over transport) {
	t.Parallel()
	e := over.start(t, "--grace", "300ms")
	const notice = "SHUTDOWN 1 SIGTERM\n"
	peers := e.crowd(5)
	var senders sync.WaitGroup
	for _, p := range peers {
		senders.Go(func() {
			for p.send("x") == nil { // small, so that the server can read what is on the way while it lingers
			}
		})
	}
	each(t, len(peers), func(i int) error { return peers[i].expect("xxx") })
	e.signal(syscall.SIGTERM)
	each(t, len(peers), func(i int) error {
		got, err := peers[i].rest()
		_ = peers[i].Close()
		if err != nil {
			return fmt.Errorf("%d bytes, then %w", len(got), err)
		}
		got, err = onlyOnce(got, notice)
		if strings.Trim(got, "x") != "\n" && strings.Trim(got, "x") != "" {
			return fmt.Errorf("not an echo: %.300q", strings.Trim(got, "x"))
		}
		return err
	})
	senders.Wait()
	e.wait(0)
}

func testDrainOfStreams(t *testing.T, over transport) {
	t.Parallel()
	e := over.start(t, "--grace", "20s")
	const clients, warm = 100, 16 << 10
	streams := make([]*stream, clients)
	ready := make(chan struct{}, clients)
	for i := range streams {
		p := e.dial()
		streams[i] = &stream{peer: p, seed: uint64(i), notice: []byte("SHUTDOWN 20 SIGTERM\n"), told: make(chan struct{}), progress: make(chan struct{}, 1)}
	}
	signalled := make(chan struct{})
	go func() {
		defer close(signalled)
		for range clients {
			<-ready
		}
		_ = e.cmd.Process.Signal(syscall.SIGTERM)
	}()
	each(t, clients, func(i int) error { return streams[i].run(warm, func() { ready <- struct{}{} }) })
	<-signalled
	e.wait(0)
	total := 0
	for _, s := range streams {
		total += s.sent
	}
	sum := e.awaitLog("drained")
	if sum.num("notified") != clients || sum.num("left_by_themselves") != clients {
		t.Errorf("the summary is %s", sum.text)
	}
	t.Logf("%d bytes of %d clients came back", total, clients)
}

// stream is a client that sends random bytes until the notice comes, half-closes, and reads all of them back.
type stream struct {
	*peer
	seed     uint64
	notice   []byte
	told     chan struct{} // closed when the notice has come
	progress chan struct{} // bytes have come back
	sent     int           // owned by the sender until it ends
	received atomic.Int64
}

// outstanding bounds the bytes that a stream has on the way, so that all streams move at a similar pace.
const outstanding = 64 << 10

func (s *stream) run(warm int, ready func()) error {
	sender := make(chan error, 1)
	go func() { sender <- s.send() }()
	got, err := s.receive(warm, ready)
	if sendErr := <-sender; sendErr != nil {
		return fmt.Errorf("sending: %w", sendErr)
	}
	if err != nil {
		return fmt.Errorf("receiving: %w", err)
	}
	before, after, found := bytes.Cut(got, s.notice)
	if !found || bytes.Contains(after, s.notice) {
		return fmt.Errorf("the notice did not come once")
	}
	// If the echo did not end in a newline, the notice has one in front.
	want := randomBytes(s.seed, s.sent)
	whole := slices.Concat(before, after)
	if n := len(before) - 1; n >= 0 && before[n] == '\n' && len(whole) == len(want)+1 {
		whole = slices.Delete(whole, n, n+1)
	}
	if !bytes.Equal(whole, want) {
		return fmt.Errorf("%d bytes came back, which are not the %d that were sent", len(whole), len(want))
	}
	return nil
}

func (s *stream) send() error {
	random := randomStream(s.seed)
	block := make([]byte, 4<<10)
	for {
		for s.sent-int(s.received.Load()) > outstanding {
			select {
			case <-s.told:
				return s.CloseWrite()
			case <-s.progress:
			}
		}
		select {
		case <-s.told:
			return s.CloseWrite()
		default:
		}
		_, _ = io.ReadFull(random, block)
		n, err := s.Write(block)
		s.sent += n
		if err != nil {
			_ = s.Close()
			return err
		}
	}
}

func (s *stream) receive(warm int, ready func()) (got []byte, err error) {
	told := false
	defer func() {
		if warm >= 0 {
			ready()
		}
		if !told {
			close(s.told) // release the sender
		}
	}()
	block := make([]byte, 32<<10)
	for {
		n, err := s.peer.Read(block)
		seen := max(0, len(got)-len(s.notice))
		got = append(got, block[:n]...)
		s.received.Store(int64(len(got)))
		select {
		case s.progress <- struct{}{}:
		default:
		}
		if warm >= 0 && len(got) >= warm {
			ready()
			warm = -1
		}
		if !told && bytes.Contains(got[seen:], s.notice) {
			told = true
			close(s.told)
		}
		if err == io.EOF {
			return got, nil
		}
		if err != nil {
			return got, err
		}
	}
}

// TestG13SilentWithoutNotifier uses a program that embeds the library without a Notifier. Its clients read their
// echoes and a FIN, and not one byte more, for every action of operators.
func TestG13SilentWithoutNotifier(t *testing.T) {
	t.Parallel()
	overEach(t, testSilentWithoutNotifier)
}

func testSilentWithoutNotifier(t *testing.T, over transport) {
	t.Parallel()
	e := over.startEmbedding(t, "--silent", "--grace", "300ms")
	p := e.served()
	e.pause(control.PauseRequest{Mode: "reject"})
	check(t, e.dial().expectRest("")) // rejected
	e.resume()
	_, _ = e.control.Notify(within(t, patience), "hello") // an error or not: nothing is sent
	check(t, p.echo("after the operator's message\n"))
	e.signal(syscall.SIGTERM)
	e.awaitState("draining")
	check(t, p.echo("in the drain\n"))
	check(t, p.expectRest(""))
	e.wait(0)
}

func TestG6ClientsHaveTheWholeGracePeriod(t *testing.T) {
	// Each signal that starts a drain. The deadline is far away: the server must stop when the last client has left.
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGHUP} {
		t.Run("the server stops when the last client has left, after "+control.SignalName(sig), func(t *testing.T) {
			if sig != syscall.SIGTERM {
				testServerStopsAfterTheLast(t, transportTCP, sig)
				return
			}
			overEach(t, func(t *testing.T, over transport) { testServerStopsAfterTheLast(t, over, sig) })
		})
	}
	t.Run("beside clients that flood and never read", func(t *testing.T) { overEach(t, testDrainBesideFlood) })
	t.Run("a handler that ignores its context is logged and delays nothing", func(t *testing.T) {
		t.Parallel()
		overEach(t, testDrainOfIgnorantHandler)
	})
}

func testServerStopsAfterTheLast(t *testing.T, over transport, sig syscall.Signal) {
	e := over.start(t, "--grace", "60s")
	peers := e.crowd(100)
	begun := e.signal(sig)
	e.expectTold(peers, begun, "SHUTDOWN 60 "+control.SignalName(sig)+"\n")
	e.awaitLog("signal received", "signal", control.SignalName(sig))
	each(t, len(peers), func(i int) error { return peers[i].echo(fmt.Sprintf("%d, in the grace period\n", i)) })
	e.expectState("draining")
	last, others := peers[0], peers[1:]
	each(t, len(others), func(i int) error { return others[i].leave() })
	check(t, last.echo("still here\n"))
	left := time.Now()
	check(t, last.leave())
	e.wait(0)
	if took := e.gone.Sub(left); took > 2*time.Second {
		t.Errorf("the server stopped %s after the last client had left", took)
	}
	if sum := e.awaitLog("drained"); sum.num("left_by_themselves") != 100 || sum.num("notices_failed") != 0 {
		t.Errorf("the summary is %s", sum.text)
	}
}

// Beside 20 clients that flood and never read, 100 others get the notice as soon, are served, and read a FIN at the
// deadline, not before.
func testDrainBesideFlood(t *testing.T, over transport) {
	const grace = 1500 * time.Millisecond
	e := over.start(t, "--grace", grace.String())
	peers := e.crowd(100)
	var flooders sync.WaitGroup
	defer flooders.Wait()
	for range 20 {
		p := e.dial()
		flooders.Go(p.flood)
	}
	e.awaitOpen(120)
	e.awaitBlocked(20)

	begun := e.signal(syscall.SIGTERM)
	e.expectTold(peers, begun, "SHUTDOWN 2 SIGTERM\n")
	each(t, len(peers), func(i int) error { return peers[i].echo("in the grace period\n") })
	each(t, len(peers), func(i int) error {
		err := peers[i].expectRest("") // a FIN: a reset is an error
		early := grace - time.Since(begun)
		_ = peers[i].Close()
		if err == nil && early > 0 {
			err = fmt.Errorf("closed %s before the deadline", early)
		}
		return err
	})
	e.wait(0)
	if took := e.gone.Sub(begun); took > exitLimit(grace) {
		t.Errorf("the process exited after %s, want at most %s", took, exitLimit(grace))
	}
	if sum := e.awaitLog("drained"); sum.num("closed_at_deadline")+sum.num("forced") != 120 {
		t.Errorf("the summary is %s", sum.text)
	}
}

func testDrainOfIgnorantHandler(t *testing.T, over transport) {
	t.Parallel()
	const grace = 200 * time.Millisecond
	e := over.startEmbedding(t, "--grace", grace.String())
	stuck := e.served()
	check(t, stuck.send("ignore\n"))
	good := e.served()
	sent := e.signal(syscall.SIGTERM)
	check(t, good.expect("SHUTDOWN 1 SIGTERM\n"))
	check(t, good.leave())
	e.wait(0)
	if took := e.gone.Sub(sent); took > exitLimit(grace) {
		t.Errorf("the process exited after %s, want at most %s", took, exitLimit(grace))
	}
	if line := e.awaitLog("handler ignores its context, stopping without it"); line.str("handler") != "main.misbehave" {
		t.Errorf("the handler's name is missing: %s", line.text)
	}
}

// expectTold checks that each of the peers reads the notice soon after begun.
func (e *echod) expectTold(peers []*peer, begun time.Time, notice string) {
	e.t.Helper()
	const soon = 500 * time.Millisecond
	told := make([]time.Time, len(peers))
	each(e.t, len(peers), func(i int) error {
		err := peers[i].expect(notice)
		told[i] = time.Now()
		return err
	})
	last := slices.MaxFunc(told, time.Time.Compare)
	if took := last.Sub(begun); took > soon {
		e.t.Errorf("the last of %d clients was told after %s, want at most %s", len(peers), took, soon)
	}
}

// awaitBlocked waits until the server can write no more to n connections. Nothing announces that: it shows in
// connections that have received much, and on which no byte moves.
func (e *echod) awaitBlocked(n int) {
	e.t.Helper()
	poll(e.t, fmt.Sprintf("%d connections that cannot be written to", n), func() bool {
		conns, err := e.control.Conns(within(e.t, patience), -1, control.ConnFilter{MinIdle: 50 * time.Millisecond})
		check(e.t, err)
		blocked := 0
		for _, c := range conns.Connections {
			if c.BytesOut > 64<<10 {
				blocked++
			}
		}
		return blocked >= n
	})
}
