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
	"sync/atomic"
	"syscall"
	"time"
)

// Conn is an accepted connection. It differs from other net.Conns in four ways. Notices are never sent inside a Write.
// After Close the server flushes, half-closes and lingers. Deadlines no longer change once the server ends the
// connection. And a write deadline applies only to the handler's writes.
//
// One goroutine may read while others write; all other methods may be called concurrently. A Conn must not be copied.
type Conn struct {
	// Fields that are used for every read and write come first, so that they share a cache line. The order avoids
	// padding, because each byte counts for every idle connection.
	srv         *Server // set once, by newConn
	bytesIn     atomic.Uint64
	bytesOut    atomic.Uint64
	lastActive  atomic.Int64 // when a byte was last read or written, by Server.clock
	idle        atomic.Int32 // one of the idle constants
	flags       connFlags
	writeLock   writeLock // held for each whole write; guards the next three fields, and changes of nc
	lastByte    byte      // the last byte written
	writeClosed bool      // CloseWrite was called
	writeBroken bool      // a write ended halfway: the client could not parse anything after it
	writeHeld   bool      // the handover holds writeLock; owned by the handover

	// Guarded by Server.state.
	admitted, rejected bool
	told               bool // the client was told to leave, or will be in a moment

	echoToken    atomic.Int32 // one of the token constants
	phase        atomic.Int32 // a Phase
	writeStarted atomic.Int64 // when the write in progress began, by Server.clock; 0 if there is none

	// Set once, by newConn; id by state.addConn.
	id       uint64
	opened   int64 // by Server.clock
	acceptor *acceptor
	sock     net.Conn // the listener's connection; below TLS if the listener returned a TLS session

	nc net.Conn // the stream that the handler reads and writes: sock, or one that WrapConn or TLS made of it

	closing lockedValue[closingState]
}

// connFlags is a set of flags, in one word to save memory.
type connFlags struct{ bits atomic.Uint32 }

const (
	flagEchoing          uint32 = 1 << iota // the handler is Echo, which a handover may interrupt anywhere
	flagHandingOver                         // a handover wants the handler to reach its safe point; guarded by closing
	flagSafePointPending                    // a handover waits for the safe point or the end; guarded by closing
	flagFrozen                              // frozen by a handover: this process must not read or write it
	flagHandlerWrites                       // a write of the handler is in progress
	flagHasWriteDeadline                    // the handler has set a write deadline
	flagInHandshake                         // WrapConn or the TLS handshake is in progress
	flagSubmitted                           // published as opened: it waits for admission, or has been admitted
	flagTLSBegun                            // the TLS handshake before admission has begun
	flagSawEOF                              // the client has ended its stream
	flagIOFailed                            // a read or write failed: the client reset the connection, or the network lost it
	flagClosed                              // Close was called, or the handler has returned
	flagNotified                            // the kernel has accepted the drain notice
	flagMaxAgeScheduled                     // the notice for Timeouts.MaxAge was scheduled
	flagClientGone                          // the sweeper has seen that the client has closed or reset the connection
	flagHandshaken                          // the reader has seen that the TLS handshake is complete
	flagMessagesQueued                      // rareState.messages is not empty; guarded by closing
	flagMessagesClosed                      // messages can no longer be queued; guarded by closing
	flagMayWait                             // written bytes may wait for the client; the sweeper clears it when none do
)

func (f *connFlags) has(flag uint32) bool { return f.bits.Load()&flag != 0 }
func (f *connFlags) set(flag uint32)      { f.bits.Or(flag) }
func (f *connFlags) clear(flag uint32)    { f.bits.And(^flag) }

// closingState says how and why the connection ends.
type closingState struct {
	reason Reason         // 0 until the server or the handler ends the connection
	cause  error          // the error of reads; nil while reads are possible
	ctx    *cancelContext // nil until the handler uses its context
	rare   *rareState     // nil until ensureRare is called
}

// rareState holds what few connections need. It is allocated on first use, to save memory.
type rareState struct {
	notifier                    Notifier
	messages                    []*message // queued while another write was in progress
	labels                      map[string]string
	readDeadline, writeDeadline time.Time       // set by the handler
	parent                      context.Context // of the handler's context
	handlerErr                  error
	drain                       connDrain
	handover                    connHandover
	remote                      net.Addr // the client's address; nil means that of the socket
}

