package client

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// streamConn is the place of one connection of a stream, and its successors.
type streamConn[K any] struct {
	*stream[K]
	retry retry
	seen  int64         // the stream's progress when retry began to count
	room  chan struct{} // holds something when due has become shorter

	mu      sync.Mutex  // guards what follows
	due     []*entry[K] // what is sent, or about to be, and has not come back; the oldest first
	sent    int64       // where the last of due ends
	echoed  int64       // how much has come back
	since   time.Time   // when the first of due became the first, or a part of it came back
	leaving bool        // nothing more is sent: it ends with the last of due
}

// run is the goroutine of a place: it makes connections while there is something to send.
func (c *streamConn[K]) run() {
	for e := c.take(nil); e != nil; e = c.take(nil) {
		err := c.serve(e)
		if c.opts.Reconnect == nil || malformed(err) {
			c.halt(err)
		}
		c.handBack(err)
		if c.intake.Err() == nil {
			c.backOff(err)
		}
	}
}

// take waits for an entry to send. It returns nil when there will be none, and once stop is closed.
func (c *streamConn[K]) take(stop <-chan struct{}) *entry[K] {
	if e, decided := c.takeNow(stop); decided {
		return e
	}
	select {
	case <-stop:
	case <-c.intake.Done():
	case e := <-c.again:
		return e
	case e := <-c.queue:
		return e
	}
	return nil
}

// takeNow is take where that needs not wait.
func (c *streamConn[K]) takeNow(stop <-chan struct{}) (e *entry[K], decided bool) {
	select {
	case <-stop:
		return nil, true
	case <-c.intake.Done():
		return nil, true
	default:
	}
	select {
	case e = <-c.again:
		return e, true
	case e = <-c.queue:
		return e, true
	default:
		return nil, false
	}
}

// serve makes a connection, sends first and what else there is over it until it ends,
// and returns why. It leaves in due what has not come back.
func (c *streamConn[K]) serve(first *entry[K]) error {
	c.sent, c.echoed, c.leaving = 0, 0, false
	told := make(chan struct{})
	stop := sync.OnceFunc(func() { close(told) })
	link, err := dialLink(c.intake, c.opts.Dial, c.address, func(n Notice) {
		if c.opts.OnNotice != nil {
			c.opts.OnNotice(n)
		}
		if n.Ends() {
			stop()
		}
	})
	if err != nil {
		c.due = []*entry[K]{first}
		return err
	}
	sending, cancel := context.WithCancelCause(c.ctx)
	var sender sync.WaitGroup
	sender.Go(func() { c.send(sending, link, first, told) })
	watch := c.watchStall(link)
	err = c.receive(link)
	stop()
	cancel(err)
	sender.Wait()
	watch.stop()
	_ = link.close(err)
	return fmt.Errorf("stream to %s: %w", c.address, err)
}

// send sends until the server announces the connection's end, or all is over.
func (c *streamConn[K]) send(ctx context.Context, link *link, e *entry[K], told <-chan struct{}) {
	var buf []byte
	for ; e != nil; e = c.takeWithRoom(told) {
		free := c.expect(e)
		data := e.Data
		if len(data) < chunkSize {
			buf = append(buf[:0], data...)
			for free > 0 && len(buf) < chunkSize {
				if e, _ = c.takeNow(told); e == nil {
					break
				}
				free = c.expect(e)
				buf = append(buf, e.Data...)
			}
			data = buf
		}
		if link.send(ctx, data) != nil {
			break // receive says why
		}
	}
	if c.ctx.Err() != nil {
		_ = link.close(context.Cause(c.ctx))
		return
	}
	_ = link.closeWrite() // which not all can
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leaving = true
	c.leave(link)
}

// takeWithRoom is take, once no more are due than this connection's share. A connection that does not answer must
// not take up what others could send.
func (c *streamConn[K]) takeWithRoom(told <-chan struct{}) *entry[K] {
	for c.free() <= 0 {
		select {
		case <-c.room:
		case <-told:
			return nil
		case <-c.intake.Done():
			return nil
		}
	}
	return c.take(told)
}

// free returns how many more may be due.
func (c *streamConn[K]) free() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.freeLocked()
}

func (c *streamConn[K]) freeLocked() int {
	share := max(c.opts.InFlight/c.opts.Conns, 1)
	return share - len(c.due)
}

