package load

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"syscall"
	"time"

	"echod/client"
)

const (
	// maxUnwritten is how much may wait to be written on a connection, in bytes, before
	// no more messages are made.
	maxUnwritten = 256 << 10

	// maxLate bounds how much may be in flight on a connection, in bytes, if part of it
	// is late. Twice the pipeline is always allowed.
	maxLate = 4 << 20
)

// A phase says what a user is doing.
type phase int

const (
	disconnected phase = iota + 1 // waits to connect
	dialing
	active     // sends and receives
	leaving    // sends nothing new, waits for what is in flight
	halfClosed // reads to the end of the stream
	done       // does not connect again
)

// A leaveReason says why a user leaves a connection.
type leaveReason int

const (
	leaveNotice leaveReason = iota + 1
	leaveChurn
	leaveEnd // of the run
)

// A user is a client that the run simulates. It has one connection at a time and makes
// another when that ends. It belongs to its worker.
type user struct {
	worker *worker
	slot   int // among the users of the worker
	index  int // among all users

	phase       phase
	wakeAt      time.Duration           // when to connect, to leave, or to stop waiting
	reason      leaveReason             // while leaving or halfClosed
	attempts    int                     // failed or ended connections since the last echo, for the backoff
	dials       int                     // connects so far
	hadConn     bool                    // it had a connection that was not turned away
	dialedAt    time.Duration           // when the present connect began
	stopDialing context.CancelCauseFunc // while dialing

	// The present connection.
	socket   socket
	check    *checker
	overdue  int  // messages in flight that are late
	echoed   bool // something came back
	notice   *client.Notice
	rejected bool // by a notice, before any echo

	// The open model: messages [taken, due) of the schedule are due, and no connection
	// has taken them. Those in resend are also due: they were sent on a connection that was rejected.
	taken, due int64
	resend     []time.Duration
	listed     bool // in worker.due

	// The closed model with a think time.
	thinking bool // in worker.thinkers
	sendsAt  time.Duration

	outageClock
}

// An outageClock measures how long a user is without service.
type outageClock struct {
	total    time.Duration // of outages that are over
	began    time.Duration // of the present outage
	out      bool          // there is one
	lastEcho time.Duration
	sentAt   time.Duration // when something was sent while nothing was in flight
}

// beginOutage begins an outage, unless there is one.
func (o *outageClock) beginOutage(since time.Duration) {
	if !o.out {
		o.began, o.out = since, true
	}
}

// served notes an echo. It ends the outage, unless the client has to leave the connection.
func (o *outageClock) served(now time.Duration, stays bool) {
	o.lastEcho = now
	if o.out && stays {
		o.total += now - o.began
		o.out = false
	}
}

// hasDue reports whether something is due that no connection has taken.
func (u *user) hasDue() bool { return len(u.resend) > 0 || u.taken < u.due }

// hasUnsent reports whether something is due that was not written.
func (u *user) hasUnsent() bool {
	return u.hasDue() || u.phase == active && u.check.unwritten() > 0
}

// tick handles the timeouts that have passed.
func (u *user) tick(now time.Duration) {
	if u.phase == active || u.phase == leaving {
		u.checkLate(now)
	}
	if now < u.wakeAt {
		return
	}
	switch u.phase {
	case disconnected:
		u.connect()
	case active:
		u.leave(leaveChurn, now)
	case leaving, halfClosed:
		u.giveUp(now)
	}
}

var (
	errDialTimeout = errors.New("connect timed out")
	errRunOver     = errors.New("the run is over")
	errNoEcho      = errors.New("gave up a connection: no echo of what was sent")
	errNoEnd       = errors.New("gave up a connection: no end of stream after the half-close")
)

