//go:build unix

package integration

import (
	"fmt"
	"net"
	"regexp"
	"syscall"
	"testing"
	"time"

	"echod/control"
)

var drainNotice = regexp.MustCompile(`^SHUTDOWN \d+ SIGTERM\n$`)

// queue connects n peers to a paused server. They wait in the accept queue.
func (e *echod) queue(n int) []*peer {
	e.t.Helper()
	peers := make([]*peer, n)
	for i := range peers {
		peers[i] = e.dial()
		check(e.t, peers[i].send("mine\n"))
	}
	return peers
}

// expectNoticeAndEnd reads an echo of queue's line, if there is one, the notice of the drain, and then a FIN. It
// half-closes when it is told, unless it stays.
func (p *peer) expectNoticeAndEnd(stays bool) error {
	told := false
	for !told {
		line, err := p.in.ReadString('\n')
		if err != nil {
			return fmt.Errorf("told %q (%w)", line, err)
		}
		told = drainNotice.MatchString(line)
		if !told && line != "mine\n" {
			return fmt.Errorf("got %q", line)
		}
	}
	if !stays {
		if err := p.CloseWrite(); err != nil {
			return err
		}
	}
	rest, err := p.rest()
	if err == nil && rest != "" && rest != "mine\n" {
		err = fmt.Errorf("got %q after the notice", rest)
	}
	return err
}

// expectToldAndEnd checks that the peer is told of the drain, and that the connection ends with a FIN.
func (p *peer) expectToldAndEnd() error {
	line, err := p.in.ReadString('\n')
	if err != nil || !drainNotice.MatchString(line) {
		return fmt.Errorf("told %q (%w)", line, err)
	}
	return p.leave()
}

// TestG11DrainWithFewFiles drains with 500 clients in the accept queue and idle callers on the control socket and
// --http.
func TestG11DrainWithFewFiles(t *testing.T) {
	t.Parallel()
	for _, files := range []int{64, 100, 128, 256, 1024} {
		t.Run(fmt.Sprintf("ulimit -n %d", files), func(t *testing.T) {
			if files != 100 {
				slow(t)
			}
			t.Parallel()
			e := startAs(t, fewFiles(t, files), "--grace", "2s", "--http", "127.0.0.1:0")
			web := e.web()
			e.pause(control.PauseRequest{})
			const clients, callers = 500, 50
			peers := e.queue(clients)
			for range callers {
				for network, address := range map[string]string{"unix": e.socket, "tcp": web} {
					nc, err := net.Dial(network, address)
					check(t, err)
					t.Cleanup(func() { _ = nc.Close() })
				}
			}
			begun := e.signal(syscall.SIGTERM)
			e.awaitState("draining") // clients leave files to the control socket
			if took := time.Since(begun); took > time.Second {
				t.Errorf("the control socket answered after %s", took)
			}
			each(t, clients, func(i int) error {
				defer peers[i].Close()
				return peers[i].expectNoticeAndEnd(i%2 == 0)
			})
			t.Logf("all were told and closed after %s", time.Since(begun))
			e.wait(0)
			sum := e.awaitLog("drained")
			t.Logf("%d served, %d without time", sum.num("notified"), sum.num("rejected"))
		})
	}
}

// TestG4NoGraceTellsALongQueue drains without a grace period. Each client in the accept queue is told and closed in
// order.
func TestG4NoGraceTellsALongQueue(t *testing.T) {
	t.Parallel()
	slow(t)
	overSome(t, []transport{transportTCP, transportUnix}, testNoGraceTellsALongQueue) // a TLS handshake takes time
}

func testNoGraceTellsALongQueue(t *testing.T, over transport) {
	e := over.start(t, "--grace", "0s")
	served := e.crowd(100)
	e.pause(control.PauseRequest{})
	peers := append(e.queue(2000), served...)
	begun := e.signal(syscall.SIGTERM)
	each(t, len(peers), func(i int) error {
		defer peers[i].Close()
		return peers[i].expectNoticeAndEnd(i%2 == 0)
	})
	e.wait(0)
	if took := e.gone.Sub(begun); took > exitLimit(0) {
		t.Errorf("the process exited after %s", took)
	}
}

// TestG3RefusedOnResume checks that many clients that are refused at once end as orderly as one.
func TestG3RefusedOnResume(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, text string
		flags      []string
		resume     func(e *echod)
		transports []transport
	}{
		{"at the connection limit", "BUSY\n", []string{"--max-conns", "5", "--at-limit", "reject"}, func(e *echod) { e.resume() }, transports},
		// Over TLS the limit bounds the handshakes too, and clients beyond it end in the middle of theirs.
		{"at the limit per client", "BUSY\n", []string{"--max-conns-per-ip", "5", "--max-conns-per-uid", "5"}, func(e *echod) { e.resume() }, []transport{transportTCP, transportUnix}},
		{"by a second pause in mode reject", "PAUSED\n", nil, func(e *echod) { e.pause(control.PauseRequest{Mode: "reject"}) }, transports},
	} {
		t.Run(c.name, func(t *testing.T) {
			overSome(t, c.transports, func(t *testing.T, over transport) {
				t.Parallel()
				e := over.start(t, c.flags...)
				e.pause(control.PauseRequest{})
				clients := 500
				if over.name == transportTLS.name {
					clients = 100 // each takes a handshake's CPU time, and the time for a rejection is bounded
				}
				peers := e.queue(clients)
				c.resume(e)
				each(t, clients, func(i int) error {
					defer peers[i].Close()
					line, err := peers[i].in.ReadString('\n')
					if line == "mine\n" && c.flags != nil {
						return peers[i].leave() // one of the first
					}
					if err != nil || line != c.text {
						return fmt.Errorf("got %q (%w)", line, err)
					}
					return peers[i].leave()
				})
			})
		})
	}
}

// TestProxySilentConnections opens many trusted connections that send no header. They delay no client that sends one.
func TestProxySilentConnections(t *testing.T) {
	t.Parallel()
	e := start(t, "--proxy-protocol", "127.0.0.1", "--max-conns", "20")
	for range 200 {
		e.dial()
	}
	const soon = time.Second
	began := time.Now()
	p := e.dial()
	check(t, p.send(headerV1))
	check(t, p.echo("hello\n"))
	if took := time.Since(began); took > soon {
		t.Errorf("the client was served after %s, want at most %s", took, soon)
	}
}
