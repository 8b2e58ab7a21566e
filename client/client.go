// Package client is the client of an echo server such as echod. It sends data,
// checks that the same bytes come back, and understands the notices that the
// server inserts into the stream.
//
// [Dial] makes a [Client], which is one connection. [Client.Echo] and
// [Client.EchoLine] send a message and wait for its echo. [Client.Send] and
// [Client.Receive], or [Client.SendLine] and [Client.ReceiveLine], do the two
// halves separately, so that several messages can be in flight. [Stream] sends
// any number of items over several connections at once.
//
// # Addresses
//
// An address has one of these forms:
//
//	host:port           TCP
//	tcp://host:port     TCP
//	tls://host:port     TLS over TCP
//	unix:///path        a Unix socket, named by an absolute path
//
// # Notices
//
// A server inserts lines of its own into the stream: when it drains, when it
// rejects a connection, and to pass on an operator's message. A notice is always
// a whole line. If it comes in the middle of an echoed line, a newline precedes
// it, so "hello\n" may arrive as "hel\nSHUTDOWN 5 SIGTERM\nlo\n".
//
// The client understands these notices, the defaults of echod:
//
//	SHUTDOWN seconds reason    the server closes the connection in that many seconds
//	PAUSED                     the connection was rejected: the server is paused
//	BUSY                       the connection was rejected: the server is at its limit
//	NOTICE text                a message from the server's operator
//
// Seconds is a whole number without a sign or leading zeros. Reason and text may
// be empty. A line has at most 4 KiB, is valid UTF-8, and has no control
// characters other than tabs. An echod that runs with --notice sends a text of
// its own on a drain. The client understands it only if it has the form above,
// as "SHUTDOWN {seconds} maintenance\n" does.
//
// The client knows what it has sent, so it can tell a notice from an echo. It
// removes notices from the echo and passes them to [Options.OnNotice]. If one
// announced the end of the connection, later errors are a [*NoticeError]. Bytes
// that are neither echo nor notice are a [*CorruptionError].
//
// One case is ambiguous: a client sends a line that is itself a valid notice, and
// the server sends the same notice. The client cannot tell which of the two
// arrived first. The echo is complete in this case, too.
//
// # Goroutines
//
//   - Echo and EchoLine start one goroutine that sends while the caller receives.
//     They wait for it before they return.
//   - Stream starts one goroutine that ranges over the source, one for each
//     connection that receives, and one for each connection that sends. The
//     iteration waits for all of them before it ends.
//   - When the context of a call ends, the context package runs a function that
//     interrupts the call. The call waits for that function.
//
// No goroutine is left between calls.
package client

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"strings"
	"sync"
)

// defaultMaxLine is the default of Options.MaxLine, in bytes.
const defaultMaxLine = 64 << 10

// Options configures a [Client]. The zero value is usable.
type Options struct {
	// TLSConfig is used for tls:// addresses. Nil means to verify the server
	// against the system's roots. If ServerName is empty, the host of the address
	// is used.
	TLSConfig *tls.Config

	// Dial makes the connections. Nil means [DialConn] with TLSConfig.
	Dial DialFunc

	// OnNotice, if not nil, is called with each notice, in order. It runs on the
	// goroutine that is in Receive, ReceiveLine, Echo or EchoLine, and must not
	// call any of these.
	OnNotice func(Notice)

	// MaxLine is the length of the longest line that ReceiveLine returns, in bytes
	// without the newline. Zero means 64 KiB.
	MaxLine int

	// Reconnect, if not nil, makes Dial, Echo and EchoLine connect again when the
	// server is unreachable, rejects the connection, or closes it. The other
	// methods never reconnect, because only Echo knows what to send again.
	Reconnect *Backoff
}

// A DialFunc makes a connection to an address. The connection must support
// deadlines. It can be half-closed if it has a method CloseWrite() error.
type DialFunc func(ctx context.Context, address string) (net.Conn, error)