// connect starts to connect. The worker's inbox gets the outcome.
func (u *user) connect() {
	w := u.worker
	u.phase, u.dialedAt = dialing, w.now()
	ctx, stop := context.WithCancelCause(context.Background())
	u.stopDialing = stop
	n := u.index + u.dials
	u.dials++
	w.dials.Go(func() {
		defer stop(nil)
		ctx, cancel := context.WithTimeoutCause(ctx, w.run.opts.Timeout, errDialTimeout)
		defer cancel()
		d, err := w.run.dial(ctx, n)
		if _, failed := errors.AsType[*handshakeError](err); err != nil && ctx.Err() != nil && !failed {
			err = context.Cause(ctx)
		}
		d.user, d.err, d.at = u, err, w.now()
		w.deliver(d)
	})
}

// connected takes the outcome of a connect.
func (u *user) connected(d dialed, now time.Duration) {
	w := u.worker
	if outOfFiles(d.err) {
		w.failed = d.err
	}
	if d.err != nil {
		u.connectFailed(d.err)
		u.reconnectLater(now)
		return
	}
	t := w.tally
	t.Connects.Tried++
	t.Connects.Made++
	record(t.second.connect, d.at-u.dialedAt)
	if d.handshake > 0 {
		record(t.second.handshake, d.handshake)
	}
	if d.resumed {
		t.Connects.Resumed++
	}
	if u.hadConn {
		t.Reconnects++
	}
	s, err := w.poll.add(d.conn, u)
	if err != nil {
		if outOfFiles(err) {
			w.failed = err
		}
		_ = d.conn.Close()
		t.Ends.Failed++
		w.run.noteError(err)
		u.beginOutage(now)
		u.reconnectLater(now)
		return
	}
	opts := &w.run.opts
	u.socket, u.phase, u.wakeAt = s, active, never
	u.overdue, u.echoed, u.notice, u.rejected = 0, false, nil, false
	u.check = newChecker(origin{w.run.id, w.run.conns.Add(1)}, w.run.padding, opts.Sizes, opts.Late, t,
		u.onNotice)
	if opts.Churn > 0 {
		u.wakeAt = now + opts.Churn/2 + rand.N(opts.Churn+1)
	}
	if w.draining && !u.hasDue() {
		u.leave(leaveEnd, now)
		return
	}
	u.send(now)
}

// connectFailed counts a failed attempt to connect.
func (u *user) connectFailed(err error) {
	t := u.worker.tally
	t.Connects.Tried++
	u.worker.run.noteError(err)
	_, isHandshake := errors.AsType[*handshakeError](err)
	switch timeout, _ := errors.AsType[net.Error](err); {
	// without any connection, the address is wrong
	case errors.Is(err, syscall.EADDRNOTAVAIL) && u.worker.run.conns.Load() > 0:
		t.Connects.NoPort++
		return // not an outage of the server
	case isHandshake:
		t.Connects.NoHandshake++
	case errors.Is(err, syscall.ECONNREFUSED):
		t.Connects.Refused++
	case errors.Is(err, syscall.ECONNRESET):
		t.Connects.Reset++
	case errors.Is(err, errDialTimeout), timeout != nil && timeout.Timeout():
		t.Connects.TimedOut++
	default:
		t.Connects.Failed++
	}
	u.beginOutage(u.dialedAt)
}

// reconnectLater schedules the next connect, unless the user should not reconnect.
func (u *user) reconnectLater(now time.Duration) {
	opts := &u.worker.run.opts
	if opts.NoReconnect {
		u.phase = done
		return
	}
	u.phase = disconnected
	u.wakeAt = now + rand.N(backoffCeiling(opts.Backoff, u.attempts)+1)
	u.attempts++
	u.stopIfIdle()
}

// stopIfIdle ends a user at the end of the run that has no connection and needs none.
func (u *user) stopIfIdle() {
	if u.phase == disconnected && u.worker.draining && !u.hasDue() {
		u.phase = done
	}
}

// backoffCeiling returns the longest wait after n failed attempts.
func backoffCeiling(b client.Backoff, n int) time.Duration {
	ceiling := b.Min
	for ; n > 0 && ceiling < b.Max; n-- {
		ceiling *= 2
	}
	return min(ceiling, b.Max)
}

