package server

import (
	"context"
	"net/netip"
	"sync/atomic"
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
func (s *Server) admit(st *state, c *Conn) (decision, Reason) {
	d, why := s.decide(st, c)
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
		if st.rejecting >= s.maxRejecting(st) {
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
	return max(1, s.opts.Limits.spareFiles(), (s.files-st.admitted)/2)
}

// awaitAdmission waits for the decision. While it waits, *waiting is true, guarded by s.state.
func (s *Server) awaitAdmission(c *Conn, waiting *bool) (d decision, why Reason) {
	_ = s.state.Await(context.Background(), func(st *state) bool {
		d, why = s.admit(st, c)
		*waiting = d == undecided
		return d != undecided
	})
	return d, why
}

func (s *Server) decide(st *state, c *Conn) (decision, Reason) {
	switch {
	case st.frozen:
		return undecided, 0
	case st.handedOver && c.isSent():
		return handedOver, 0
	case c.endReason() != 0:
		return closeUnserved, 0
	case st.phase == StateStopped:
		return reject, ReasonRejectedDraining
	case st.notAccepting():
		if st.drain.over() {
			return reject, ReasonRejectedDraining
		}
		return admit, 0 // it comes from the accept queue: it is told, and has its time like the others
	case st.pauseRejects():
		return reject, ReasonRejectedPaused
	case len(st.holds) > 0:
		return undecided, 0
	case st.atClientLimit(c):
		return reject, ReasonRejectedLimit
	case st.admitted < s.opts.Limits.MaxConns:
		return admit, 0
	case s.opts.Limits.AtLimit == LimitReject:
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
		return st.admitted < s.opts.Limits.MaxConns || s.opts.Limits.AtLimit == LimitReject
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

// connFiles counts the files that connections of all servers in this process have open, because they share one limit.
var connFiles atomic.Int64

// hasFile reports whether the limit on open files has room for one more connection, if connections may take spare of
// the reserved files.
func (s *Server) hasFile(spare int) bool {
	return s.files == 0 || connFiles.Load() < int64(s.files+spare)
}

// clientKey is what counts as one client for Limits.MaxConnsPerIP and MaxConnsPerUID.
type clientKey struct {
	addr netip.Addr
	uid  int // of a client of a Unix socket, whose addr is invalid
}

// clientKey returns the client that c counts for, and how many connections that may have; 0 means any number.
func (c *Conn) clientKey() (key clientKey, most int) {
	limits := &c.srv.opts.Limits
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
	if !key.addr.Is4() {
		if prefix, err := key.addr.WithZone("").Prefix(limits.IPv6Prefix); err == nil {
			key.addr = prefix.Addr()
		}
	}
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