// A Client is a connection to an echo server. With Options.Reconnect it is a
// sequence of connections.
//
// All methods may be called concurrently. One goroutine can send while another
// receives. Several senders wait for each other, and so do several receivers, in
// no particular order. Echo and EchoLine exclude both, so a Receive that waits
// while nothing is outstanding blocks an Echo.
//
// The client sees a notice only while it receives. After a notice that announces
// the end of the connection, the outstanding echoes can still be received.
// Methods that would send return a [*NoticeError].
//
// When the context of a call ends, the call returns at once with an error that
// wraps the context's cause. Part of the data may have been sent. The connection
// stays usable, with one exception: over TLS, a Send that is interrupted while
// the server does not read breaks the sending side.
type Client struct {
	address string
	opts    Options

	// sendMu is held by the sender, recvMu by the receiver, both by Echo.
	sendMu, recvMu ctxMutex

	open    context.Context         // ends with Close
	endOpen context.CancelCauseFunc // with the cause net.ErrClosed

	mu   sync.Mutex // guards conn; held while open ends
	conn *echoConn  // replaced only by the holder of sendMu and recvMu
}

// Dial connects to the server at address. The context bounds the dialing only.
// With opts.Reconnect, Dial tries again until it succeeds or the Backoff's limits
// are reached.
func Dial(ctx context.Context, address string, opts Options) (*Client, error) {
	c := &Client{address: address, opts: opts, sendMu: newCtxMutex(), recvMu: newCtxMutex()}
	c.open, c.endOpen = context.WithCancelCause(context.Background())
	conn, err := c.dial(ctx)
	if err != nil && c.retryable(ctx, err) {
		conn, err = c.redial(ctx, &retry{Backoff: *opts.Reconnect}, err)
	}
	if err != nil {
		c.endOpen(err)
		return nil, err
	}
	c.conn = conn
	return c, nil
}

// Send sends p. It blocks while the server does not read. A server that echoes
// stops reading when the client does not receive.
func (c *Client) Send(ctx context.Context, p []byte) error {
	if err := c.sendMu.lock(ctx); err != nil {
		return c.wrapError("send to", err)
	}
	defer c.sendMu.unlock()
	conn, err := c.currentConn()
	if err == nil {
		err = conn.sendable()
	}
	if err == nil {
		err = conn.send(ctx, p)
	}
	return c.wrapError("send to", err)
}

// Receive waits for an echo and reads it into p, as [io.Reader] does. It leaves
// out notices.
//
// When the connection has ended, the error wraps an [*EndError]. If a notice
// announced the end, the error is a [*NoticeError] that wraps the EndError. The
// error matches [io.EOF] if the whole echo was received.
func (c *Client) Receive(ctx context.Context, p []byte) (int, error) {
	if err := c.recvMu.lock(ctx); err != nil {
		return 0, c.wrapError("receive from", err)
	}
	defer c.recvMu.unlock()
	conn, err := c.currentConn()
	if err != nil {
		return 0, c.wrapError("receive from", err)
	}
	n, err := conn.receive(ctx, p)
	return n, c.wrapError("receive from", err)
}

// SendLine sends line and a newline. If line contains a newline, SendLine returns
// [ErrNewline].
func (c *Client) SendLine(ctx context.Context, line string) error {
	msg, err := withNewline(line)
	if err != nil {
		return c.wrapError("send to", err)
	}
	return c.Send(ctx, msg)
}

// ReceiveLine waits for a whole line and returns it without its newline. It
// returns the errors of [Client.Receive], and [ErrLineTooLong]. After an error,
// the incomplete line is left for the next call.
func (c *Client) ReceiveLine(ctx context.Context) (string, error) {
	if err := c.recvMu.lock(ctx); err != nil {
		return "", c.wrapError("receive from", err)
	}
	defer c.recvMu.unlock()
	conn, err := c.currentConn()
	if err != nil {
		return "", c.wrapError("receive from", err)
	}
	line, err := conn.receiveLine(ctx, cmp.Or(c.opts.MaxLine, defaultMaxLine))
	return line, c.wrapError("receive from", err)
}

