package client

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
)

// defaultMaxLine is the zero value of Options.MaxLine, in bytes.
const defaultMaxLine = 64 << 10

// Options says how a [Client] behaves. The zero value is usable.
type Options struct {
	// Dial makes a connection to the address given to Dial; nil means TCP.
	Dial DialFunc

	// OnNotice, if not nil, is called with each notice, in order, by the
	// goroutine that is in Receive, ReceiveLine, Echo or EchoLine. It must not
	// call one of these.
	OnNotice func(Notice)

	// MaxLine is the length, in bytes without the newline, of the longest line
	// that ReceiveLine returns. Zero means 64 KiB.
	MaxLine int

	// Reconnect, if not nil, makes Dial, Echo and EchoLine try again when the
	// server cannot be reached, turns the client away or goes. The other
	// methods stay with the connection that is there: only Echo knows what to
	// send again.
	Reconnect *Backoff
}

// A DialFunc makes a connection to an address. It is the place for TLS or Unix
// sockets. The connection's deadlines must work; half-closing needs it to have the
// method CloseWrite() error.
type DialFunc func(ctx context.Context, address string) (net.Conn, error)

// A Client is a connection to an echo server; with Options.Reconnect, a sequence
// of connections.
//
// All methods may be called concurrently. One goroutine may send while another
// receives; several that send, or several that receive, take turns, in no
// particular order. Echo and EchoLine take both turns. So a Receive that waits
// while nothing is outstanding keeps an Echo waiting.
//
// A notice is seen only when something is being received. After one that
// announces the end of the connection, what is outstanding can still be
// received, but what would send anew returns a *NoticeError.
//
// The end of a context interrupts a call at once; the call returns an error that
// wraps the context's cause, and the connection stays usable. Part of what it was
// to send may have been sent.
type Client struct {
	address string
	opts    Options

	sending, receiving turn

	life context.Context // ends with Close, its cause is net.ErrClosed
	end  context.CancelCauseFunc

	mu   sync.Mutex // guards link; held while Close closes it
	link *link      // replaced only by who has both turns
}

// Dial connects to the server at address, a host and port for TCP. The context
// bounds the dialing only. With opts.Reconnect it tries again until that gives up.
func Dial(ctx context.Context, address string, opts Options) (*Client, error) {
	c := &Client{address: address, opts: opts, sending: newTurn(), receiving: newTurn()}
	if c.opts.Dial == nil {
		c.opts.Dial = dialTCP
	}
	c.life, c.end = context.WithCancelCause(context.Background())
	link, err := c.dial(ctx)
	if err != nil && c.retryable(ctx, err) {
		link, err = c.redial(ctx, &retry{Backoff: *opts.Reconnect}, err)
	}
	if err != nil {
		c.end(err)
		return nil, err
	}
	c.link = link
	return c, nil
}

func dialTCP(ctx context.Context, address string) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "tcp", address)
}

// Send sends p. It blocks while the server takes nothing more, which it may do
// for good if the echo of much earlier data is not received meanwhile.
func (c *Client) Send(ctx context.Context, p []byte) error {
	if err := c.sending.take(ctx); err != nil {
		return c.wrap("send to", err)
	}
	defer c.sending.pass()
	link, err := c.current()
	if err == nil {
		err = link.usable()
	}
	if err == nil {
		err = link.send(ctx, p)
	}
	return c.wrap("send to", err)
}

// Receive waits for an echo and reads it into p, as [io.Reader] does. Notices are
// not part of it.
//
// When the connection has ended, the error wraps an *EndError, and before it a
// *NoticeError if a notice had announced that. It matches [io.EOF] if everything
// sent has come back.
func (c *Client) Receive(ctx context.Context, p []byte) (int, error) {
	if err := c.receiving.take(ctx); err != nil {
		return 0, c.wrap("receive from", err)
	}
	defer c.receiving.pass()
	link, err := c.current()
	if err != nil {
		return 0, c.wrap("receive from", err)
	}
	n, err := link.receive(ctx, p)
	return n, c.wrap("receive from", err)
}

// SendLine sends line and a newline. A newline within is [ErrNewline].
func (c *Client) SendLine(ctx context.Context, line string) error {
	msg, err := message(line)
	if err != nil {
		return c.wrap("send to", err)
	}
	return c.Send(ctx, msg)
}

