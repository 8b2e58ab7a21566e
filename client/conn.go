package client

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"time"
)

const (
	// chunkSize is the size of one read or write, in bytes.
	chunkSize = 64 << 10

	// abortTimeout is how long echoes are received after a failed send, on a
	// connection that cannot be half-closed.
	abortTimeout = time.Second
)

// An echoConn is one connection to the server. It separates the echo from the
// notices. One goroutine may send while another receives.
type echoConn struct {
	conn     net.Conn
	onNotice func(Notice) // may be nil

	buf []byte // read buffer, owned by the receiver

	mu         sync.Mutex // guards the fields below; never held during I/O
	dec        *decoder
	notice     *Notice // the last one that announced the end of the connection
	ended      error   // why nothing more will be received
	sendClosed error   // why nothing more can be sent: errHalfClosed or errTLSBroken
	aborted    error   // why abort has set a read deadline
}

func newEchoConn(conn net.Conn, onNotice func(Notice)) *echoConn {
	return &echoConn{conn: conn, onNotice: onNotice, dec: newDecoder()}
}

// sendable returns nil if new data may be sent, or the reason why not.
func (c *echoConn) sendable() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.ended != nil:
		return c.ended
	case c.notice != nil:
		return &NoticeError{Notice: *c.notice}
	default:
		return c.sendClosed
	}
}

// send writes p. A shutdown notice does not stop it: the grace period is there to
// finish what has begun.
func (c *echoConn) send(ctx context.Context, p []byte) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	defer interruptOnDone(ctx, c.conn.SetWriteDeadline)()
	for chunk := range slices.Chunk(p, chunkSize) {
		c.mu.Lock()
		c.dec.expect(chunk) // before Write, because the echo may arrive before Write returns
		c.mu.Unlock()
		if n, err := c.conn.Write(chunk); err != nil {
			return c.sendFailed(ctx, len(chunk)-n, err)
		}
	}
	return nil
}

// sendFailed records that the last n bytes were not sent because of err, and
// returns the most telling error.
func (c *echoConn) sendFailed(ctx context.Context, n int, err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dec.unexpect(n)
	isInterrupted := isInterrupted(ctx, err)
	if _, ok := c.conn.(*tls.Conn); ok && isInterrupted && c.sendClosed == nil {
		c.sendClosed = errTLSBroken // part of a record may have been written
	}
	switch {
	case c.ended != nil:
		return c.ended
	case isInterrupted:
		return context.Cause(ctx)
	case c.sendClosed != nil:
		return c.sendClosed
	default:
		return err
	}
}

// receive waits for an echo and copies what has arrived to p.
func (c *echoConn) receive(ctx context.Context, p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	return c.takeEcho(ctx, func(ready []byte) int { return copy(p, ready) })
}

// discard waits for an echo and returns how many bytes have arrived.
func (c *echoConn) discard(ctx context.Context) (int, error) {
	return c.takeEcho(ctx, func(ready []byte) int { return len(ready) })
}

// takeEcho waits for an echo and passes it to use, which returns how many bytes it
// has consumed.
func (c *echoConn) takeEcho(ctx context.Context, use func(ready []byte) int) (int, error) {
	for {
		c.mu.Lock()
		n := use(c.dec.ready())
		c.dec.take(n)
		c.mu.Unlock()
		if n > 0 {
			return n, nil
		}
		if err := c.fill(ctx); err != nil {
			return 0, err
		}
	}
}

// receiveLine waits for a whole line of at most limit bytes and returns it without
// its newline. After an error, the incomplete line is left for the next call.
func (c *echoConn) receiveLine(ctx context.Context, limit int) (string, error) {
	for seen := 0; ; {
		c.mu.Lock()
		ready := c.dec.ready()
		if i := bytes.IndexByte(ready[seen:], '\n'); i >= 0 && seen+i <= limit {
			line := string(ready[:seen+i])
			c.dec.take(seen + i + 1)
			c.mu.Unlock()
			return line, nil
		}
		seen = len(ready)
		c.mu.Unlock()
		if seen > limit {
			return "", ErrLineTooLong
		}
		if err := c.fill(ctx); err != nil {
			return "", err
		}
	}
}

