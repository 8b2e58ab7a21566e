package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// caller is the ResponseWriter towards who made a request. For a request that lasts, takeOver makes it
// write to the connection itself: net/http does not notice the end of a caller that has sent one byte
// more than its request, such as a newline from a shell script, and would keep a pause for a dead owner.
type caller struct {
	http.ResponseWriter
	conn   net.Conn // once taken over
	header http.Header
	status int  // of the answer; 0 until it begins
	began  bool // the status line was written, of a connection that was taken over
	logged bool
	leave  []func() // in the order to be called
}

var errCallerGone = errors.New("the caller has gone")

// takeOver prepares for an answer that lasts, and returns a context that ends when the caller goes. It
// needs HTTP/1.
func (c *caller) takeOver(ctx context.Context) (context.Context, error) {
	conn, buffered, err := http.NewResponseController(c.ResponseWriter).Hijack()
	if err != nil {
		return nil, fmt.Errorf("taking over the connection: %w", err)
	}
	_ = conn.SetDeadline(time.Time{})
	c.conn, c.header = conn, http.Header{}
	ctx, cancel := context.WithCancelCause(ctx)
	ended := make(chan struct{})
	go awaitEnd(buffered, cancel, ended)
	c.leave = append(c.leave, func() {
		_ = conn.Close()
		<-ended
	})
	return ctx, nil
}

// awaitEnd is the goroutine that notices the end of the caller; leave waits for it.
func awaitEnd(r io.Reader, cancel context.CancelCauseFunc, ended chan<- struct{}) {
	defer close(ended)
	_, _ = io.Copy(io.Discard, r)
	cancel(errCallerGone)
}

// end gives up what takeOver and others have taken.
func (c *caller) end() {
	for _, leave := range c.leave {
		leave()
	}
}

// Unwrap is http.ResponseController's: a profile takes as long as it is asked for, and moves the deadline of its answer.
func (c *caller) Unwrap() http.ResponseWriter { return c.ResponseWriter }

// Header is http.ResponseWriter's.
func (c *caller) Header() http.Header {
	if c.conn != nil {
		return c.header
	}
	return c.ResponseWriter.Header()
}

// WriteHeader is http.ResponseWriter's.
func (c *caller) WriteHeader(status int) {
	if c.status == 0 {
		c.status = status
	}
	if c.conn == nil {
		c.ResponseWriter.WriteHeader(status)
		return
	}
	c.began = true
	c.header.Set("Connection", "close")
	c.header.Set("Date", time.Now().UTC().Format(http.TimeFormat))
	var head bytes.Buffer
	fmt.Fprintf(&head, "HTTP/1.1 %d %s\r\n", status, http.StatusText(status))
	_ = c.header.Write(&head) // a buffer takes all
	head.WriteString("\r\n")
	_, _ = c.Write(head.Bytes()) // the caller's end shows in the context
}

// Write is http.ResponseWriter's, with a bound on how long the caller may take.
func (c *caller) Write(p []byte) (int, error) {
	if c.conn == nil {
		if c.status == 0 {
			c.status = http.StatusOK
		}
		return c.ResponseWriter.Write(p)
	}
	if !c.began {
		c.WriteHeader(http.StatusOK)
	}
	_ = c.conn.SetWriteDeadline(time.Now().Add(answerTimeout))
	return c.conn.Write(p)
}
