package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"sync/atomic"
	"syscall"
	"time"

	"go.uber.org/zap"
)

// Conn is an accepted connection. It differs from other net.Conns: notices never land inside a Write; Close leaves
// flushing, half-closing and lingering to the server; deadlines no longer change once the server ends the connection;
// and a write deadline applies to the handler's writes only.
//
// One goroutine may read while others write; all other methods may be called concurrently. A Conn must not be copied.
type Conn struct {
	// What each message touches comes first, in a cache line of its own.
	srv         *Server // set once, by newConn
	bytesIn     atomic.Uint64
	bytesOut    atomic.Uint64
	active      atomic.Int64 // when a byte moved last, by Server.clock
	posted      atomic.Int32 // length of messages
	idle        atomic.Int32 // one of the idle constants
	writeLock   writeLock    // held for each whole write; guards the four fields below, and changes of nc
	lastByte    byte
	writeClosed bool // CloseWrite was called
	writeBroken bool // a write ended halfway: the client could not parse anything after it
	flags       connFlags
	turn        atomic.Int32 // one of the turn constants
	phase       atomic.Int32

	// Set once, by newConn, or by state when it adds the connection (id).
	id     uint64
	opened int64 // by Server.clock
	from   *acceptor
	sock   net.Conn // what the listener returned, or what is below its TLS session

	nc net.Conn // what is read and written: sock, or what WrapConn made of it

	// Guarded by Server.state.
	admitted, rejected bool
	told               bool // to leave: the notice is posted, or will be at once

	writeHeld bool // a handover holds writeLock; its own

	gone       bool // the sweeper has seen that the client has gone
	handshaken bool // the reader has seen that the TLS handshake is complete

	blocked atomic.Int64 // since when a write is in progress, by Server.clock; 0 when none is

	messages locked[*messageQueue] // nil until the first one
	closing  locked[closingState]

	progress progress // the sweeper's own
}

// connFlags are facts about a connection, in one word to save memory.
type connFlags struct{ bits atomic.Uint32 }

const (
	flagEchoing          uint32 = 1 << iota // the handler is Echo, which can be interrupted anywhere
	flagHandingOver                         // the handler is to reach its safe point; set under the lock of closing
	flagAwaited                             // a handover waits for the handler, or for the end; set like flagHandingOver
	flagSent                                // another process gets the connection: nothing may change any more
	flagHandlerWrites                       // a write of the handler is in progress
	flagHasWriteDeadline                    // the handler has set one
	flagTLSBegun                            // the TLS handshake before admission has begun
	flagSawEOF                              // the client has ended its stream
	flagBroken                              // reset or lost: a read or write failed for no reason of ours
	flagClosed                              // Close was called, or the handler has returned
	flagNotified                            // the kernel took the notice of the drain
	flagOld                                 // the notice for its age was scheduled
)

func (f *connFlags) has(flag uint32) bool { return f.bits.Load()&flag != 0 }
func (f *connFlags) set(flag uint32)      { f.bits.Or(flag) }
func (f *connFlags) clear(flag uint32)    { f.bits.And(^flag) }

// closingState says how and why the connection ends.
type closingState struct {
	reason Reason         // 0 until the end is decided
	cause  error          // why reads fail; nil while they do not
	ctx    *cancelContext // nil until the handler uses its context
	rare   *rareState     // nil until it is needed
}

// rareState is allocated only for the few connections that need it.
type rareState struct {
	notifier                    Notifier
	labels                      map[string]string
	readDeadline, writeDeadline time.Time // as the handler has set them
	parent                      context.Context
	handlerErr                  error
	drain                       connDrain
	handover                    connHandover
	remote                      net.Addr // nil for that of the socket
}

// connDrain is a connection's own drain.
type connDrain struct {
	begun       bool
	interrupted bool          // an idle Read has failed with ErrDraining
	signal      chan struct{} // closed when it begins; nil until the handler asks for it
	deadline    time.Time
	reason      string
	closed      Reason // how the connection is closed at the deadline
}