// Echo sends msg, of any size, and returns its echo: exactly the bytes of msg, or
// those that came back before an error.
//
// With Options.Reconnect, Echo continues on a new connection when the server
// drains, rejects the connection, or closes it. It sends again what was not
// echoed. It returns each byte once, although a server may receive a byte twice.
// An interrupted Echo closes its connection, and the next Echo makes another.
//
// Without Options.Reconnect, an interrupted Echo leaves the rest of the echo to
// Receive. Until that is received, Echo returns [ErrOutstanding].
func (c *Client) Echo(ctx context.Context, msg []byte) ([]byte, error) {
	if err := c.sendMu.lock(ctx); err != nil {
		return nil, c.wrapError("echo by", err)
	}
	defer c.sendMu.unlock()
	if err := c.recvMu.lock(ctx); err != nil {
		return nil, c.wrapError("echo by", err)
	}
	defer c.recvMu.unlock()
	conn, err := c.currentConn()
	if err != nil {
		return nil, c.wrapError("echo by", err)
	}
	if conn.outstanding() > 0 && conn.endReason() == nil {
		return nil, c.wrapError("echo by", ErrOutstanding)
	}
	out := make([]byte, len(msg))
	var n int
	if c.opts.Reconnect == nil {
		n, err = conn.echo(ctx, msg, out)
	} else {
		n, err = c.echoReconnecting(ctx, conn, msg, out)
	}
	return out[:n], c.wrapError("echo by", err)
}

// EchoLine is [Client.Echo] for line and a newline. It returns the echo without
// the newline.
func (c *Client) EchoLine(ctx context.Context, line string) (string, error) {
	msg, err := withNewline(line)
	if err != nil {
		return "", c.wrapError("echo by", err)
	}
	out, err := c.Echo(ctx, msg)
	return string(bytes.TrimSuffix(out, []byte("\n"))), err
}

// withNewline returns line with a newline.
func withNewline(line string) ([]byte, error) {
	if strings.Contains(line, "\n") {
		return nil, ErrNewline
	}
	return []byte(line + "\n"), nil
}

// Outstanding returns the number of bytes that were sent on the current
// connection and whose echo was not yet returned.
func (c *Client) Outstanding() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.conn.outstanding()
}

// CloseWrite half-closes the connection, over TLS with a close_notify alert.
// Nothing more can be sent. Outstanding echoes can still be received. With
// Options.Reconnect, a later Echo makes a new connection.
//
// A Send in progress fails, except over TLS, where CloseWrite waits for it. If
// the connection cannot be half-closed, the error matches
// [errors.ErrUnsupported].
func (c *Client) CloseWrite() error {
	conn, err := c.currentConn()
	if err == nil {
		err = conn.closeWrite()
	}
	return c.wrapError("half-close connection to", err)
}

// Close closes the connection. Calls in progress and later calls return an error
// that matches [net.ErrClosed]. A second Close returns nil.
func (c *Client) Close() error {
	c.mu.Lock()
	closed := c.open.Err() != nil
	c.endOpen(net.ErrClosed)
	conn := c.conn // for good, because replace looks at open
	c.mu.Unlock()
	if closed {
		return nil
	}
	return c.wrapError("close connection to", conn.close(net.ErrClosed))
}

// currentConn returns the connection, or net.ErrClosed after Close.
func (c *Client) currentConn() (*echoConn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open.Err() != nil {
		return nil, context.Cause(c.open)
	}
	return c.conn, nil
}

// wrapError adds the operation and the address to err, unless it is nil.
func (c *Client) wrapError(op string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s %s: %w", op, c.address, err)
}

// A ctxMutex is a mutex whose lock method gives up when a context ends.
type ctxMutex chan struct{}

func newCtxMutex() ctxMutex { return make(ctxMutex, 1) }

func (m ctxMutex) lock(ctx context.Context) error {
	select {
	case m <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (m ctxMutex) unlock() { <-m }
