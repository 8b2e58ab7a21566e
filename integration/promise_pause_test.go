//go:build unix

package integration

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"echod/control"
)

// admitted lists the open connections that have passed the gate, by id.
func (e *echod) admitted() (ids []uint64) {
	e.t.Helper()
	conns, err := e.control.Conns(within(e.t, patience), -1, control.ConnFilter{})
	check(e.t, err)
	for _, c := range conns.Connections {
		if c.State != "waiting" {
			ids = append(ids, c.ID)
		}
	}
	return ids
}

// pause places a hold through the control socket.
func (e *echod) pause(req control.PauseRequest) control.Hold {
	e.t.Helper()
	hold, err := e.control.Pause(within(e.t, patience), req)
	check(e.t, err)
	return hold
}

// resume releases all holds through the control socket.
func (e *echod) resume() control.Change {
	e.t.Helper()
	change, err := e.control.ResumeAll(within(e.t, patience))
	check(e.t, err)
	return change
}

// TestG2PauseAdmitsNobody pauses in the middle of a storm of clients, where a connection may be accepted in the very
// moment of the pause.
func TestG2PauseAdmitsNobody(t *testing.T) {
	t.Parallel()
	overEach(t, testPauseAdmitsNobody)
}

func testPauseAdmitsNobody(t *testing.T, over transport) {
	t.Parallel()
	e := over.start(t, "--grace", "20s")
	events := e.events()
	old := e.served()
	admitted := make(map[string][]uint64) // by hold: the connections at the end of its pause
	for range 8 {
		storm := e.beginStorm(4, 60)
		storm.awaitConnected(20)
		hold := e.pause(control.PauseRequest{Reason: "storm"})
		before := e.admitted()
		storm.awaitConnected(40)
		e.expectState("paused")
		admitted[hold.ID] = e.admitted()
		if after := admitted[hold.ID]; !slices.Equal(after, before) {
			t.Fatalf("%d connections at the end of the pause, %d at its start", len(after), len(before))
		}
		check(t, old.echo("served during the pause\n"))

		e.resume()
		peers := storm.end()
		each(t, len(peers), func(i int) error {
			defer peers[i].Close()
			if err := peers[i].expect("storm\n"); err != nil {
				return err
			}
			return peers[i].leave()
		})
		e.awaitOpen(1)
	}
	e.signal(syscall.SIGTERM)
	check(t, old.expect("SHUTDOWN 20 SIGTERM\n"))
	check(t, old.leave())
	e.wait(0)

	// Events come in the order in which things happened: no connection that opened during a pause was admitted in it.
	hold, waited := "", 0
	for _, event := range <-events {
		switch {
		case event.Type == "hold":
			hold = event.Hold.ID
		case event.Type == "released":
			hold = ""
		case event.Type == "opened" && hold != "":
			waited++
			if slices.Contains(admitted[hold], event.Conn.ID) {
				t.Errorf("connection %d opened during %s and was admitted", event.Conn.ID, hold)
			}
		}
	}
	t.Logf("%d connections waited at the gate", waited)
}

// TestG3ResumeServesTheQueue checks that no waiting client is reset, and that the accept queue's order is kept.
func TestG3ResumeServesTheQueue(t *testing.T) {
	t.Parallel()
	overEach(t, testResumeServesTheQueue)
}