// connDrain is a connection's own drain.
type connDrain struct {
	begun       bool
	interrupted bool          // an idle Read has failed with ErrDraining
	signal      chan struct{} // closed when the drain begins; nil until the handler calls Draining
	deadline    time.Time
	reason      string
	closed      Reason // the close reason at the deadline
}

// Values of Conn.idle.
const (
	idleUnmarked    int32 = iota
	idleMarked            // the handler waits for its next request
	idleInterrupted       // a drain has interrupted the Read of an idle handler: it fails with ErrDraining
	idleHandover          // a handover has interrupted it: it fails with ErrHandover
)

func newConn(a *acceptor, nc net.Conn) *Conn {
	c := &Conn{srv: a.srv, acceptor: a, sock: nc, nc: nc, opened: a.srv.clock()}
	if session, ok := nc.(*tls.Conn); ok { // of tls.NewListener
		c.sock = session.NetConn()
	}
	if cred, ok := peerCredentials(nc); ok {
		c.closing.With(func(cl *closingState) { cl.ensureRare().remote = cred })
	}
	c.phase.Store(int32(PhaseWaiting))
	c.markActive()
	connFiles.Add(1)
	return c
}

// ID returns the connection's number. The server counts connections from 1, in the order in which it accepts them.
func (c *Conn) ID() uint64 { return c.id }

// Server returns the server that the connection belongs to.
func (c *Conn) Server() *Server { return c.srv }

// BytesIn returns the number of bytes read from the client.
func (c *Conn) BytesIn() uint64 { return c.bytesIn.Load() }

// BytesOut returns the number of bytes written to the client, including notices.
func (c *Conn) BytesOut() uint64 { return c.bytesOut.Load() }

// LocalAddr returns the server's address on this connection.
func (c *Conn) LocalAddr() net.Addr { return knownAddr(c.sock.LocalAddr()) }

// RemoteAddr returns the client's address. If WrapConn returned a connection with another remote address, it returns
// that. The client of a Unix socket has no address; RemoteAddr returns its Credentials, on systems that report them.
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
// The server does not count direct reads and writes on it, and may send notices between them.
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

// PeerCredentials returns the credentials of the client of a Unix socket. ok is false on systems that do not report
// them.
func (c *Conn) PeerCredentials() (cred Credentials, ok bool) { return peerCredentials(c.sock) }

// Draining returns a channel that is closed when the connection's drain begins: its client has been told to leave, and
// has time until DrainDeadline. The cause is a drain of the server, an eviction (PauseOptions.Evict), or the connection's age
// (Timeouts.MaxAge). The handler may finish its work until its context is cancelled.
func (c *Conn) Draining() (signal <-chan struct{}) {
	c.closing.With(func(cl *closingState) {
		d := &cl.ensureRare().drain
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

// DrainDeadline returns the time at which the server closes the connection. ok is false while the connection is not
// being drained.
func (c *Conn) DrainDeadline() (deadline time.Time, ok bool) {
	c.closing.With(func(cl *closingState) {
		if cl.rare != nil && cl.rare.drain.begun {
			deadline, ok = cl.rare.drain.deadline, true
		}
	})
	return deadline, ok
}

// DrainReason returns why the connection is being drained. It is empty while the connection is not being drained.
func (c *Conn) DrainReason() (reason string) {
	c.closing.With(func(cl *closingState) {
		if cl.rare != nil {
			reason = cl.rare.drain.reason
		}
	})
	return reason
}

// startDrain begins the connection's drain.
func (c *Conn) startDrain(info connDrain) {
	c.closing.With(func(cl *closingState) {
		d := &cl.ensureRare().drain
		d.begun, d.deadline, d.reason, d.closed = true, info.deadline, info.reason, info.closed
		if d.signal != nil {
			close(d.signal)
		}
		if cl.cause == nil && c.idle.CompareAndSwap(idleMarked, idleInterrupted) {
			d.interrupted = true
			_ = c.nc.SetReadDeadline(aLongTimeAgo)
		}
	})
}

// moveDeadline sets the deadline of the connection's drain to the result of deadline, if the drain has begun.
func (c *Conn) moveDeadline(deadline func(connDrain) time.Time) {
	c.closing.With(func(cl *closingState) {
		if cl.rare != nil && cl.rare.drain.begun {
			cl.rare.drain.deadline = deadline(cl.rare.drain)
		}
	})
}

// MarkIdle declares that the handler has answered all requests and has read nothing of the next one. With a bufio.Reader
// the latter means that Buffered returns 0. (A bufio.Scanner does not report this.) A drain then makes the waiting Read,
// or the next one, fail with ErrDraining, once per connection. No byte is lost, so the handler may also continue. Reading
// a byte removes the mark. Call MarkIdle on the goroutine that reads.
func (c *Conn) MarkIdle() { c.idle.CompareAndSwap(idleUnmarked, idleMarked) }

// endIdle removes the mark of MarkIdle after a read; data reports whether the read returned data. If a drain or a
// handover interrupted the read, endIdle returns ErrDraining or ErrHandover.
func (c *Conn) endIdle(data bool) (interrupted error) {
	was := c.idle.Swap(idleUnmarked)
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
			cl.rare.drain.interrupted = false // a request has begun: the drain may interrupt the handler again after it
		}
		if cl.cause == nil {
			_ = c.nc.SetReadDeadline(cl.rare.readDeadline)
		}
	})
	return interrupted
}

