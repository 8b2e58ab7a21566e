package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"

	"go.uber.org/zap"
)

// Identify says who a client really is, where connections come through a proxy that tells, such as with the PROXY protocol. It
// reads what the proxy sends ahead of the client's bytes from nc, and not a byte more. A nil address means the
// connection's own. An error that wraps io.EOF says that nothing came before the end of the stream, as from a probe that only
// connects: that is no fault. It is called on the connection's goroutine, and has to heed nc's deadline.
type Identify func(nc net.Conn) (*net.TCPAddr, error)

// identifyTimeout is how long a proxy may take to say who its client is: it sends that with the first segment.
const identifyTimeout = 3 * time.Second

// enterIdentified is the goroutine that takes a connection to the gate whose client is not known yet.
func (a *acceptor) enterIdentified(c *Conn) {
	s := a.srv
	defer s.endTask()
	_ = c.SetReadDeadline(time.Now().Add(identifyTimeout))
	client, err := s.opts.Identify(c.nc)
	_ = c.SetReadDeadline(time.Time{})
	if client != nil {
		c.client.Store(client)
	}
	switch {
	case err == nil || c.ended():
	case errors.Is(err, io.EOF):
		c.end(ClientClosed, ErrConnClosed)
	case errors.Is(err, syscall.ECONNRESET):
		c.end(ClientReset, ErrConnClosed)
	default:
		s.log.Warn("client not identified", zap.Uint64("conn", c.id), zap.Stringer("remote", c.RemoteAddr()), zap.Error(err))
		c.end(RejectedUnidentified, fmt.Errorf("%w: %w", errUnidentified, err))
	}
	s.book.With(func(l *ledger) { l.announceOpened(c) })
	v, why := s.awaitVerdictIdentified(c)
	s.enter(c, v, why)
}

// awaitVerdictIdentified is awaitVerdict for a connection that has had a place since it was accepted, and keeps it while it waits.
func (s *Server) awaitVerdictIdentified(c *Conn) (v verdict, why Reason) {
	_ = s.book.Await(context.Background(), func(l *ledger) bool {
		l.identifying--
		if v, why = s.judge(l, c); v == wait {
			l.identifying++
		}
		return v != wait
	})
	return v, why
}

var errUnidentified = errors.New("the client was not identified")
