package server

import (
	"bufio"
	"errors"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

func TestG3ClientsThatCameDuringAPauseAreServedOldestFirst(t *testing.T) {
	const clients = 50
	s, addr := serveTCP(t, Echo, Options{})
	h, err := s.Pause(PauseOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var order []string
	var queue []*net.TCPConn
	for range clients {
		c := dialTCP(t, addr)
		send(t, c, c.LocalAddr().String())
		order = append(order, c.LocalAddr().String())
		queue = append(queue, c)
	}
	if n := s.Status().Accepted; n > 1 {
		t.Errorf("%d clients were accepted during the pause, want them left in the queue", n)
	}
	h.Release()
	for i, c := range queue {
		receives(t, c, order[i])
	}
	var served []string
	for info := range s.Conns() {
		served = append(served, info.Remote.String())
	}
	wantEqual(t, "order of serving", served, order)
}

func TestG4TheQueueOfAPausedServerIsToldAndServed(t *testing.T) {
	const clients = 50
	s, addr := serveTCP(t, Echo, Options{})
	if _, err := s.Pause(PauseOptions{}); err != nil {
		t.Fatal(err)
	}
	var queue []*net.TCPConn
	for range clients {
		queue = append(queue, dialTCP(t, addr))
	}
	s.StartDrain(DrainOptions{Grace: 20 * time.Second, Reason: "x"})
	for _, c := range queue {
		receives(t, c, "SHUTDOWN 20 x\n")
		send(t, c, "last words\n")
		_ = c.CloseWrite()
		receivesAll(t, c, "last words\n")
	}
	<-s.Done()
	wantClosed(t, s, map[Reason]uint64{ReasonClientLeft: clients})
}

// Clients connect as fast as they can across a drain's begin. To be refused is fine; but who is
// connected must get an echo or a notice, and never a reset.
func TestG4NobodyIsResetInAConnectStorm(t *testing.T) {
	var connected, told atomic.Int64
	for range 3 {
		s, addr := serveTCP(t, Echo, Options{})
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				for range 10_000 {
					nc, err := net.DialTimeout("tcp", addr.String(), time.Second)
					if err != nil {
						return
					}
					connected.Add(1)
					_ = nc.SetDeadline(time.Now().Add(20 * time.Second))
					_, _ = nc.Write([]byte("x\n"))
					line, err := bufio.NewReader(nc).ReadString('\n')
					switch {
					case err != nil:
						t.Errorf("a connected client read %q and %v, want an echo or a notice", line, err)
					case strings.HasPrefix(line, "SHUTDOWN "):
						told.Add(1)
					case line != "x\n":
						t.Errorf("a client read %q", line)
					}
					_ = nc.Close()
				}
			})
		}
		_ = s.state.Await(t.Context(), func(l *state) bool { return l.accepted > 1000 })
		shutdownIn(t, s, 20*time.Second, "x")
		all.Wait()
	}
	t.Logf("%d connected, %d of them were told of the drain before an echo", connected.Load(), told.Load())
}

// A client that has been told tries at once to connect again.
func TestG4NobodyIsToldBeforeAcceptingHasStopped(t *testing.T) {
	for range 20 {
		s, addr := serveTCP(t, Echo, Options{})
		c := dialTCP(t, addr)
		send(t, c, "x\n")
		receives(t, c, "x\n")
		s.StartDrain(DrainOptions{Grace: 20 * time.Second, Reason: "x"})
		receives(t, c, "SHUTDOWN 20 x\n")
		if late, err := net.DialTimeout("tcp", addr.String(), 20*time.Millisecond); err == nil {
			_ = late.Close()
			t.Error("a client could connect after another one had been told of the drain")
		}
		_ = c.Close()
		<-s.Done()
	}
}

