package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime/debug"
	"time"

	"go.uber.org/zap"
)

// serve is the goroutine of an admitted connection. Its stack of 2 KiB is more than a third of the memory of an idle
// connection. The frames from serve to the read of an echo just fit into it; one more frame would double the stack of
// each connection. For a connection that is taken over, owned reports whether this process became its owner; otherwise
// owned is nil.
func (c *Conn) serve(owned <-chan bool) {
	defer c.srv.endTask()
	reason := ReasonHandlerError // for a handler that calls runtime.Goexit
	defer func() { c.close(reason) }()
	if owned != nil && !<-owned {
		reason = 0 // leave the connection to its owner
		return
	}
	defer func() {
		if p := recover(); p != nil {
			reason = c.logPanic(p)
		}
	}()
	if c.acceptor.baseContext != nil || c.srv.opts.ConnContext != nil {
		c.setParent()
	}
	reason = c.handlerResult(c.acceptor.handler.ServeConn((*connContext)(c), c))
}

// serveWith is like serve, but calls f instead of the handler.
func (c *Conn) serveWith(f func(ctx context.Context) error) {
	defer c.srv.endTask()
	reason := ReasonHandlerError
	defer func() { c.close(reason) }()
	defer func() {
		if p := recover(); p != nil {
			reason = c.logPanic(p)
		}
	}()
	if c.acceptor.baseContext != nil || c.srv.opts.ConnContext != nil {
		c.setParent()
	}
	reason = c.handlerResult(f((*connContext)(c)))
}

// setParent sets the parent of the handler's context.
func (c *Conn) setParent() {
	parent := c.acceptor.baseContext
	if c.srv.opts.ConnContext != nil {
		if parent == nil {
			parent = context.Background()
		}
		parent = c.srv.opts.ConnContext(parent, c)
	}
	if parent != nil {
		c.closing.With(func(cl *closingState) { cl.ensureRare().parent = parent })
	}
}

// connContext is the context of a connection's handler. It makes a context of package context, which takes 190 bytes,
// only when the handler first uses it. An echo never does.
type connContext Conn

type cancelContext struct {
	context.Context
	cancel context.CancelCauseFunc
}

// lazyContext returns the context of package context. It makes it in the first call.
func (x *connContext) lazyContext() (ctx context.Context) {
	(*Conn)(x).closing.With(func(cl *closingState) {
		if cl.ctx == nil {
			parent := context.Background()
			if cl.rare != nil && cl.rare.parent != nil {
				parent = cl.rare.parent
			}
			cl.ctx = new(cancelContext)
			cl.ctx.Context, cl.ctx.cancel = context.WithCancelCause(parent)
			if cl.cause != nil {
				cl.ctx.cancel(cl.cause)
			}
		}
		ctx = cl.ctx.Context
	})
	return ctx
}

// Deadline, Done, Err and Value implement context.Context. context.Cause finds the cause through Value.
func (x *connContext) Deadline() (time.Time, bool) { return x.lazyContext().Deadline() }
func (x *connContext) Done() <-chan struct{}       { return x.lazyContext().Done() }
func (x *connContext) Err() error                  { return x.lazyContext().Err() }
func (x *connContext) Value(key any) any           { return x.lazyContext().Value(key) }

// logPanic logs a panic of the handler, and returns the close reason.
func (c *Conn) logPanic(p any) Reason {
	c.srv.log.Error("handler panicked", zap.Uint64("conn", c.id), zap.Stringer("remote", c.RemoteAddr()),
		zap.Any("panic", p), zap.ByteString("stack", debug.Stack()))
	return ReasonHandlerPanic
}

// handlerResult returns the close reason that follows from the handler's result. It is a separate function because
// logging in serve would enlarge the stack of every connection.
func (c *Conn) handlerResult(err error) Reason {
	if state, ok := handoverState(err); ok {
		var handedOver bool
		if handedOver, err = c.awaitHandover(state); handedOver {
			return reasonHandedOver
		}
	}
	why := c.handlerReason(err)
	if err != nil {
		c.closing.With(func(cl *closingState) { cl.ensureRare().handlerErr = err })
	}
	if why == ReasonHandlerError && c.closeReason() == 0 {
		c.srv.log.Warn("handler returned an error",
			zap.Uint64("conn", c.id), zap.Stringer("remote", c.RemoteAddr()), zap.Error(err))
	}
	return why
}