// leave closes the connection when all that was to be sent has come back. Its caller holds mu.
func (c *streamConn[K]) leave(link *link) {
	if c.leaving && len(c.due) == 0 {
		_ = link.close(errLeft)
	}
}

// expect notes that an entry is about to be sent, and returns how many more may be due.
func (c *streamConn[K]) expect(e *entry[K]) (free int) {
	e.sent++
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.due) == 0 {
		c.since = time.Now()
	}
	c.sent += int64(len(e.Data))
	e.end = c.sent
	c.due = append(c.due, e)
	return c.freeLocked()
}

// receive completes what comes back, until the connection ends. It returns why that is.
func (c *streamConn[K]) receive(link *link) error {
	var done []*entry[K]
	for {
		n, err := link.advance(context.Background()) // send closes the link when all is over
		if err != nil {
			return err
		}
		done = c.confirm(link, n, done[:0])
		for _, e := range done {
			c.complete(e, nil)
		}
	}
}

// confirm appends to done what has come back with the next n bytes.
func (c *streamConn[K]) confirm(link *link, n int, done []*entry[K]) []*entry[K] {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.since = time.Now()
	c.echoed += int64(n)
	for len(c.due) > 0 && c.due[0].end <= c.echoed {
		done = append(done, c.due[0])
		c.due[0] = nil
		c.due = c.due[1:]
	}
	c.leave(link)
	if len(done) > 0 {
		select {
		case c.room <- struct{}{}:
		default:
		}
	}
	return done
}

// handBack gives away what has not come back over a connection that has ended for the reason err.
func (c *streamConn[K]) handBack(err error) {
	due := c.due
	c.due = nil
	if len(due) > 0 && c.sent > 0 {
		if err := c.blame(due[0], err); err != nil {
			c.complete(due[0], err)
			due = due[1:]
		}
	}
	for _, e := range due {
		if c.intake.Err() != nil {
			c.complete(e, c.unfinishedBy())
		} else {
			c.again <- e
		}
	}
}

// blame returns the error of an entry that was the next due when a connection ended for
// the reason err, or nil if it is to be sent again.
func (c *streamConn[K]) blame(e *entry[K], err error) error {
	if corruption, is := errors.AsType[*CorruptionError](err); is && len(corruption.Want) > 0 {
		return corruption // else it came unasked, before that
	}
	if _, told := errors.AsType[*NoticeError](err); told {
		return nil // the server has its own reasons to end it
	}
	if e.grows(c.progress.Load()) >= c.opts.Attempts {
		return fmt.Errorf("gave up after %d connections: %w", c.opts.Attempts, err)
	}
	return nil
}

// suspicion counts the connections that have ended with an item as the next that is due.
// It grows only while others come back: a server that is gone says nothing about an item.
type suspicion struct {
	connections int
	progress    int64 // of the stream, when the last of them ended
}

func (s *suspicion) grows(progress int64) int {
	if progress > s.progress {
		s.connections++
		s.progress = progress
	}
	return s.connections
}

// backOff waits before the next connection.
func (c *streamConn[K]) backOff(err error) {
	if c.opts.OnReconnect != nil {
		c.opts.OnReconnect(err)
	}
	if now := c.progress.Load(); now != c.seen {
		c.seen = now
		c.retry.hope()
	}
	if c.echoed > 0 {
		c.retry.reset()
	}
	c.retry.Backoff = *c.opts.Reconnect
	if err := c.retry.wait(c.intake, err); err != nil {
		c.halt(err) // for nothing where the wait has been ended by that
	}
}

// stallWatch closes a connection over which what is due does not come.
type stallWatch struct {
	mu    sync.Mutex
	timer *time.Timer // nil: stopped
}

func (c *streamConn[K]) watchStall(link *link) *stallWatch {
	w := &stallWatch{}
	if c.opts.StallTimeout < 0 {
		return w
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.timer = time.AfterFunc(c.opts.StallTimeout, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.timer == nil {
			return // stopped: what is due belongs to others
		}
		if left := c.patience(); left > 0 {
			w.timer.Reset(left)
		} else {
			_ = link.close(errStalled)
		}
	})
	return w
}

func (w *stallWatch) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.timer != nil {
		w.timer.Stop()
		w.timer = nil
	}
}

// patience is how long the next that is due may still take.
func (c *streamConn[K]) patience() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.due) == 0 {
		return c.opts.StallTimeout
	}
	return c.opts.StallTimeout - time.Since(c.since)
}