func testResumeServesTheQueue(t *testing.T, over transport) {
	t.Parallel()
	e := over.start(t)
	e.pause(control.PauseRequest{})
	const clients = 50
	peers := make([]*peer, clients)
	var want []string
	for i := range peers {
		peers[i] = e.dial()
		check(t, peers[i].send(fmt.Sprintf("sent by %d during the pause\n", i)))
		want = append(want, peers[i].LocalAddr().String())
	}
	// One may have been accepted in the moment of the pause: it waits at the gate. Linux does not tell how many wait in the
	// queue of a Unix socket.
	st := e.status()
	queued := clients - st.Connections
	if st.Listeners[0].AcceptQueue != nil {
		queued = *st.Listeners[0].AcceptQueue
	}
	if st.Connections+queued != clients || len(e.admitted()) != 0 {
		t.Errorf("%d open, %d admitted, %d in the queue; want none admitted of %d", st.Connections, len(e.admitted()), queued, clients)
	}
	if change := e.resume(); !change.Changed || change.State != "running" {
		t.Errorf("resume answers %+v", change)
	}
	each(t, clients, func(i int) error { return peers[i].expect(fmt.Sprintf("sent by %d during the pause\n", i)) })

	conns, err := e.control.Conns(within(t, patience), -1, control.ConnFilter{})
	check(t, err)
	var got []string
	for _, c := range conns.Connections { // in the order in which they were accepted
		got = append(got, c.Remote)
	}
	// Clients of a Unix socket have no address, and TLS handshakes are not over in the order in which they began.
	if _, plain := peers[0].peerConn.(*net.TCPConn); plain && !slices.Equal(got, want) {
		t.Errorf("served in the order\n%s\nwant the order in which they connected\n%s", strings.Join(got, " "), strings.Join(want, " "))
	}
	each(t, clients, func(i int) error { return peers[i].leave() })
	e.awaitOpen(0)
	e.expectAccounts(map[string]uint64{"client-closed": clients})
}

func TestPause(t *testing.T) {
	t.Parallel()
	t.Run("mode reject tells clients PAUSED, those that waited before too", func(t *testing.T) {
		overEach(t, testPauseRejects)
	})
	t.Run("a hold with a time to live ends by itself", func(t *testing.T) {
		t.Parallel()
		e := start(t)
		const ttl = 200 * time.Millisecond
		hold := e.pause(control.PauseRequest{TTL: ttl})
		p := e.dial()
		check(t, p.echo("served after the pause\n"))
		e.expectState("running")
		released := e.awaitLog("hold released", "hold", hold.ID)
		if after := released.time.Sub(hold.Since); after < ttl {
			t.Errorf("released after %s, want %s", after, ttl)
		}
	})
}

func testPauseRejects(t *testing.T, over transport) {
	t.Parallel()
	e := over.start(t)
	old := e.served()
	e.pause(control.PauseRequest{})
	waiting := e.dial()
	strict := e.pause(control.PauseRequest{Mode: "reject"})
	check(t, waiting.expectRest("PAUSED\n"))
	check(t, e.dial().expectRest("PAUSED\n"))
	check(t, old.echo("served during the pause\n"))

	_, err := e.control.ReleaseHold(within(t, patience), strict.ID)
	check(t, err)
	e.expectState("paused")
	held := e.dial()
	check(t, held.send("held\n"))
	e.resume()
	check(t, held.expect("held\n"))
	e.awaitOpen(2)
	e.expectAccounts(map[string]uint64{"rejected-paused": 2})
}

// storm is a number of clients that connect one after another and send a line.
type storm struct {
	t         testing.TB
	connected chan *peer
	peers     []*peer // received from connected
	stop      chan struct{}
	all       sync.WaitGroup
	errs      chan error
}

// beginStorm starts workers, each of which connects at most so many clients.
func (e *echod) beginStorm(workers, most int) *storm {
	s := &storm{
		t: e.t, connected: make(chan *peer, workers*most),
		stop: make(chan struct{}), errs: make(chan error, workers),
	}
	for range workers {
		s.all.Go(func() { s.errs <- s.connectMany(e, most) })
	}
	return s
}

func (s *storm) connectMany(e *echod, most int) error {
	for range most {
		select {
		case <-s.stop:
			return nil
		default:
		}
		p, err := e.connect()
		if err != nil {
			return err
		}
		s.connected <- p
		if err := p.send("storm\n"); err != nil {
			return err
		}
	}
	return nil
}

// awaitConnected waits until n clients have connected.
func (s *storm) awaitConnected(n int) {
	s.t.Helper()
	for len(s.peers) < n {
		select {
		case p := <-s.connected:
			s.peers = append(s.peers, p)
		case <-within(s.t, patience).Done():
			s.t.Fatalf("only %d of %d clients could connect", len(s.peers), n)
		}
	}
}

// end stops the storm and returns all clients that have connected.
func (s *storm) end() []*peer {
	s.t.Helper()
	close(s.stop)
	s.all.Wait()
	close(s.connected)
	for p := range s.connected {
		s.peers = append(s.peers, p)
	}
	close(s.errs)
	for err := range s.errs {
		check(s.t, err)
	}
	return s.peers
}
