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
// interrupts a connection. The socket of a flooding client is always readable, so the poller would never check the
// deadline.
const maxReads = 16

// WriteTo implements io.WriterTo, which io.Copy uses. It copies what the client sends to w, until the client ends its
// stream. It holds no buffer while the client is silent, and uses larger buffers for a client that sends more. If w
// is c itself, as in an echo, each message costs two system calls and no allocation.
//
// WriteTo reads, so only one goroutine may use it at a time. Deadlines and the end of the connection act as in Read and
// Write. But a write deadline does not apply to a write that need not wait for the client.
func (c *Conn) WriteTo(w io.Writer) (written int64, err error) {
	cp := &copier{src: c, dst: w, echo: w == io.Writer(c)}
	return cp.copy()
}

// A copier is one call of WriteTo.
type copier struct {
	src   *Conn
	dst   io.Writer
	buf   *buffer // holds the bytes of the last read; nil while the client is silent
	size  bufferSize
	small bool // the last read would have fit into a smaller buffer
	echo  bool // dst is src
	// resumable means that a handover may interrupt the copier anywhere. The copier then returns ErrHandover, and the
	// method unwritten returns the bytes that were read and not written.
	resumable bool

	started      bool // onReadable was called
	reportsQueue bool // the result of reportQueue

	// Results of onReadable.
	holdsWriteLock bool // src.writeLock is held, because only a part of the read was written
	eof            bool
	written        int64
}

// copy uses the fastest method that the stream allows.
func (cp *copier) copy() (int64, error) {
	nc := cp.src.nc
	if raw := rawConn(nc); raw != nil {
		return cp.copyRaw(raw)
	}
	if session, transport := tlsSession(nc); transport != nil {
		return cp.copyTLS(session, transport)
	}
	return cp.copyBuffered()
}

// copyRaw copies from a socket. It calls onReadable when the socket is readable, and does here what may block.
func (cp *copier) copyRaw(raw syscall.RawConn) (int64, error) {
	defer cp.finish()
	c := cp.src
	onReadable := cp.onReadable // bound once, because each binding allocates
	for {
		if c.idle.Load() != idleUnmarked {
			if err := c.idleReadError(); err != nil {
				return cp.written, err
			}
		}
		err := raw.Read(onReadable)
		if cp.resumable && !c.takeEchoToken() {
			return cp.written, ErrHandover
		}
		if len(cp.unwritten()) > 0 {
			if werr := cp.writeUnwritten(); werr != nil {
				return cp.written, werr
			}
		}
		switch {
		case cp.eof:
			c.flags.set(flagSawEOF)
			return cp.written, nil
		case cp.buf != nil && cp.buf.err != nil:
			return cp.written, c.ioError(c.readError(cp.buf.err))
		case err != nil:
			if c.idle.Load() != idleUnmarked {
				if interrupted := c.endIdle(false); interrupted != nil && c.cause() == nil {
					return cp.written, interrupted
				}
			}
			if cp.wasInterrupted(err) {
				if c.flags.has(flagHandingOver) {
					return cp.written, ErrHandover
				}
				continue // the handover was rolled back meanwhile
			}
			return cp.written, c.ioError(asReadError(err))
		}
	}
}

// asReadError changes the operation in an error of RawConn.Read from raw-read to read, as in errors of net.Conn.Read.
func asReadError(err error) error {
	if oe, ok := errors.AsType[*net.OpError](err); ok {
		oe.Op = "read"
	}
	return err
}

// readError wraps an error of read(2) as package net does.
func (c *Conn) readError(err error) error {
	return &net.OpError{
		Op: "read", Net: c.RemoteAddr().Network(), Source: c.LocalAddr(), Addr: c.RemoteAddr(),
		Err: os.NewSyscallError("read", err),
	}
}

// onReadable is called with src's descriptor when it may be readable. It never blocks, because closing a connection
// waits for it. If it returns false, the goroutine waits until the poller reports new input. The poller is
// edge-triggered and does not report earlier input again, not even a FIN. So onReadable returns false only when the
// kernel reports that nothing is left.
func (cp *copier) onReadable(fd uintptr) (done bool) {
	c := cp.src
	if cp.resumable && !c.takeEchoToken() {
		return true
	}
	if !cp.started {
		cp.started, cp.reportsQueue = true, reportQueue(fd)
	}
	for range maxReads {
		if cp.buf == nil {
			cp.buf = getBuffer(cp.size)
		}
		n, left, err := readFD(fd, cp.buf, cp.reportsQueue)
		switch {
		case wouldBlock(err):
			cp.goIdle()
			return false
		case err != nil:
			cp.buf.err = err
			return true
		case n == 0:
			cp.eof = true
			return true
		}
		if c.idle.Load() != idleUnmarked {
			c.endIdle(true)
		}
		c.bytesIn.Add(uint64(n))
		c.markActive()
		cp.buf.setRead(n)
		if !cp.echo || !cp.writeNow(fd) {
			return true
		}
		cp.resizeBuffer()
		if left == 0 {
			cp.goIdle()
			return false
		}
	}
	return true
}