// Values of Conn.idle.
const (
	idleNo          int32 = iota
	idleMarked            // the handler waits for its next request
	idleInterrupted       // and its Read is made to fail with ErrDraining
	idleHandover          // or with ErrHandover
)

func newConn(a *acceptor, nc net.Conn) *Conn {
	c := &Conn{srv: a.srv, from: a, sock: nc, nc: nc, opened: a.srv.clock()}
	if session, ok := nc.(*tls.Conn); ok { // of tls.NewListener
		c.sock = session.NetConn()
	}
	if cred, ok := peerCredentials(nc); ok {
		c.closing.With(func(cl *closingState) { cl.extra().remote = cred })
	}
	c.phase.Store(int32(PhaseWaiting))
	c.touch()
	connFiles.Add(1)
	return c
}

// ID is the connection's number, counted from 1 in the order of accepting.
func (c *Conn) ID() uint64 { return c.id }

// Server returns the server that the connection belongs to.
func (c *Conn) Server() *Server { return c.srv }

// BytesIn is how many bytes were read from the client.
func (c *Conn) BytesIn() uint64 { return c.bytesIn.Load() }

// BytesOut is how many bytes were written to the client, notices included.
func (c *Conn) BytesOut() uint64 { return c.bytesOut.Load() }

// LocalAddr is the server's address on this connection.
func (c *Conn) LocalAddr() net.Addr { return knownAddr(c.sock.LocalAddr()) }

// RemoteAddr is the client's address, as returned by WrapConn's connection. The client of a Unix socket has no
// address; RemoteAddr is then its Credentials, on systems that report them.
func (c *Conn) RemoteAddr() (addr net.Addr) {
	c.closing.With(func(cl *closingState) {
		if cl.rare != nil {
			addr = cl.rare.remote
		}
	})
	if addr == nil {
		return knownAddr(c.sock.RemoteAddr())
	}
	return addr
}

// NetConn returns the underlying stream: the connection from the listener or from WrapConn, for example a *tls.Conn.
// Direct reads and writes on it are not counted, and notices may land between them.
func (c *Conn) NetConn() (nc net.Conn) {
	c.closing.With(func(*closingState) { nc = c.nc })
	return nc
}

// SyscallConn gives access to the socket's descriptor. The error is errors.ErrUnsupported where there is none.
func (c *Conn) SyscallConn() (syscall.RawConn, error) {
	if sc, ok := c.sock.(syscall.Conn); ok {
		return sc.SyscallConn()
	}
	return nil, errUnsupported
}

var errUnsupported = errors.ErrUnsupported

// TLS returns the state of the connection's TLS session; ok is false if it has none.
func (c *Conn) TLS() (state tls.ConnectionState, ok bool) {
	session, ok := c.NetConn().(interface{ ConnectionState() tls.ConnectionState })
	if !ok {
		return state, false
	}
	return session.ConnectionState(), true
}

// Credentials identify the process at the other end of a Unix socket, as it was when it connected. They are the
// client's RemoteAddr.
type Credentials struct{ PID, UID, GID int }

// Network returns "unix".
func (Credentials) Network() string { return "unix" }

// String returns, for example, "uid=1000,pid=4711".
func (c Credentials) String() string { return fmt.Sprintf("uid=%d,pid=%d", c.UID, c.PID) }

// PeerCredentials returns the credentials of the client of a Unix socket; ok is false where the system does not tell.
func (c *Conn) PeerCredentials() (cred Credentials, ok bool) { return peerCredentials(c.sock) }