// idleReadError returns ErrDraining or ErrHandover if a read of an idle handler must fail at once, because a drain or
// a handover has begun already.
func (c *Conn) idleReadError() (err error) {
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
		c.idle.Store(idleUnmarked)
	}
	return err
}

// finishHandshake performs the handshake of a TLS session before its first idle read, because crypto/tls cannot continue
// a handshake that a drain has interrupted.
func (c *Conn) finishHandshake() error {
	session, ok := c.nc.(*tls.Conn)
	if !ok || c.flags.has(flagHandshaken) {
		return nil
	}
	c.endIdle(true)
	if err := session.Handshake(); err != nil {
		return err
	}
	c.flags.set(flagHandshaken)
	c.MarkIdle()
	return nil
}

// SetNotifier replaces the Notifier of this connection; nil means no notices. Call it before a change of protocol,
// such as STARTTLS in the handler. It waits for a write in progress, and drops notices that are not sent yet. A drain
// sends one notice, so a Notifier that is set after that is not called for it; check Draining.
func (c *Conn) SetNotifier(n Notifier) {
	if n == nil {
		n = silentNotifier{}
	}
	c.writeLock.Lock()
	defer c.unlockWrite()
	c.closing.With(func(cl *closingState) { cl.ensureRare().notifier = n })
}

// Wrap replaces the connection's stream with the one that wrap returns, such as a TLS session for STARTTLS. While
// wrap runs, the server sends nothing to the client; afterwards its notices use the new stream. Write the plain-text
// answer to STARTTLS inside wrap, because a notice could follow an answer that is written earlier. Call Wrap on the
// goroutine that reads, before any byte of the new stream has been read. If wrap returns an error, the old stream
// stays in place but the server sends no more notices; the handler should return. Only ctx bounds Wrap, not
// Timeouts.Handshake. The connection's addresses do not change.
func (c *Conn) Wrap(ctx context.Context, wrap WrapConn) error {
	c.writeLock.Lock()
	defer c.unlockWrite()
	err := c.replaceStream(ctx, wrap)
	if err != nil {
		c.closing.With(func(cl *closingState) { cl.ensureRare().notifier = silentNotifier{} })
	}
	return err
}

// replaceStream replaces the stream with the one that wrap returns. The client's address does not change.
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

// setStream replaces the stream before the connection is admitted. The client's address becomes that of the new stream.
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
			cl.ensureRare().remote = remote
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

// RemoteAddr returns the address given to WithRemoteAddr.
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
		r := cl.ensureRare()
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

// ensureRare returns cl.rare, and allocates it if necessary.
func (cl *closingState) ensureRare() *rareState {
	if cl.rare == nil {
		cl.rare = new(rareState)
	}
	return cl.rare
}

