package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"
)

// DrainOptions configures a drain. A zero field in the argument of Drain means the field of Options.Drain. A zero
// field in Options.Drain means the default given here.
type DrainOptions struct {
	// Grace is the time between the notice to a client and its deadline. Zero means DefaultGrace. Off means none:
	// clients are told and closed at once.
	Grace time.Duration
	// Delay is the time for which the server still accepts clients, before it tells any to leave. It gives load
	// balancers time to notice that the server is not ready. The grace period begins after it. A pause stays in force
	// until the hold or the delay ends. Zero and Off mean no delay.
	Delay time.Duration
	// Spread is the time over which clients are told, after the delay: one after another at random moments, so that
	// they do not all reconnect at once. Each client's grace period begins when it is told. The drain ends at the
	// latest after delay, spread and grace together. Zero and Off mean that all clients are told at once.
	Spread time.Duration
	// StopTimeout is the time from the beginning of the drain until a supervisor kills the process. ExtendDrain does
	// not extend beyond it. Zero and Off mean that it is not known.
	StopTimeout time.Duration
	// Final makes CancelDrain refuse, because the caller relies on the server's stop.
	Final bool
	// Reason is told to clients and logged: one line of printable text. Empty means "shutdown".
	Reason string
}

func (o DrainOptions) check() error {
	var errs []error
	for _, opt := range []struct {
		name  string
		value time.Duration
	}{{"grace", o.Grace}, {"delay", o.Delay}, {"spread", o.Spread}, {"stop timeout", o.StopTimeout}} {
		if opt.value < Off {
			errs = append(errs, fmt.Errorf("%s %s is negative", opt.name, opt.value))
		}
	}
	if err := CheckText(o.Reason); err != nil {
		errs = append(errs, fmt.Errorf("reason: %w", err))
	}
	return errors.Join(errs...)
}

// withDefaults fills in zero fields from d, and turns Off into zero.
func (o DrainOptions) withDefaults(d DrainOptions) DrainOptions {
	return DrainOptions{
		Grace:       max(0, cmp.Or(o.Grace, d.Grace)),
		Delay:       max(0, cmp.Or(o.Delay, d.Delay)),
		Spread:      max(0, cmp.Or(o.Spread, d.Spread)),
		StopTimeout: max(0, cmp.Or(o.StopTimeout, d.StopTimeout)),
		Final:       o.Final || d.Final,
		Reason:      cmp.Or(o.Reason, d.Reason),
	}
}

// drain is the server's drain, in progress or finished. It is a part of state.
type drain struct {
	since, deadline time.Time
	acceptUntil     time.Time // end of the delay, at the latest the deadline
	tellUntil       time.Time // end of the spread; acceptUntil if there is no spread
	latest          time.Time // latest possible deadline, for ExtendDrain; zero if unknown
	cause           *drainCause
	final           bool

	// The steps of the drain, in order; forced can come at any time.
	notAccepting bool // the delay is over
	notifying    bool // clients are told to leave; a client that is admitted later is told at once
	expired      bool // the deadline has passed
	aborting     bool // the flush after the deadline is over: connections are closed while their handlers run
	forced       bool // everything is closed now

	told, notified, noticeFailed                                         int
	leftThemselves, atDeadline, closedByForce, rejected, closedOtherwise int

	stuck int
	ended time.Time
}

// DrainInfo describes a drain.
type DrainInfo struct {
	Since        time.Time
	Ended        time.Time // zero until the server has stopped
	AcceptUntil  time.Time // the server serves new clients until then; Since if there is no DrainOptions.Delay
	TellUntil    time.Time // the last client is told then; AcceptUntil if there is no DrainOptions.Spread
	Deadline     time.Time
	Reason       string
	Told         int // clients that were told to leave, or for which that failed
	Untold       int // clients that are being served and were not told yet
	Notified     int // clients whose notice the kernel has accepted
	NoticeFailed int // clients whose notice could not be sent: they had left, or do not read
}

// Report sums up a drain.
type Report struct {
	DrainInfo
	Took            time.Duration
	Left            int // connections that the client or the handler ended, or that were lost
	AtDeadline      int // connections that were closed at the deadline
	Forced          int // connections that were closed by force
	Rejected        int // clients that connected too late to be served
	ClosedOtherwise int // connections that were killed, idle or stalled, or whose handler failed
	Stuck           int // handlers that ignored their context, and still run
}