// ready reads what has arrived, and writes what there is room for.
func (u *user) ready() {
	if u.socket == nil {
		return // it ended after the poller reported it
	}
	w := u.worker
	n, ago, err := u.socket.read(w.in)
	now := w.now() // reading the users before this one took time
	if n > 0 {
		before := w.tally.Echoes.Returned
		u.check.feed(w.in[:n], now-ago)
		if w.tally.Echoes.Returned > before {
			u.echoed, u.attempts, u.overdue = true, 0, 0
			u.served(now-ago, u.notice == nil)
			w.lastEcho = max(w.lastEcho, now-ago)
			if think := w.run.opts.Think; think.Max > 0 {
				w.thinkers.add(u, now+think.pick())
			}
		}
		if u.notice != nil && u.phase == active {
			u.beginOutage(now)
			u.leave(leaveNotice, now)
		}
	}
	if err != nil && !errors.Is(err, errWouldBlock) {
		u.ended(err, now)
		return
	}
	u.send(now)
	u.halfCloseIfDone(now)
}

// onNotice takes a notice.
func (u *user) onNotice(n client.Notice) {
	t := u.worker.tally
	switch n.Kind {
	case client.NoticeShutdown:
		t.Notices.Shutdown++
	case client.NoticePaused:
		t.Notices.Paused++
	case client.NoticeBusy:
		t.Notices.Busy++
	case client.NoticeMessage:
		t.Notices.Messages++
	}
	if n.Ends() {
		if !u.worker.run.opts.IgnoreNotices {
			u.notice = &n
		}
		if !u.echoed && n.Grace == 0 && !u.rejected {
			u.rejected = true
			t.Connects.TurnedAway++
		}
	}
}

// send makes as many messages as are due and may be in flight, and writes them, as
// long as the connection takes them.
func (u *user) send(now time.Duration) {
	if u.phase != active {
		u.write(now)
		return
	}
	for u.makeMessages(now) {
		if u.write(now); u.phase != active || u.check.unwritten() > 0 {
			break
		}
	}
	if u.phase == active && u.worker.draining && !u.hasUnsent() {
		u.leave(leaveEnd, now)
	}
}

// makeMessages makes messages that are due, and reports whether there is something to
// write.
func (u *user) makeMessages(now time.Duration) bool {
	for room := u.room(); room > 0 && u.check.unwritten() < maxUnwritten; room-- {
		due, ok := u.nextDue(now)
		if !ok {
			break
		}
		if u.check.outstanding() == 0 {
			u.sentAt = now
		}
		u.check.begin(due, u.worker.run.opts.Sizes.pick())
	}
	return u.check.unwritten() > 0
}

// room returns how many more messages may be in flight. Late messages do not count,
// until there are so many that more would use too much memory.
func (u *user) room() int {
	opts := &u.worker.run.opts
	inFlight := u.check.outstanding()
	if u.check.outstandingBytes() < max(maxLate, 2*int64(opts.Pipeline)*int64(u.check.meanSize)) {
		inFlight -= u.overdue
	}
	return opts.Pipeline - inFlight
}

// nextDue takes the next message that is due.
func (u *user) nextDue(now time.Duration) (due time.Duration, ok bool) {
	w := u.worker
	switch {
	case len(u.resend) > 0:
		due, u.resend = u.resend[0], u.resend[1:]
		return due, true
	case w.run.opts.open():
		if u.taken == u.due {
			return 0, false
		}
		u.taken++
		return w.run.schedule.due(u.index, u.taken-1), true
	}
	return now, !w.draining && !u.thinking
}

// write writes the next bytes, as long as the socket has room.
func (u *user) write(now time.Duration) {
	for {
		p := u.worker.out[:u.check.fill(u.worker.out)]
		if len(p) == 0 {
			break
		}
		n, err := u.socket.write(p)
		u.worker.tally.Echoes.Sent += u.check.wrote(n)
		if err != nil && !errors.Is(err, errWouldBlock) {
			return // the next read says why, after what arrived before
		}
		if n < len(p) {
			break
		}
	}
	if err := u.socket.awaitRoom(u.check.unwritten() > 0); err != nil {
		u.ended(err, now)
	}
}

