package server

import (
	"sync/atomic"
	"time"
)

// A posting is text of the server's own for one client: a notice.
type posting struct {
	text []byte
	// settled is told, once, whether the kernel took the whole text.
	settled func(sent bool)
}

// outbox holds what was posted to a connection while another write was under way. Posting never
// blocks, however shut the client's window is: who finds the connection's write lock taken leaves the
// text here, and whoever lets go of the lock looks here again.
type outbox struct {
	waiting atomic.Int32
	queue   locked[outboxQueue]
}

type outboxQueue struct {
	items []*posting
	shut  bool
}

// outboxSize is how many texts may wait for one client that does not read.
const outboxSize = 16

// post sends p to the client as soon as no other write is under way. It does not block.
func (c *Conn) post(p *posting) {
	var full bool
	c.outbox.queue.With(func(q *outboxQueue) {
		if full = q.shut || len(q.items) >= outboxSize; !full {
			q.items = append(q.items, p)
			c.outbox.waiting.Add(1)
		}
	})
	if full {
		p.settled(false)
		return
	}
	c.deliver()
}

// unlockWrite lets go of the write lock, and sees to what was posted in the meantime.
func (c *Conn) unlockWrite() {
	c.writing.Unlock()
	c.deliver()
}

// deliver writes what is posted, unless somebody holds the write lock, who will. What the kernel
// does not take at once is left to a goroutine, which keeps the lock.
func (c *Conn) deliver() {
	for c.outbox.waiting.Load() > 0 && c.writing.TryLock() {
		for p := c.outbox.next(); p != nil; p = c.outbox.next() {
			text := c.ownLine(p.text)
			n, err := 0, error(nil)
			if c.torn {
				err = errTorn
			} else {
				n, err = c.tryWrite(text)
			}
			switch {
			case n == len(text):
				p.settled(true)
			case err != nil:
				c.torn = c.torn || n > 0
				p.settled(false)
			default:
				c.srv.startTask()
				go c.finishPosting(p, text[n:])
				return
			}
		}
		c.writing.Unlock()
	}
}

// finishPosting writes the rest of p, waiting for the client. It was handed the write lock.
func (c *Conn) finishPosting(p *posting, rest []byte) {
	defer c.srv.endTask()
	_, err := c.write(rest)
	if err != nil {
		c.torn = true
	}
	p.settled(err == nil)
	c.unlockWrite()
}

// flush writes what is posted, waiting for the client. It needs c.writing.
func (o *outbox) flush(c *Conn) {
	for p := o.next(); p != nil; p = o.next() {
		_, err := c.write(c.ownLine(p.text))
		p.settled(err == nil)
	}
}

// next takes the oldest posting; nil when there is none.
func (o *outbox) next() (p *posting) {
	o.queue.With(func(q *outboxQueue) {
		if len(q.items) > 0 {
			p, q.items = q.items[0], q.items[1:]
			o.waiting.Add(-1)
		}
	})
	return p
}

// shut fails what is still posted, and all that will be.
func (o *outbox) shut() {
	var left []*posting
	o.queue.With(func(q *outboxQueue) {
		left, q.items, q.shut = q.items, nil, true
		o.waiting.Store(0)
	})
	for _, p := range left {
		p.settled(false)
	}
}

// ownLine makes text that is a line stand on its own line. It needs c.writing.
func (c *Conn) ownLine(text []byte) []byte {
	isLine := len(text) > 0 && text[len(text)-1] == '\n'
	if isLine && c.bytesOut.Load() > 0 && c.lastByte != '\n' {
		return append([]byte{'\n'}, text...)
	}
	return text
}

// tryWrite writes as much of p as the kernel takes at once. It needs c.writing.
func (c *Conn) tryWrite(p []byte) (n int, err error) {
	raw := rawConn(c.nc) // not kept: what each connection would hold for it is more than making it costs
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

// blockedSince says since when a write to the client is under way.
func (c *Conn) blockedSince() (since time.Time, blocked bool) {
	ns := c.blocked.Load()
	return c.srv.at(ns), ns != 0
}
