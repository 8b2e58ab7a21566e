package server

import (
	"errors"
	"os"
	"time"
)

// A message is a notice for one client. It is rendered when it is written, because its bytes depend on the last byte
// sent before it.
type message struct {
	notice Notice
	done   func(messageResult) // called once
}

// messageResult is the outcome of a message.
type messageResult int

const (
	messageSent   messageResult = iota + 1 // the kernel took all of it
	messageFailed                          // it did not: the client has gone, or its queue is full
	messageSilent                          // the connection's Notifier says nothing
)

// maxMessages is how many messages may wait for one client that does not read.
const maxMessages = 16

// messageQueue holds the messages that were posted while another write was in progress.
type messageQueue struct {
	items  []*message
	closed bool
}

// closedMessages is the queue of each connection that is closed.
var closedMessages = &messageQueue{closed: true}

// post sends m as soon as no other write is in progress. It does not block, however full the client's window is: if
// the write lock is taken, the message stays in the queue, and the holder of the lock sends it when it unlocks.
func (c *Conn) post(m *message) {
	var refused bool
	c.messages.With(func(queue **messageQueue) {
		if *queue == nil {
			*queue = new(messageQueue)
		}
		q := *queue
		if refused = q.closed || len(q.items) >= maxMessages; !refused {
			q.items = append(q.items, m)
			c.posted.Add(1)
		}
	})
	if refused {
		m.done(c.unsent(m.notice))
		return
	}
	c.deliver()
}

// unlockWrite releases the write lock, and sends what was posted in the meantime.
func (c *Conn) unlockWrite() {
	c.writeLock.Unlock()
	if c.flags.has(flagHandingOver) {
		c.srv.wakeHandover() // it may wait for the lock
	}
	c.deliver()
}

// deliver sends the posted messages, unless another goroutine holds the write lock and will do so. What the kernel does
// not take at once is left to a goroutine, which keeps the lock.
func (c *Conn) deliver() {
	for c.posted.Load() > 0 && !c.flags.has(flagHandingOver) && c.writeLock.TryLock() {
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

// finishMessage sends the rest of m and waits for the client to take it. It was handed the write lock.
func (c *Conn) finishMessage(m *message, rest []byte) {
	defer c.srv.endTask()
	c.setFinishing(true)
	n, err := 0, error(nil)
	if !c.flags.has(flagHandingOver) {
		n, err = c.write(rest)
	} else {
		err = os.ErrDeadlineExceeded // the handover began before it knew of this write
	}
	for err != nil && errors.Is(err, os.ErrDeadlineExceeded) && c.flags.has(flagHandingOver) {
		var handedOver bool
		if rest, handedOver = c.stopNotice(rest[n:]); handedOver {
			c.writeLock.Unlock()
			m.done(messageSent)
			return
		}
		n, err = c.write(rest)
	}
	c.setFinishing(false)
	c.writeBroken = c.writeBroken || n < len(rest)
	if err != nil {
		m.done(messageFailed)
	} else {
		m.done(messageSent)
	}
	c.unlockWrite()
}

// setFinishing tells a handover that it may interrupt the write in progress.
func (c *Conn) setFinishing(yes bool) {
	c.closing.With(func(cl *closingState) { cl.extra().handover.finishing = yes })
}

// flushMessages sends the posted messages and waits for the client to take them. The caller holds the write lock.
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

// nextMessage takes the oldest message from the queue; nil when there is none.
func (c *Conn) nextMessage() (m *message) {
	c.messages.With(func(queue **messageQueue) {
		if q := *queue; q != nil && len(q.items) > 0 {
			m, q.items = q.items[0], q.items[1:]
			c.posted.Add(-1)
		}
	})
	return m
}

// closeMessages fails the messages that are still in the queue, and all later ones.
func (c *Conn) closeMessages() {
	var left []*message
	c.messages.With(func(queue **messageQueue) {
		if *queue != nil {
			left = (*queue).items
		}
		*queue = closedMessages
		c.posted.Store(0)
	})
	for _, m := range left {
		m.done(c.unsent(m.notice))
	}
}

// unsent returns the result of a notice that cannot be sent: it failed, unless the Notifier returns nil for it.
func (c *Conn) unsent(n Notice) messageResult {
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

// Write sends all of p; a notice goes before or after it. When the server ends the connection, writes have a second
// left and then fail with the cause. Write may be called concurrently.
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

// writeError returns why writes fail; nil if they do not. The caller holds the write lock.
func (c *Conn) writeError() error {
	switch {
	case c.flags.has(flagSent):
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
		case cl.cause != nil: // the deadline of the flush stays
		case handlerWrites:
			_ = c.nc.SetWriteDeadline(cl.rare.writeDeadline)
		default:
			_ = c.nc.SetWriteDeadline(time.Time{})
		}
	})
}

// writeChunk bounds the bytes of a single write, so that the counters show progress.
const writeChunk = 256 << 10

// write writes p and counts what was taken. The caller holds the write lock.
func (c *Conn) write(p []byte) (written int, err error) {
	c.blocked.Store(c.srv.clock())
	defer c.blocked.Store(0)
	for written < len(p) && err == nil {
		var n int
		n, err = c.nc.Write(p[written:min(len(p), written+writeChunk)])
		written += n
		c.wrote(p[:written], n)
	}
	if err != nil {
		// crypto/tls cannot go on after an error, however little was written.
		c.writeBroken = c.writeBroken || isTLS(c.nc)
		return written, c.explain(err)
	}
	return written, nil
}

// wrote counts the last n bytes of p as written. The caller holds the write lock.
func (c *Conn) wrote(p []byte, n int) {
	if n > 0 {
		c.bytesOut.Add(uint64(n))
		c.lastByte = p[len(p)-1]
		c.touch()
	}
}

// tryWrite writes as much of p as the kernel takes without waiting. It writes nothing if the stream has no descriptor
// to write to directly, as with TLS. The caller holds the write lock.
func (c *Conn) tryWrite(p []byte) (n int, err error) {
	raw := rawConn(c.nc) // not kept: storing it would cost each connection more than making it here
	if raw == nil {
		return 0, nil
	}
	n, err = writeNow(raw, p)
	if n > 0 {
		c.wrote(p[:n], n)
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