// handlerReason returns the close reason for a handler that returned err.
func (c *Conn) handlerReason(err error) Reason {
	switch {
	case c.flags.has(flagIOFailed):
		return ReasonClientReset
	case c.flags.has(flagSawEOF) && (err == nil || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)):
		return ReasonClientClosed // close changes it to ReasonClientLeft if the client was notified
	case errors.Is(err, ErrClientGone):
		return ReasonClientClosed
	case err != nil && !errors.Is(err, ErrConnClosed) && !errors.Is(err, ErrDraining):
		return ReasonHandlerError
	default:
		return ReasonHandlerDone
	}
}

// closeUnserved is the goroutine of a connection that ended before it was admitted. It only closes the connection.
func (c *Conn) closeUnserved() {
	defer c.srv.endTask()
	c.close(ReasonHandlerDone)
}

// reject is the goroutine of a connection that is not served: it tells the client why, half-closes, lingers and
// closes.
func (c *Conn) reject(why Reason) {
	defer c.srv.endTask()
	// Reads stay possible: the first write to a TLS client performs the handshake.
	_ = c.nc.SetDeadline(time.Now().Add(flushTimeout))
	c.writeLock.Lock()
	if text := c.rejection(why); len(text) > 0 {
		_, _ = c.write(text)
	}
	c.unlockWrite()
	c.end(why, errors.New(why.String()))
	c.close(why)
}

// rejectNow is like reject, but does not wait for the client. A client that keeps sending may see a reset.
func (c *Conn) rejectNow(why Reason) {
	defer c.srv.endTask()
	c.end(why, errors.New(why.String()))
	if raw := rawConn(c.sock); raw != nil {
		discardPending(raw)
	}
	c.writeLock.Lock()
	if text := c.rejection(why); rawConn(c.nc) == nil { // TLS, for example
		_, _ = c.write(text) // does not wait, because the send buffer is empty
	} else {
		_, _ = c.tryWrite(text)
	}
	c.closeWrite()
	c.writeLock.Unlock()
	c.closeSocket()
	c.closeMessages()
	c.finish(why)
}

// rejection returns the bytes that tell the client why it is not served. The caller holds the write lock.
func (c *Conn) rejection(why Reason) []byte {
	if c.acceptor.tls != nil && !c.flags.has(flagTLSBegun) {
		return nil // the client expects a handshake
	}
	n := Notice{Kind: NoticeReject, Rejected: why}
	if why == ReasonRejectedDraining {
		c.srv.state.With(func(st *state) { n.Reason, n.Deadline = st.drain.cause.reason, st.drain.deadline })
	}
	return c.render(&message{notice: n})
}

// close closes the connection: it sends pending messages, half-closes, lingers for the client's FIN, closes, and
// records the end. The close reason is reason, unless the connection ended earlier for another one. close lingers,
// because closing a socket with unread input sends an RST. An RST makes the client's kernel discard data that the
// client has not read (RFC 1122, 4.2.2.13). For the reason 0 it does nothing.
func (c *Conn) close(reason Reason) {
	switch reason {
	case 0:
		return
	case reasonHandedOver:
		c.detach()
		return
	default:
	}
	c.phase.Store(int32(PhaseClosing))
	c.srv.connState(c, PhaseClosing)
	c.flags.set(flagClosed)
	c.end(reason, ErrConnClosed)
	why := c.closeReason()

	// Writes fail after flushTimeout, so the lock becomes free. A client may leave before its notice is recorded as
	// sent. So flagNotified is read under the lock.
	c.writeLock.Lock()
	if why == ReasonClientClosed && c.flags.has(flagNotified) {
		why = ReasonClientLeft
	}
	c.flushMessages()
	c.closeStream(why)
	c.closeMessages()
	c.writeLock.Unlock()
	c.finish(why)
}

