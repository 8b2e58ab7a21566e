package server

import (
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
)

// maxReads is how many reads in a row WriteTo makes before it checks the read deadline, with which the server
// interrupts a connection. The socket of a flooding client is always readable, so the poller itself would never check
// it.
const maxReads = 16

// WriteTo implements io.WriterTo, which io.Copy uses: it writes to w what the client sends, until the client ends its
// stream. It holds no buffer while the client is silent, and uses larger buffers for a client that sends more. If w
// is c itself, an echo, each message costs one system call to read it, one to write it, and no allocation.
//
// WriteTo reads, so only one goroutine may use it at a time. Deadlines and the end of the connection act as in Read
// and Write, except that a write deadline counts only for a write that has to wait for the client.
func (c *Conn) WriteTo(w io.Writer) (written int64, err error) {
	cp := &copier{src: c, dst: w, echo: w == io.Writer(c)}
	return cp.copy()
}

// A copier is one call of WriteTo.
type copier struct {
	src   *Conn
	dst   io.Writer
	buf   *buffer // nil while the client is silent
	size  bufferSize
	small bool // a smaller buffer would have sufficed for the last read
	echo  bool // dst is src
	// resumable means that a handover may interrupt the copier anywhere. It then returns ErrHandover, and rest is what
	// was read and not written.
	resumable bool

	visited  bool
	reportsQ bool // what reportQueue returned

	// The work that a visit to the descriptor has left.
	locked  bool // src.writeLock is held, because a part of the read before rest was written
	eof     bool
	read    int    // size of the last read
	rest    []byte // of that, what is not written yet
	err     error
	written int64
}

// copy uses the fastest method that the stream allows.
func (cp *copier) copy() (int64, error) {
	nc := cp.src.nc
	if raw := rawConn(nc); raw != nil {
		return cp.run(raw)
	}
	if session, transport := tlsSession(nc); transport != nil {
		return cp.session(session, transport)
	}
	return cp.plain()
}

// run does what may block, between visits to the descriptor.
func (cp *copier) run(raw syscall.RawConn) (int64, error) {
	defer cp.finish()
	c := cp.src
	visit := cp.visit // bound once, because each binding allocates
	for {
		if c.idle.Load() != idleNo {
			if err := c.refuseIdleRead(); err != nil {
				return cp.written, err
			}
		}
		err := raw.Read(visit)
		if cp.resumable && !c.takeTurn() {
			return cp.written, ErrHandover
		}
		if len(cp.rest) > 0 {
			if werr := cp.writeRest(); werr != nil {
				return cp.written, werr
			}
		}
		switch {
		case cp.eof:
			c.flags.set(flagSawEOF)
			return cp.written, nil
		case cp.err != nil:
			return cp.written, c.explain(c.readError(cp.err))
		case err != nil:
			if c.idle.Load() != idleNo {
				if interrupted := c.endIdle(false); interrupted != nil && c.cause() == nil {
					return cp.written, interrupted
				}
			}
			if cp.wasInterrupted(err) {
				if c.flags.has(flagHandingOver) {
					return cp.written, ErrHandover
				}
				continue // the handover was given up in this instant
			}
			return cp.written, c.explain(asRead(err))
		}
	}
}

// asRead names the operation as net.Conn.Read does; package net calls it raw-read.
func asRead(err error) error {
	if oe, ok := errors.AsType[*net.OpError](err); ok {
		oe.Op = "read"
	}
	return err
}

// readError wraps the error of read(2) as package net does.
func (c *Conn) readError(err error) error {
	return &net.OpError{
		Op: "read", Net: c.RemoteAddr().Network(), Source: c.LocalAddr(), Addr: c.RemoteAddr(),
		Err: os.NewSyscallError("read", err),
	}
}

