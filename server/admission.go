package server

import (
	"context"
	"math"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"
)

// decision is what admission decides for an accepted connection.
type decision int

const (
	undecided     decision = iota // it must wait
	admit                         // serve it
	reject                        // tell the client why it is not served, linger, and close
	rejectNow                     // the same without lingering, because too many files are open
	closeUnserved                 // it was ended while it waited: close it
	handedOver                    // another process has it: close the descriptor
)

// admit is the one place that decides whether an accepted connection may be served. It decides and counts under the
// same lock as every pause and drain, so no connection is admitted during a pause or after a drain began.
//
// refused is the reason if the client's address alone is enough to reject it.
func (s *Server) admit(st *state, c *Conn, refused Reason) (decision, Reason) {
	d, why := s.decide(st, c, refused)
	switch d {
	case admit:
		c.admitted = true
		c.phase.Store(int32(PhaseServing))
		st.admitted++
		st.countClient(c, +1)
		st.tasks++
	case reject:
		c.phase.Store(int32(PhaseRejecting))
		st.tasks++
		if why == ReasonRejectedDenied || st.rejecting >= s.maxRejecting(st) {
			return rejectNow, why
		}
		c.rejected = true
		st.rejecting++
	case closeUnserved, handedOver:
		st.tasks++
	case undecided, rejectNow:
	}
	return d, why
}

// maxRejecting is how many rejected connections may linger at once. More are closed without lingering, so that a flood
// of them leaves files for the others.
func (s *Server) maxRejecting(st *state) int {
	if s.files == 0 { // files are not limited
		return math.MaxInt
	}
	return max(1, s.live().limits.spareFiles(), (s.files-st.admitted)/2)
}

// awaitAdmission waits for the decision. While it waits, *waiting is true, guarded by s.state.
func (s *Server) awaitAdmission(c *Conn, refused Reason, waiting *bool) (d decision, why Reason) {
	_ = s.state.Await(context.Background(), func(st *state) bool {
		d, why = s.admit(st, c, refused)
		*waiting = d == undecided
		return d != undecided
	})
	return d, why
}

func (s *Server) decide(st *state, c *Conn, refused Reason) (decision, Reason) {
	limits := &s.live().limits
	switch {
	case st.frozen:
		return undecided, 0
	case st.handedOver && c.flags.has(flagSent):
		return handedOver, 0
	case c.endReason() != 0:
		return closeUnserved, 0
	case st.phase == StateStopped:
		return reject, ReasonRejectedDraining
	case refused == ReasonRejectedDenied:
		return reject, refused
	case st.notAccepting():
		if st.drain.over() {
			return reject, ReasonRejectedDraining
		}
		return admit, 0 // it comes from the accept queue: it is told, and has its time like the others
	case refused != 0:
		return reject, refused
	case st.pauseRejects():
		return reject, ReasonRejectedPaused
	case len(st.holds) > 0:
		return undecided, 0
	case st.atClientLimit(c):
		return reject, ReasonRejectedAddressLimit
	case st.admitted < limits.MaxConns:
		return admit, 0
	case limits.AtLimit == LimitReject:
		return reject, ReasonRejectedLimit
	default:
		return undecided, 0
	}
}

// mayAccept reports whether the accept loop should take a connection from the accept queue now.
func (s *Server) mayAccept(st *state) bool {
	switch {
	case st.frozen:
		return false
	case st.notAccepting(), st.pauseRejects():
		return true
	case len(st.holds) > 0:
		return false
	default:
		limits := &s.live().limits
		return limits.AtLimit == LimitReject || st.admitted < limits.MaxConns
	}
}

// A handshake is a connection in WrapConn or in its TLS handshake. It takes no place of MaxConns, so that clients that are
// slow or silent keep nobody out. MaxHandshakes bounds their number.
type handshake struct {
	c      *Conn
	begun  time.Time
	client clientKey // of a TLS handshake, if the connections of each client are bounded
}

// slowHandshake is how long a handshake has before it may be ended for a newer client. Faster ones make clients wait in
// the accept queue, so that a crowd that comes at once, as after a pause, is served and not reset.
const slowHandshake = time.Second

