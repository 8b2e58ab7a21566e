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
func identifyByLine(_ context.Context, nc net.Conn) (net.Conn, error) {
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
		return nc, nil
	}
	ip := net.ParseIP(string(line))
	if ip == nil {
		return nil, errors.New("no address")
	}
	return WithRemoteAddr(nc, &net.TCPAddr{IP: ip, Port: 7}), nil
}

func TestIdentifiedClientsAreListedAndLimitedByTheirOwnAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{WrapConn: identifyByLine, Limits: Limits{MaxConnsPerIP: 1}})
		first := r.dial(t)
		wantPhases(t, r.Server, PhaseWaiting)
		first.send(t, "203.0.113.1\nhello\n")
		first.has(t, "hello\n")
		wantPhases(t, r.Server, PhaseServing)
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
				r := newRig(t, Echo, Options{WrapConn: identifyByLine})
				c := r.dial(t)
				c.send(t, sent)
				pass(DefaultHandshakeTimeout)
				c.ends(t, "")
				wantClosed(t, r.Server, map[Reason]uint64{ReasonRejectedHandshake: 1})
				if n := len(r.messages("handshake failed")); n != 1 {
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
		"close": {func(c *client) { _ = c.Close() }, ReasonClientClosed},
		"reset": {func(c *client) { c.Reset() }, ReasonClientReset},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, Echo, Options{WrapConn: identifyByLine})
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
		r := newRig(t, Echo, Options{WrapConn: identifyByLine})
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
			case EventOpened:
				got = append(got, fmt.Sprint("opened ", e.Conn.ID, " ", e.Conn.Remote))
			case EventClosed:
				got = append(got, fmt.Sprint("closed ", e.Closed.ID, " ", e.Closed.Remote))
			}
		}
		proxy := unknown.LocalAddr().String()
		wantEqual(t, "events", got, []string{"opened 1 203.0.113.1:7", "closed 1 203.0.113.1:7", "opened 2 " + proxy, "closed 2 " + proxy})
	})
}

func TestUnidentifiedClientsHoldUpNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{WrapConn: identifyByLine})
		r.dial(t) // says nothing
		c := r.dial(t)
		c.send(t, "local\nhello\n")
		c.has(t, "hello\n")
	})
}

// They do not count as served, so silent ones keep nobody out.
func TestUnidentifiedClientsDoNotCountTowardsTheLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{WrapConn: identifyByLine, Limits: Limits{MaxConns: 2}})
		a, b, c := r.dial(t), r.dial(t), r.dial(t)
		wantPhases(t, r.Server, PhaseWaiting, PhaseWaiting, PhaseWaiting)
		a.send(t, "local\nx")
		a.has(t, "x")
		c.send(t, "local\ny")
		c.has(t, "y")
		b.send(t, "local\nz")
		b.has(t, "")
		c.leave(t)
		b.has(t, "z")
	})
}

// At the limit on handshakes the oldest one is closed, so that silent clients leave files for others.
func TestG11UnidentifiedClientsLeaveFilesForOthers(t *testing.T) {
	for name, prepare := range map[string]func(*testing.T, *rig){
		"while running":  func(*testing.T, *rig) {},
		"during a pause": func(t *testing.T, r *rig) { r.pause(t, PauseOptions{Mode: PauseReject}) },
		"during a drain": func(t *testing.T, r *rig) {
			r.StartDrain(DrainOptions{Grace: time.Hour, Delay: time.Hour, Reason: "x"})
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, Echo, Options{WrapConn: identifyByLine, Limits: Limits{MaxHandshakes: 3}})
				prepare(t, r)
				var clients []*client
				for range 8 {
					clients = append(clients, r.dial(t))
				}
				for _, c := range clients[:5] {
					c.ends(t, "")
				}
				wantPhases(t, r.Server, PhaseWaiting, PhaseWaiting, PhaseWaiting)
				wantClosed(t, r.Server, map[Reason]uint64{ReasonRejectedHandshake: 5})
				for _, c := range clients[5:] {
					_ = c.Close()
				}
			})
		})
	}
}

// A place is an identified client's own from accept to close, also while he waits at the gate.
func TestIdentifiedClientsKeepTheirPlaceAtTheGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{WrapConn: identifyByLine, Limits: Limits{MaxConns: 1}})
		c := r.dial(t)
		h := r.pause(t, PauseOptions{})
		c.send(t, "local\n")
		h.Release()
		queued := r.dial(t)
		queued.send(t, "local\nx")
		queued.has(t, "")
		c.leave(t)
		queued.has(t, "x")
	})
}

func TestPauseHoldsIdentifiedClientsAtTheGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{WrapConn: identifyByLine})
		c := r.dial(t)
		h := r.pause(t, PauseOptions{})
		c.send(t, "local\nx\n")
		c.has(t, "")
		wantPhases(t, r.Server, PhaseWaiting)
		h.Release()
		c.has(t, "x\n")
	})
}

func TestDrainTellsWhoIsIdentifiedMeanwhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{WrapConn: identifyByLine})
		c := r.dial(t)
		r.StartDrain(DrainOptions{Grace: 2 * time.Second, Reason: "x"})
		pass(acceptorsStop)
		c.send(t, "local\n")
		c.has(t, "SHUTDOWN 2 x\n")
		c.leave(t)
		<-r.Done()
		wantClosed(t, r.Server, map[Reason]uint64{ReasonClientLeft: 1})
	})
}