func TestG4TheQueueOfAnInheritedListenerSurvives(t *testing.T) {
	ln := listen(t)
	successor, err := ln.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer successor.Close()
	s, _ := newServer(t, Echo, Options{Limits: Limits{MaxConns: 1}})
	served := serveListener(t, s, Listener{Listener: ln, Inherited: true})
	c := dialTCP(t, ln.Addr())
	send(t, c, "x")
	receives(t, c, "x")
	queued := dialTCP(t, ln.Addr())
	s.StartDrain(DrainOptions{Grace: 20 * time.Second, Reason: "x"})
	receives(t, c, "\nSHUTDOWN 20 x\n")
	_ = c.CloseWrite()
	receivesAll(t, c, "")
	wantErr(t, "Serve", <-served, ErrServerClosed)

	ln2, err := net.FileListener(successor)
	if err != nil {
		t.Fatal(err)
	}
	next, _ := newServer(t, Echo, Options{})
	serve(t, next, ln2)
	late := dialTCP(t, ln.Addr()) // no filter was left behind
	for _, c := range []*net.TCPConn{queued, late} {
		send(t, c, "y")
		receives(t, c, "y")
	}
}

func TestFilterKeepsNewHandshakesOutAndLetsTheQueueBe(t *testing.T) {
	ln := listen(t)
	early := dialTCP(t, ln.Addr())
	if err := stopHandshakes(ln); err != nil {
		t.Fatal(err)
	}
	_, err := net.DialTimeout("tcp", ln.Addr().String(), 200*time.Millisecond)
	if ne, ok := errors.AsType[net.Error](err); !ok || !ne.Timeout() {
		t.Errorf("a late client got %v, want to be kept waiting", err)
	}
	_ = ln.(*net.TCPListener).SetDeadline(time.Now().Add(10 * time.Second))
	nc, err := ln.Accept()
	if err != nil {
		t.Fatalf("accepting who came before the filter: %v", err)
	}
	defer nc.Close()
	send(t, early, "x") // and the filter, which nc has inherited, keeps no data out
	receives(t, nc, "x")
	_ = ln.Close()
	if _, err := net.DialTimeout("tcp", ln.Addr().String(), 10*time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("after the close a client gets %v, want connection refused", err)
	}
	wantErr(t, "filter on a closed listener", stopHandshakes(ln), net.ErrClosed)
	wantErr(t, "filter on a fake listener", stopHandshakes(newFakeListener()), errors.ErrUnsupported)
}

func TestStatusShowsTheAcceptQueue(t *testing.T) {
	s, addr := serveTCP(t, Echo, Options{})
	_ = s.AwaitStatus(t.Context(), func(st State, _ int) bool { return st == StateRunning })
	if _, err := s.Pause(PauseOptions{}); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		dialTCP(t, addr)
	}
	st := s.Status()
	if len(st.Listeners) != 1 {
		t.Fatalf("%d listeners, want 1", len(st.Listeners))
	}
	waiting := st.Listeners[0].AcceptQueue + st.Connections // one may have slipped through
	if waiting != 3 || st.Listeners[0].AcceptQueueLimit < 3 {
		t.Errorf("accept queue %+v beside %d connections, want 3 clients together", st.Listeners[0], st.Connections)
	}
}

// The client takes so little at a time that writes of the server's complete less often than the stall
// timeout: its acknowledgements are what shows that it is there. Once it stops it is cut off.
func TestSlowReaderIsNotCutOffButAStoppedOneIs(t *testing.T) {
	t.Parallel()
	const stall = 700 * time.Millisecond
	s, addr := serveTCP(t, HandlerFunc(untilWriteFails), Options{Timeouts: Timeouts{Stall: stall}})
	c := dialTCP(t, addr)
	_ = c.SetReadBuffer(64 << 10)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	buf := make([]byte, 8<<10)
	for began := time.Now(); time.Since(began) < 4*stall; <-tick.C {
		if _, err := c.Read(buf); err != nil {
			t.Fatalf("a client that reads slowly got %v after %v", err, time.Since(began))
		}
	}
	began := time.Now()
	awaitConns(t, s, 0)
	if took := time.Since(began); took < stall/2 || took > stall+flushTimeout+time.Second {
		t.Errorf("a client that stopped reading was gone after %v, want about %v", took, stall)
	}
	wantClosed(t, s, map[Reason]uint64{ReasonStalled: 1})
}