// Draining returns a channel that is closed when the connection's drain begins: its client has been told, and has
// until DrainDeadline. The cause is a drain of the server, an eviction (PauseOptions.Evict), or the connection's age
// (Timeouts.MaxAge). The handler may finish its work until its context is cancelled.
func (c *Conn) Draining() (signal <-chan struct{}) {
	c.closing.With(func(cl *closingState) {
		d := &cl.extra().drain
		if d.signal == nil {
			d.signal = make(chan struct{})
			if d.begun {
				close(d.signal)
			}
		}
		signal = d.signal
	})
	return signal
}

// DrainDeadline returns when the connection is closed at the latest; ok is false while it is not being drained.
func (c *Conn) DrainDeadline() (deadline time.Time, ok bool) {
	c.closing.With(func(cl *closingState) {
		if cl.rare != nil && cl.rare.drain.begun {
			deadline, ok = cl.rare.drain.deadline, true
		}
	})
	return deadline, ok
}

// DrainReason returns why the connection is being drained; empty while it is not.
func (c *Conn) DrainReason() (reason string) {
	c.closing.With(func(cl *closingState) {
		if cl.rare != nil {
			reason = cl.rare.drain.reason
		}
	})
	return reason
}

// startDrain begins the connection's drain.
func (c *Conn) startDrain(as connDrain) {
	c.closing.With(func(cl *closingState) {
		d := &cl.extra().drain
		d.begun, d.deadline, d.reason, d.closed = true, as.deadline, as.reason, as.closed
		if d.signal != nil {
			close(d.signal)
		}
		if cl.cause == nil && c.idle.CompareAndSwap(idleMarked, idleInterrupted) {
			d.interrupted = true
			_ = c.nc.SetReadDeadline(longAgo)
		}
	})
}

// moveDeadline changes the deadline of the connection's drain, if it has begun.
func (c *Conn) moveDeadline(deadline func(connDrain) time.Time) {
	c.closing.With(func(cl *closingState) {
		if cl.rare != nil && cl.rare.drain.begun {
			cl.rare.drain.deadline = deadline(cl.rare.drain)
		}
	})
}

// MarkIdle declares that the handler has answered all requests and has read nothing of the next one: with a
// bufio.Reader, that Buffered returns 0. (A bufio.Scanner does not report this.) A drain then makes the waiting Read,
// or the next one, fail with ErrDraining, once per connection. No byte is lost, so the handler may also continue. The
// first byte read ends the mark. Call MarkIdle on the goroutine that reads.
func (c *Conn) MarkIdle() { c.idle.CompareAndSwap(idleNo, idleMarked) }

// endIdle removes the mark of MarkIdle after a read, which may have brought data. It returns ErrDraining or
// ErrHandover if the read was interrupted for that.
func (c *Conn) endIdle(data bool) (interrupted error) {
	was := c.idle.Swap(idleNo)
	switch was {
	case idleInterrupted:
		interrupted = ErrDraining
	case idleHandover:
		interrupted = ErrHandover
	default:
		return nil
	}
	c.closing.With(func(cl *closingState) {
		if data && was == idleInterrupted {
			cl.rare.drain.interrupted = false // a request has begun: the handler can be interrupted after it
		}
		if cl.cause == nil {
			_ = c.nc.SetReadDeadline(cl.rare.readDeadline)
		}
	})
	return interrupted
}

// refuseIdleRead returns why a read of an idle handler must fail at once: a drain or a handover has begun already.
func (c *Conn) refuseIdleRead() (err error) {
	c.closing.With(func(cl *closingState) {
		switch {
		case cl.cause != nil || cl.rare == nil:
		case c.flags.has(flagHandingOver):
			err = ErrHandover
		case cl.rare.drain.begun && !cl.rare.drain.interrupted:
			cl.rare.drain.interrupted = true
			err = ErrDraining
		}
	})
	if err != nil {
		c.idle.Store(idleNo)
	}
	return err
}

