package load

import (
	"context"
	"errors"
	"io"
	"net"
	"syscall"
	"time"

	"echod/client"
)

// A phase is what a user is doing.
type phase int

const (
	absent  phase = iota + 1 // waits until it is to connect
	dialing                  // connects
	serving                  // sends and receives
	leaving                  // sends nothing new, waits for what is under way
	closing                  // has half-closed, reads to the end
	gone                     // comes back no more
)

// A cause is why a user leaves a connection.
type cause int

const (
	byNotice cause = iota + 1
	byChurn
	byEnd // of the run
)

// A user is one of the run's clients: it has one connection at a time, and makes
// another when that ends. It belongs to its loop.
type user struct {
	loop  *loop
	slot  int // among the loop's users
	index int // among all

	phase       phase
	wake        time.Duration           // when to go on: to connect, to leave, to wait no longer
	cause       cause                   // while leaving and closing
	waits       int                     // for the backoff, since something came back
	made        int                     // connections so far
	dialed      time.Duration           // when it began to
	stopDialing context.CancelCauseFunc // while dialing

	// The present connection.
	socket   socket
	check    *checker
	written  int64 // bytes
	counted  int64 // messages that are counted as sent
	overdue  int   // messages under way that are late
	echoed   bool  // something has come back
	notice   *client.Notice
	rejected bool // by a notice, before anything had come back

	// The open model: messages [taken, fallen) of its schedule are due and not
	// taken, besides those that are to be sent again.
	taken, fallen int64
	again         []time.Duration
	dirty         bool // in the loop's list

	outages
}

// waiting reports whether something is due that no connection has taken.
func (u *user) waiting() bool { return len(u.again) > 0 || u.taken < u.fallen }

// ready reads what has come, and writes what there is room for.
func (u *user) ready() {
	if u.socket == nil {
		return // it has ended since it was said to be ready
	}
	l := u.loop
	n, ago, err := u.socket.read(l.buf)
	now := l.now() // not when the loop woke up: others may have been served since
	if n > 0 {
		before := l.tally.Echoes.Returned
		u.check.feed(l.buf[:n], now-ago)
		if l.tally.Echoes.Returned > before {
			u.echoed, u.waits, u.overdue = true, 0, 0
			u.served(now-ago, u.notice == nil)
		}
		if u.notice != nil && u.phase == serving {
			u.serviceGone(now)
			u.leave(byNotice, now)
		}
	}
	if err != nil && !errors.Is(err, errWouldBlock) {
		u.ended(err, now)
		return
	}
	u.send(now)
	u.halfClose(now)
}

// told takes a notice.
func (u *user) told(n client.Notice) {
	t := u.loop.tally
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
		u.notice = &n
		if !u.echoed && n.Grace == 0 && !u.rejected {
			u.rejected = true
			t.Connects.TurnedAway++
		}
	}
}

// leave stops sending. What has not been written is sent over the next connection.
func (u *user) leave(why cause, now time.Duration) {
	u.cause, u.phase, u.wake = why, leaving, now+u.loop.run.opts.DrainWait
	u.takeBack()
	u.halfClose(now)
}

// takeBack makes what has not been written due again.
func (u *user) takeBack() {
	dues := u.check.retract(u.written)
	if u.loop.run.opts.Rate > 0 {
		u.again = append(append([]time.Duration(nil), dues...), u.again...)
	}
}

// halfClose does so when it leaves and nothing is under way any more. What is late
// is awaited only at the end of the run, when nothing else waits for its client.
func (u *user) halfClose(now time.Duration) {
	awaited := u.check.outstanding()
	if u.cause != byEnd {
		awaited -= u.overdue
	}
	if u.phase != leaving || awaited > 0 && !u.rejected {
		return
	}
	if err := u.socket.closeWrite(); errors.Is(err, errWouldBlock) {
		return // it comes back when all is written
	}
	u.phase, u.wake = closing, now+u.loop.run.opts.DrainWait
}

// tick does what has become due by itself.
func (u *user) tick(now time.Duration) {
	if u.phase == serving || u.phase == leaving {
		u.lookForLate(now)
	}
	if now < u.wake {
		return
	}
	switch u.phase {
	case absent:
		u.connect()
	case serving:
		u.leave(byChurn, now)
	case leaving, closing:
		u.impatient(now)
	}
}

var (
	errNoEcho = errors.New("a connection was given up: the echo of what was sent has not come")
	errNoEnd  = errors.New("a connection was given up: it was half-closed, and no end of stream has come")
)

// impatient ends a connection that has been waited for long enough.
func (u *user) impatient(now time.Duration) {
	if u.phase == closing {
		u.ended(errNoEnd, now)
	} else {
		u.ended(errNoEcho, now)
	}
}

// ended says that the connection has, and how.
func (u *user) ended(err error, now time.Duration) {
	t, opts := u.loop.tally, &u.loop.run.opts
	u.socket.close()
	u.socket = nil
	u.takeBack()
	dues := u.check.due[u.check.dueHead:]
	complete := u.check.outstanding() == 0
	missing := u.check.end()
	if u.rejected {
		t.Echoes.TurnedAway += missing
		if opts.Rate > 0 {
			u.again = append(append([]time.Duration(nil), dues...), u.again...)
		}
	} else {
		t.Echoes.Lost += missing
	}
	own := u.phase == closing && u.cause != byNotice
	inOrder := errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) // which is how one ends that knows no half-close
	if !inOrder {
		u.loop.run.noteError(err)
	}
	switch {
	case u.notice != nil:
		t.Ends.Noticed++
		if complete && inOrder && !u.rejected {
			t.Notices.Heeded++
		}
	case own && inOrder:
		t.Ends.Left++
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		t.Ends.Reset++
	case errors.Is(err, io.EOF):
		t.Ends.Closed++
	default:
		t.Ends.Failed++
	}
	if !own {
		u.serviceGone(now)
	}
	if own && u.cause == byChurn {
		u.phase, u.wake = absent, now
		u.settle()
		return
	}
	u.comeBack(now)
}

// lookForLate lets go of what has become late. If meanwhile nothing has come back
// at all, there is no service.
func (u *user) lookForLate(now time.Duration) {
	overdue := u.check.overdue(u.overdue, now)
	if overdue == 0 {
		return
	}
	if since := max(u.check.oldest(), u.asked, u.echo); now-since > u.loop.run.opts.Late {
		u.serviceGone(since)
	}
	if overdue > u.overdue {
		u.overdue = overdue
		u.send(now)
		u.halfClose(now)
	}
}

// finish ends what there still is, at the end of the run's patience.
func (u *user) finish(now time.Duration) {
	switch {
	case u.socket != nil:
		u.impatient(now)
	case u.phase == dialing:
		u.notConnected(errDialTimeout)
	}
	u.loop.tally.Echoes.Unsent += int64(len(u.again)) + u.fallen - u.taken
	if end := u.loop.endedAt; u.inOut && end > u.outage {
		u.without += end - u.outage
	}
}
