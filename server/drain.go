package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"
)

// drain is the end of a server's life under way. It is a part of the ledger.
type drain struct {
	since, deadline time.Time
	acceptUntil     time.Time // not after the deadline
	shut            bool      // accepting has come to its end
	reason          string
	telling         bool // notices go out: who is admitted from now on is told at once
	expired         bool // the deadline has passed
	forced          bool

	notified, noticeFailed                         int
	left, atDeadline, byForce, rejected, otherwise int

	stuck int
	ended time.Time
}

func (d *drain) info() DrainInfo {
	return DrainInfo{
		Since: d.since, Ended: d.ended, AcceptUntil: d.acceptUntil, Deadline: d.deadline, Reason: d.reason,
		Notified: d.notified, NoticeFailed: d.noticeFailed,
	}
}

func (d *drain) report() Report {
	return Report{
		DrainInfo: d.info(), Took: d.ended.Sub(d.since),
		Left: d.left, Deadline: d.atDeadline, Forced: d.byForce, Rejected: d.rejected, Otherwise: d.otherwise, Stuck: d.stuck,
	}
}

// shorten brings the deadline forward.
func (d *drain) shorten(deadline time.Time) {
	d.deadline = deadline
	if deadline.Before(d.acceptUntil) {
		d.acceptUntil = deadline
	}
}

// over says that no connection gets any more time.
func (d *drain) over() bool { return d != nil && (d.expired || d.forced) }

// count books a connection that closed during the drain.
func (d *drain) count(why Reason) {
	switch why {
	case Deadline:
		d.atDeadline++
	case Forced:
		d.byForce++
	case RejectedPaused, RejectedLimit, RejectedDraining, RejectedUnidentified:
		d.rejected++
	case ClientClosed, ClientReset, ClientLeft, HandlerDone:
		d.left++
	default:
		d.otherwise++
	}
}

// DrainInfo describes a drain under way, or finished.
type DrainInfo struct {
	Since        time.Time
	Ended        time.Time // zero until it has
	AcceptUntil  time.Time // new clients are served as usual until then; Since where there is no DrainDelay
	Deadline     time.Time
	Reason       string
	Notified     int // clients whose notice the kernel took
	NoticeFailed int // clients who could not be told: gone, or not reading
}

// Report sums up a drain.
type Report struct {
	DrainInfo
	Took      time.Duration
	Left      int // connections that ended by themselves: the client or the handler was done, or the client lost
	Deadline  int // connections that were closed at the deadline
	Forced    int // connections that were closed by force
	Rejected  int // clients who came too late to be given time
	Otherwise int // connections that were killed, idle or stalled, or whose handler failed
	Stuck     int // handlers left behind, since they ignored their context
}

// Drain begins the server's end and returns at once: accepting stops for certain, after Options.DrainDelay, then every client is
// sent the notice, and has until the deadline; see Done and Shutdown for its end. The deadline is as far off as the delay
// and the grace together. A grace of zero means Options.Grace, a negative one none.
//
// A drain under way is shortened by a grace that ends before its deadline, counted from now or, if that is not yet over, from
// the end of the delay, and changed by nothing else; a grace of zero leaves it alone. Drain reports whether it changed anything.
func (s *Server) Drain(grace time.Duration, reason string) (changed bool) {
	how := shorten
	if grace == 0 {
		grace, how = s.opts.Grace, adopt
	}
	return s.drainBy(func(begin time.Time) time.Time { return begin.Add(max(0, grace)) }, reason, how)
}

// at is a deadline for drainBy that does not depend on when the grace begins.
func at(deadline time.Time) func(time.Time) time.Time {
	return func(time.Time) time.Time { return deadline }
}

// insistence says what becomes of a drain that is under way when another is asked for.
type insistence int

const (
	adopt   insistence = iota + 1 // it goes on as it is
	shorten                       // its deadline is brought forward
	force                         // it ends now
)