// ReceiveLine waits for a whole line and returns it without its newline. On an
// error, that of [Client.Receive] or [ErrLineTooLong], nothing is lost: what has
// come of the line is left for the next call.
func (c *Client) ReceiveLine(ctx context.Context) (string, error) {
	if err := c.receiving.take(ctx); err != nil {
		return "", c.wrap("receive from", err)
	}
	defer c.receiving.pass()
	link, err := c.current()
	if err != nil {
		return "", c.wrap("receive from", err)
	}
	line, err := link.receiveLine(ctx, cmp.Or(c.opts.MaxLine, defaultMaxLine))
	return line, c.wrap("receive from", err)
}

// Echo sends msg, of any size, and returns what comes back: exactly the bytes of
// msg, or those of them that came before an error.
//
// With Options.Reconnect, Echo goes on over a new connection, where it sends what
// was not echoed, when the server announces its end, turns the client away or
// goes. Each byte is returned once, though a server may see it twice. An Echo
// that is interrupted gives its connection up; the next one makes another.
// Without, an interrupted Echo leaves the rest of its echo to Receive, and Echo
// returns [ErrOutstanding] until that is received.
func (c *Client) Echo(ctx context.Context, msg []byte) ([]byte, error) {
	if err := c.sending.take(ctx); err != nil {
		return nil, c.wrap("echo by", err)
	}
	defer c.sending.pass()
	if err := c.receiving.take(ctx); err != nil {
		return nil, c.wrap("echo by", err)
	}
	defer c.receiving.pass()
	link, err := c.current()
	if err != nil {
		return nil, c.wrap("echo by", err)
	}
	if link.outstanding() > 0 && link.endedBy() == nil {
		return nil, c.wrap("echo by", ErrOutstanding)
	}
	out := make([]byte, len(msg))
	var n int
	if c.opts.Reconnect == nil {
		n, err = link.echo(ctx, msg, out)
	} else {
		n, err = c.echoReconnecting(ctx, link, msg, out)
	}
	return out[:n], c.wrap("echo by", err)
}

// EchoLine is [Client.Echo] for line and a newline; it returns the line without.
func (c *Client) EchoLine(ctx context.Context, line string) (string, error) {
	msg, err := message(line)
	if err != nil {
		return "", c.wrap("echo by", err)
	}
	out, err := c.Echo(ctx, msg)
	return string(bytes.TrimSuffix(out, []byte("\n"))), err
}

func message(line string) ([]byte, error) {
	if strings.Contains(line, "\n") {
		return nil, ErrNewline
	}
	return []byte(line + "\n"), nil
}

// Outstanding returns the number of bytes that were sent on the present
// connection and whose echo has not been handed out.
func (c *Client) Outstanding() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.link.outstanding()
}

// CloseWrite tells the server that nothing more will be sent. What is outstanding
// can still be received. It does not wait for a Send, which then fails. The error
// is [errors.ErrUnsupported] for a connection that cannot be half-closed.
// With Options.Reconnect, a later Echo makes a new connection.
func (c *Client) CloseWrite() error {
	link, err := c.current()
	if err == nil {
		err = link.closeWrite()
	}
	return c.wrap("half-close connection to", err)
}

// Close closes the connection. Calls under way and later ones return an error
// that matches [net.ErrClosed]; a second Close returns nil.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.life.Err() != nil {
		return nil
	}
	c.end(net.ErrClosed)
	return c.wrap("close connection to", c.link.close(net.ErrClosed))
}

// current returns the link, or net.ErrClosed.
func (c *Client) current() (*link, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.life.Err() != nil {
		return nil, context.Cause(c.life)
	}
	return c.link, nil
}

// wrap says what was being done when err, if it is not nil, happened.
func (c *Client) wrap(doing string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s %s: %w", doing, c.address, err)
}

// A turn is held by one goroutine at a time. Unlike for a mutex, waiting for it
// ends with a context.
type turn chan struct{}

func newTurn() turn { return make(turn, 1) }

func (t turn) take(ctx context.Context) error {
	select {
	case t <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (t turn) pass() { <-t }
