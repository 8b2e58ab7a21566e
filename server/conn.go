package server

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// Conn is an accepted connection. It is a net.Conn, with these differences: each Write is whole, so
// that no notice ever lands inside of it; Close leaves flushing and lingering to the server; and once
// the server has decided to end the connection, deadlines cannot be moved any more.
//
// One goroutine may read while others write. A Conn must not be copied.
type Conn struct {
	// What each message touches comes first, in a cache line of its own, so that a crowd of clients costs few of them.
	srv      *Server // set once, by newConn
	bytesIn  atomic.Uint64
	bytesOut atomic.Uint64
	active   atomic.Int64 // when the last byte moved, by Server.clock
	writing  sync.Mutex   // held for each whole write; lastByte and torn belong to its holder
	lastByte byte
	torn     bool // a write ended halfway: nothing that follows could be understood
	outbox   outbox

	// Set once, by newConn, or by the ledger when it opens the connection (id).
	nc     net.Conn
	id     uint64
	opened time.Time

	client atomic.Pointer[net.TCPAddr] // what Options.Identify said; nil for nc's own

	// Guarded by the lock of Server.book.
	admitted, rejected bool
	told               bool // the drain's notice is under way or was sent

	phase    atomic.Int32
	sawEOF   atomic.Bool
	broken   atomic.Bool  // reset or lost: a read or write failed for no reason of ours
	notified atomic.Bool  // the drain's notice was taken by the kernel
	blocked  atomic.Int64 // since when a write is under way, by Server.clock; 0 when none is
	fate     locked[fate]

	// The sweeper's own.
	acked      uint64
	progressed int64 // when acked was last seen to grow, by Server.clock
}

// fate is how the connection ends, once that is decided.
type fate struct {
	reason Reason
	cause  error            // of the context's end: nil until reads are to fail
	ctx    *cancelledByFate // nil until the handler asks for its context
}

// Phase is what is being done with a connection.
type Phase int32

// The phases of an open connection.
const (
	Waiting   Phase = iota + 1 // accepted, and held at the gate
	Serving                    // its handler runs
	Rejecting                  // being told why it is not served
	Closing                    // flushed, half-closed, waiting for the client's end of stream
)

var phaseNames = [...]string{Waiting: "waiting", Serving: "serving", Rejecting: "rejecting", Closing: "closing"}

// String gives the phase's name as the control plane shows it.
func (p Phase) String() string {
	if p < Waiting || p > Closing {
		return fmt.Sprintf("Phase(%d)", int32(p))
	}
	return phaseNames[p]
}

func newConn(s *Server, nc net.Conn) *Conn {
	c := &Conn{srv: s, nc: nc, opened: time.Now()}
	c.setPhase(Waiting)
	c.touch()
	return c
}

// ip is the client's address; invalid where it has none.
func (c *Conn) ip() netip.Addr {
	a := c.RemoteAddr()
	if tcp, ok := a.(*net.TCPAddr); ok {
		return tcp.AddrPort().Addr().Unmap()
	}
	ap, _ := netip.ParseAddrPort(a.String())
	return ap.Addr().Unmap()
}

// ID is the connection's number, counted from 1 in the order of accepting.
func (c *Conn) ID() uint64 { return c.id }

// Draining returns a channel that is closed when a drain has begun, right after the clients were
// notified: the soft signal to come to an end. The hard one is the context.
func (c *Conn) Draining() <-chan struct{} { return c.srv.draining }

// BytesIn is how many bytes were read from the client.
func (c *Conn) BytesIn() uint64 { return c.bytesIn.Load() }

// BytesOut is how many bytes were written towards the client, notices included.
func (c *Conn) BytesOut() uint64 { return c.bytesOut.Load() }

// LocalAddr is the server's address on this connection.
func (c *Conn) LocalAddr() net.Addr { return c.nc.LocalAddr() }

// RemoteAddr is the client's address, as Options.Identify has it where that is set.
func (c *Conn) RemoteAddr() net.Addr {
	if client := c.client.Load(); client != nil {
		return client
	}
	return c.nc.RemoteAddr()
}

// Read reads what the client sent. Once the connection is to end, it fails with the cause.
func (c *Conn) Read(p []byte) (int, error) {
	n, err := c.nc.Read(p)
	if n > 0 {
		c.bytesIn.Add(uint64(n))
		c.touch()
	}
	switch {
	case err == nil:
	case errors.Is(err, io.EOF):
		c.sawEOF.Store(true)
	default:
		err = c.explain(err)
	}
	return n, err
}

// writeChunk bounds what is handed to the kernel at once, so that the counters show progress.
const writeChunk = 256 << 10