// Shutdown drains and waits for the end. The deadline is ctx's, or Options.Grace from now where it
// has none; up to two seconds later everything is closed. When ctx is cancelled, not when its
// deadline passes, the rest is closed by force, and the error is the cause.
func (s *Server) Shutdown(ctx context.Context, reason string) (Report, error) {
	if deadline, ok := ctx.Deadline(); ok {
		s.drainBy(at(deadline), reason, shorten)
	} else {
		s.Drain(0, reason)
	}
	var err error
	select {
	case <-s.stopped:
	case <-ctx.Done():
		if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
			err = context.Cause(ctx)
			s.drainBy(at(time.Now()), reason, force)
		}
		<-s.stopped
	}
	return s.report(), err
}

// Close closes everything now: no notice, no grace. It returns when that is done, after a moment at the
// most, also where handlers ignore their context.
func (s *Server) Close() error {
	s.drainBy(at(time.Now()), "close", force)
	<-s.stopped
	return nil
}

// Force is Close without waiting for its end. It reports whether it changed anything; reason counts
// only where no drain is under way.
func (s *Server) Force(reason string) (changed bool) { return s.drainBy(at(time.Now()), reason, force) }

// drainBy begins a drain, or changes the one under way. Its deadline is told when the grace begins.
func (s *Server) drainBy(by func(begin time.Time) time.Time, reason string, how insistence) (changed bool) {
	if err := CheckText(reason); err != nil {
		reason = fmt.Sprintf("%.40q", reason)
	}
	var begun, shortened, forced bool
	var deadline time.Time
	s.book.With(func(l *ledger) {
		if l.state == Stopped {
			return
		}
		now := time.Now()
		if l.drain != nil {
			deadline = by(later(now, l.drain.acceptUntil))
		}
		if l.drain == nil {
			begun = true
			acceptUntil := now.Add(s.opts.DrainDelay)
			deadline = by(acceptUntil)
			l.drain = &drain{since: now, acceptUntil: acceptUntil, deadline: deadline, reason: reason}
			l.drain.shorten(deadline)
			l.setState(Draining) // before the holds go, or the server would seem to run in between
			if !now.Before(l.drain.acceptUntil) {
				l.stopAccepting()
			}
		}
		if how >= shorten && !l.drain.expired && deadline.Before(l.drain.deadline) {
			shortened = true
			l.drain.shorten(deadline)
		}
		if how == force && !l.drain.forced {
			forced = true
			l.drain.forced = true
		}
	})
	if begun {
		go s.conductDrain() // before logging, which may block
	}
	fields := []zap.Field{zap.String("reason", reason), zap.Time("deadline", deadline)}
	switch {
	case forced:
		s.log.Warn("closing everything now")
	case begun && s.opts.DrainDelay > 0:
		s.log.Info("draining: accepting goes on for a while", append(fields, zap.Duration("accepting", s.opts.DrainDelay))...)
	case begun:
		s.log.Info("draining: no new connections, clients are being notified", fields...)
	case shortened:
		s.log.Info("drain shortened", fields...)
	}
	return begun || shortened || forced
}

// acceptingStops bounds how long notices wait for the accept queue to be emptied: on a
// listener whose queue is long, whoever comes out of it later is told then.
const acceptingStops = 250 * time.Millisecond

// stopAccepting lets nobody new in any more. A pause ends with it and not before, or those who are kept waiting would be served
// during a drain's delay, in the middle of what somebody has paused the server for. Under the lock of the book.
func (l *ledger) stopAccepting() {
	l.drain.shut = true
	for len(l.holds) > 0 {
		l.drop(0, &DrainingError{Deadline: l.drain.deadline})
	}
	l.wakeAcceptors()
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// closing says that nobody new is let in any more.
func (l *ledger) closing() bool { return l.drain != nil && l.drain.shut }

func (s *Server) isClosing() (yes bool) {
	s.book.With(func(l *ledger) { yes = l.closing() })
	return yes
}

func (s *Server) forced() (yes bool) {
	s.book.With(func(l *ledger) { yes = l.drain.forced })
	return yes
}

// drainInfo describes the drain, which must have begun.
func (s *Server) drainInfo() (d DrainInfo) {
	s.book.With(func(l *ledger) { d = l.drain.info() })
	return d
}

// report sums up the drain, which must have begun.
func (s *Server) report() (r Report) {
	s.book.With(func(l *ledger) { r = l.drain.report() })
	return r
}
