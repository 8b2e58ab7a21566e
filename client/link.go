package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"time"
)

// chunkSize is how much, in bytes, is read or written at once.
const chunkSize = 64 << 10

// A link is one connection to the server. One goroutine may send on it while
// another receives; the turns of the Client see to that.
type link struct {
	conn     net.Conn
	onNotice func(Notice)

	buf []byte // read buffer, owned by the receiver

	mu         sync.Mutex // guards what follows; never held during I/O
	dec        *decoder
	notice     *Notice // the last one that Ends the connection
	ended      error   // why nothing more will be received
	halfClosed bool
}

func newLink(conn net.Conn, onNotice func(Notice)) *link {
	return &link{conn: conn, onNotice: onNotice, dec: newDecoder()}
}

// usable returns why nothing new may be sent, nil if it may.
func (l *link) usable() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.ended != nil:
		return l.ended
	case l.notice != nil:
		return &NoticeError{Notice: *l.notice}
	case l.halfClosed:
		return errHalfClosed
	}
	return nil
}

// send writes p. It goes on when a shutdown is announced meanwhile, for the grace
// period is there to finish what has begun.
func (l *link) send(ctx context.Context, p []byte) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	defer interruptible(ctx, l.conn.SetWriteDeadline)()
	for chunk := range slices.Chunk(p, chunkSize) {
		l.mu.Lock()
		l.dec.expect(chunk) // first, for the echo may be quicker than Write
		l.mu.Unlock()
		n, err := l.conn.Write(chunk)
		if err != nil {
			l.mu.Lock()
			l.dec.retract(len(chunk) - n)
			l.mu.Unlock()
			if ended := l.endedBy(); ended != nil {
				return ended // which says more than "broken pipe"
			}
			if interrupted(ctx, err) {
				return context.Cause(ctx)
			}
			return err
		}
	}
	return nil
}

// receive waits for an echo and moves as much of it as has come to p.
func (l *link) receive(ctx context.Context, p []byte) (int, error) {
	for {
		l.mu.Lock()
		n := copy(p, l.dec.ready())
		l.dec.take(n)
		l.mu.Unlock()
		if n > 0 || len(p) == 0 {
			return n, nil
		}
		if err := l.fill(ctx); err != nil {
			return 0, err
		}
	}
}

// advance waits for an echo, and returns how much has come.
func (l *link) advance(ctx context.Context) (int, error) {
	for {
		l.mu.Lock()
		n := len(l.dec.ready())
		l.dec.take(n)
		l.mu.Unlock()
		if n > 0 {
			return n, nil
		}
		if err := l.fill(ctx); err != nil {
			return 0, err
		}
	}
}

// receiveLine waits for a whole line of at most limit bytes and returns it
// without its newline. On an error it leaves what has come for the next call.
func (l *link) receiveLine(ctx context.Context, limit int) (string, error) {
	for seen := 0; ; {
		l.mu.Lock()
		ready := l.dec.ready()
		if i := bytes.IndexByte(ready[seen:], '\n'); i >= 0 && seen+i <= limit {
			line := string(ready[:seen+i])
			l.dec.take(seen + i + 1)
			l.mu.Unlock()
			return line, nil
		}
		seen = len(ready)
		l.mu.Unlock()
		if seen > limit {
			return "", ErrLineTooLong
		}
		if err := l.fill(ctx); err != nil {
			return "", err
		}
	}
}

// fill reads once from the connection and reports the notices that came.
func (l *link) fill(ctx context.Context) error {
	if err := l.endedBy(); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if l.buf == nil {
		l.buf = make([]byte, chunkSize)
	}
	restore := interruptible(ctx, l.conn.SetReadDeadline)
	n, readErr := l.conn.Read(l.buf)
	restore()

	l.mu.Lock()
	notices, err := l.dec.feed(l.buf[:n])
	l.mu.Unlock()
	l.report(notices)
	switch {
	case err != nil:
		l.end(err)
		return nil // what has come before comes first
	case readErr == nil:
		return nil
	}
	if interrupted(ctx, readErr) {
		return context.Cause(ctx)
	}

	l.mu.Lock()
	notices, missing := l.dec.finish()
	l.mu.Unlock()
	l.report(notices)
	if readErr == io.EOF && missing > 0 {
		readErr = io.ErrUnexpectedEOF
	}
	l.end(&EndError{Missing: missing, Err: readErr})
	return nil // what finish has confirmed comes first
}

// report passes notices on. It must not hold mu while the user's function runs.
func (l *link) report(notices []Notice) {
	for _, n := range notices {
		if n.Ends() {
			l.mu.Lock()
			l.notice = &n
			l.mu.Unlock()
		}
		if l.onNotice != nil {
			l.onNotice(n)
		}
	}
}

// end notes err as the reason why nothing more will be received, unless there is
// one already, and returns the reason. A notice that announced it goes before.
func (l *link) end(err error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended == nil {
		if l.notice != nil {
			err = &NoticeError{Notice: *l.notice, Err: err}
		}
		l.ended = err
	}
	return l.ended
}

func (l *link) endedBy() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ended
}

// echo sends msg and receives its echo into out, which is as long, at the same
// time: neither side's buffers need to hold it. It returns how much came back.
func (l *link) echo(ctx context.Context, msg, out []byte) (n int, err error) {
	if err := l.usable(); err != nil {
		return 0, err
	}
	sendCtx, stopSending := context.WithCancelCause(ctx)
	defer stopSending(nil)
	var sendErr error
	var sender sync.WaitGroup
	sender.Go(func() {
		if sendErr = l.send(sendCtx, msg); sendErr != nil && sendCtx.Err() == nil {
			// The server closes in turn, so that the receiver does not wait for
			// an echo of what it was never sent.
			_ = l.closeWrite()
		}
	})
	for n < len(out) && err == nil {
		var m int
		m, err = l.receive(ctx, out[n:])
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

// closeWrite half-closes the connection or, if it is of a kind that cannot,
// reports errors.ErrUnsupported.
func (l *link) closeWrite() error {
	l.mu.Lock()
	done := l.halfClosed
	l.halfClosed = true
	l.mu.Unlock()
	if done {
		return nil
	}
	conn, ok := l.conn.(interface{ CloseWrite() error })
	if !ok {
		return fmt.Errorf("%T: %w", l.conn, errors.ErrUnsupported)
	}
	return conn.CloseWrite()
}

// close closes the connection, which has thereby ended for the reason err, if it
// has not been closed before.
func (l *link) close(err error) error {
	l.end(err)
	if err := l.conn.Close(); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

func (l *link) outstanding() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dec.outstanding()
}

// interruptible lets the end of ctx interrupt I/O, by means of setDeadline. The
// function it returns must be called after the I/O: it makes the next possible.
func interruptible(ctx context.Context, setDeadline func(time.Time) error) (restore func()) {
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

// interrupted reports whether err comes from the end of ctx.
func interrupted(ctx context.Context, err error) bool {
	return ctx.Err() != nil && errors.Is(err, os.ErrDeadlineExceeded)
}