// Write sends p whole: a notice goes before or after it. Once the connection is to end, writes have
// a second left, and then fail with the cause.
func (c *Conn) Write(p []byte) (int, error) {
	c.writing.Lock()
	defer c.unlockWrite()
	return c.write(p)
}

// write needs c.writing.
func (c *Conn) write(p []byte) (written int, err error) {
	if c.torn {
		return 0, errTorn
	}
	c.blocked.Store(c.srv.clock())
	defer c.blocked.Store(0)
	for written < len(p) && err == nil {
		var n int
		n, err = c.nc.Write(p[written:min(len(p), written+writeChunk)])
		written += n
		c.wrote(p[:written], n)
	}
	if err != nil {
		c.torn = written > 0 || c.torn
		return written, c.explain(err)
	}
	return written, nil
}

var errTorn = errors.New("an earlier write to this connection was cut short")

// wrote accounts for the last n bytes of p; it needs c.writing.
func (c *Conn) wrote(p []byte, n int) {
	if n > 0 {
		c.bytesOut.Add(uint64(n))
		c.lastByte = p[len(p)-1]
		c.touch()
	}
}

// explain turns the error of a broken or ended connection into what is known of it.
func (c *Conn) explain(err error) error {
	switch {
	case c.cause() != nil:
		return c.cause()
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, net.ErrClosed):
	default:
		c.broken.Store(true)
	}
	return err
}

// CloseWrite ends the stream towards the client, who can go on sending. Nothing can be written
// after it, notices neither.
func (c *Conn) CloseWrite() error {
	c.writing.Lock()
	defer c.unlockWrite()
	c.torn = true
	if hc, ok := c.nc.(interface{ CloseWrite() error }); ok {
		return hc.CloseWrite()
	}
	return errors.ErrUnsupported
}

// Close lets the connection end: reads fail from now on, and when the handler has returned the server
// half-closes, lingers and closes. It never fails, and calling it is never needed. The close reason
// is still what the handler makes of it, so that a deferred Close hides nothing.
func (c *Conn) Close() error {
	c.fate.With(func(f *fate) {
		if f.reason == 0 {
			c.sever(f, ErrConnClosed)
		}
	})
	return nil
}

// SetDeadline sets both deadlines; see net.Conn.
func (c *Conn) SetDeadline(t time.Time) error { return c.deadline(t, c.nc.SetDeadline) }

// SetReadDeadline sets the deadline of reads; see net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.deadline(t, c.nc.SetReadDeadline) }

// SetWriteDeadline sets the deadline of writes; see net.Conn. A write that it cuts short is the last.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.deadline(t, c.nc.SetWriteDeadline) }

func (c *Conn) deadline(t time.Time, set func(time.Time) error) (err error) {
	c.fate.With(func(f *fate) {
		if f.cause == nil {
			err = set(t)
		}
	})
	return err
}

func (c *Conn) touch() { c.active.Store(c.srv.clock()) }

func (c *Conn) setPhase(p Phase) { c.phase.Store(int32(p)) }

// reason says how the connection ends; zero while that is not decided.
func (c *Conn) reason() (why Reason) {
	c.fate.With(func(f *fate) { why = f.reason })
	return why
}

// cause is why reads fail, and the context has ended; nil while they have not.
func (c *Conn) cause() (cause error) {
	c.fate.With(func(f *fate) { cause = f.cause })
	return cause
}

func (c *Conn) ended() bool { return c.reason() != 0 }

// end decides, unless that is done, how the connection ends. The handler's context is
// cancelled, reads fail at once, and what is to be written still has flushTimeout.
func (c *Conn) end(why Reason, cause error) (first bool) {
	c.fate.With(func(f *fate) {
		if first = f.reason == 0; first {
			f.reason = why
			c.sever(f, cause)
		}
	})
	return first
}

// sever lets reads fail with cause, and writes a while later. It is called under the lock of c.fate. The context
// goes first, so that whom the deadline wakes finds the cause.
func (c *Conn) sever(f *fate, cause error) {
	if f.cause == nil {
		f.cause = cause
	}
	if f.ctx != nil {
		f.ctx.cancel(cause)
	}
	_ = c.nc.SetReadDeadline(longAgo)
	_ = c.nc.SetWriteDeadline(time.Now().Add(flushTimeout))
}

// abort closes the connection under whoever uses it. It does not block: TLS would wait up to five
// seconds for a client that does not read to take its farewell, so what is below it is closed.
func (c *Conn) abort() {
	if layer, ok := c.nc.(interface{ NetConn() net.Conn }); ok {
		_ = layer.NetConn().Close()
		return
	}
	_ = c.nc.Close()
}