// visit is called with src's descriptor each time it may be readable. It never blocks, because closing a connection
// waits for it. Returning false parks the goroutine until the poller reports new input. The poller is edge-triggered
// and does not report earlier input again, not even a FIN. So visit returns false only when the kernel reports that
// nothing is left.
func (cp *copier) visit(fd uintptr) (done bool) {
	c := cp.src
	if cp.resumable && !c.takeTurn() {
		return true
	}
	if !cp.visited {
		cp.visited, cp.reportsQ = true, reportQueue(fd)
	}
	for range maxReads {
		if cp.buf == nil {
			cp.buf = takeBuffer(cp.size)
		}
		n, left, err := readFD(fd, cp.buf, cp.reportsQ)
		switch {
		case wouldBlock(err):
			cp.idle()
			return false
		case err != nil:
			cp.err = err
			return true
		case n == 0:
			cp.eof = true
			return true
		}
		if c.idle.Load() != idleNo {
			c.endIdle(true)
		}
		c.bytesIn.Add(uint64(n))
		c.touch()
		cp.read, cp.rest = n, cp.buf.bytes[:n:n]
		if !cp.echo || !cp.writeNow(fd) {
			return true
		}
		cp.adapt()
		if left == 0 {
			cp.idle()
			return false
		}
	}
	return true
}

// idle gives up what the copier has while the client is silent.
func (cp *copier) idle() {
	cp.release()
	if cp.resumable {
		cp.src.turn.Store(turnFree)
	}
}

// Values of Conn.turn. While it is free, an echo has read and written everything and waits for the client. A handover
// then takes the turn, so that it need not wake the echo, which takes time when there are thousands.
const (
	turnTaken  int32 = iota // by the handler
	turnFree                // an echo waits for the client
	turnFrozen              // by a handover: the echo must not touch the socket
)

// takeTurn takes the turn for the handler, and reports whether it has it.
func (c *Conn) takeTurn() bool {
	return c.turn.Load() == turnTaken || c.turn.CompareAndSwap(turnFree, turnTaken)
}

// writeNow writes rest without waiting, and reports whether that was all. It leaves the remainder, and any error, to
// writeRest. If it wrote a part, it keeps the write lock, so that no notice lands in between.
func (cp *copier) writeNow(fd uintptr) bool {
	c := cp.src
	if !c.writeLock.TryLock() {
		return false
	}
	if c.flags.has(flagClosed) || c.writeError() != nil {
		c.writeLock.Unlock()
		return false
	}
	n, _ := writeFD(fd, cp.rest)
	if n > 0 {
		c.bytesOut.Add(uint64(n))
		c.lastByte = cp.rest[n-1]
		cp.written += int64(n)
		cp.rest = cp.rest[n:]
	}
	if n > 0 && len(cp.rest) > 0 {
		cp.locked = true
		return false
	}
	c.unlockWrite()
	return len(cp.rest) == 0
}

// writeRest writes rest, and waits for its reader.
func (cp *copier) writeRest() (err error) {
	var n int
	switch {
	case cp.resumable:
		if n, err = cp.writeResumable(); errors.Is(err, ErrHandover) {
			cp.written += int64(n)
			cp.rest = cp.rest[n:]
			return err
		}
	case cp.locked:
		n, err = cp.src.writeForHandler(cp.rest)
		cp.src.writeBroken = cp.src.writeBroken || err != nil
		cp.locked = false
		cp.src.unlockWrite()
	default:
		n, err = cp.dst.Write(cp.rest)
		if n < 0 || n > len(cp.rest) {
			n, err = 0, errInvalidWrite
		}
	}
	cp.written += int64(n)
	if err == nil && n < len(cp.rest) {
		err = io.ErrShortWrite
	}
	cp.rest = nil
	if cp.buf != nil {
		cp.adapt()
	}
	return err
}

// writeResumable writes rest to src. A handover that interrupts it does not break the stream: the successor writes
// the rest.
func (cp *copier) writeResumable() (int, error) {
	c := cp.src
	if !cp.locked && !c.writeLock.TryLock() && !c.writeLock.LockUnless(c.HandingOver()) {
		return 0, ErrHandover
	}
	halfway := cp.locked
	cp.locked = false
	defer c.unlockWrite()
	if err := c.writeError(); err != nil {
		return 0, err
	}
	var written int
	for {
		n, err := c.writeForHandler(cp.rest[written:])
		written += n
		switch {
		case err == nil || written == len(cp.rest):
			return written, err
		case !cp.wasInterrupted(err):
			c.writeBroken = c.writeBroken || halfway || written > 0
			return written, err
		case c.flags.has(flagHandingOver):
			return written, ErrHandover
		}
	}
}