func (d *drain) info() DrainInfo {
	return DrainInfo{
		Since: d.since, Ended: d.ended, AcceptUntil: d.acceptUntil, TellUntil: d.tellUntil, Deadline: d.deadline,
		Reason: d.cause.reason, Told: d.told, Notified: d.notified, NoticeFailed: d.noticeFailed,
	}
}

// drainInfo describes the drain; it returns nil if there is none.
func (st *state) drainInfo() *DrainInfo {
	if st.drain == nil {
		return nil
	}
	info := st.drain.info()
	info.Untold = st.admitted - st.told
	return &info
}

func (d *drain) report() Report {
	return Report{
		DrainInfo: d.info(), Took: d.ended.Sub(d.since), Left: d.leftThemselves, AtDeadline: d.atDeadline, Forced: d.closedByForce,
		Rejected: d.rejected, ClosedOtherwise: d.closedOtherwise, Stuck: d.stuck,
	}
}

// setTimes sets the times of a drain whose next notice is sent at begin.
func (d *drain) setTimes(begin time.Time, spread, grace time.Duration) {
	d.deadline = begin.Add(spread + grace)
	if d.deadline.Before(d.acceptUntil) {
		d.acceptUntil = d.deadline
	}
	if d.tellUntil = d.acceptUntil; spread > 0 {
		d.tellUntil = begin.Add(spread)
	}
	d.cause.grace = max(0, grace)
}

// nextNoticeTime returns the end of the delay, or now if the delay is over.
func (d *drain) nextNoticeTime(now time.Time) time.Time {
	if d.acceptUntil.After(now) {
		return d.acceptUntil
	}
	return now
}

// noticesDone reports whether every client has been told.
func (st *state) noticesDone() bool {
	return st.drain.notifying && st.drain.cause.pending == 0 && !st.scheduleBusy
}

// over reports whether the server is closing the connections: the deadline has passed, or the drain is forced.
func (d *drain) over() bool { return d != nil && (d.expired || d.forced) }

// countClosed counts a connection that was closed during the drain.
func (d *drain) countClosed(why Reason) {
	switch why {
	case ReasonDeadline, ReasonEvicted, ReasonMaxAge:
		d.atDeadline++
	case ReasonForced:
		d.closedByForce++
	case ReasonRejectedPaused, ReasonRejectedLimit, ReasonRejectedAddressLimit, ReasonRejectedRate, ReasonRejectedDenied,
		ReasonRejectedDraining, ReasonRejectedHandshake, ReasonHandshakeFailed:
		d.rejected++
	case ReasonClientClosed, ReasonClientReset, ReasonClientLeft, ReasonHandlerDone:
		d.leftThemselves++
	default:
		d.closedOtherwise++
	}
}

// notAccepting reports whether a drain has stopped accepting.
func (st *state) notAccepting() bool { return st.drain != nil && st.drain.notAccepting }

// finishedAfterHandover reports whether the server was handed over and has nothing left to drain.
func (st *state) finishedAfterHandover() bool { return st.handedOver && st.finished() }

// finished reports whether the drain has nothing left to wait for. It waits for all goroutines that accept or serve,
// and for listeners that were taken over and are not served yet. After a handover it also waits for connections that
// the predecessor of this server keeps, because this server forwards their ends.
func (st *state) finished() bool {
	if st.handedOver {
		return st.tasks == 0 && len(st.keptConns) == 0
	}
	return st.tasks == 0 && len(st.pendingAcceptors) == 0
}

// stopAccepting stops accepting and ends every pause. During the drain's delay pauses stay in force, because each
// protects work that is still in progress.
func (st *state) stopAccepting() {
	st.drain.notAccepting = true
	for len(st.holds) > 0 {
		st.endHold(0, &DrainingError{Deadline: st.drain.deadline}, Caller{})
	}
	st.interruptAcceptors()
}

// acceptorsTimeout is how long the first notices wait at most until the accept loops let no new connections in.
const acceptorsTimeout = 250 * time.Millisecond

// keptEndsTimeout is how long after the deadline a server that was handed over forwards the ends of connections that
// its own predecessor keeps.
const keptEndsTimeout = 2 * time.Second

