package client

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// A streamConn is one of the Conns connections of a stream, and the connections
// that replace it. Its run goroutine receives. While connected, a second goroutine
// sends.
type streamConn[K any] struct {
	*stream[K]
	retry     retry
	seen      int64         // stream.echoes at the last wait
	slotFreed chan struct{} // signals that outstanding has become shorter

	mu          sync.Mutex         // guards the fields below
	outstanding []*inFlightItem[K] // sent or about to be sent, and not come back; oldest first
	sent        int64              // offset of the end of the last entry sent
	echoed      int64              // offset up to which the echo has come back
	since       time.Time          // when the oldest entry became the oldest, or the last byte came back
	draining    bool               // nothing more is sent; close when outstanding is empty
}

// run makes connections while there is something to send.
func (c *streamConn[K]) run() {
	for e := c.take(nil); e != nil; e = c.take(nil) {
		err := c.serve(e)
		if c.opts.Reconnect == nil || isPermanent(err) {
			c.stopSending(err)
		} else {
			c.updateRetry(err)
		}
		c.returnOutstanding(err)
		if c.sendCtx.Err() == nil {
			c.backOff(err)
		}
	}
}

// take waits for an entry to send. It returns nil when stop is closed or nothing
// more will be sent.
func (c *streamConn[K]) take(stop <-chan struct{}) *inFlightItem[K] {
	if e, decided := c.tryTake(stop); decided {
		return e
	}
	select {
	case <-stop:
	case <-c.sendCtx.Done():
	case e := <-c.resend:
		return e
	case e := <-c.queue:
		return e
	}
	return nil
}

// tryTake is take without waiting. If take would have to wait, decided is false.
func (c *streamConn[K]) tryTake(stop <-chan struct{}) (e *inFlightItem[K], decided bool) {
	select {
	case <-stop:
		return nil, true
	case <-c.sendCtx.Done():
		return nil, true
	default:
	}
	select {
	case e = <-c.resend:
		return e, true
	case e = <-c.queue:
		return e, true
	default:
		return nil, false
	}
}

// serve makes a connection, sends first and further entries on it until it ends,
// and returns the reason. What has not come back is left in outstanding.
func (c *streamConn[K]) serve(first *inFlightItem[K]) error {
	c.sent, c.echoed, c.draining = 0, 0, false
	noticed := make(chan struct{}) // closed when the server announces the end
	stop := sync.OnceFunc(func() { close(noticed) })
	conn, err := c.dial(func(n Notice) {
		if c.opts.OnNotice != nil {
			c.opts.OnNotice(n)
		}
		if n.Ends() {
			stop()
		}
	})
	if err != nil {
		c.outstanding = []*inFlightItem[K]{first}
		return err
	}
	sendCtx, cancel := context.WithCancelCause(c.ctx)
	var sender sync.WaitGroup
	sender.Go(func() { c.send(sendCtx, conn, first, noticed) })
	timer := c.watchStall(conn)
	err = c.receive(conn)
	stop()
	cancel(err)
	sender.Wait()
	timer.stop()
	_ = conn.close(err)
	return fmt.Errorf("stream to %s: %w", c.address, err)
}

// dial connects within the stall timeout.
func (c *streamConn[K]) dial(onNotice func(Notice)) (*echoConn, error) {
	ctx := c.sendCtx
	if c.opts.StallTimeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, c.opts.StallTimeout, errDialTimeout)
		defer cancel()
	}
	return dialEcho(ctx, c.address, c.opts.Dial, c.opts.TLSConfig, onNotice)
}

// send sends entries until the server announces the end of the connection, the
// connection fails, or nothing more is to be sent.
func (c *streamConn[K]) send(ctx context.Context, conn *echoConn, e *inFlightItem[K], noticed <-chan struct{}) {
	var buf []byte
	for ; e != nil; e = c.takeWithinShare(noticed) {
		free := c.expect(e)
		data := e.Data
		if len(data) < chunkSize { // send small entries together
			buf = append(buf[:0], data...)
			for free > 0 && len(buf) < chunkSize {
				if e, _ = c.tryTake(noticed); e == nil {
					break
				}
				free = c.expect(e)
				buf = append(buf, e.Data...)
			}
			data = buf
		}
		if err := conn.send(ctx, data); err != nil {
			conn.abort(err)
			break // receive returns the reason
		}
	}
	if c.ctx.Err() != nil {
		_ = conn.close(context.Cause(c.ctx))
		return
	}
	_ = conn.closeWrite() // if it is not supported, closeIfDone closes the connection
	c.mu.Lock()
	defer c.mu.Unlock()
	c.draining = true
	c.closeIfDone(conn)
}

// takeWithinShare is take, but first waits until fewer entries are outstanding than this connection's share of
// InFlight. So a connection that does not answer cannot hold entries that others could send.
func (c *streamConn[K]) takeWithinShare(noticed <-chan struct{}) *inFlightItem[K] {
	for c.freeSlots() <= 0 {
		select {
		case <-c.slotFreed:
		case <-noticed:
			return nil
		case <-c.sendCtx.Done():
			return nil
		}
	}
	return c.take(noticed)
}

// freeSlots returns how many more entries may be sent.
func (c *streamConn[K]) freeSlots() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.freeSlotsLocked()
}

func (c *streamConn[K]) freeSlotsLocked() int {
	share := max(c.opts.InFlight/c.opts.Conns, 1)
	return share - len(c.outstanding)
}

// closeIfDone closes a draining connection when everything sent has come back. The
// caller holds mu.
func (c *streamConn[K]) closeIfDone(conn *echoConn) {
	if c.draining && len(c.outstanding) == 0 {
		_ = conn.close(errConnDone)
	}
}