// crowdedHandshakes reports whether the next client must wait: there are MaxHandshakes, and even the oldest is not slow.
func (s *Server) crowdedHandshakes(st *state) bool {
	return len(st.handshakes) >= s.live().limits.MaxHandshakes && time.Since(st.handshakes[0].begun) < slowHandshake
}

// beginHandshake adds a handshake. At MaxHandshakes it removes the oldest one if that is slow; the caller must end it.
// Otherwise another listener was faster by an instant, and there is one more.
func (s *Server) beginHandshake(st *state, c *Conn) (oldest *Conn) {
	if len(st.handshakes) >= s.live().limits.MaxHandshakes && !s.crowdedHandshakes(st) {
		oldest = st.removeHandshake(0)
	}
	st.tasks++
	st.handshakes = append(st.handshakes, handshake{c: c, begun: time.Now()})
	return oldest
}

// removeHandshake removes handshake i, and returns its connection; nil if there is none.
func (st *state) removeHandshake(i int) *Conn {
	if i < 0 {
		return nil
	}
	c := st.handshakes[i].c
	st.handshakes = slices.Delete(st.handshakes, i, i+1)
	return c
}

func (st *state) indexHandshake(c *Conn) int {
	return slices.IndexFunc(st.handshakes, func(h handshake) bool { return h.c == c })
}

// boundHandshakesOf counts the TLS handshakes of c's client. If there are more than that client may have connections,
// it returns the oldest, which the caller must end. So one client cannot have all handshakes.
func (s *Server) boundHandshakesOf(c *Conn) (oldest *Conn) {
	key, most := c.clientKey()
	if most == 0 {
		return nil
	}
	s.state.With(func(st *state) {
		if i := st.indexHandshake(c); i >= 0 {
			st.handshakes[i].client = key
		}
		first, n := -1, 0
		for i, h := range st.handshakes {
			if h.client == key {
				if n++; first < 0 {
					first = i
				}
			}
		}
		if n > most {
			oldest = st.removeHandshake(first)
		}
	})
	return oldest
}

// pauseRejects reports whether a hold in mode PauseReject exists. With several holds the stricter mode wins.
func (st *state) pauseRejects() bool {
	for _, h := range st.holds {
		if h.info.Mode == PauseReject {
			return true
		}
	}
	return false
}

// connFiles counts the files that connections of all servers in this process have open, because they share one limit.
var connFiles atomic.Int64

// hasFile reports whether the limit on open files has room for one more connection, if connections may take spare of
// the reserved files.
func (s *Server) hasFile(spare int) bool {
	return s.files == 0 || connFiles.Load() < int64(s.files+spare)
}

// clientKey identifies a client for Limits.MaxConnsPerIP and MaxConnsPerUID.
type clientKey struct {
	addr netip.Addr
	uid  int // of a client of a Unix socket, whose addr is invalid
}

// clientKey returns the client that c counts for, and how many connections that may have; 0 means any number.
func (c *Conn) clientKey() (key clientKey, most int) {
	limits := &c.srv.live().limits
	if limits.MaxConnsPerIP == 0 && limits.MaxConnsPerUID == 0 {
		return key, 0
	}
	remote := c.RemoteAddr()
	if cred, ok := remote.(Credentials); ok {
		return clientKey{uid: cred.UID}, limits.MaxConnsPerUID
	}
	key.addr = addrOf(remote)
	if !key.addr.IsValid() {
		return key, 0
	}
	key.addr = limits.clientAddr(key.addr.WithZone(""))
	return key, limits.MaxConnsPerIP
}

// atClientLimit reports whether c's client has as many connections as it may have.
func (st *state) atClientLimit(c *Conn) bool {
	key, most := c.clientKey()
	return most > 0 && st.perClient[key] >= most
}

// countClient adds n to the number of connections that are served for c's client.
func (st *state) countClient(c *Conn, n int) {
	key, most := c.clientKey()
	if most == 0 {
		return
	}
	if st.perClient[key] += n; st.perClient[key] <= 0 {
		delete(st.perClient, key)
	}
}