// closeStream half-closes, lingers and closes. The caller holds the write lock.
func (c *Conn) closeStream(why Reason) {
	sawFIN := false
	c.writeClosed = true
	if !c.flags.has(flagIOFailed) && why != ReasonStalled && c.closeWrite() {
		sawFIN = c.linger()
	}
	switch {
	case why == ReasonStalled || why == ReasonForced:
		resetOnClose(c.sock)
	case !sawFIN:
		setOrphanTimeout(c.sock)
	}
	c.closeSocket()
}

// closeSocket closes the socket first, so that closing the stream on top of it cannot wait for the client.
func (c *Conn) closeSocket() {
	_ = c.sock.Close()
	if c.nc != c.sock {
		_ = c.nc.Close()
	}
}

// closeWrite sends close_notify if there is a TLS session, and half-closes the socket. It reports whether the socket
// was half-closed.
func (c *Conn) closeWrite() bool {
	if c.nc != c.sock {
		c.closeNotify()
	}
	half, ok := c.sock.(halfCloser)
	return ok && half.CloseWrite() == nil
}

// linger discards input until the client's FIN. It reads at most lingerBytes and for at most lingerTimeout, so that a
// flooding client does not take CPU time from other clients.
func (c *Conn) linger() (sawFIN bool) {
	_ = c.sock.SetReadDeadline(time.Now().Add(lingerTimeout))
	n, err := io.CopyN(io.Discard, c.sock, lingerBytes)
	return n < lingerBytes && errors.Is(err, io.EOF)
}

// abort closes the socket while its handler may still use it. It does not block: closing a TLS session could wait five
// seconds for a client that does not read, so abort closes the socket below it.
func (c *Conn) abort() {
	if c.closeReason() == ReasonForced {
		resetOnClose(c.sock)
	} else {
		setOrphanTimeout(c.sock)
	}
	_ = c.sock.Close()
}

// finish records that the connection is closed, and calls ConnState and OnClose. Later calls do nothing.
func (c *Conn) finish(why Reason) {
	s := c.srv
	closed := ClosedConn{
		ID: c.id, Remote: c.RemoteAddr(), Local: c.LocalAddr(), Opened: c.srv.timeAt(c.opened),
		Closed: time.Now(), Reason: why, BytesIn: c.BytesIn(), BytesOut: c.BytesOut(),
		Notified: c.flags.has(flagNotified), Labels: c.Labels(), Err: c.handlerErr(),
	}
	var first bool
	s.state.With(func(st *state) {
		if first = st.removeConn(c, closed); first {
			connFiles.Add(-1)
		}
	})
	if !first {
		return
	}
	s.logClosed(closed)
	s.connState(c, PhaseClosed)
	if s.opts.OnClose != nil {
		s.callOnClose(closed)
	}
}

func (c *Conn) handlerErr() (err error) {
	c.closing.With(func(cl *closingState) {
		if cl.rare != nil {
			err = cl.rare.handlerErr
		}
	})
	return err
}

func (s *Server) logClosed(closed ClosedConn) {
	if s.opts.QuietConns {
		return
	}
	if entry := s.log.Check(zap.InfoLevel, "connection closed"); entry != nil {
		fields := []zap.Field{
			zap.Uint64("conn", closed.ID), zap.Stringer("remote", closed.Remote), zap.Stringer("reason", closed.Reason),
			zap.Uint64("bytes_in", closed.BytesIn), zap.Uint64("bytes_out", closed.BytesOut),
			zap.Duration("duration", closed.Closed.Sub(closed.Opened).Round(time.Millisecond)),
		}
		if len(closed.Labels) > 0 {
			fields = append(fields, zap.Any("labels", closed.Labels))
		}
		entry.Write(fields...)
	}
}

func (s *Server) callOnClose(closed ClosedConn) {
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("OnClose panicked", zap.Uint64("conn", closed.ID), zap.String("panic", fmt.Sprint(p)),
				zap.ByteString("stack", debug.Stack()))
		}
	}()
	s.opts.OnClose(closed)
}

func (s *Server) connState(c *Conn, p Phase) {
	if s.opts.ConnState != nil {
		s.opts.ConnState(c, p)
	}
}

// resetOnClose makes Close send an RST and discard unsent data.
func resetOnClose(nc net.Conn) {
	if tcp, ok := nc.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
}