// finishHandshake performs the handshake of a TLS session before its first idle read: crypto/tls cannot continue a
// handshake that a drain has interrupted.
func (c *Conn) finishHandshake() error {
	session, ok := c.nc.(*tls.Conn)
	if !ok || c.handshaken {
		return nil
	}
	c.endIdle(true)
	if err := session.Handshake(); err != nil {
		return err
	}
	c.handshaken = true
	c.MarkIdle()
	return nil
}

// SetNotifier replaces the Notifier of this connection; nil means no notices. Call it before a change of protocol,
// such as STARTTLS in the handler. It waits for a write in progress, and drops notices that are not sent yet. A drain
// notifies once, so a Notifier that is set after that is not called: check Draining.
func (c *Conn) SetNotifier(n Notifier) {
	if n == nil {
		n = silent{}
	}
	c.writeLock.Lock()
	defer c.unlockWrite()
	c.closing.With(func(cl *closingState) { cl.extra().notifier = n })
}

// Wrap replaces the connection's stream with the one that wrap returns, such as a TLS session for STARTTLS. While
// wrap runs, the server sends nothing to the client; afterwards its notices use the new stream. Write the plain-text
// answer to STARTTLS inside wrap, because a notice could follow it if it were written earlier. Call Wrap on the
// goroutine that reads, before any byte of the new stream has been read. If wrap returns an error, the old stream
// stays in place but the server sends no more notices; the handler should return. Only ctx bounds Wrap, not
// Timeouts.Handshake. The connection's addresses do not change.
func (c *Conn) Wrap(ctx context.Context, wrap WrapConn) error {
	c.writeLock.Lock()
	defer c.unlockWrite()
	err := c.replaceStream(ctx, wrap)
	if err != nil {
		c.closing.With(func(cl *closingState) { cl.extra().notifier = silent{} })
	}
	return err
}

// replaceStream replaces the stream by what wrap makes of it. The client's address stays.
func (c *Conn) replaceStream(ctx context.Context, wrap WrapConn) error {
	wrapped, err := wrap(ctx, c.nc)
	if err != nil {
		return err
	}
	if named, ok := wrapped.(addrConn); ok {
		wrapped = named.Conn
	}
	c.closing.With(func(*closingState) { c.nc = wrapped })
	return nil
}

// setStream replaces the stream, and with it the client's address, before the connection is admitted.
func (c *Conn) setStream(wrapped net.Conn) {
	var remote net.Addr
	if named, ok := wrapped.(addrConn); ok {
		wrapped, remote = named.Conn, named.remote
	} else if wrapped != c.sock {
		remote = wrapped.RemoteAddr()
	}
	c.closing.With(func(cl *closingState) {
		c.nc = wrapped
		if remote != nil {
			cl.extra().remote = remote
		}
	})
}

// WithRemoteAddr returns nc with another remote address. A WrapConn that reads a PROXY header returns it, so that the
// connection keeps the fast path of a plain socket.
func WithRemoteAddr(nc net.Conn, remote net.Addr) net.Conn { return addrConn{nc, remote} }

type addrConn struct {
	net.Conn
	remote net.Addr
}

// RemoteAddr returns the address that was given.
func (c addrConn) RemoteAddr() net.Addr { return c.remote }

// Bounds on labels.
const (
	maxLabels      = 16
	maxLabelLength = 256
)

// SetLabel attaches a label to the connection, such as the name of the user. Logs, listings and the control plane
// show labels. An empty value removes the label. A connection has at most 16 labels. Keys and values have at most 256
// bytes and must pass CheckText.
func (c *Conn) SetLabel(key, value string) error {
	for _, text := range []string{key, value} {
		if err := CheckText(text); err != nil {
			return fmt.Errorf("label %.40q: %w", key, err)
		}
		if len(text) > maxLabelLength {
			return fmt.Errorf("label %.40q: it has %d bytes: at most %d are allowed", key, len(text), maxLabelLength)
		}
	}
	var full bool
	c.closing.With(func(cl *closingState) {
		r := cl.extra()
		_, known := r.labels[key]
		switch {
		case value == "":
			delete(r.labels, key)
		case !known && len(r.labels) >= maxLabels:
			full = true
		default:
			if r.labels == nil {
				r.labels = make(map[string]string)
			}
			r.labels[key] = value
		}
	})
	if full {
		return fmt.Errorf("label %.40q: the connection has %d labels already", key, maxLabels)
	}
	return nil
}