// leave stops sending. Messages that were not written are sent on the next connection.
func (u *user) leave(reason leaveReason, now time.Duration) {
	u.reason, u.phase, u.wakeAt = reason, leaving, now+u.worker.run.opts.DrainWait
	u.retractUnwritten()
	u.halfCloseIfDone(now)
}

// retractUnwritten makes messages that were not written due again.
func (u *user) retractUnwritten() {
	due := u.check.retract()
	if u.worker.run.opts.open() {
		u.resend = append(due, u.resend...)
	}
}

// halfCloseIfDone half-closes a connection that is being left when nothing is in
// flight any more. Late messages are waited for only at the end of the run, when
// nothing else waits for the user.
func (u *user) halfCloseIfDone(now time.Duration) {
	awaited := u.check.outstanding()
	if u.reason != leaveEnd {
		awaited -= u.overdue
	}
	if u.phase != leaving || awaited > 0 && !u.rejected {
		return
	}
	if err := u.socket.closeWrite(); errors.Is(err, errWouldBlock) {
		return // ready is called again when everything is written
	}
	u.phase, u.wakeAt = halfClosed, now+u.worker.run.opts.DrainWait
}

// checkLate looks for messages that have become late. They no longer hold up others.
// If nothing has come back meanwhile, an outage begins.
func (u *user) checkLate(now time.Duration) {
	overdue := u.check.overdue(u.overdue, now)
	if overdue == 0 {
		return
	}
	if since := max(u.check.oldest(), u.sentAt, u.outageClock.lastEcho); now-since > u.worker.run.opts.Late {
		u.beginOutage(since)
	}
	if overdue > u.overdue {
		u.overdue = overdue
		u.send(now)
		u.halfCloseIfDone(now)
	}
}

// giveUp ends a connection that has been waited for long enough.
func (u *user) giveUp(now time.Duration) {
	if u.phase == halfClosed {
		u.ended(errNoEnd, now)
	} else {
		u.ended(errNoEcho, now)
	}
}

// ended takes the end of the connection.
func (u *user) ended(err error, now time.Duration) {
	t, opts := u.worker.tally, &u.worker.run.opts
	u.socket.close()
	u.socket = nil
	u.retractUnwritten()
	due := u.check.dueTimes()
	complete := len(due) == 0
	missing := u.check.finish()
	if u.rejected {
		t.Echoes.TurnedAway += missing
		if opts.open() {
			u.resend = append(due, u.resend...)
		}
	} else {
		u.hadConn = true
		t.Echoes.Lost += missing
	}
	byUser := u.phase == halfClosed && u.reason != leaveNotice
	// a connection that cannot half-close was closed
	inOrder := errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed)
	if !inOrder {
		u.worker.run.noteError(err)
	}
	switch {
	case u.notice != nil:
		t.Ends.Noticed++
		if complete && inOrder && !u.rejected {
			t.Notices.Heeded++
		}
	case byUser && inOrder:
		t.Ends.Left++
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		t.Ends.Reset++
	case errors.Is(err, io.EOF):
		t.Ends.Closed++
	default:
		t.Ends.Failed++
	}
	if !byUser {
		u.beginOutage(now)
	}
	if byUser && u.reason == leaveChurn {
		u.phase, u.wakeAt = disconnected, now
		u.stopIfIdle()
		return
	}
	u.reconnectLater(now)
}

// finish ends everything when the run stops waiting.
func (u *user) finish(now time.Duration) {
	switch {
	case u.socket != nil:
		u.giveUp(now)
	case u.phase == dialing:
		u.connectFailed(errDialTimeout)
	}
	u.worker.tally.Echoes.Unsent += int64(len(u.resend)) + u.due - u.taken
	if end := u.worker.drainAt; u.out && end > u.began {
		u.total += end - u.began
	}
}
