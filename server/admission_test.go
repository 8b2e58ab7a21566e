package server

import (
	"fmt"
	"testing"
	"time"
)

func TestMaxConns(t *testing.T) {
	t.Run("clients over the limit wait in the accept queue for a place",
		inBubble(Echo, Options{Limits: Limits{MaxConns: 2}}, func(t *testing.T, r *rig) {
			a, b := r.dial(t), r.dial(t)
			c, d := r.dial(t), r.dial(t)
			c.send(t, "x\n")
			pass(time.Hour)
			c.has(t, "")
			wantEqual(t, "accept queue", r.ln.queued(), 2)
			wantState(t, r.Server, StateRunning, 2)
			a.leave(t)
			c.has(t, "x\n")
			wantEqual(t, "accept queue", r.ln.queued(), 1)
			b.leave(t)
			d.echoes(t, "y\n")
		}))

	t.Run("a lingering connection keeps its place", inBubble(Echo, Options{Limits: Limits{MaxConns: 1}}, func(t *testing.T, r *rig) {
		r.dial(t)
		_ = r.Kill(1)
		next := r.dial(t)
		next.send(t, "x\n")
		next.has(t, "")
		pass(lingerTimeout)
		next.has(t, "x\n")
	}))

	rejecting := Options{Limits: Limits{MaxConns: 1, AtLimit: LimitReject}}
	t.Run("with LimitReject clients over the limit are told BUSY", inBubble(Echo, rejecting, func(t *testing.T, r *rig) {
		a := r.dial(t)
		r.dial(t).ends(t, "BUSY\n")
		wantClosed(t, r.Server, map[Reason]uint64{ReasonRejectedLimit: 1})
		a.leave(t)
		r.dial(t).echoes(t, "x\n")
	}))

	t.Run("rejections that linger are bounded and delay no client", inBubble(Echo, rejecting, func(t *testing.T, r *rig) {
		r.maxConnFiles = 60 // leaves (60-1)/2 = 29 of them; the spare of the reserve is more where open files are limited
		most := max(29, r.activeSettings().limits.spareFiles())
		r.dial(t)
		for range 2 { // those that have gone do not count
			var clients []*client
			for range most + 8 {
				clients = append(clients, r.dial(t))
			}
			wantState(t, r.Server, StateRunning, 1+most)
			wantEqual(t, "accept queue", r.ln.queued(), 0)
			for _, c := range clients[:most] {
				c.has(t, "BUSY\n")
			}
			pass(lingerTimeout)
			wantState(t, r.Server, StateRunning, 1)
		}
		wantClosed(t, r.Server, map[Reason]uint64{ReasonRejectedLimit: 2 * (uint64(most) + 8)})
	}))

	t.Run("clients over that bound are told BUSY too", func(t *testing.T) {
		ln := listen(t)
		s, _ := newServer(t, Echo, rejecting)
		s.maxConnFiles = 60
		serve(t, s, ln)
		echoed(t, dialTCP(t, ln.Addr()), "x")
		for range s.activeSettings().limits.spareFiles() + 8 {
			receivesAll(t, dialTCP(t, ln.Addr()), "BUSY\n")
		}
	})
}

func TestMaxConnsPerIP(t *testing.T) {
	t.Run("more clients of one address are rejected, whatever AtLimit says",
		inBubble(Echo, Options{Limits: Limits{MaxConnsPerIP: 2}}, func(t *testing.T, r *rig) {
			first, _ := r.dialFrom(t, "198.51.100.1"), r.dialFrom(t, "198.51.100.1")
			r.dialFrom(t, "198.51.100.1").ends(t, "BUSY\n")
			r.dialFrom(t, "::ffff:198.51.100.1").ends(t, "BUSY\n") // the same address, mapped into IPv6
			r.dialFrom(t, "2001:db8::1").echoes(t, "x\n")
			first.leave(t)
			again := r.dialFrom(t, "198.51.100.1")
			again.echoes(t, "x\n")
			again.leave(t)
			r.state.With(func(st *state) { wantEqual(t, "addresses kept", len(st.perClient), 2) })
			r.KillFunc(func(ConnInfo) bool { return true })
			pass(lingerTimeout)
			r.state.With(func(st *state) { wantEqual(t, "addresses kept when all have left", len(st.perClient), 0) })
		}))

	for prefix, tt := range map[int]struct{ rejected, admitted string }{
		0:   {rejected: "2001:db8:1:2:ffff::9", admitted: "2001:db8:1:3::1"}, // the default is 64
		48:  {rejected: "2001:db8:1:ffff::9", admitted: "2001:db8:2::1"},
		128: {rejected: "2001:db8:1:2::1", admitted: "2001:db8:1:2::2"},
	} {
		t.Run(fmt.Sprintf("IPv6 clients count by their prefix of %d bits", prefix),
			inBubble(Echo, Options{Limits: Limits{MaxConnsPerIP: 1, IPv6Prefix: prefix}}, func(t *testing.T, r *rig) {
				r.dialFrom(t, "2001:db8:1:2::1").echoes(t, "x")
				r.dialFrom(t, tt.rejected).ends(t, "BUSY\n")
				r.dialFrom(t, tt.admitted).echoes(t, "x")
				// IPv4 addresses count whole.
				r.dialFrom(t, "198.51.100.1").echoes(t, "x")
				r.dialFrom(t, "198.51.100.2").echoes(t, "x")
			}))
	}

	t.Run("the limit is applied when a pause ends", inBubble(Echo, Options{Limits: Limits{MaxConnsPerIP: 1}}, func(t *testing.T, r *rig) {
		first := r.dial(t)
		r.ln.slip(1)
		h := r.pause(t, PauseOptions{})
		second := r.dial(t)
		second.send(t, "x\n")
		second.has(t, "")
		first.leave(t)
		h.Release()
		second.has(t, "x\n")
	}))

	t.Run("clients without an IP address are not limited",
		inBubble(Echo, Options{Limits: Limits{MaxConnsPerIP: 1}}, func(t *testing.T, r *rig) {
			for range 3 {
				served, far := newFakePair(r.ln.Addr(), unnamed{})
				r.ln.hand(served)
				(&client{far}).echoes(t, "x\n")
			}
		}))

	t.Run("a drain does not apply it to the accept queue",
		inBubble(Echo, Options{Limits: Limits{MaxConnsPerIP: 1}}, func(t *testing.T, r *rig) {
			r.pause(t, PauseOptions{})
			first, second := r.dial(t), r.dial(t)
			r.drain(time.Second, "x")
			pass(quietTime)
			first.has(t, "SHUTDOWN 1 x\n")
			second.has(t, "SHUTDOWN 1 x\n")
		}))
}