// Read reads what the client sent. Once the server ends the connection, Read fails with the cause. See MarkIdle for
// ErrDraining.
func (c *Conn) Read(p []byte) (n int, err error) {
	if c.idle.Load() != idleUnmarked {
		if err = c.finishHandshake(); err == nil {
			if err := c.idleReadError(); err != nil {
				return 0, err
			}
		}
	}
	if c.flags.has(flagFrozen) {
		return 0, ErrConnClosed
	}
	if err == nil {
		n, err = c.nc.Read(p)
	}
	var interrupted error
	if n > 0 || err != nil {
		if c.idle.Load() != idleUnmarked {
			interrupted = c.endIdle(n > 0)
		}
	}
	if n > 0 {
		c.bytesIn.Add(uint64(n))
		c.markActive()
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
		err = c.ioError(err)
	}
	return n, err
}

// ioError returns the error that a failed read or write reports. If the server ended the connection, that is the cause
// of the end. Otherwise it is err, and ioError records that the connection was reset or lost.
func (c *Conn) ioError(err error) error {
	if cause := c.cause(); cause != nil {
		return cause
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, net.ErrClosed) {
		c.flags.set(flagIOFailed)
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
			cl.ensureRare().readDeadline = t
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
			cl.ensureRare().writeDeadline = t
			c.flags.set(flagHasWriteDeadline)
		}
		if cl.cause == nil && c.flags.has(flagHandlerWrites) {
			err = c.nc.SetWriteDeadline(t)
		}
	})
	return err
}

func (c *Conn) markActive() { c.lastActive.Store(c.srv.clock()) }

// clock returns the nanoseconds since New. It is never zero. A change of the wall clock does not affect it; with the
// wall clock, such a change could make every connection look idle.
func (s *Server) clock() int64 { return int64(time.Since(s.started)) + 1 }

// timeAt is the inverse of clock.
func (s *Server) timeAt(clock int64) time.Time { return s.started.Add(time.Duration(clock - 1)) }

// startTask counts a goroutine that works for an open connection. It calls endTask last, and the drain waits for it.
func (s *Server) startTask() { s.state.With(func(st *state) { st.tasks++ }) }
func (s *Server) endTask()   { s.state.With(func(st *state) { st.tasks-- }) }

// closeReason returns why the connection ends; 0 while it is open.
func (c *Conn) closeReason() (why Reason) {
	c.closing.With(func(cl *closingState) { why = cl.reason })
	return why
}

// cause returns the error of reads; nil while reads are possible.
func (c *Conn) cause() (cause error) {
	c.closing.With(func(cl *closingState) { cause = cl.cause })
	return cause
}

// end ends the connection for the given reason, and reports whether it was the first to do so. It cancels the handler's
// context and makes reads fail at once. Writes have flushTimeout left. It does nothing once a handover has frozen the
// connection.
func (c *Conn) end(why Reason, cause error) (first bool) {
	var pending bool
	c.closing.With(func(cl *closingState) {
		if first = cl.reason == 0 && !c.flags.has(flagFrozen); first {
			cl.reason = why
			c.cancelIO(cl, cause)
			pending = c.clearSafePointPending()
		}
	})
	if pending {
		c.srv.countSafePoint(c)
	}
	return first
}

// cancelIO makes reads fail with cause at once, and writes after flushTimeout. The caller holds the lock of c.closing.
// It cancels the context first, so that a goroutine woken by the deadline finds the cause.
func (c *Conn) cancelIO(cl *closingState, cause error) {
	if cl.cause == nil {
		cl.cause = cause
	}
	if cl.ctx != nil {
		cl.ctx.cancel(cause)
	}
	_ = c.nc.SetReadDeadline(aLongTimeAgo)
	_ = c.nc.SetWriteDeadline(time.Now().Add(flushTimeout))
}

// addrOf returns the IP address in a, or the zero Addr if it has none.
func addrOf(a net.Addr) netip.Addr {
	if tcp, ok := a.(*net.TCPAddr); ok {
		return tcp.AddrPort().Addr().Unmap()
	}
	ap, _ := netip.ParseAddrPort(a.String())
	return ap.Addr().Unmap()
}