// runDrain is the goroutine of the drain, from its beginning until the server has stopped. The steps: wait for the
// delay, stop accepting, tell the clients, wait for the deadline, close the remaining connections.
func (s *Server) runDrain(d *drain) {
	if !s.awaitDelay(d) {
		return
	}
	s.awaitFor(acceptorsTimeout, func(st *state) bool { return len(st.acceptors) == 0 || st.drain.over() })
	s.startNotices()
	s.awaitDeadline()

	var conns []*Conn
	var forced bool
	var deadline time.Time
	s.state.With(func(st *state) {
		st.drain.expired = true
		conns, forced, deadline = st.conns.all(), st.drain.forced, st.drain.deadline
	})
	stuck := s.closeRemaining(conns, forced, deadline)
	// The predecessor of this server may still report ends of the connections that it keeps.
	s.awaitFor(time.Until(deadline.Add(keptEndsTimeout)), func(st *state) bool {
		return !st.handedOver || st.drain.forced || len(st.keptConns) == 0
	})
	s.stopBackground()
	s.state.With(func(st *state) {
		st.drain.stuck = stuck
		st.drain.ended = time.Now()
		st.setLifecycle(StateStopped)
		for _, sub := range st.subscribers {
			sub.end()
		}
		st.subscribers = nil
	})
	for _, done := range []chan struct{}{s.forwardDone(), s.predecessorDone()} {
		if done != nil {
			<-done
		}
	}
	s.logReport()
	close(s.stopped)
}

// awaitDelay waits until the delay is over, and then stops accepting. It returns false if the drain was cancelled.
func (s *Server) awaitDelay(d *drain) (goOn bool) {
	for {
		var until time.Time
		var done bool
		s.state.With(func(st *state) {
			until = d.acceptUntil
			goOn = st.drain == d
			done = !goOn || d.notAccepting || d.forced || st.finishedAfterHandover() || !time.Now().Before(until)
			if done && goOn && !d.notAccepting {
				st.stopAccepting()
			}
		})
		if done {
			return goOn
		}
		s.awaitFor(time.Until(until), func(st *state) bool {
			return st.drain != d || d.forced || st.finishedAfterHandover() || !d.acceptUntil.Equal(until)
		})
	}
}

// startNotices schedules the notices to the clients that are being served.
func (s *Server) startNotices() {
	var conns []*Conn
	var deadline time.Time
	s.state.With(func(st *state) {
		st.drain.notifying = true
		deadline = st.drain.deadline
		if st.drain.forced {
			return
		}
		conns = st.conns.all()
		s.scheduleNotices(st, st.drain.cause, st.untold(), st.drain.tellUntil)
	})
	for _, c := range conns { // those told earlier, by an eviction or for their age
		c.moveDeadline(func(d connDrain) time.Time { return earlier(d.deadline, deadline) })
	}
}

// notifyIfDraining schedules the notice to a client that was admitted after startNotices.
func (s *Server) notifyIfDraining(c *Conn) {
	s.state.With(func(st *state) {
		if st.drain != nil && st.drain.notifying && !st.drain.forced && !c.told {
			s.scheduleNotices(st, st.drain.cause, []*Conn{c}, st.drain.tellUntil)
		}
	})
}

// noticesAfterDeadline is how long after the deadline notices are still sent, to clients without a grace period.
const noticesAfterDeadline = 600 * time.Millisecond

// notifyDrain begins the drain of a connection: it queues the notice to the client. If it is too late, it counts the
// notice as failed.
func (s *Server) notifyDrain(e dueEntry) {
	c, cause := e.conn, e.cause
	var late bool
	s.state.With(func(st *state) {
		late = st.drain != nil && (st.drain.forced || time.Since(st.drain.deadline) > noticesAfterDeadline)
	})
	done := func(result messageResult) {
		if result == messageSilent {
			return
		}
		if result == messageSent {
			c.flags.set(flagNotified)
		}
		s.state.With(func(st *state) { st.countNotice(result == messageSent) })
	}
	notice := Notice{Kind: NoticeDrain, Reason: cause.reason, Closed: cause.closed, Deadline: e.deadline, Left: e.remaining}
	if late {
		done(c.undeliveredResult(notice))
		return
	}
	c.queueMessage(&message{notice: notice, done: done})
	c.startDrain(connDrain{deadline: e.deadline, reason: cause.reason, closed: cause.closed})
}

// countNotice counts a notice of a drain, of an eviction or of Timeouts.MaxAge.
func (st *state) countNotice(sent bool) {
	inDrain := st.drain != nil && st.drain.notifying
	switch {
	case sent && inDrain:
		st.drain.notified++
	case inDrain:
		st.drain.noticeFailed++
	}
	if sent {
		st.noticesSent++
	} else {
		st.noticesFailed++
	}
}

