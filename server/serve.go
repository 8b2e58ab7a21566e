package server

import (
	"errors"
	"fmt"
	"io"
	"net"
	"runtime/debug"
	"time"

	"go.uber.org/zap"
)

// serve is the goroutine of an admitted connection. It begins with a stack of 2 KiB, over a third of what a
// silent connection costs; the frames from here to where an echo waits just fit in, and one that does
// not doubles every stack.
func (c *Conn) serve() {
	defer c.srv.endTask()
	natural := HandlerError // should the handler call runtime.Goexit
	defer func() { c.close(natural) }()
	defer func() {
		if p := recover(); p != nil {
			natural = HandlerPanic
			c.srv.log.Error("handler panicked", zap.Uint64("conn", c.id), zap.Any("panic", p), zap.ByteString("stack", debug.Stack()))
		}
	}()
	natural = c.verdict(c.srv.handler.ServeConn((*connContext)(c), c))
}

// verdict says how a connection ended that the server itself had no reason to end. It logs by itself, since
// what is logged in serve takes stack from the handler: see there.
func (c *Conn) verdict(err error) Reason {
	why := c.naturalReason(err)
	if why == HandlerError && !c.ended() {
		c.srv.log.Warn("handler returned an error", zap.Uint64("conn", c.id), zap.Error(err))
	}
	return why
}

func (c *Conn) naturalReason(err error) Reason {
	switch {
	case c.broken.Load():
		return ClientReset
	case c.sawEOF.Load() && (err == nil || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)):
		return ClientClosed // or ClientLeft: close can tell
	case err != nil && !errors.Is(err, ErrConnClosed):
		return HandlerError
	default:
		return HandlerDone
	}
}

// refuse is the goroutine of a connection that was turned away at the gate.
func (c *Conn) refuse(why Reason) {
	defer c.srv.endTask()
	defer c.close(why)
	c.end(why, errors.New(why.String()))
	_, _ = c.Write(c.srv.rejection(why))
}

// dismiss is refuse in a hurry: a client that has sent something already may see a reset instead of the text.
func (c *Conn) dismiss(why Reason) {
	defer c.srv.endTask()
	c.end(why, errors.New(why.String()))
	c.writing.Lock()
	_, _ = c.tryWrite(c.srv.rejection(why))
	c.writing.Unlock()
	_ = c.nc.Close()
	c.outbox.shut()
	c.srv.settle(c, why)
}

// rejection is what a client is told when it is turned away.
func (s *Server) rejection(why Reason) []byte {
	switch why {
	case RejectedPaused:
		return []byte(noticePaused)
	case RejectedDraining:
		d := s.drainInfo()
		return s.opts.Notice.render(d.Reason, d.Deadline, d.Deadline)
	default:
		return []byte(noticeBusy)
	}
}

// depart is the goroutine of a connection that was ended while it waited at the gate.
func (c *Conn) depart() {
	defer c.srv.endTask()
	c.close(HandlerDone)
}

// close ends a connection whose reason is natural unless another came first: what was posted is
// written, the stream is half-closed, the client's end of stream awaited a little, and all of it booked.
// The linger matters: closing with unread input sends RST, on which the client's
// kernel throws away what it has received but the client not yet read (RFC 1122, 4.2.2.13).
func (c *Conn) close(natural Reason) {
	c.setPhase(Closing)
	c.end(natural, ErrConnClosed)
	why := c.reason()

	// Bounded, since writes have no more than flushTimeout from end on. Under the lock it is known whether the
	// client was notified: it may be quicker to leave than who notified it is to say so.
	c.writing.Lock()
	if why == ClientClosed && c.notified.Load() {
		why = ClientLeft
	}
	c.outbox.flush(c)
	half, ok := c.nc.(interface{ CloseWrite() error })
	if ok && !c.broken.Load() && why != Stalled {
		if half.CloseWrite() == nil {
			c.linger()
		}
	}
	if tcp, ok := c.nc.(*net.TCPConn); ok && why == Stalled {
		_ = tcp.SetLinger(0) // its kernel would else keep what the client does not take, for minutes
	}
	_ = c.nc.Close()
	c.torn = true
	c.outbox.shut()
	c.writing.Unlock()
	c.srv.settle(c, why)
}

// linger discards input until the client's FIN, for a while. A client that floods sends none, and
// discarding all that it has would take the time of the others.
func (c *Conn) linger() {
	_ = c.nc.SetReadDeadline(time.Now().Add(lingerTimeout))
	_, _ = io.CopyN(io.Discard, c.nc, lingerBytes)
}

// settle books a closed connection, once, and tells whoever wants to know.
func (s *Server) settle(c *Conn, why Reason) {
	closed := ClosedConn{
		ID: c.id, Remote: c.RemoteAddr(), Local: c.LocalAddr(), Opened: c.opened, Closed: time.Now(), Reason: why,
		BytesIn: c.BytesIn(), BytesOut: c.BytesOut(), Notified: c.notified.Load(),
	}
	var first bool
	s.book.With(func(l *ledger) { first = l.settle(c, closed) })
	if !first {
		return
	}
	if entry := s.log.Check(zap.InfoLevel, "connection closed"); entry != nil {
		entry.Write(zap.Uint64("conn", c.id), zap.Stringer("remote", c.RemoteAddr()), zap.Stringer("reason", why),
			zap.Uint64("bytes_in", closed.BytesIn), zap.Uint64("bytes_out", closed.BytesOut),
			zap.Duration("duration", closed.Closed.Sub(c.opened).Round(time.Millisecond)))
	}
	if s.opts.OnClose != nil {
		s.callOnClose(closed)
	}
}

func (s *Server) callOnClose(closed ClosedConn) {
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("OnClose panicked", zap.Uint64("conn", closed.ID), zap.String("panic", fmt.Sprint(p)), zap.ByteString("stack", debug.Stack()))
		}
	}()
	s.opts.OnClose(closed)
}
