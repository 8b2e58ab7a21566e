package server

import (
	"errors"
	"os"
	"time"
)

// A message is a notice to one client. The Notifier renders it when it is written, because its bytes depend on the last
// byte written before it.
type message struct {
	notice Notice
	done   func(messageResult) // called once, with the result
}

// messageResult is the outcome of a message.
type messageResult int

const (
	messageSent   messageResult = iota + 1 // the kernel has accepted all of it
	messageFailed                          // the client has left, or too many messages wait for it
	messageSilent                          // the connection's Notifier returned nothing
)

// maxMessages bounds how many messages may wait for a client that does not read.
const maxMessages = 16

// queueMessage sends m as soon as no other write is in progress. It does not block, even if the client's window is
// full. If another goroutine holds the write lock, that goroutine sends m when it releases the lock.
func (c *Conn) queueMessage(m *message) {
	var refused bool
	c.closing.With(func(cl *closingState) {
		rare := cl.ensureRare()
		if refused = c.flags.has(flagMessagesClosed) || len(rare.messages) >= maxMessages; !refused {
			rare.messages = append(rare.messages, m)
			c.flags.set(flagMessagesQueued)
		}
	})
	if refused {
		m.done(c.undeliveredResult(m.notice))
		return
	}
	c.sendQueued()
}

// unlockWrite releases the write lock, and sends the messages that were queued in the meantime.
func (c *Conn) unlockWrite() {
	c.writeLock.Unlock()
	if c.flags.has(flagHandingOver) {
		c.srv.wakeHandover() // the handover may wait for the lock
	}
	c.sendQueued()
}

// sendQueued sends the queued messages, unless another goroutine holds the write lock, which then sends them. If the
// kernel does not accept a whole message at once, sendQueued starts finishMessage, which keeps the lock.
func (c *Conn) sendQueued() {
	for c.flags.has(flagMessagesQueued) && !c.flags.has(flagHandingOver) && c.writeLock.TryLock() {
		for m := c.nextMessage(); m != nil; m = c.nextMessage() {
			text := c.render(m)
			if len(text) == 0 {
				m.done(messageSilent)
				continue
			}
			n, err := 0, c.writeError()
			if err == nil {
				n, err = c.tryWrite(text)
			}
			switch {
			case n == len(text):
				m.done(messageSent)
			case err != nil:
				c.writeBroken = c.writeBroken || n > 0
				m.done(messageFailed)
			default:
				c.srv.startTask()
				go c.finishMessage(m, text[n:])
				return
			}
		}
		c.writeLock.Unlock()
	}
}

// finishMessage is the goroutine that sends the rest of m, and waits for the client to read it. The caller passes it
// the write lock.
func (c *Conn) finishMessage(m *message, rest []byte) {
	defer c.srv.endTask()
	c.setNoticeBlocked(true)
	n, err := 0, error(nil)
	if !c.flags.has(flagHandingOver) {
		n, err = c.write(rest)
	} else {
		err = os.ErrDeadlineExceeded // the handover began before setNoticeBlocked, and has not interrupted this write
	}
	for err != nil && errors.Is(err, os.ErrDeadlineExceeded) && c.flags.has(flagHandingOver) {
		var handedOver bool
		if rest, handedOver = c.suspendNotice(rest[n:]); handedOver {
			c.writeLock.Unlock()
			m.done(messageSent)
			return
		}
		n, err = c.write(rest)
	}
	c.setNoticeBlocked(false)
	c.writeBroken = c.writeBroken || n < len(rest)
	if err != nil {
		m.done(messageFailed)
	} else {
		m.done(messageSent)
	}
	c.unlockWrite()
}

// setNoticeBlocked records whether a handover may interrupt the write of a notice.
func (c *Conn) setNoticeBlocked(yes bool) {
	c.closing.With(func(cl *closingState) { cl.ensureRare().handover.noticeBlocked = yes })
}

// flushMessages sends the queued messages, and waits for the client to read them. The caller holds the write lock.
func (c *Conn) flushMessages() {
	for m := c.nextMessage(); m != nil; m = c.nextMessage() {
		text := c.render(m)
		err := c.writeError()
		if err == nil && len(text) > 0 {
			_, err = c.write(text)
		}
		switch {
		case len(text) == 0:
			m.done(messageSilent)
		case err != nil:
			m.done(messageFailed)
		default:
			m.done(messageSent)
		}
	}
}

// nextMessage removes the oldest message from the queue, and returns it; nil if there is none.
func (c *Conn) nextMessage() (m *message) {
	if !c.flags.has(flagMessagesQueued) {
		return nil
	}
	c.closing.With(func(cl *closingState) {
		rare := cl.ensureRare()
		if len(rare.messages) > 0 {
			m, rare.messages = rare.messages[0], rare.messages[1:]
		}
		if len(rare.messages) == 0 {
			rare.messages = nil
			c.flags.clear(flagMessagesQueued)
		}
	})
	return m
}

// closeMessages closes the queue. Messages in it and later ones are not sent.
func (c *Conn) closeMessages() {
	var left []*message
	c.closing.With(func(cl *closingState) {
		c.flags.set(flagMessagesClosed)
		c.flags.clear(flagMessagesQueued)
		if cl.rare != nil {
			left, cl.rare.messages = cl.rare.messages, nil
		}
	})
	for _, m := range left {
		m.done(c.undeliveredResult(m.notice))
	}
}

