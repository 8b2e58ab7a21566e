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

// Backoff configures how a client reconnects. Before each attempt it waits for a
// random time between zero and a limit that doubles from Min to Max. This is the
// "full jitter" of Marc Brooker's "Exponential Backoff And Jitter" (AWS
// Architecture Blog, 2015). It keeps the clients of a server that restarts from
// returning all at once. The zero value is usable.
//
// A malformed address and a certificate that cannot be verified are not retried.
type Backoff struct {
	Min time.Duration // limit of the first wait; zero means 100 ms
	Max time.Duration // limit of the longest wait; zero means 10 s, or Min if that is longer

	// Retries is the number of attempts in a row without any echo after which the
	// client gives up. Zero means no limit.
	Retries int

	// MaxElapsed is the time without any echo after which the client gives up.
	// Zero means no limit.
	MaxElapsed time.Duration
}

// limit returns the limit of the wait after n earlier ones.
func (b Backoff) limit(n int) time.Duration {
	limit, longest := b.Min, b.Max
	if limit <= 0 {
		limit = defaultMinDelay
	}
	if longest <= 0 {
		longest = defaultMaxDelay
	}
	for range n {
		if limit >= longest/2 {
			return max(limit, longest)
		}
		limit *= 2
	}
	return limit
}

// A retry counts the attempts of one connection in a row.
type retry struct {
	Backoff
	waits int       // determines the length of the next wait
	tries int       // compared with Retries
	since time.Time // compared with MaxElapsed; zero before the first wait
}

// resetAll restarts the retry after an echo on this connection.
func (r *retry) resetAll() {
	r.waits = 0
	r.resetLimits()
}

// resetLimits restarts the limits after an echo on another connection. The
// waits stay as long as they are.
func (r *retry) resetLimits() { r.tries, r.since = 0, time.Time{} }

// wait waits before the next attempt. err is the reason for the attempt. If there
// must be no further attempt, wait returns an error that wraps err.
func (r *retry) wait(ctx context.Context, err error) error {
	if r.Retries > 0 && r.tries >= r.Retries {
		if r.tries == 1 {
			return fmt.Errorf("gave up after 1 retry: %w", err)
		}
		return fmt.Errorf("gave up after %d retries: %w", r.tries, err)
	}
	if r.since.IsZero() {
		r.since = time.Now()
	}
	delay := rand.N(r.limit(r.waits) + 1)
	if err := r.expired(err); err != nil {
		return err
	}
	if r.MaxElapsed > 0 {
		delay = min(delay, r.MaxElapsed-time.Since(r.since)) // for a last attempt
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

// expired returns an error that wraps err if MaxElapsed has passed.
func (r *retry) expired(err error) error {
	if r.MaxElapsed <= 0 || r.since.IsZero() || time.Since(r.since) < r.MaxElapsed {
		return nil
	}
	return fmt.Errorf("gave up after %s: %w", r.MaxElapsed, err)
}

// retryable reports whether the client should connect again after err.
func (c *Client) retryable(ctx context.Context, err error) bool {
	if c.opts.Reconnect == nil || ctx.Err() != nil || c.open.Err() != nil {
		return false
	}
	_, corrupt := errors.AsType[*CorruptionError](err)
	return !corrupt && !isPermanent(err)
}

func (c *Client) dial(ctx context.Context) (*echoConn, error) {
	return dialEcho(ctx, c.address, c.opts.Dial, c.opts.TLSConfig, c.opts.OnNotice)
}

// redial waits and dials until it has a connection. err is the reason why the
// last connection or attempt failed.
func (c *Client) redial(ctx context.Context, r *retry, err error) (*echoConn, error) {
	for {
		if err := r.wait(ctx, err); err != nil {
			return nil, err
		}
		var conn *echoConn
		conn, err = c.dial(ctx)
		if err == nil || !c.retryable(ctx, err) {
			return conn, err
		}
	}
}

// echoReconnecting is echoConn.echo over as many connections as needed. The caller
// holds sendMu and recvMu.
func (c *Client) echoReconnecting(ctx context.Context, conn *echoConn, msg, out []byte) (done int, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(c.open, func() { cancel(context.Cause(c.open)) })()

	r := &retry{Backoff: *c.opts.Reconnect}
	for {
		n, err := conn.echo(ctx, msg[done:], out[done:])
		done += n
		if err == nil {
			return done, nil
		}
		if n > 0 {
			r.resetAll()
		}
		again := c.retryable(ctx, err)
		_ = conn.close(errAbandoned)
		if !again {
			return done, err
		}
		if conn, err = c.redial(ctx, r, err); err != nil {
			return done, err
		}
		if err := c.replace(conn); err != nil {
			return done, err
		}
	}
}

// replace makes conn the client's connection, or closes it if the client was
// closed in the meantime.
func (c *Client) replace(conn *echoConn) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open.Err() != nil {
		_ = conn.close(net.ErrClosed)
		return context.Cause(c.open)
	}
	c.conn = conn
	return nil
}