// Labels returns a copy of the connection's labels; nil if it has none.
func (c *Conn) Labels() (labels map[string]string) {
	c.closing.With(func(cl *closingState) {
		if cl.rare != nil && len(cl.rare.labels) > 0 {
			labels = maps.Clone(cl.rare.labels)
		}
	})
	return labels
}

func (cl *closingState) extra() *rareState {
	if cl.rare == nil {
		cl.rare = new(rareState)
	}
	return cl.rare
}

// Read reads what the client sent. Once the server ends the connection, Read fails with the cause. See MarkIdle for
// ErrDraining.
func (c *Conn) Read(p []byte) (n int, err error) {
	if c.idle.Load() != idleNo {
		if err = c.finishHandshake(); err == nil {
			if err := c.refuseIdleRead(); err != nil {
				return 0, err
			}
		}
	}
	if c.flags.has(flagSent) {
		return 0, ErrConnClosed
	}
	if err == nil {
		n, err = c.nc.Read(p)
	}
	var interrupted error
	if n > 0 || err != nil {
		if c.idle.Load() != idleNo {
			interrupted = c.endIdle(n > 0)
		}
	}
	if n > 0 {
		c.bytesIn.Add(uint64(n))
		c.touch()
	}
	switch {
	case err == nil:
	case errors.Is(err, io.EOF):
		c.flags.set(flagSawEOF)
	case interrupted != nil && errors.Is(err, os.ErrDeadlineExceeded) && c.cause() == nil:
		if n > 0 {
			return n, nil
		}
		return 0, interrupted
	default:
		err = c.explain(err)
	}
	return n, err
}

// explain returns the cause instead of err if the server ends the connection. Otherwise it returns err, and records a
// reset or a lost connection.
func (c *Conn) explain(err error) error {
	if cause := c.cause(); cause != nil {
		return cause
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, net.ErrClosed) {
		c.flags.set(flagBroken)
	}
	return err
}

// Close makes reads and writes fail. When the handler has returned, the server half-closes, lingers and closes the
// connection. A handler need not call Close, and Close always returns nil. The handler's result still determines the
// close reason.
func (c *Conn) Close() error {
	c.flags.set(flagClosed)
	c.closing.With(func(cl *closingState) {
		if cl.reason == 0 {
			c.cancelIO(cl, ErrConnClosed)
		}
	})
	return nil
}

// SetDeadline sets both deadlines; see net.Conn.
func (c *Conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline sets the deadline of reads; see net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) (err error) {
	c.closing.With(func(cl *closingState) {
		if !t.IsZero() || cl.rare != nil {
			cl.extra().readDeadline = t
		}
		if idle := c.idle.Load(); cl.cause == nil && idle != idleInterrupted && idle != idleHandover {
			err = c.nc.SetReadDeadline(t)
		}
	})
	return err
}

// SetWriteDeadline sets the deadline of the handler's writes; see net.Conn. It does not apply to notices. After a
// write that it interrupts midway, all further writes fail.
func (c *Conn) SetWriteDeadline(t time.Time) (err error) {
	c.closing.With(func(cl *closingState) {
		if !t.IsZero() || cl.rare != nil {
			cl.extra().writeDeadline = t
			c.flags.set(flagHasWriteDeadline)
		}
		if cl.cause == nil && c.flags.has(flagHandlerWrites) {
			err = c.nc.SetWriteDeadline(t)
		}
	})
	return err
}

func (c *Conn) touch() { c.active.Store(c.srv.clock()) }