// fill reads once from the connection and reports the notices that arrived. When
// the connection ends, it returns nil once, so that the caller first takes the
// echo that arrived before the end.
func (c *echoConn) fill(ctx context.Context) error {
	if err := c.endReason(); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if c.buf == nil {
		c.buf = make([]byte, chunkSize)
	}
	restore := interruptOnDone(ctx, c.conn.SetReadDeadline)
	n, readErr := c.conn.Read(c.buf)
	restore()

	c.mu.Lock()
	notices, err := c.dec.feed(c.buf[:n])
	c.mu.Unlock()
	c.report(notices)
	switch {
	case err != nil:
		c.setEnded(err)
		return nil
	case readErr == nil:
		return nil
	case isInterrupted(ctx, readErr):
		return context.Cause(ctx)
	}

	c.mu.Lock()
	notices, missing := c.dec.finish()
	if c.aborted != nil && errors.Is(readErr, os.ErrDeadlineExceeded) {
		readErr = c.aborted
	}
	c.mu.Unlock()
	c.report(notices)
	if readErr == io.EOF && missing > 0 {
		readErr = io.ErrUnexpectedEOF
	}
	c.setEnded(&EndError{Missing: missing, Err: readErr})
	return nil
}

// report passes notices to onNotice. The caller must not hold mu.
func (c *echoConn) report(notices []Notice) {
	for _, n := range notices {
		if n.Ends() {
			c.mu.Lock()
			c.notice = &n
			c.mu.Unlock()
		}
		if c.onNotice != nil {
			c.onNotice(n)
		}
	}
}

// setEnded records err as the reason why nothing more will be received. The first
// reason wins. If a notice announced the end, the reason becomes a NoticeError.
func (c *echoConn) setEnded(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended != nil {
		return
	}
	if c.notice != nil {
		err = &NoticeError{Notice: *c.notice, Err: err}
	}
	c.ended = err
}

func (c *echoConn) endReason() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ended
}

// echo sends msg and receives its echo into out, which has the same length. It
// does both at the same time, so that msg may be larger than all buffers on the
// way. It returns how many bytes came back.
func (c *echoConn) echo(ctx context.Context, msg, out []byte) (n int, err error) {
	if err := c.sendable(); err != nil {
		return 0, err
	}
	sendCtx, stopSending := context.WithCancelCause(ctx)
	defer stopSending(nil)
	var sendErr error
	var sender sync.WaitGroup
	sender.Go(func() {
		if sendErr = c.send(sendCtx, msg); sendErr != nil && sendCtx.Err() == nil {
			c.abort(sendErr)
		}
	})
	for n < len(out) && err == nil {
		var m int
		m, err = c.receive(ctx, out[n:])
		n += m
	}
	if err != nil {
		stopSending(err)
	}
	sender.Wait()
	if err == nil {
		err = sendErr
	}
	return n, err
}

// closeWrite half-closes the connection. If it does not support that, the error
// matches errors.ErrUnsupported.
func (c *echoConn) closeWrite() error {
	conn, ok := c.conn.(interface{ CloseWrite() error })
	if !ok {
		return fmt.Errorf("%T: %w", c.conn, errors.ErrUnsupported)
	}
	c.mu.Lock()
	closed := c.sendClosed
	if closed == nil {
		c.sendClosed = errHalfClosed
	}
	c.mu.Unlock()
	switch closed {
	case nil:
		return conn.CloseWrite()
	case errHalfClosed:
		return nil
	default:
		return closed
	}
}

// abort ends the connection after send has failed with err. Otherwise receive would
// wait for the echo of bytes that were never sent. What was sent before can still
// come back: until the server closes too, or for abortTimeout if the connection
// cannot be half-closed.
func (c *echoConn) abort(err error) {
	if errors.Is(c.closeWrite(), errors.ErrUnsupported) {
		c.mu.Lock()
		c.aborted = err
		c.mu.Unlock()
		_ = c.conn.SetReadDeadline(time.Now().Add(abortTimeout))
	}
}

// close closes the connection and records err as the reason, unless it has ended
// already. A second close returns nil.
func (c *echoConn) close(err error) error {
	c.setEnded(err)
	if tlsConn, ok := c.conn.(*tls.Conn); ok {
		c.mu.Lock()
		broken := c.sendClosed == errTLSBroken
		c.mu.Unlock()
		if broken { // the server does not read, and Close would wait 5 s to send close_notify
			_ = tlsConn.NetConn().Close()
		}
		_ = tlsConn.Close() // the error would be that close_notify could not be sent
		return nil
	}
	if err := c.conn.Close(); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

func (c *echoConn) outstanding() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.dec.outstanding()
}

// interruptOnDone makes the end of ctx interrupt I/O: it sets a deadline in the
// past with setDeadline. After the I/O, the caller must call restore.
func interruptOnDone(ctx context.Context, setDeadline func(time.Time) error) (restore func()) {
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		_ = setDeadline(time.Unix(1, 0))
	})
	return func() {
		if !stop() {
			<-done
			_ = setDeadline(time.Time{})
		}
	}
}

// isInterrupted reports whether err was caused by the end of ctx.
func isInterrupted(ctx context.Context, err error) bool {
	return ctx.Err() != nil && errors.Is(err, os.ErrDeadlineExceeded)
}
