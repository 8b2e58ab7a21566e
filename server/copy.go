package server

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
)

// copyBurst is how many reads in a row may go by without a look at the read deadline, which is how a
// connection is told to end: a client that floods is always readable, and would never be waited for.
const copyBurst = 16

// WriteTo implements io.WriterTo: it writes to w what the client sends, until the client ends its stream,
// which is no error. io.Copy uses it, so a handler gets it by io.Copy(w, c). While the client is
// silent no buffer is held, and buffers grow with what the client has to say. Where w is c itself, an
// echo, a message costs no allocation and no system call but reading and writing it.
//
// Like Read it is for one goroutine at a time. Deadlines and the end of the connection count as in
// Read and Write; a write deadline, only for a write that has to wait for the client.
func (c *Conn) WriteTo(w io.Writer) (written int64, err error) {
	cp := &copier{src: c, dst: w, echo: w == io.Writer(c)}
	if raw := rawConn(c.nc); raw != nil {
		return cp.run(raw)
	}
	return cp.plain()
}

// A copier is one WriteTo under way.
type copier struct {
	src  *Conn
	dst  io.Writer
	buf  *buffer // nil while the client is silent
	size bufferSize
	slim bool // a smaller buffer would have done for the last read
	echo bool // dst is src

	visited   bool
	announced bool // what announceLeft said

	// What a visit to the descriptor left to do.
	locked  bool // src.writing is held, since a part of what rest is the end of was written
	eof     bool
	read    int    // how much the last read brought
	rest    []byte // of that, what is not yet written
	err     error
	written int64
}

// run goes on between visits to the descriptor: it does what may have to wait for somebody.
func (cp *copier) run(raw syscall.RawConn) (int64, error) {
	defer cp.release()
	c := cp.src
	visit := cp.visit // bound once, or each call would allocate
	for {
		err := raw.Read(visit)
		if len(cp.rest) > 0 {
			if werr := cp.writeRest(); werr != nil {
				return cp.written, werr
			}
		}
		switch {
		case cp.eof:
			c.sawEOF.Store(true)
			return cp.written, nil
		case cp.err != nil:
			return cp.written, c.explain(c.readError(cp.err))
		case err != nil:
			return cp.written, c.explain(asRead(err))
		}
	}
}

// asRead calls by its name what package net calls a raw read.
func asRead(err error) error {
	if oe, ok := errors.AsType[*net.OpError](err); ok {
		oe.Op = "read"
	}
	return err
}

// readError wraps what read(2) said as package net does.
func (c *Conn) readError(err error) error {
	return &net.OpError{
		Op: "read", Net: c.RemoteAddr().Network(), Source: c.LocalAddr(), Addr: c.RemoteAddr(),
		Err: os.NewSyscallError("read", err),
	}
}

// visit is called with the descriptor of src, each time it may be readable. It never blocks, since
// closing a connection waits for it. False parks the goroutine until there is more to read, so it is
// returned only once the kernel has said that there is nothing: the poller is edge-triggered, and
// would keep silent about what, or that end of stream, which came before.
func (cp *copier) visit(fd uintptr) (done bool) {
	c := cp.src
	if !cp.visited {
		cp.visited, cp.announced = true, announceLeft(fd)
	}
	for range copyBurst {
		if cp.buf == nil {
			cp.buf = takeBuffer(cp.size)
		}
		n, left, err := readFD(fd, cp.buf, cp.announced)
		switch {
		case wouldBlock(err):
			cp.release()
			return false
		case err != nil:
			cp.err = err
			return true
		case n == 0:
			cp.eof = true
			return true
		}
		c.bytesIn.Add(uint64(n))
		c.touch()
		cp.read, cp.rest = n, cp.buf.bytes[:n:n]
		if !cp.echo || !cp.writeNow(fd) {
			return true
		}
		cp.adapt()
		if left == 0 {
			cp.release()
			return false
		}
	}
	return true
}

// writeNow writes rest without waiting, and reports whether that was all. What is left, and any error,
// is for writeRest; having written a part it keeps the lock for it, so that no notice gets in between.
func (cp *copier) writeNow(fd uintptr) bool {
	c := cp.src
	if !c.writing.TryLock() {
		return false
	}
	if c.torn {
		c.writing.Unlock()
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

// writeRest writes rest, waiting for whoever reads it.
func (cp *copier) writeRest() (err error) {
	var n int
	if cp.locked {
		n, err = cp.src.write(cp.rest)
		cp.src.torn = cp.src.torn || err != nil
		cp.locked = false
		cp.src.unlockWrite()
	} else {
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
	cp.adapt()
	return err
}

// adapt chooses the size of the next buffer by what the last read brought.
func (cp *copier) adapt() {
	var next bufferSize
	next, cp.slim = cp.buf.size.after(cp.read, cp.slim)
	if next != cp.buf.size {
		cp.release()
		cp.size = next
	}
}

var errInvalidWrite = errors.New("a writer says that it wrote more than it was given")

func (cp *copier) release() {
	if cp.buf != nil {
		cp.buf.giveBack()
		cp.buf = nil
	}
}

// plain is run for a connection without a descriptor to read from: TLS, and systems that have none.
func (cp *copier) plain() (int64, error) {
	cp.buf = takeBuffer(smallBuffer)
	defer cp.release()
	return io.CopyBuffer(struct{ io.Writer }{cp.dst}, struct{ io.Reader }{cp.src}, cp.buf.bytes)
}
