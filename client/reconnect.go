package client

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"time"
)

const (
	defaultMinDelay = 100 * time.Millisecond
	defaultMaxDelay = 10 * time.Second
)

// Backoff says how long to wait before connecting again. Each wait is random
// between nothing and a bound that doubles from Min to Max: the "full jitter" of
// Marc Brooker's "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015),
// so that the clients of a server that restarts do not all come back at once.
// The zero value is usable.
type Backoff struct {
	Min time.Duration // bound of the first wait; zero means 100 ms
	Max time.Duration // bound of the longest wait; zero means 10 s, or Min if longer

	// Retries is how often to try again in a row without any byte being echoed.
	// Zero means until the context ends.
	Retries int

	// MaxElapsed is how long to go on trying without any byte being echoed.
	// Zero means until the context ends.
	MaxElapsed time.Duration
}

// ceiling returns the bound of the wait that comes after n others.
func (b Backoff) ceiling(n int) time.Duration {
	bound, limit := b.Min, b.Max
	if bound <= 0 {
		bound = defaultMinDelay
	}
	if limit <= 0 {
		limit = defaultMaxDelay
	}
	for range n {
		if bound >= limit/2 {
			return max(bound, limit)
		}
		bound *= 2
	}
	return bound
}

// A retry counts the waits in a row.
type retry struct {
	Backoff
	waits int       // they grow by this
	tries int       // what Retries bounds
	since time.Time // what MaxElapsed bounds; zero before the first
}

// reset is called when something was echoed.
func (r *retry) reset() {
	r.waits = 0
	r.hope()
}

// hope is called when something was echoed elsewhere: it makes sense to go on trying, and none to do so more often.
func (r *retry) hope() { r.tries, r.since = 0, time.Time{} }

// wait waits for the next attempt, which has become necessary by err. Its own
// error, when there is to be none, wraps err.
func (r *retry) wait(ctx context.Context, err error) error {
	if r.Retries > 0 && r.tries >= r.Retries {
		return fmt.Errorf("gave up after %d retries: %w", r.tries, err)
	}
	if r.since.IsZero() {
		r.since = time.Now()
	}
	delay := rand.N(r.ceiling(r.waits) + 1)
	if r.MaxElapsed > 0 {
		left := r.MaxElapsed - time.Since(r.since)
		if left <= 0 {
			return fmt.Errorf("gave up after %s: %w", r.MaxElapsed, err)
		}
		delay = min(delay, left) // for a last attempt
	}
	timer := time.NewTimer(delay)
	defer timer.Stop()
	r.waits++
	r.tries++
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w while reconnecting: %w", context.Cause(ctx), err)
	}
}

// retryable reports whether trying again may help after err.
func (c *Client) retryable(ctx context.Context, err error) bool {
	if c.opts.Reconnect == nil || ctx.Err() != nil || c.life.Err() != nil {
		return false
	}
	_, corrupt := errors.AsType[*CorruptionError](err)
	return !corrupt && !malformed(err)
}

// malformed reports whether err says that the address makes no sense, and never will.
func malformed(err error) bool {
	_, is := errors.AsType[*net.AddrError](err)
	return is
}

func (c *Client) dial(ctx context.Context) (*link, error) {
	return dialLink(ctx, c.opts.Dial, c.address, c.opts.OnNotice)
}

func dialLink(ctx context.Context, dial DialFunc, address string, onNotice func(Notice)) (*link, error) {
	conn, err := dial(ctx, address)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "dial" {
			err = op.Err // which leaves out the address, said here
		}
		return nil, fmt.Errorf("connect to %s: %w", address, err)
	}
	return newLink(conn, onNotice), nil
}

// redial waits and dials until it has a connection in place of one that was lost,
// or not made, for the reason err.
func (c *Client) redial(ctx context.Context, r *retry, err error) (*link, error) {
	for {
		if err := r.wait(ctx, err); err != nil {
			return nil, err
		}
		var l *link
		l, err = c.dial(ctx)
		if err == nil || !c.retryable(ctx, err) {
			return l, err
		}
	}
}

// echoReconnecting is link.echo over as many connections as it takes. Its caller
// has both turns.
func (c *Client) echoReconnecting(ctx context.Context, l *link, msg, out []byte) (done int, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(c.life, func() { cancel(context.Cause(c.life)) })()

	r := &retry{Backoff: *c.opts.Reconnect}
	for {
		n, err := l.echo(ctx, msg[done:], out[done:])
		done += n
		if err == nil {
			return done, nil
		}
		if n > 0 {
			r.reset()
		}
		again := c.retryable(ctx, err)
		_ = l.close(errAbandoned)
		if !again {
			return done, err
		}
		if l, err = c.redial(ctx, r, err); err != nil {
			return done, err
		}
		if err := c.replace(l); err != nil {
			return done, err
		}
	}
}

// replace makes l the client's connection, unless Close was quicker.
func (c *Client) replace(l *link) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.life.Err() != nil {
		_ = l.close(net.ErrClosed)
		return context.Cause(c.life)
	}
	c.link = l
	return nil
}
