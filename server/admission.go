package server

import (
	"context"
	"math"
	"net/netip"
	"strconv"
	"sync/atomic"
)

// decision is what admission decides for an accepted connection.
type decision int

const (
	undecided     decision = iota // the connection must wait
	admit                         // serve it
	reject                        // tell the client why it is not served, linger, and close
	rejectNow                     // like reject, without lingering, because too many files are open
	closeUnserved                 // close it, because it ended while it waited
	handedOver                    // release it, because another process serves it
)

// admit is the one place that decides whether an accepted connection may be served. It decides and counts under the
// same lock as every pause and drain, so no connection is admitted during a pause or after a drain began.
//
// refused is the result of checkAccess: the reason for which the client's address or rate is refused, or 0.
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

// maxRejecting returns how many rejected connections may linger at once. Further ones are closed without lingering, so
// that a flood of them leaves files for other connections.
func (s *Server) maxRejecting(st *state) int {
	if s.maxConnFiles == 0 { // files are not limited
		return math.MaxInt
	}
	return max(1, s.activeSettings().limits.spareFiles(), (s.maxConnFiles-st.admitted)/2)
}

// awaitAdmission waits for the decision. *waiting, which s.state guards, is true while it waits.
func (s *Server) awaitAdmission(c *Conn, refused Reason, waiting *bool) (d decision, why Reason) {
	_ = s.state.Await(context.Background(), func(st *state) bool {
		d, why = s.admit(st, c, refused)
		*waiting = d == undecided
		return d != undecided
	})
	return d, why
}

// decide returns the decision for c, and the reason for a rejection. It changes nothing.
func (s *Server) decide(st *state, c *Conn, refused Reason) (decision, Reason) {
	limits := &s.activeSettings().limits
	switch {
	case st.frozen:
		return undecided, 0
	case st.handedOver && c.flags.has(flagFrozen):
		return handedOver, 0
	case c.closeReason() != 0:
		return closeUnserved, 0
	case st.lifecycle == StateStopped:
		return reject, ReasonRejectedDraining
	case refused == ReasonRejectedDenied:
		return reject, refused
	case st.successorPaused:
		return reject, ReasonRejectedPaused // a kept handshake is over; this process does not know when the pause ends
	case st.notAccepting():
		if st.drain.over() {
			return reject, ReasonRejectedDraining
		}
		return admit, 0 // a client from the accept queue of a drain gets the notice and its grace period
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

// mayAccept reports whether the accept loop may take a connection from the accept queue now.
func (s *Server) mayAccept(st *state) bool {
	switch {
	case st.frozen:
		return false
	case st.notAccepting(), st.pauseRejects():
		return true
	case len(st.holds) > 0:
		return false
	default:
		limits := &s.activeSettings().limits
		return limits.AtLimit == LimitReject || st.admitted < limits.MaxConns
	}
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

// connFiles counts the open files of connections of all servers in this process, because they share one limit.
var connFiles atomic.Int64

// fileAvailable reports whether the limit on open files allows one more connection, if connections may use spare of the
// reserved files.
func (s *Server) fileAvailable(spare int) bool {
	return s.maxConnFiles == 0 || connFiles.Load() < int64(s.maxConnFiles+spare)
}

// clientKey identifies a client for Limits.MaxConnsPerIP and MaxConnsPerUID.
type clientKey struct {
	addr netip.Addr
	uid  int // of a client of a Unix socket, whose addr is invalid
}

// clientKey returns the client that c belongs to, and how many connections that client may have; 0 means any number.
func (c *Conn) clientKey() (key clientKey, most int) {
	limits := &c.srv.activeSettings().limits
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

// atClientLimit reports whether c's client has its maximum number of connections.
func (st *state) atClientLimit(c *Conn) bool {
	key, most := c.clientKey()
	return most > 0 && st.perClient[key] >= most
}

// reachedLimits lists the limits on open connections that keep new clients out.
func (st *state) reachedLimits(l *Limits) (reached []ReachedLimit) {
	if l.MaxConns > 0 && st.admitted >= l.MaxConns {
		reached = append(reached, ReachedLimit{
			Setting: "max-conns", Value: strconv.Itoa(l.MaxConns), Rejects: l.AtLimit == LimitReject,
		})
	}
	perIP := ReachedLimit{Setting: "max-conns-per-ip", Value: strconv.Itoa(l.MaxConnsPerIP), Rejects: true}
	perUID := ReachedLimit{Setting: "max-conns-per-uid", Value: strconv.Itoa(l.MaxConnsPerUID), Rejects: true}
	for key, n := range st.perClient {
		switch {
		case key.addr.IsValid() && l.MaxConnsPerIP > 0 && n >= l.MaxConnsPerIP:
			perIP.Clients++
		case !key.addr.IsValid() && l.MaxConnsPerUID > 0 && n >= l.MaxConnsPerUID:
			perUID.Clients++
		}
	}
	for _, r := range []ReachedLimit{perIP, perUID} {
		if r.Clients > 0 {
			reached = append(reached, r)
		}
	}
	return reached
}

// countClient adds n to the number of admitted connections of c's client.
func (st *state) countClient(c *Conn, n int) {
	key, most := c.clientKey()
	if most == 0 {
		return
	}
	if st.perClient[key] += n; st.perClient[key] <= 0 {
		delete(st.perClient, key)
	}
}
