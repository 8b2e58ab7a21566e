//go:build unix

package integration

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"echod/control"
)

// admitted lists the connections that are being served, and ever were.
func (e *echod) admitted() (ids []uint64) {
	e.t.Helper()
	conns, err := e.control.Conns(within(e.t, patience), -1, 0)
	check(e.t, err)
	for _, c := range conns.Connections {
		if c.State != "waiting" {
			ids = append(ids, c.ID)
		}
	}
	return ids
}

// pause pauses through the control socket.
func (e *echod) pause(req control.PauseRequest) control.Hold {
	e.t.Helper()
	hold, err := e.control.Pause(within(e.t, patience), req)
	check(e.t, err)
	return hold
}

// resume resumes through the control socket.
func (e *echod) resume() control.Change {
	e.t.Helper()
	change, err := e.control.Resume(within(e.t, patience))
	check(e.t, err)
	return change
}

// TestG2NobodyIsAdmittedOncePauseHasReturned pauses in the middle of a storm of clients. One that is being accepted just
// then must wait at the gate: events, which come in the order in which things happened, show who came too late.
func TestG2NobodyIsAdmittedOncePauseHasReturned(t *testing.T) {
	t.Parallel()
	e := start(t, "--grace", "20s")
	events := e.events()
	old := e.served()
	admitted := make(map[string][]uint64) // by hold, to the end of its pause
	for range 12 {
		storm := beginStorm(t, e.addr, 4, 60)
		storm.awaitConnected(20)
		hold := e.pause(control.PauseRequest{Reason: "storm"})
		before := e.admitted()
		storm.awaitConnected(40)
		e.expectState("paused")
		admitted[hold.ID] = e.admitted()
		if after := admitted[hold.ID]; !slices.Equal(after, before) {
			t.Fatalf("admitted during the pause: %d connections, %d when it began", len(after), len(before))
		}
		check(t, old.echo("I notice nothing\n"))

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
	hold, held := "", 0
	for _, event := range <-events {
		switch {
		case event.Type == "hold":
			hold = event.Hold.ID
		case event.Type == "released":
			hold = ""
		case event.Type == "opened" && hold != "":
			held++
			if slices.Contains(admitted[hold], event.Conn.ID) {
				t.Errorf("connection %d came when %s stood, and was admitted", event.Conn.ID, hold)
			}
		}
	}
	t.Logf("%d connections had to wait at the gate", held)
}

// storm is clients that connect one after another, and say something.
type storm struct {
	t         testing.TB
	connected chan *peer
	peers     []*peer // those that came out of connected
	stop      chan struct{}
	all       sync.WaitGroup
	errs      chan error
}

// beginStorm lets workers connect, of which each makes so many clients at the most.
func beginStorm(t testing.TB, addr string, workers, most int) *storm {
	s := &storm{
		t: t, connected: make(chan *peer, workers*most),
		stop: make(chan struct{}), errs: make(chan error, workers),
	}
	for range workers {
		s.all.Go(func() { s.errs <- s.connectMany(addr, most) })
	}
	return s
}

func (s *storm) connectMany(addr string, most int) error {
	for range most {
		select {
		case <-s.stop:
			return nil
		default:
		}
		p, err := connect(addr)
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

// awaitConnected waits until so many have connected.
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

// end stops it, and returns all who have connected.
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

// TestG3ClientsOfAPauseAreServedOnResumeOldestFirst: none is reset, and the accept queue's order is kept.
func TestG3ClientsOfAPauseAreServedOnResumeOldestFirst(t *testing.T) {
	t.Parallel()
	e := start(t)
	e.pause(control.PauseRequest{})
	const clients = 50
	peers := make([]*peer, clients)
	var came []string
	for i := range peers {
		peers[i] = e.dial()
		check(t, peers[i].send(fmt.Sprintf("said by %d while paused\n", i)))
		came = append(came, peers[i].LocalAddr().String())
	}
	// One may have been accepted just when the pause began: it waits at the gate.
	if st := e.status(); st.Connections+e.queued(st) != clients || len(e.admitted()) != 0 {
		t.Errorf("%d open, %d admitted and %d in the queue, want none admitted of %d", st.Connections, len(e.admitted()), e.queued(st), clients)
	}
	if change := e.resume(); !change.Changed || change.State != "running" {
		t.Errorf("resume answers %+v", change)
	}
	each(t, clients, func(i int) error { return peers[i].expect(fmt.Sprintf("said by %d while paused\n", i)) })

	conns, err := e.control.Conns(within(t, patience), -1, 0)
	check(t, err)
	var served []string
	for _, c := range conns.Connections { // in the order in which they were accepted
		served = append(served, c.Remote)
	}
	if !slices.Equal(served, came) {
		t.Errorf("served in the order\n%s\nbut they came in the order\n%s", strings.Join(served, " "), strings.Join(came, " "))
	}
	each(t, clients, func(i int) error { return peers[i].leave() })
	e.awaitOpen(0)
	e.expectAccounts(map[string]uint64{"client-closed": clients})
}

// TestPauseRejecting: the stricter mode counts, and a client is told why it is turned away.
func TestPauseRejecting(t *testing.T) {
	t.Parallel()
	e := start(t)
	old := e.served()
	e.pause(control.PauseRequest{})
	waiting := e.dial()
	strict := e.pause(control.PauseRequest{Mode: "reject"})
	check(t, waiting.expectRest("PAUSED\n"))
	check(t, e.dial().expectRest("PAUSED\n"))
	check(t, old.echo("I notice nothing\n"))

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

func TestPauseWithATimeToLiveEndsByItself(t *testing.T) {
	t.Parallel()
	e := start(t)
	hold := e.pause(control.PauseRequest{TTL: 200_000_000})
	p := e.dial()
	check(t, p.echo("served when it is over\n"))
	e.expectState("running")
	released := e.awaitLog("hold released", "hold", hold.ID)
	if after := released.time.Sub(hold.Since); after < 200_000_000 {
		t.Errorf("released after %s", after)
	}
}

// TestG2ADrainsDelayDoesNotBreakAPause: a restart in the middle of somebody's backup lets nobody in before the delay is over, and
// then who waits is told with the others.
func TestG2ADrainsDelayDoesNotBreakAPause(t *testing.T) {
	t.Parallel()
	const delay = 2 * time.Second
	e := start(t, "--drain-delay", delay.String(), "--grace", "20s")
	served := e.served()
	e.pause(control.PauseRequest{Reason: "backup"})
	waiting := e.dial()
	check(t, waiting.send("waiting\n"))
	began := e.signal(syscall.SIGTERM)
	e.awaitLog("draining: accepting goes on for a while")
	check(t, served.echo("I notice nothing\n"))
	if st := e.status(); st.State != "draining" || len(st.Holds) != 1 || st.Accepted != 1 {
		t.Errorf("in the delay it is %s with %d holds, and has accepted %d; want draining, 1 and 1", st.State, len(st.Holds), st.Accepted)
	}
	var lines [2]string // in either order
	for i := range lines {
		line, err := waiting.in.ReadString('\n')
		check(t, err)
		lines[i] = line
		if waited := time.Since(began); waited < delay {
			t.Errorf("%q came %s after the signal, in the middle of the pause", line, waited)
		}
	}
	if slices.Sort(lines[:]); lines != [2]string{"SHUTDOWN 20 SIGTERM\n", "waiting\n"} {
		t.Errorf("who has waited was sent %q", lines)
	}
	check(t, served.expect("SHUTDOWN 20 SIGTERM\n"))
	check(t, waiting.leave())
	check(t, served.leave())
	e.wait(0)
}
