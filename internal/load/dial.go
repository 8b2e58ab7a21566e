package load

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"syscall"
	"time"

	"echod/client"
)

// connect starts to dial. The outcome comes by the loop's inbox.
func (u *user) connect() {
	l := u.loop
	u.phase, u.dialed = dialing, l.now()
	ctx, stop := context.WithCancelCause(context.Background())
	u.stopDialing = stop
	l.dials.Go(func() {
		defer stop(nil)
		ctx, cancel := context.WithTimeoutCause(ctx, l.run.opts.Timeout, errDialTimeout)
		defer cancel()
		conn, err := l.run.dial(ctx, l.run.opts.Address)
		if err != nil && ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		l.deliver(dialed{u, conn, err, l.now()})
	})
}

var (
	errDialTimeout = errors.New("no connection in time")
	errOver        = errors.New("the run is over")
)

// notConnected counts an attempt to connect that has failed.
func (u *user) notConnected(err error) {
	t := u.loop.tally
	t.Connects.Tried++
	switch timeout, _ := errors.AsType[net.Error](err); {
	case errors.Is(err, syscall.ECONNREFUSED):
		t.Connects.Refused++
	case errors.Is(err, syscall.ECONNRESET):
		t.Connects.Reset++
	case errors.Is(err, errDialTimeout), timeout != nil && timeout.Timeout():
		t.Connects.TimedOut++
	default:
		t.Connects.Failed++
	}
	u.loop.run.noteError(err)
	u.serviceGone(u.dialed)
}

// connected takes the outcome of dialing.
func (u *user) connected(d dialed, now time.Duration) {
	if outOfFiles(d.err) {
		u.loop.failed = d.err
	}
	if d.err != nil {
		u.notConnected(d.err)
		u.comeBack(now)
		return
	}
	t, l := u.loop.tally, u.loop
	t.Connects.Tried++
	t.Connects.Made++
	record(t.connect, d.at-u.dialed)
	if u.made++; u.made > 1 {
		t.Reconnects++
	}
	s, err := l.poll.add(d.conn, u)
	if err != nil {
		if outOfFiles(err) {
			l.failed = err
		}
		_ = d.conn.Close()
		t.Ends.Failed++
		l.run.noteError(err)
		u.serviceGone(now)
		u.comeBack(now)
		return
	}
	u.socket, u.phase = s, serving
	u.written, u.counted, u.overdue, u.echoed, u.notice, u.rejected = 0, 0, 0, false, nil, false
	opts := &l.run.opts
	u.check = newChecker(origin{l.run.id, l.run.conns.Add(1)}, opts.Size, opts.Late, t, u.told)
	u.wake = never
	if opts.Churn > 0 {
		u.wake = now + opts.Churn/2 + rand.N(opts.Churn+1)
	}
	if l.ending && !u.waiting() {
		u.leave(byEnd, now)
		return
	}
	u.send(now)
}

// outOfFiles reports whether it is this side that cannot have more connections, for
// which no server is to blame.
func outOfFiles(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)
}

// comeBack waits before the next attempt to connect, if there is to be one.
func (u *user) comeBack(now time.Duration) {
	opts := &u.loop.run.opts
	if opts.NoReconnect {
		u.phase = gone
		return
	}
	u.phase = absent
	u.wake = now + rand.N(ceiling(opts.Backoff, u.waits)+1)
	u.waits++
	u.settle()
}

// settle makes a user without a connection get one at the end of the run only if
// something is still to be sent.
func (u *user) settle() {
	if u.phase == absent && u.loop.ending && !u.waiting() {
		u.phase = gone
	}
}

// ceiling returns the bound of the wait that comes after n others.
func ceiling(b client.Backoff, n int) time.Duration {
	bound := b.Min
	for ; n > 0 && bound < b.Max; n-- {
		bound *= 2
	}
	return min(bound, b.Max)
}