// wasInterrupted reports whether err is that of a handover's interrupt: an echo sets no deadlines of its own.
func (cp *copier) wasInterrupted(err error) bool {
	return cp.resumable && errors.Is(err, os.ErrDeadlineExceeded) && cp.src.cause() == nil
}

var errInvalidWrite = errors.New("the writer returned a count outside of what it was given")

// adapt chooses the size of the next buffer by the size of the last read.
func (cp *copier) adapt() {
	var next bufferSize
	next, cp.small = cp.buf.size.after(cp.read, cp.small)
	if next != cp.buf.size {
		cp.release()
		cp.size = next
	}
}

// finish gives the buffer back, and keeps a copy of what is not written.
func (cp *copier) finish() {
	cp.rest = slices.Clone(cp.rest)
	cp.release()
}

func (cp *copier) release() {
	if cp.buf != nil {
		cp.buf.giveBack()
		cp.buf = nil
	}
}

// plain is run for a connection whose descriptor cannot be read directly, such as a TLS session of the handler's own.
func (cp *copier) plain() (int64, error) {
	cp.buf = takeBuffer(smallBuffer)
	defer cp.finish()
	for {
		n, err := cp.src.Read(cp.buf.bytes)
		cp.read, cp.rest = n, cp.buf.bytes[:n:n]
		if n > 0 {
			if werr := cp.writeRest(); werr != nil {
				return cp.written, werr
			}
			if cp.buf == nil {
				cp.buf = takeBuffer(smallBuffer)
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return cp.written, nil
		case err != nil && cp.wasInterrupted(err):
			if cp.src.flags.has(flagHandingOver) {
				return cp.written, ErrHandover
			}
		case err != nil:
			return cp.written, err
		}
	}
}

// echo sends back what the client sends, after pending, which another process had read.
func (c *Conn) echo(pending []byte) error {
	cp := &copier{src: c, dst: c, echo: true, resumable: true, rest: pending}
	c.flags.set(flagEchoing)
	if c.flags.has(flagHandingOver) || !c.takeTurn() { // it began before echoing was set, and has interrupted nothing
		return Handover(pending)
	}
	var err error
	if len(pending) > 0 {
		err = cp.writeRest()
	}
	if err == nil {
		_, err = cp.copy()
	}
	if errors.Is(err, ErrHandover) {
		return Handover(cp.rest)
	}
	return err
}

// bufferSize is one of the sizes of the buffers that WriteTo reads into.
type bufferSize int8

// The sizes. Half a megabyte moves bulk data with as little CPU time as splice(2) does (docs/benchmarks.md).
const (
	smallBuffer bufferSize = iota
	mediumBuffer
	largeBuffer
)

var buffers = [...]struct {
	bytes int
	most  int32 // how many may be in use: a client that stalls keeps the one that is being written to it
	inUse atomic.Int32
	pool  sync.Pool
}{
	smallBuffer:  {bytes: 4 << 10},
	mediumBuffer: {bytes: 64 << 10, most: 512},
	largeBuffer:  {bytes: 512 << 10, most: 64},
}

// after returns the size to use after a read of n bytes into a buffer of size s: a larger one if the read filled it, a
// smaller one if that would have sufficed twice in a row. It reports whether it would have.
func (s bufferSize) after(n int, smallBefore bool) (next bufferSize, small bool) {
	small = s > smallBuffer && n < buffers[s-1].bytes
	switch {
	case s < largeBuffer && n == buffers[s].bytes:
		return s + 1, false
	case small && smallBefore:
		return s - 1, false
	default:
		return s, small
	}
}

// A buffer is used by one reader at a time.
type buffer struct {
	bytes    []byte
	size     bufferSize
	receiver receiver
}

// takeBuffer returns a buffer of size s, or of the next smaller size of which not too many are in use.
func takeBuffer(s bufferSize) *buffer {
	for ; s > smallBuffer; s-- {
		if buffers[s].inUse.Add(1) <= buffers[s].most {
			break
		}
		buffers[s].inUse.Add(-1)
	}
	if b, ok := buffers[s].pool.Get().(*buffer); ok {
		return b
	}
	return &buffer{bytes: make([]byte, buffers[s].bytes), size: s}
}

func (b *buffer) giveBack() {
	if b.size > smallBuffer {
		buffers[b.size].inUse.Add(-1)
	}
	buffers[b.size].pool.Put(b)
}