// clock is the time since the server was made, in nanoseconds. It is never zero. A change of the wall clock, which
// would make every connection look idle, does not affect it.
func (s *Server) clock() int64 { return int64(time.Since(s.started)) + 1 }

// at is the inverse of clock.
func (s *Server) at(clock int64) time.Time { return s.started.Add(time.Duration(clock - 1)) }

// startTask counts a goroutine that works for an open connection. It calls endTask last, and the drain waits for it.
func (s *Server) startTask() { s.state.With(func(st *state) { st.tasks++ }) }
func (s *Server) endTask()   { s.state.With(func(st *state) { st.tasks-- }) }

// endReason is how the connection ends; zero while that is not decided.
func (c *Conn) endReason() (why Reason) {
	c.closing.With(func(cl *closingState) { why = cl.reason })
	return why
}

// cause is why reads fail; nil while they do not.
func (c *Conn) cause() (cause error) {
	c.closing.With(func(cl *closingState) { cause = cl.cause })
	return cause
}

// end ends the connection with a reason, unless it has one already. It cancels the handler's context and makes reads
// fail at once. Writes have flushTimeout left.
func (c *Conn) end(why Reason, cause error) (first bool) {
	var awaited bool
	c.closing.With(func(cl *closingState) {
		if first = cl.reason == 0 && !c.flags.has(flagSent); first {
			cl.reason = why
			c.cancelIO(cl, cause)
			awaited = c.endAwaited()
		}
	})
	if awaited {
		c.srv.countSettled(c)
	}
	return first
}

// cancelIO makes reads fail with cause, and writes after a while. The caller holds the lock of c.closing. It cancels
// the context first, so that a goroutine woken by the deadline finds the cause.
func (c *Conn) cancelIO(cl *closingState, cause error) {
	if cl.cause == nil {
		cl.cause = cause
	}
	if cl.ctx != nil {
		cl.ctx.cancel(cause)
	}
	_ = c.nc.SetReadDeadline(longAgo)
	_ = c.nc.SetWriteDeadline(time.Now().Add(flushTimeout))
}

// connContext is a connection as the context of its handler. The 190 bytes that package context needs are allocated
// when the handler first uses the context, which an echo never does.
type connContext Conn

type cancelContext struct {
	context.Context
	cancel context.CancelCauseFunc
}