// awaitDeadline waits until the last connection is closed, the deadline has passed, or the drain is forced, and logs a
// countdown. It does not return before all clients have been told, unless the drain is forced.
func (s *Server) awaitDeadline() {
	told := false
	defer func() {
		if !told {
			close(s.draining)
		}
	}()
	var deadline time.Time
	var logAt time.Duration // the time left at which the countdown is logged next
	for {
		var open, untold int
		var changed, done, allTold bool
		s.state.With(func(st *state) {
			changed, deadline = !st.drain.deadline.Equal(deadline), st.drain.deadline
			open, untold = st.conns.len(), st.drainInfo().Untold
			allTold = st.noticesDone()
			done = st.finished() || st.drain.forced
		})
		if allTold && !told {
			close(s.draining)
			told = true
		}
		left := time.Until(deadline)
		switch {
		case done || left <= 0 && allTold:
			return
		case left > 0 && (changed || left <= logAt):
			fields := []zap.Field{zap.Int("seconds_left", int((left+time.Second-1)/time.Second)), zap.Int("connections", open)}
			if untold > 0 {
				fields = append(fields, zap.Int("not_told_yet", untold))
			}
			s.log.Info("draining", fields...)
			logAt = nextCountdown(left)
		}
		s.awaitFor(cmp.Or(max(0, left-logAt), maxSweep), func(st *state) bool {
			return st.finished() || st.drain.forced || !st.drain.deadline.Equal(deadline) || st.noticesDone() && !told
		})
	}
}

// nextCountdown returns the remaining time at which the countdown is logged next: every minute, then every ten
// seconds in the last minute, and every second in the last ten.
func nextCountdown(left time.Duration) time.Duration {
	step := time.Minute
	switch {
	case left <= 10*time.Second:
		step = time.Second
	case left <= time.Minute:
		step = 10 * time.Second
	}
	return (left - 1).Truncate(step)
}

// closeRemaining closes the connections that are still open, and returns the number of handlers that did not return.
// Its time limits count from the deadline, so that delays of earlier steps do not add up.
func (s *Server) closeRemaining(conns []*Conn, forced bool, deadline time.Time) (stuck int) {
	if !forced {
		for c := range paced(conns, promptBurst) {
			if s.isForced() {
				break
			}
			c.end(ReasonDeadline, ErrDeadline)
		}
		flush := max(time.Until(deadline.Add(abortAfter)), abandonAfter)
		s.awaitFor(flush, func(st *state) bool { return st.tasks == 0 || st.drain.forced })
	}
	s.state.With(func(st *state) {
		st.drain.aborting = true
		conns = st.conns.all()
	})
	for _, c := range conns {
		c.end(ReasonForced, ErrForced)
		c.abort()
	}
	s.awaitFor(abandonAfter, func(st *state) bool { return st.tasks == 0 })

	s.state.With(func(st *state) { conns = st.conns.all() })
	for _, c := range conns {
		s.log.Error("handler ignores its context, stopping without it",
			zap.String("handler", handlerName(c.acceptor.handler)),
			zap.Uint64("conn", c.id), zap.Stringer("remote", c.RemoteAddr()),
			zap.Duration("open_for", time.Since(c.srv.timeAt(c.opened)).Round(time.Millisecond)))
		c.closeMessages()
		go c.finish(c.closeReason()) // on a goroutine, because OnClose may block, too
	}
	s.awaitFor(abandonAfter, func(st *state) bool { return st.conns.len() == 0 })
	return len(conns)
}

func (s *Server) isForced() (yes bool) {
	s.state.With(func(st *state) { yes = st.drain.forced })
	return yes
}

// awaitFor waits until cond returns true, for d at most.
func (s *Server) awaitFor(d time.Duration, cond func(*state) bool) {
	ctx, cancel := context.WithTimeoutCause(context.Background(), d, errWaitTimeout)
	defer cancel()
	_ = s.state.Await(ctx, cond)
}

var errWaitTimeout = errors.New("the wait timed out")

func (s *Server) logReport() {
	r, _ := s.Report()
	s.log.Info("drained", zap.String("reason", r.Reason), zap.Duration("took", r.Took.Round(time.Millisecond)),
		zap.Int("notified", r.Notified), zap.Int("notices_failed", r.NoticeFailed),
		zap.Int("left_by_themselves", r.Left), zap.Int("closed_at_deadline", r.AtDeadline), zap.Int("forced", r.Forced),
		zap.Int("rejected", r.Rejected), zap.Int("closed_otherwise", r.ClosedOtherwise),
		zap.Int("handlers_left_behind", r.Stuck))
}
