package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"slices"
	"syscall"
	"time"

	"go.uber.org/zap"
)

// What comes before admission: WrapConn and the TLS handshake.

// A handshake is a connection in WrapConn or in its TLS handshake. It does not count for MaxConns, so that slow or
// silent clients do not keep others out. MaxHandshakes bounds the number of handshakes.
type handshake struct {
	c      *Conn
	begun  time.Time
	client clientKey // set for a TLS handshake if the connections of each client are limited
}

// slowHandshake is the age from which a handshake may be ended for a newer client. While all handshakes are younger,
// clients wait in the accept queue. So a crowd that connects at once, as after a pause, is served and not reset.
const slowHandshake = time.Second

// handshakesFull reports whether the next client must wait: there are MaxHandshakes, and even the oldest is not slow.
func (s *Server) handshakesFull(st *state) bool {
	return len(st.handshakes) >= s.activeSettings().limits.MaxHandshakes &&
		time.Since(st.handshakes[0].begun) < slowHandshake
}

// beginHandshake adds a handshake. At MaxHandshakes it removes the oldest one if that is slow; the caller must end it.
// If none is slow, another listener has just added one, and there is one more than MaxHandshakes.
func (s *Server) beginHandshake(st *state, c *Conn) (oldest *Conn) {
	if len(st.handshakes) >= s.activeSettings().limits.MaxHandshakes && !s.handshakesFull(st) {
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

// handshake is the goroutine of a connection with a handshake: it calls WrapConn, performs the TLS handshake, and waits
// for admission.
func (c *Conn) handshake() {
	s := c.srv
	defer s.endTask()
	refused, err := c.performHandshake()
	c.endHandshake(err)

	var waiting bool
	s.state.With(func(st *state) {
		st.removeHandshake(st.indexHandshake(c))
		st.publishOpened(c)
	})
	c.flags.clear(flagInHandshake)
	d, why := s.awaitAdmission(c, refused, &waiting)
	s.applyDecision(c, d, why)
}

// performHandshake calls WrapConn and performs the TLS handshake. If checkAccess refuses the client, it returns the
// reason and performs no TLS handshake.
func (c *Conn) performHandshake() (refused Reason, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("WrapConn or a TLS callback panicked: %v\n%s", p, debug.Stack())
		}
	}()
	if c.acceptor.baseContext != nil {
		c.closing.With(func(cl *closingState) { cl.ensureRare().parent = c.acceptor.baseContext })
	}
	timeout := c.srv.activeSettings().timeouts.Handshake
	c.setHandshakeDeadline(time.Now().Add(timeout))
	if c.acceptor.wrap != nil {
		if err := c.wrapStream(timeout); err != nil {
			return 0, err
		}
	}
	if refused = c.srv.checkAccess(c); refused == 0 && c.acceptor.tls != nil {
		c.flags.set(flagTLSBegun)
		if oldest := c.srv.limitClientHandshakes(c); oldest != nil {
			oldest.end(oldest.handshakeReason(), errHandshakeLimit)
		}
		// Without a Done channel, crypto/tls starts no goroutine. The connection's deadline bounds the handshake, and
		// the end of the connection interrupts it.
		if err := c.replaceStream(context.WithoutCancel((*connContext)(c)), c.acceptor.tls); err != nil {
			return 0, err
		}
		c.setIdentityLabels()
	}
	return refused, nil
}

// wrapStream calls WrapConn. Only WrapConn needs a context with a timeout.
func (c *Conn) wrapStream(timeout time.Duration) error {
	ctx, cancel := context.WithTimeoutCause((*connContext)(c), timeout, errHandshakeTimeout)
	defer cancel()
	wrapped, err := c.acceptor.wrap(ctx, c.nc)
	switch {
	case err != nil && ctx.Err() != nil:
		return fmt.Errorf("%w: %w", context.Cause(ctx), err)
	case err != nil:
		return err
	}
	c.setStream(wrapped)
	return nil
}

var (
	errHandshakeTimeout = errors.New("the handshake took too long")
	errHandshakeLimit   = errors.New("the handshake was ended for a newer client: a limit on connections is reached")
)

// setHandshakeDeadline sets the deadline of the reads and writes of a handshake.
func (c *Conn) setHandshakeDeadline(t time.Time) {
	c.closing.With(func(cl *closingState) {
		if cl.cause == nil {
			_ = c.nc.SetDeadline(t)
		}
	})
}

// endHandshake ends the connection if err is not nil, with the close reason and the log line that fit err.
func (c *Conn) endHandshake(err error) {
	c.closing.With(func(cl *closingState) {
		if cl.cause == nil {
			cl.ctx = nil // the handler gets a context of its own
		}
	})
	c.setHandshakeDeadline(time.Time{})
	if err == nil {
		return
	}
	_, isTLS := errors.AsType[*HandshakeError](err)
	why, cause := c.handshakeReason(), fmt.Errorf("%w: %w", errHandshakeFailed, err)
	switch {
	case isTLS: // also for a client that left during the handshake
	case errors.Is(err, io.EOF):
		why, cause = ReasonClientClosed, ErrConnClosed
	case errors.Is(err, syscall.ECONNRESET):
		why, cause = ReasonClientReset, ErrConnClosed
	}
	first := c.end(why, cause)
	if errors.Is(c.cause(), errHandshakeLimit) {
		err = fmt.Errorf("%w: %w", errHandshakeLimit, err)
	} else if !first || why != c.handshakeReason() {
		return // the server has ended the connection, or the client left before the handshake began
	}
	c.closing.With(func(cl *closingState) { cl.ensureRare().handlerErr = err })
	c.srv.log.Warn("handshake failed", zap.Uint64("conn", c.id), zap.Stringer("remote", c.RemoteAddr()), zap.Error(err))
}

var errHandshakeFailed = errors.New("the handshake failed")

// handshakeReason returns the close reason for a handshake that fails now.
func (c *Conn) handshakeReason() Reason {
	if c.flags.has(flagTLSBegun) {
		return ReasonHandshakeFailed
	}
	return ReasonRejectedHandshake
}

// limitClientHandshakes counts c's handshake for its client. If the client has more handshakes than it may have
// connections, it returns the oldest, which the caller must end. So one client cannot use all handshakes.
func (s *Server) limitClientHandshakes(c *Conn) (oldest *Conn) {
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