func (x *connContext) real() (ctx context.Context) {
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

func (x *connContext) Deadline() (time.Time, bool) { return x.real().Deadline() }
func (x *connContext) Done() <-chan struct{}       { return x.real().Done() }
func (x *connContext) Err() error                  { return x.real().Err() }

// Value is also how context.Cause finds the cause.
func (x *connContext) Value(key any) any { return x.real().Value(key) }

// setParent sets the parent of the handler's context.
func (c *Conn) setParent() {
	parent := c.from.base
	if c.srv.opts.ConnContext != nil {
		if parent == nil {
			parent = context.Background()
		}
		parent = c.srv.opts.ConnContext(parent, c)
	}
	if parent != nil {
		c.closing.With(func(cl *closingState) { cl.extra().parent = parent })
	}
}

// serve is the goroutine of an admitted connection. Its stack of 2 KiB is more than a third of the memory of an idle
// connection. The frames from here to where an echo waits just fit into it; one more frame doubles the stack of each
// connection. For a connection that is taken over, owned says whether it is to be served; otherwise owned is nil.
func (c *Conn) serve(owned <-chan bool) {
	defer c.srv.endTask()
	natural := ReasonHandlerError // for a handler that calls runtime.Goexit
	defer func() { c.close(natural) }()
	if owned != nil && !<-owned {
		natural = 0 // the connection is not this goroutine's
		return
	}
	defer func() {
		if p := recover(); p != nil {
			natural = c.panicked(p)
		}
	}()
	if c.from.base != nil || c.srv.opts.ConnContext != nil {
		c.setParent()
	}
	natural = c.handlerResult(c.from.handler.ServeConn((*connContext)(c), c))
}

// serveWith is serve with another function in place of the handler's.
func (c *Conn) serveWith(f func(ctx context.Context) error) {
	defer c.srv.endTask()
	natural := ReasonHandlerError
	defer func() { c.close(natural) }()
	defer func() {
		if p := recover(); p != nil {
			natural = c.panicked(p)
		}
	}()
	if c.from.base != nil || c.srv.opts.ConnContext != nil {
		c.setParent()
	}
	natural = c.handlerResult(f((*connContext)(c)))
}

// panicked logs a panic of the handler.
func (c *Conn) panicked(p any) Reason {
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
	why := c.naturalReason(err)
	if err != nil {
		c.closing.With(func(cl *closingState) { cl.extra().handlerErr = err })
	}
	if why == ReasonHandlerError && c.endReason() == 0 {
		c.srv.log.Warn("handler returned an error",
			zap.Uint64("conn", c.id), zap.Stringer("remote", c.RemoteAddr()), zap.Error(err))
	}
	return why
}

func (c *Conn) naturalReason(err error) Reason {
	switch {
	case c.flags.has(flagBroken):
		return ReasonClientReset
	case c.flags.has(flagSawEOF) && (err == nil || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)):
		return ReasonClientClosed // close may turn it into ReasonClientLeft
	case errors.Is(err, ErrClientGone):
		return ReasonClientClosed
	case err != nil && !errors.Is(err, ErrConnClosed) && !errors.Is(err, ErrDraining):
		return ReasonHandlerError
	default:
		return ReasonHandlerDone
	}
}

// boundHandshake sets the deadline of reads and writes that a handshake makes on the stream below Conn.
func (c *Conn) boundHandshake(t time.Time) {
	c.closing.With(func(cl *closingState) {
		if cl.cause == nil {
			_ = c.nc.SetDeadline(t)
		}
	})
}

// endHandshake records how the handshake before admission ended.
func (c *Conn) endHandshake(err error) {
	c.closing.With(func(cl *closingState) {
		if cl.cause == nil {
			cl.ctx = nil // the handler gets a context of its own
		}
	})
	c.boundHandshake(time.Time{})
	if err == nil {
		return
	}
	_, isTLS := errors.AsType[*HandshakeError](err)
	why, cause := c.handshakeReason(), fmt.Errorf("%w: %w", errHandshakeFailed, err)
	switch {
	case isTLS: // also for a client that left in the middle of it
	case errors.Is(err, io.EOF):
		why, cause = ReasonClientClosed, ErrConnClosed
	case errors.Is(err, syscall.ECONNRESET):
		why, cause = ReasonClientReset, ErrConnClosed
	}
	first := c.end(why, cause)
	if crowded := errors.Is(c.cause(), errHandshakeCrowded); crowded {
		err = fmt.Errorf("%w: %w", errHandshakeCrowded, err)
	} else if !first || why != c.handshakeReason() {
		return // the server has ended it, or the client has left before it began
	}
	c.closing.With(func(cl *closingState) { cl.extra().handlerErr = err })
	c.srv.log.Warn("handshake failed", zap.Uint64("conn", c.id), zap.Stringer("remote", c.RemoteAddr()), zap.Error(err))
}

var errHandshakeFailed = errors.New("the handshake failed")

// handshakeReason is the close reason of a connection whose handshake fails now.
func (c *Conn) handshakeReason() Reason {
	if c.flags.has(flagTLSBegun) {
		return ReasonHandshakeFailed
	}
	return ReasonRejectedHandshake
}

// closeUnserved is the goroutine of a connection that was ended before it was admitted.
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