// expect records that an entry is about to be sent, and returns how many more may
// be sent.
func (c *streamConn[K]) expect(e *inFlightItem[K]) (free int) {
	e.sent++
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.outstanding) == 0 {
		c.since = time.Now()
	}
	c.sent += int64(len(e.Data))
	e.end = c.sent
	c.outstanding = append(c.outstanding, e)
	return c.freeSlotsLocked()
}

// receive completes the entries that come back until the connection ends. It
// returns the reason.
func (c *streamConn[K]) receive(conn *echoConn) error {
	var done []*inFlightItem[K]
	for {
		n, err := conn.discard(context.Background()) // when c.ctx ends, send closes conn
		if err != nil {
			return err
		}
		done = c.advance(conn, n, done[:0])
		for _, e := range done {
			c.complete(e, nil)
		}
		clear(done) // or it keeps their data in memory while this connection is idle
	}
}

// advance records that n more bytes came back, and appends to done the entries that
// are complete with them.
func (c *streamConn[K]) advance(conn *echoConn, n int, done []*inFlightItem[K]) []*inFlightItem[K] {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.since = time.Now()
	c.lastEcho.Store(int64(c.since.Sub(c.began)))
	c.echoed += int64(n)
	for len(c.outstanding) > 0 && c.outstanding[0].end <= c.echoed {
		done = append(done, c.outstanding[0])
		c.outstanding[0] = nil
		c.outstanding = c.outstanding[1:]
	}
	c.closeIfDone(conn)
	if len(done) > 0 {
		select {
		case c.slotFreed <- struct{}{}:
		default:
		}
	}
	return done
}

// returnOutstanding queues the outstanding entries again after the connection has
// ended with err, or completes them if nothing more is sent.
func (c *streamConn[K]) returnOutstanding(err error) {
	entries := c.outstanding
	c.outstanding = nil
	if len(entries) > 0 && c.sent > 0 {
		if err := c.itemError(entries[0], err); err != nil {
			c.complete(entries[0], err)
			entries = entries[1:]
		}
	}
	for _, e := range entries {
		if c.sendCtx.Err() != nil {
			c.complete(e, c.unfinishedError())
		} else {
			c.resend <- e
		}
	}
}

// itemError decides whether the oldest outstanding entry fails because its
// connection ended with err. It returns nil if the entry is to be sent again.
func (c *streamConn[K]) itemError(e *inFlightItem[K], err error) error {
	if corruption, ok := errors.AsType[*CorruptionError](err); ok && len(corruption.Want) > 0 {
		return corruption // with an empty Want, the bytes came before the entry was sent
	}
	if _, ok := errors.AsType[*NoticeError](err); ok {
		return nil // the server had its own reason to close
	}
	if e.failures.add(c.echoes.Load()) >= c.opts.Attempts {
		if c.opts.Attempts == 1 {
			return fmt.Errorf("gave up after 1 connection: %w", err)
		}
		return fmt.Errorf("gave up after %d connections: %w", c.opts.Attempts, err)
	}
	return nil
}

// A failureCount counts the connections that have ended with an entry as the oldest
// outstanding one. It counts only while other entries come back, because a server
// that is down says nothing about an item.
type failureCount struct {
	n      int
	echoes int64 // stream.echoes at the last failure
}

// add counts one failure, given the value of stream.echoes, and returns the count.
func (f *failureCount) add(echoes int64) int {
	if echoes > f.echoes {
		f.n++
		f.echoes = echoes
	}
	return f.n
}

// updateRetry restarts the limits of the retry after an echo, and stops sending if they
// are reached after a connection that ended with err.
func (c *streamConn[K]) updateRetry(err error) {
	if now := c.echoes.Load(); now != c.seen {
		c.seen = now
		c.retry.resetLimits()
	}
	if c.echoed > 0 {
		c.retry.resetAll()
	}
	c.retry.Backoff = *c.opts.Reconnect
	if c.retry.since.IsZero() && (errors.Is(err, errStalled) || errors.Is(err, errDialTimeout)) {
		// MaxElapsed counts from the last echo, not from the end of the wait for it.
		waited := min(c.opts.StallTimeout, time.Since(c.began)-time.Duration(c.lastEcho.Load()))
		c.retry.since = time.Now().Add(-waited)
	}
	if err := c.retry.expired(err); err != nil {
		c.stopSending(err)
	}
}

// backOff waits before the next connection.
func (c *streamConn[K]) backOff(err error) {
	if c.opts.OnReconnect != nil {
		c.opts.OnReconnect(err)
	}
	if err := c.retry.wait(c.sendCtx, err); err != nil {
		c.stopSending(err) // no effect if the end of sendCtx ended the wait
	}
}

// A stallTimer closes a connection when the oldest outstanding entry does not
// advance for the stall timeout.
type stallTimer struct {
	mu    sync.Mutex
	timer *time.Timer // nil when stopped
}

func (c *streamConn[K]) watchStall(conn *echoConn) *stallTimer {
	t := &stallTimer{}
	if c.opts.StallTimeout < 0 {
		return t
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.timer = time.AfterFunc(c.opts.StallTimeout, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.timer == nil {
			return // the outstanding entries belong to others now
		}
		if left := c.stallLeft(); left > 0 {
			t.timer.Reset(left)
		} else {
			_ = conn.close(errStalled)
		}
	})
	return t
}

func (t *stallTimer) stop() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.timer != nil {
		t.timer.Stop()
		t.timer = nil
	}
}

// stallLeft returns the time until the connection counts as stalled.
func (c *streamConn[K]) stallLeft() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.outstanding) == 0 {
		return c.opts.StallTimeout
	}
	return c.opts.StallTimeout - time.Since(c.since)
}
