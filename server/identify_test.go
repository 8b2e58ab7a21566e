package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
)

// identifyByLine takes the first line for the client's address.
func identifyByLine(nc net.Conn) (*net.TCPAddr, error) {
	var line []byte
	for b := make([]byte, 1); ; {
		if _, err := io.ReadFull(nc, b); err != nil {
			return nil, err
		}
		if b[0] == '\n' {
			break
		}
		line = append(line, b[0])
	}
	if string(line) == "local" {
		return nil, nil
	}
	ip := net.ParseIP(string(line))
	if ip == nil {
		return nil, errors.New("no address")
	}
	return &net.TCPAddr{IP: ip, Port: 7}, nil
}

func TestIdentifiedClientsAreListedAndLimitedByTheirOwnAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Identify: identifyByLine, MaxConnsPerIP: 1})
		first := r.dial(t)
		wantPhases(t, r.Server, Waiting)
		first.send(t, "203.0.113.1\nhello\n")
		first.has(t, "hello\n")
		wantPhases(t, r.Server, Serving)
		for info := range r.Conns() {
			wantEqual(t, "remote", info.Remote.String(), "203.0.113.1:7")
		}
		again, other, local := r.dial(t), r.dial(t), r.dial(t)
		again.send(t, "203.0.113.1\n")
		again.ends(t, "BUSY\n")
		other.send(t, "203.0.113.2\nhello\n")
		other.has(t, "hello\n")
		local.send(t, "local\nhello\n")
		local.has(t, "hello\n")
		first.leave(t)
		back := r.dial(t)
		back.send(t, "203.0.113.1\nagain\n")
		back.has(t, "again\n")
		closed := r.Closed()
		wantEqual(t, "closed", closed[0].Remote.String(), "203.0.113.1:7")
	})
}

func TestClientsThatAreNotIdentifiedAreClosed(t *testing.T) {
	for name, sent := range map[string]string{"wrong": "nobody\n", "silent": ""} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, Echo, Options{Identify: identifyByLine})
				c := r.dial(t)
				c.send(t, sent)
				pass(identifyTimeout)
				c.ends(t, "")
				wantClosed(t, r.Server, map[Reason]uint64{RejectedUnidentified: 1})
				if n := len(r.messages("client not identified")); n != 1 {
					t.Errorf("%d log lines, want 1", n)
				}
			})
		})
	}
}

// A health check may only connect, and close or reset; that is nothing to warn of.
func TestWhoGoesBeforeHeIsIdentifiedIsNoFault(t *testing.T) {
	for name, tt := range map[string]struct {
		leave func(*client)
		want  Reason
	}{
		"close": {func(c *client) { _ = c.Close() }, ClientClosed},
		"reset": {func(c *client) { c.Reset() }, ClientReset},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, Echo, Options{Identify: identifyByLine})
				tt.leave(r.dial(t))
				pass(lingerTimeout)
				wantClosed(t, r.Server, map[Reason]uint64{tt.want: 1})
				if n := r.logs.FilterLevelExact(zap.WarnLevel).Len(); n != 0 {
					t.Errorf("%d warnings, want none", n)
				}
			})
		})
	}
}

func TestEventsNameTheIdentifiedClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Identify: identifyByLine})
		sub := r.Subscribe()
		defer sub.Close()
		known, unknown := r.dial(t), r.dial(t)
		known.send(t, "203.0.113.1\n")
		known.leave(t)
		unknown.send(t, "nobody\n")
		unknown.ends(t, "")
		var got []string
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		for e := range sub.Events(ctx) {
			switch e.Type {
			case ConnOpened:
				got = append(got, fmt.Sprint("opened ", e.Conn.ID, " ", e.Conn.Remote))
			case ConnClosed:
				got = append(got, fmt.Sprint("closed ", e.Closed.ID, " ", e.Closed.Remote))
			}
		}
		proxy := unknown.LocalAddr().String()
		wantEqual(t, "events", got, []string{"opened 1 203.0.113.1:7", "closed 1 203.0.113.1:7", "opened 2 " + proxy, "closed 2 " + proxy})
	})
}

func TestUnidentifiedClientsHoldUpNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Identify: identifyByLine})
		r.dial(t) // says nothing
		c := r.dial(t)
		c.send(t, "local\nhello\n")
		c.has(t, "hello\n")
	})
}

// They count, or so many could come that there are no files left.
func TestUnidentifiedClientsCountTowardsTheLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Identify: identifyByLine, MaxConns: 2})
		a, b, queued := r.dial(t), r.dial(t), r.dial(t)
		wantState(t, r.Server, Running, 2)
		a.send(t, "local\nx")
		a.has(t, "x")
		queued.send(t, "local\ny")
		queued.has(t, "")
		b.leave(t)
		queued.has(t, "y")
	})
}

// Whoever is to be turned away is identified first, which takes a file for as long as it takes the proxy.
func TestG11UnidentifiedClientsLeaveFilesForOthers(t *testing.T) {
	for name, full := range map[string]func(*testing.T, *rig) (empty func()){
		"at the limit": func(t *testing.T, r *rig) func() {
			c := r.dial(t)
			c.send(t, "local\nx")
			c.has(t, "x")
			return func() { c.leave(t) }
		},
		"during a pause": func(t *testing.T, r *rig) func() {
			h := r.pause(t, PauseOptions{Mode: RejectNew})
			return func() { h.Release() }
		},
		"during a drain": func(t *testing.T, r *rig) func() {
			r.dial(t)
			r.Drain(time.Hour, "x")
			return func() {}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, Echo, Options{Identify: identifyByLine, MaxConns: 1, AtLimit: Reject})
				empty := full(t, r)
				const most = 1 + maxRejecting
				var silent []*client
				for range most + 20 {
					if nc, err := r.ln.dialFrom("198.51.100.1"); err == nil {
						silent = append(silent, &client{fakeConn: nc})
					}
				}
				synctest.Wait()
				wantEqual(t, "open at once", r.Status().Connections, most)
				empty()
				pass(2 * identifyTimeout)
				if n := r.Status().Accepted; n < most+20 {
					t.Errorf("%d were accepted in the end, want all %d", n, most+20)
				}
				for _, c := range silent {
					_ = c.Close()
				}
			})
		})
	}
}

// A place is an identified client's own from accept to close, also while he waits at the gate.
func TestIdentifiedClientsKeepTheirPlaceAtTheGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Identify: identifyByLine, MaxConns: 1})
		c := r.dial(t)
		h := r.pause(t, PauseOptions{})
		c.send(t, "local\n")
		h.Release()
		queued := r.dial(t)
		wantState(t, r.Server, Running, 1)
		c.leave(t)
		queued.send(t, "local\nx")
		queued.has(t, "x")
	})
}

func TestPauseHoldsIdentifiedClientsAtTheGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Identify: identifyByLine})
		c := r.dial(t)
		h := r.pause(t, PauseOptions{})
		c.send(t, "local\nx\n")
		c.has(t, "")
		wantPhases(t, r.Server, Waiting)
		h.Release()
		c.has(t, "x\n")
	})
}

func TestDrainTellsWhoIsIdentifiedMeanwhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Identify: identifyByLine})
		c := r.dial(t)
		r.Drain(2*time.Second, "x")
		pass(acceptingStops)
		c.send(t, "local\n")
		c.has(t, "SHUTDOWN 2 x\n")
		c.leave(t)
		<-r.Done()
		wantClosed(t, r.Server, map[Reason]uint64{ClientLeft: 1})
	})
}