// rejectNow is reject without waiting for the client. A client that keeps sending may see a reset.
func (c *Conn) rejectNow(why Reason) {
	defer c.srv.endTask()
	c.end(why, errors.New(why.String()))
	if raw := rawConn(c.sock); raw != nil {
		discardPending(raw)
	}
	c.writeLock.Lock()
	if text := c.rejection(why); rawConn(c.nc) == nil { // TLS, for example
		_, _ = c.write(text) // into an empty send buffer, so that it does not wait
	} else {
		_, _ = c.tryWrite(text)
	}
	c.closeWrite()
	c.writeLock.Unlock()
	c.closeSocket()
	c.closeMessages()
	c.finish(why)
}

// rejection returns what the client is told when it is not served. The caller holds the write lock.
func (c *Conn) rejection(why Reason) []byte {
	if c.from.tls != nil && !c.flags.has(flagTLSBegun) {
		return nil // the client expects a handshake
	}
	n := Notice{Kind: NoticeReject, Rejected: why}
	if why == ReasonRejectedDraining {
		c.srv.state.With(func(st *state) { n.Reason, n.Deadline = st.drain.cause.reason, st.drain.deadline })
	}
	return c.render(&message{notice: n})
}

// close ends a connection, with the reason natural unless it has one already. It sends pending messages, half-closes,
// lingers for the client's FIN, closes, and records the end. It lingers because closing a socket with unread input
// sends an RST, which makes the client's kernel discard data that the client has not read (RFC 1122, 4.2.2.13).
func (c *Conn) close(natural Reason) {
	switch natural {
	case 0:
		return
	case reasonHandedOver:
		c.release()
		return
	default:
	}
	c.phase.Store(int32(PhaseClosing))
	c.srv.connState(c, PhaseClosing)
	c.flags.set(flagClosed)
	c.end(natural, ErrConnClosed)
	why := c.endReason()

	// The lock is free within flushTimeout, because writes have no longer. Under the lock it is known whether the
	// client was notified: it may leave faster than its notifier can say so.
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
	if !c.flags.has(flagBroken) && why != ReasonStalled && c.closeWrite() {
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

// closeSocket closes the socket, and then the stream on top of it, which cannot wait for the client any more.
func (c *Conn) closeSocket() {
	_ = c.sock.Close()
	if c.nc != c.sock {
		_ = c.nc.Close()
	}
}

// closeWrite ends the stream towards the client, through all layers. It reports whether the socket was half-closed.
func (c *Conn) closeWrite() bool {
	if c.nc != c.sock {
		c.closeNotify()
	}
	half, ok := c.sock.(halfCloser)
	return ok && half.CloseWrite() == nil
}

// linger discards input until the client's FIN. Its time and bytes are bounded, because a flooding client could take
// CPU time from other clients.
func (c *Conn) linger() (sawFIN bool) {
	_ = c.sock.SetReadDeadline(time.Now().Add(lingerTimeout))
	n, err := io.CopyN(io.Discard, c.sock, lingerBytes)
	return n < lingerBytes && errors.Is(err, io.EOF)
}

// abort closes the socket under its users. It does not block: it closes below TLS, which would wait up to five seconds
// for a client that does not read.
func (c *Conn) abort() {
	if c.endReason() == ReasonForced {
		resetOnClose(c.sock)
	} else {
		setOrphanTimeout(c.sock)
	}
	_ = c.sock.Close()
}

// finish records a closed connection, once, and calls OnClose and ConnState.
func (c *Conn) finish(why Reason) {
	s := c.srv
	closed := ClosedConn{
		ID: c.id, Remote: c.RemoteAddr(), Local: c.LocalAddr(), Opened: c.srv.at(c.opened),
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

// addrOf returns the IP address in a, or the zero Addr if it has none.
func addrOf(a net.Addr) netip.Addr {
	if tcp, ok := a.(*net.TCPAddr); ok {
		return tcp.AddrPort().Addr().Unmap()
	}
	ap, _ := netip.ParseAddrPort(a.String())
	return ap.Addr().Unmap()
}