// undeliveredResult returns the result of a notice that cannot be sent: messageSilent if the Notifier returns nothing
// for it, and otherwise messageFailed.
func (c *Conn) undeliveredResult(n Notice) messageResult {
	if len(c.notifier().Notice(n)) == 0 {
		return messageSilent
	}
	return messageFailed
}

// render asks the connection's Notifier for the bytes of m. The caller holds the write lock.
func (c *Conn) render(m *message) []byte {
	n := m.notice
	n.MidLine = c.bytesOut.Load() > 0 && c.lastByte != '\n'
	return c.notifier().Notice(n)
}

// notifier returns the connection's Notifier.
func (c *Conn) notifier() (n Notifier) {
	n = c.srv.opts.Notifier
	c.closing.With(func(cl *closingState) {
		if cl.rare != nil && cl.rare.notifier != nil {
			n = cl.rare.notifier
		}
	})
	return n
}

// Write writes all of p. A notice is sent before or after it. When the server ends the connection, writes have one more
// second, and then fail with the cause. Write may be called concurrently.
func (c *Conn) Write(p []byte) (int, error) {
	c.writeLock.Lock()
	defer c.unlockWrite()
	if c.flags.has(flagClosed) {
		return 0, ErrConnClosed
	}
	if err := c.writeError(); err != nil {
		return 0, err
	}
	n, err := c.writeForHandler(p)
	if err != nil && n > 0 {
		c.writeBroken = true
	}
	return n, err
}

// writeError returns the error with which writes fail; nil if they are possible. The caller holds the write lock.
func (c *Conn) writeError() error {
	switch {
	case c.flags.has(flagFrozen):
		return ErrConnClosed
	case c.writeClosed:
		return ErrWriteClosed
	case c.writeBroken:
		return ErrWriteBroken
	default:
		return nil
	}
}

// writeForHandler writes under the handler's write deadline. The caller holds the write lock.
func (c *Conn) writeForHandler(p []byte) (int, error) {
	c.flags.set(flagHandlerWrites)
	if c.flags.has(flagHasWriteDeadline) {
		c.applyWriteDeadline(true)
	}
	n, err := c.write(p)
	c.flags.clear(flagHandlerWrites)
	if c.flags.has(flagHasWriteDeadline) {
		c.applyWriteDeadline(false)
	}
	return n, err
}

// applyWriteDeadline sets the handler's write deadline for a write of the handler, and none outside of one: an expired
// deadline must neither stop the server's own messages nor corrupt a TLS session, for which a write that timed out
// is fatal (crypto/tls, Conn.SetDeadline).
func (c *Conn) applyWriteDeadline(handlerWrites bool) {
	c.closing.With(func(cl *closingState) {
		switch {
		case cl.cause != nil: // the deadline of the flush applies
		case handlerWrites:
			_ = c.nc.SetWriteDeadline(cl.rare.writeDeadline)
		default:
			_ = c.nc.SetWriteDeadline(time.Time{})
		}
	})
}

// writeChunk is the maximum size of one write, in bytes, so that the counters show progress.
const writeChunk = 256 << 10

// write writes p, and counts the bytes written. The caller holds the write lock.
func (c *Conn) write(p []byte) (written int, err error) {
	c.writeStarted.Store(c.srv.clock())
	defer c.writeStarted.Store(0)
	for written < len(p) && err == nil {
		var n int
		n, err = c.nc.Write(p[written:min(len(p), written+writeChunk)])
		written += n
		c.countWritten(p[:written], n)
	}
	if err != nil {
		// crypto/tls cannot continue after any write error.
		c.writeBroken = c.writeBroken || isTLS(c.nc)
		return written, c.ioError(err)
	}
	return written, nil
}

// countWritten counts the last n bytes of p as written, and marks the connection as active. The caller holds the write
// lock.
func (c *Conn) countWritten(p []byte, n int) {
	if n > 0 {
		c.addWritten(p, n)
		c.markActive()
	}
}

// addWritten is like countWritten, but does not mark the connection as active. It is for an echo, whose read has just
// marked it. n is not 0.
func (c *Conn) addWritten(p []byte, n int) {
	c.bytesOut.Add(uint64(n))
	c.lastByte = p[len(p)-1]
	if !c.flags.has(flagMayWait) {
		c.flags.set(flagMayWait)
	}
}

// tryWrite writes as much of p as the kernel accepts without waiting. It writes nothing if the stream is not a
// socket, as with TLS. The caller holds the write lock.
func (c *Conn) tryWrite(p []byte) (n int, err error) {
	raw := rawConn(c.nc) // not stored in Conn: that would cost more memory than making it costs here
	if raw == nil {
		return 0, nil
	}
	n, err = writeNow(raw, p)
	if n > 0 {
		c.countWritten(p[:n], n)
	}
	if err != nil && !wouldBlock(err) {
		return n, err
	}
	return n, nil
}

// CloseWrite half-closes the connection: nothing more can be written, not even a notice, but the client can still
// send. The error is errors.ErrUnsupported if the connection cannot be half-closed; it then stays writable.
func (c *Conn) CloseWrite() error {
	c.writeLock.Lock()
	defer c.unlockWrite()
	if err := c.writeError(); err != nil {
		return err
	}
	half, ok := c.nc.(halfCloser)
	if !ok {
		return errUnsupported
	}
	c.writeClosed = true
	return half.CloseWrite()
}

type halfCloser interface{ CloseWrite() error }