// unnamed is the address of a client of a Unix socket.
type unnamed struct{}

func (unnamed) Network() string { return "unix" }
func (unnamed) String() string  { return "@" }

func TestOpenFilesLimit(t *testing.T) {
	t.Run("two servers in one process share it", bubbled(func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		other := newRig(t, Echo, Options{})
		r.maxConnFiles, other.maxConnFiles = 3, 3
		a, b, c := r.dial(t), r.dial(t), other.dial(t)
		c.echoes(t, "x")
		waiting := other.dial(t)
		waiting.send(t, "y")
		waiting.has(t, "")
		wantState(t, other.Server, StateRunning, 1)
		a.leave(t)
		pass(maxAcceptBackoff) // the other server does not see the close, and tries again
		waiting.has(t, "y")
		b.leave(t)
	}))

	t.Run("a drain takes a part of the reserve for the accept queue", bubbled(func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		r.maxConnFiles = 1
		served := r.dial(t)
		queued := r.dial(t)
		pass(time.Second)
		queued.has(t, "")
		r.drain(5*time.Second, "x")
		pass(acceptorsTimeout)
		for _, c := range []*client{served, queued} {
			c.has(t, "SHUTDOWN 5 x\n")
			c.leave(t)
		}
	}))
}

func TestWaitingConnection(t *testing.T) {
	waiting := func(f func(*testing.T, *rig, *client)) func(*testing.T) {
		return inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
			r.ln.slip(1)
			r.pause(t, PauseOptions{})
			c := r.dial(t)
			wantPhases(t, r.Server, PhaseWaiting)
			f(t, r, c)
		})
	}
	t.Run("can be killed", waiting(func(t *testing.T, r *rig, c *client) {
		wantEqual(t, "killed", r.KillFunc(func(ConnInfo) bool { return true }), 1)
		if took := elapsed(func() { c.ends(t, "") }); took != 0 {
			t.Errorf("the client saw the end after %v, want at once", took)
		}
		wantClosed(t, r.Server, map[Reason]uint64{ReasonKilled: 1})
	}))
	t.Run("does not delay Close", waiting(func(t *testing.T, r *rig, _ *client) {
		if took := elapsed(func() { _ = r.Close() }); took > abandonAfter {
			t.Errorf("Close took %v, want at most %v", took, abandonAfter)
		}
		wantState(t, r.Server, StateStopped, 0)
		wantEqual(t, "handlers left behind", report(t, r.Server).Stuck, 0)
	}))
}

func TestFloodOfRejections(t *testing.T) {
	for _, limit := range []int{Off, 1000} {
		t.Run(fmt.Sprintf("all are told, with at most %d connections", limit), inBubble(Echo, Options{Limits: Limits{MaxConns: limit}},
			func(t *testing.T, r *rig) {
				r.pause(t, PauseOptions{Mode: PauseReject})
				var clients []*client
				for range 20 {
					clients = append(clients, r.dial(t))
				}
				for _, c := range clients {
					c.ends(t, "PAUSED\n")
				}
			}))
	}
	t.Run("those that do not linger are told, also on what is no socket", inBubble(Echo,
		Options{Limits: Limits{MaxConns: 1, ReservedFiles: 3}}, func(t *testing.T, r *rig) {
			r.maxConnFiles = 5 // so that two may linger
			r.pause(t, PauseOptions{Mode: PauseReject})
			clients := []*client{r.dial(t), r.dial(t), r.dial(t)}
			wantClosed(t, r.Server, map[Reason]uint64{ReasonRejectedPaused: 1})
			for _, c := range clients {
				c.ends(t, "PAUSED\n")
			}
		}))
}