// goIdle releases the buffer and the token while the client is silent.
func (cp *copier) goIdle() {
	cp.releaseBuffer()
	if cp.resumable {
		cp.src.echoToken.Store(tokenFree)
	}
}

// Values of Conn.echoToken. It is free while an echo has written everything that it has read, and waits for the
// client. A handover then takes the token instead of waking the echo, because waking thousands of goroutines takes
// time.
const (
	tokenHandler  int32 = iota // the handler has the token
	tokenFree                  // an echo waits for the client
	tokenHandover              // a handover has the token: the echo must not use the socket
)

// takeEchoToken takes the token for the handler. It reports false if a handover has it.
func (c *Conn) takeEchoToken() bool {
	return c.echoToken.Load() == tokenHandler || c.echoToken.CompareAndSwap(tokenFree, tokenHandler)
}

// writeNow writes without waiting, and reports whether it wrote everything. It leaves the rest, and any error, to
// writeUnwritten. If it wrote a part, it keeps the write lock, so that no notice is written in between.
func (cp *copier) writeNow(fd uintptr) bool {
	c := cp.src
	if !c.writeLock.TryLock() {
		return false
	}
	if c.flags.has(flagClosed) || c.writeError() != nil {
		c.writeLock.Unlock()
		return false
	}
	rest := cp.buf.unwritten
	n, _ := writeFD(fd, rest)
	if n > 0 {
		c.addWritten(rest[:n], n)
		cp.written += int64(n)
		rest = rest[n:]
		cp.buf.unwritten = rest
	}
	if n > 0 && len(rest) > 0 {
		cp.holdsWriteLock = true
		return false
	}
	c.unlockWrite()
	return len(rest) == 0
}

// writeUnwritten writes the rest, and waits for dst.
func (cp *copier) writeUnwritten() (err error) {
	var n int
	switch {
	case cp.resumable:
		if n, err = cp.writeResumable(); errors.Is(err, ErrHandover) {
			cp.written += int64(n)
			cp.buf.unwritten = cp.buf.unwritten[n:]
			return err
		}
	case cp.holdsWriteLock:
		n, err = cp.src.writeForHandler(cp.buf.unwritten)
		cp.src.writeBroken = cp.src.writeBroken || err != nil
		cp.holdsWriteLock = false
		cp.src.unlockWrite()
	default:
		n, err = cp.dst.Write(cp.buf.unwritten)
		if n < 0 || n > len(cp.buf.unwritten) {
			n, err = 0, errInvalidWrite
		}
	}
	cp.written += int64(n)
	if err == nil && n < len(cp.buf.unwritten) {
		err = io.ErrShortWrite
	}
	cp.buf.unwritten = nil
	cp.resizeBuffer()
	return err
}

// writeResumable writes the rest to src. If a handover interrupts it, the stream is not broken, because the successor
// writes what is left.
func (cp *copier) writeResumable() (int, error) {
	c := cp.src
	if !cp.holdsWriteLock && !c.writeLock.TryLock() && !c.writeLock.LockOrCancel(c.HandingOver()) {
		return 0, ErrHandover
	}
	halfway := cp.holdsWriteLock
	cp.holdsWriteLock = false
	defer c.unlockWrite()
	if err := c.writeError(); err != nil {
		return 0, err
	}
	rest := cp.buf.unwritten
	var written int
	for {
		n, err := c.writeForHandler(rest[written:])
		written += n
		switch {
		case err == nil || written == len(rest):
			return written, err
		case !cp.wasInterrupted(err):
			c.writeBroken = c.writeBroken || halfway || written > 0
			return written, err
		case c.flags.has(flagHandingOver):
			return written, ErrHandover
		}
	}
}

// wasInterrupted reports whether a handover caused err. An echo itself sets no deadlines.
func (cp *copier) wasInterrupted(err error) bool {
	return cp.resumable && errors.Is(err, os.ErrDeadlineExceeded) && cp.src.cause() == nil
}

