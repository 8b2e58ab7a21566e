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

// TestG4ClientsOfAPauseAreToldInADrain: those who wait in the kernel's queue get the notice, and their time.
func TestG4ClientsOfAPauseAreToldInADrain(t *testing.T) {
	t.Parallel()
	e := start(t, "--grace", "20s")
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
		if err := p.echo("served on\n"); err != nil {
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

// TestG4NobodyIsResetInAStorm: whoever can connect is told, though clients keep coming while the drain begins.
func TestG4NobodyIsResetInAStorm(t *testing.T) {
	t.Parallel()
	e := start(t, "--grace", "20s")
	var stormers, told atomic.Int64
	const workers = 8
	coming := make(chan struct{}, workers)
	drains := make(chan struct{})
	go func() {
		defer close(drains)
		for range workers { // each has come at least once
			<-coming
		}
		_ = e.cmd.Process.Signal(syscall.SIGTERM)
	}()
	each(t, workers, func(int) error {
		var peers []*peer
		for len(peers) < 2000 {
			p, err := connectSoon(e.addr)
			if err != nil {
				break // not let in any more
			}
			defer p.Close()
			peers = append(peers, p)
			if len(peers) == 20 {
				coming <- struct{}{}
			}
		}
		if len(peers) < 20 {
			coming <- struct{}{}
			return fmt.Errorf("only %d could connect", len(peers))
		}
		for _, p := range peers {
			stormers.Add(1)
			if err := p.expect("SHUTDOWN 20 SIGTERM\n"); err != nil {
				return err
			}
			told.Add(1)
			if err := p.leave(); err != nil {
				return err
			}
		}
		return nil
	})
	<-drains
	e.wait(0)
	t.Logf("%d of %d clients were told", told.Load(), stormers.Load())
}

// TestG4AcceptingHasStoppedWhenTheFirstIsTold: whoever reads the notice cannot connect again.
func TestG4AcceptingHasStoppedWhenTheFirstIsTold(t *testing.T) {
	t.Parallel()
	e := start(t, "--grace", "20s", "--listen", "127.0.0.1:0", "--listen", "127.0.0.1:0")
	peers, first := e.crowd(20), e.served()
	e.signal(syscall.SIGHUP)
	check(t, first.expect("SHUTDOWN 20 SIGHUP\n"))
	if st := e.status(); len(st.Listeners) != 0 {
		t.Errorf("listening still: %+v", st.Listeners)
	}
	check(t, first.leave())
	each(t, len(peers), func(i int) error {
		if err := peers[i].expect("SHUTDOWN 20 SIGHUP\n"); err != nil {
			return err
		}
		for _, addr := range e.addrs {
			if p, err := connectSoon(addr); err == nil {
				_ = p.Close()
				return fmt.Errorf("%s lets a client in after the notice", addr)
			}
		}
		return peers[i].leave()
	})
	e.wait(0)
}

// TestG4NoticeStandsOnItsOwnLine: after an echo that ended without a newline, one goes first.
func TestG4NoticeStandsOnItsOwnLine(t *testing.T) {
	t.Parallel()
	e := start(t, "--grace", "20s")
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

// TestG5EveryByteComesBack: clients stream random bytes, the drain comes in the middle, and each half-closes when told.
func TestG5EveryByteComesBack(t *testing.T) {
	e := start(t, "--grace", "20s")
	const clients, warm = 200, 16 << 10
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

// stream is a client that sends random bytes until it is told to stop, and then wants all of them back.
type stream struct {
	*peer
	seed     uint64
	notice   []byte
	told     chan struct{} // closed when the notice has come
	progress chan struct{} // something has come back
	sent     int           // by the sender, until it is awaited
	received atomic.Int64
}

// outstanding bounds what a stream has on its way, so that all of them move at a like pace.
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
	// A newline goes first where the echo did not end in one.
	want := randomBytes(s.seed, s.sent)
	whole := slices.Concat(before, after)
	if n := len(before) - 1; n >= 0 && before[n] == '\n' && len(whole) == len(want)+1 {
		whole = slices.Delete(whole, n, n+1)
	}
	if !bytes.Equal(whole, want) {
		return fmt.Errorf("%d bytes came back, and not those %d that were sent", len(whole), len(want))
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
			close(s.told) // the sender must not wait for what does not come
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

// TestG5ClientThatReadsToTheEndSeesNoReset: not even one that goes on sending until the server's end of stream.
func TestG5ClientThatReadsToTheEndSeesNoReset(t *testing.T) {
	t.Parallel()
	e := start(t, "--grace", "300ms")
	const notice = "SHUTDOWN 1 SIGTERM\n"
	peers := e.crowd(5)
	var senders sync.WaitGroup
	for _, p := range peers {
		senders.Go(func() {
			for p.send("x") == nil { // small, so that what is on its way can be read while the server lingers
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

// TestG5KilledClientGetsAllThatWasRead, though it has read nothing so far, and goes on sending: input that nobody reads
// must not make the kernel reset the connection, and throw away what waits to be sent.
func TestG5KilledClientGetsAllThatWasRead(t *testing.T) {
	t.Parallel()
	e := start(t)
	p := e.dial()
	check(t, p.SetReadBuffer(16<<10))
	const size = 128 << 10
	data := string(randomBytes(1, size))
	check(t, p.send(data))
	for deadline := time.Now().Add(patience); e.status().BytesOut < size; e.pass(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("only %d bytes were echoed", e.status().BytesOut)
		}
	}
	_, err := e.control.Kill(within(t, patience), 1)
	check(t, err)
	for range 10 {
		check(t, p.send("x"))
	}
	got, err := p.rest()
	check(t, err)
	// A read that was under way when the connection was killed may still bring what came right behind, and that too
	// is written back.
	if more, ok := strings.CutPrefix(got, data); !ok || strings.Trim(more, "x") != "" {
		t.Errorf("got %d bytes, want the %d that were read before", len(got), len(data))
	}
	_ = p.Close()
	e.awaitOpen(0)
	e.expectAccounts(map[string]uint64{"killed": 1})
}

// TestG6HandlerThatIgnoresItsContextIsNamed: it cannot keep the process from ending.
func TestG6HandlerThatIgnoresItsContextIsNamed(t *testing.T) {
	t.Parallel()
	const grace = 200 * time.Millisecond
	e := startEmbedding(t, "--grace", grace.String())
	stuck := e.served()
	check(t, stuck.send("ignore\n"))
	good := e.served()
	sent := e.signal(syscall.SIGTERM)
	check(t, good.expect("SHUTDOWN 1 SIGTERM\n"))
	check(t, good.leave())
	e.wait(0)
	if took := e.gone.Sub(sent); took > goneBy(grace) {
		t.Errorf("the process was gone after %s", took)
	}
	if line := e.awaitLog("handler ignores its context and is left behind"); line.str("handler") != "main.misbehave" {
		t.Errorf("the handler's name is missing: %s", line.text)
	}
}