var errInvalidWrite = errors.New("the writer returned an invalid count")

// resizeBuffer chooses the size of the next buffer from the size of the last read.
func (cp *copier) resizeBuffer() {
	if cp.buf.size == unpooled {
		cp.releaseBuffer()
		return
	}
	var next bufferSize
	next, cp.small = cp.buf.size.next(cp.buf.lastRead, cp.small)
	if next != cp.buf.size {
		cp.releaseBuffer()
		cp.size = next
	}
}

// unwritten returns the bytes of the last read that were not written yet.
func (cp *copier) unwritten() []byte {
	if cp.buf == nil {
		return nil
	}
	return cp.buf.unwritten
}

// finish releases the buffer, and keeps a copy of the unwritten bytes.
func (cp *copier) finish() {
	rest := slices.Clone(cp.unwritten())
	cp.releaseBuffer()
	if len(rest) > 0 {
		cp.buf = unpooledBuffer(rest)
	}
}

func (cp *copier) releaseBuffer() {
	if cp.buf != nil {
		cp.buf.put()
		cp.buf = nil
	}
}

// copyBuffered copies from a stream that is not a socket, such as a TLS session that a handler has made.
func (cp *copier) copyBuffered() (int64, error) {
	cp.buf = getBuffer(smallBuffer)
	defer cp.finish()
	for {
		n, err := cp.src.Read(cp.buf.bytes)
		cp.buf.setRead(n)
		if n > 0 {
			if werr := cp.writeUnwritten(); werr != nil {
				return cp.written, werr
			}
			if cp.buf == nil {
				cp.buf = getBuffer(smallBuffer)
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

// echo writes pending, which another process has read, and then sends back what the client sends.
func (c *Conn) echo(pending []byte) error {
	cp := &copier{src: c, dst: c, echo: true, resumable: true}
	c.flags.set(flagEchoing)
	// A handover that began before flagEchoing was set has not interrupted the echo.
	if c.flags.has(flagHandingOver) || !c.takeEchoToken() {
		return Handover(pending)
	}
	var err error
	if len(pending) > 0 {
		cp.buf = unpooledBuffer(pending)
		err = cp.writeUnwritten()
	}
	if err == nil {
		_, err = cp.copy()
	}
	if errors.Is(err, ErrHandover) {
		return Handover(cp.unwritten())
	}
	return err
}

// bufferSize is one of the sizes of the buffers that WriteTo reads into.
type bufferSize int8

// The sizes. With half a megabyte, bulk data takes as little CPU time as with splice(2) (docs/benchmarks.md).
const (
	unpooled bufferSize = iota - 1 // a buffer of any size that is not from a pool
	smallBuffer
	mediumBuffer
	largeBuffer
)

var buffers = [...]struct {
	bytes int
	most  int32 // maximum number in use; a stalled client keeps the buffer that is being written to it
	inUse atomic.Int32
	pool  sync.Pool
}{
	smallBuffer:  {bytes: 4 << 10},
	mediumBuffer: {bytes: 64 << 10, most: 512},
	largeBuffer:  {bytes: 512 << 10, most: 64},
}

// next returns the size of the buffer for the next read, after a read of n bytes into a buffer of size s. It is
// larger if the read filled the buffer, and smaller if two reads in a row would have fit into a smaller one. small
// reports whether this read would have fit.
func (s bufferSize) next(n int, smallBefore bool) (next bufferSize, small bool) {
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
	recvArgs recvArgs

	lastRead  int    // size of the last read
	unwritten []byte // bytes of the last read that were not written yet
	err       error
}

// unpooledBuffer returns a buffer that holds pending as the bytes of the last read.
func unpooledBuffer(pending []byte) *buffer {
	b := &buffer{bytes: pending, size: unpooled}
	b.setRead(len(pending))
	return b
}

// setRead records that a read has filled the first n bytes.
func (b *buffer) setRead(n int) { b.lastRead, b.unwritten = n, b.bytes[:n:n] }

// getBuffer returns a buffer of size s. If too many of that size are in use, it returns a smaller one.
func getBuffer(s bufferSize) *buffer {
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

// put returns the buffer to its pool.
func (b *buffer) put() {
	if b.size == unpooled {
		return
	}
	b.unwritten, b.err = nil, nil
	if b.size > smallBuffer {
		buffers[b.size].inUse.Add(-1)
	}
	buffers[b.size].pool.Put(b)
}
