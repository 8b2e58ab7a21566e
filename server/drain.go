package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"time"

	"go.uber.org/zap"
)

// DrainOptions configures a drain. A zero field in the argument of Drain means the field of Options.Drain. A zero
// field in Options.Drain means the default given here.
type DrainOptions struct {
	// Grace is the time between the notice to a client and its deadline. Zero means DefaultGrace. Off means none:
	// clients are told and closed at once.
	Grace time.Duration
	// Delay is the time for which the server still accepts before it tells its clients. It gives load balancers time
	// to notice that the server is not ready. The grace period begins after it. A pause stays in force until the hold
	// or the delay ends. Zero and Off mean no delay.
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

// drain is a drain in progress, or a finished one. It is a part of state.
type drain struct {
	since, deadline time.Time
	acceptUntil     time.Time // end of the delay; not after the deadline
	tellUntil       time.Time // end of the spread; acceptUntil without one
	latest          time.Time // of the deadline, for ExtendDrain; zero if not known
	cause           *drainCause
	final           bool

	notAccepting bool // the delay is over
	telling      bool // clients are told; those admitted from now on are told, too
	expired      bool // the deadline has passed
	forced       bool // everything is closed now
	aborting     bool // the flush after the deadline is over, too

	told, notified, noticeFailed                   int
	left, atDeadline, byForce, rejected, otherwise int

	stuck int
	ended time.Time
}

// DrainInfo describes a drain.
type DrainInfo struct {
	Since        time.Time
	Ended        time.Time // zero until the server has stopped
	AcceptUntil  time.Time // new clients are served as usual until then; Since without a DrainOptions.Delay
	TellUntil    time.Time // the last client is told then; AcceptUntil without a DrainOptions.Spread
	Deadline     time.Time
	Reason       string
	Told         int // clients that were told so far, or should have been
	Untold       int // clients that are served and were not told yet
	Notified     int // of those told: clients whose notice the kernel took
	NoticeFailed int // clients that could not be told: they had gone, or do not read
}

// Report sums up a drain.
type Report struct {
	DrainInfo
	Took       time.Duration
	Left       int // connections that ended by themselves: the client or the handler was done, or the client was lost
	AtDeadline int // connections that were closed at the deadline
	Forced     int // connections that were closed by force
	Rejected   int // clients that came too late to be given time
	Otherwise  int // connections that were killed, idle or stalled, or whose handler failed
	Stuck      int // handlers that ignored their context and were left behind
}

func (d *drain) info() DrainInfo {
	return DrainInfo{
		Since: d.since, Ended: d.ended, AcceptUntil: d.acceptUntil, TellUntil: d.tellUntil, Deadline: d.deadline,
		Reason: d.cause.reason, Told: d.told, Notified: d.notified, NoticeFailed: d.noticeFailed,
	}
}

// drainInfo describes the drain; nil if there is none.
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
		DrainInfo: d.info(), Took: d.ended.Sub(d.since), Left: d.left, AtDeadline: d.atDeadline, Forced: d.byForce,
		Rejected: d.rejected, Otherwise: d.otherwise, Stuck: d.stuck,
	}
}

// set sets when clients are told and when the drain ends: from begin on, which is not before the end of the delay.
func (d *drain) set(begin time.Time, spread, grace time.Duration) {
	d.deadline = begin.Add(spread + grace)
	if d.deadline.Before(d.acceptUntil) {
		d.acceptUntil = d.deadline
	}
	if d.tellUntil = d.acceptUntil; spread > 0 {
		d.tellUntil = begin.Add(spread)
	}
	d.cause.grace = max(0, grace)
}

// begin returns when the first clients are told, or, if that has begun, the next ones.
func (d *drain) begin(now time.Time) time.Time {
	if d.acceptUntil.After(now) {
		return d.acceptUntil
	}
	return now
}

// allTold reports whether no client waits to be told.
func (st *state) allTold() bool {
	return st.drain.telling && st.drain.cause.pending == 0 && !st.sending
}

// over reports whether connections get no more time.
func (d *drain) over() bool { return d != nil && (d.expired || d.forced) }

// count counts a connection that closed during the drain.
func (d *drain) count(why Reason) {
	switch why {
	case ReasonDeadline, ReasonEvicted, ReasonMaxAge:
		d.atDeadline++
	case ReasonForced:
		d.byForce++
	case ReasonRejectedPaused, ReasonRejectedLimit, ReasonRejectedAddressLimit, ReasonRejectedRate, ReasonRejectedDenied,
		ReasonRejectedDraining, ReasonRejectedHandshake, ReasonHandshakeFailed:
		d.rejected++
	case ReasonClientClosed, ReasonClientReset, ReasonClientLeft, ReasonHandlerDone:
		d.left++
	default:
		d.otherwise++
	}
}

// notAccepting reports whether new clients are no longer accepted.
func (st *state) notAccepting() bool { return st.drain != nil && st.drain.notAccepting }

// Drain drains the server, waits until it has stopped, and returns the report. After o.Delay the server stops
// accepting and tells every client. At the deadline it closes the remaining connections. It has stopped at most two
// seconds later. The drain cannot be cancelled. If a drain is already in progress, see StartDrain.
func (s *Server) Drain(o DrainOptions) Report {
	o.Final = true
	s.StartDrain(o)
	<-s.stopped
	report, _ := s.Report()
	return report
}

// StartDrain begins a drain and returns at once; see Done for its end. It reports whether it changed anything. If a
// drain is in progress, StartDrain can only bring its deadline forward: to o.Spread plus o.Grace from now, or from
// the end of the delay. A zero o.Grace changes nothing. A zero o.Spread tells the remaining clients at once.
// ExtendDrain moves the deadline back, and CancelDrain cancels the drain. After HandOver a later drain also ends
// HandoverOptions.Keep.
func (s *Server) StartDrain(o DrainOptions) (changed bool) {
	mode := drainShorten
	if o.Grace == 0 {
		mode = drainAdopt
	}
	again := max(0, o.Spread)
	o = o.withDefaults(s.live().drain)
	return s.changeDrain(func(_ time.Time, begun bool) (spread, grace time.Duration) {
		if begun {
			return o.Spread, o.Grace
		}
		return again, o.Grace
	}, o, mode)
}

// Shutdown drains, as in net/http. Clients have until ctx ends, or Options.Drain.Grace if ctx has no deadline.
// Shutdown returns nil when all connections have ended by themselves. Otherwise it flushes and closes the rest within
// two seconds, and returns ctx.Err(), or ErrDeadline if ctx has not ended. If ctx is cancelled before its deadline,
// Shutdown closes everything at once.
func (s *Server) Shutdown(ctx context.Context) error {
	if s.log == nil {
		return errNotNew
	}
	deadline, hasDeadline := ctx.Deadline()
	if hasDeadline {
		o := s.live().drain
		o.Final = true
		s.changeDrain(endingAt(deadline, o), o, drainShorten)
	} else {
		s.StartDrain(DrainOptions{Final: true})
	}
	select {
	case <-s.stopped:
	case <-ctx.Done():
		if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
			s.changeDrain(endingAt(time.Now(), DrainOptions{}), s.live().drain, drainForce)
		}
		<-s.stopped
	}
	report, _ := s.Report()
	switch {
	case report.AtDeadline+report.Forced+report.Stuck == 0:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case hasDeadline && !time.Now().Before(deadline):
		return context.DeadlineExceeded // ctx's timer is a little late
	default:
		return ErrDeadline
	}
}

// Force closes everything without notice or grace period. It returns at once, and reports whether it changed
// anything. If a drain is in progress, its reason does not change.
func (s *Server) Force(reason string) (changed bool) {
	return s.changeDrain(endingAt(time.Now(), DrainOptions{}), DrainOptions{Reason: reason}, drainForce)
}

// Close closes everything without notice or grace period, and waits until that is done. It returns after at most
// about two seconds, even if handlers ignore their context.
func (s *Server) Close() error {
	if s.log == nil {
		return errNotNew
	}
	s.Force("close")
	<-s.stopped
	return nil
}

// Report returns the report of the drain; ok is false until the server has stopped.
func (s *Server) Report() (r Report, ok bool) {
	s.state.With(func(st *state) {
		if ok = st.phase == StateStopped; ok {
			r = st.drain.report()
		}
	})
	return r, ok
}

// RegisterOnShutdown adds a function that the server calls on its own goroutine when a drain begins, before the
// delay. Clients are still accepted then; f can wait for Draining to act later. Status().Drain has the deadline. f
// can, for example, end work that runs outside of handlers. The drain waits for f as it does for a handler. If a
// drain has already begun, f is called at once. After CancelDrain, the next drain calls f again.
func (s *Server) RegisterOnShutdown(f func()) {
	var begun bool
	s.state.With(func(st *state) {
		st.onShutdown = append(st.onShutdown, f)
		if begun = st.drain != nil; begun {
			st.tasks++
		}
	})
	if begun {
		go s.callOnShutdown(f)
	}
}

func (s *Server) callOnShutdown(f func()) {
	defer s.endTask()
	f()
}

// drainMode says how a new request changes a drain that is in progress.
type drainMode int

const (
	drainAdopt   drainMode = iota + 1 // the drain does not change
	drainShorten                      // its deadline is brought forward
	drainForce                        // it ends now
)

// A drainPlan returns the spread and the grace period of a drain whose notices start at begin. begun reports whether
// this call begins the drain.
type drainPlan func(begin time.Time, begun bool) (spread, grace time.Duration)

// endingAt returns the plan of a drain that ends at deadline. Its spread is o's if that leaves o's grace period; clients
// have the rest of the time.
func endingAt(deadline time.Time, o DrainOptions) drainPlan {
	return func(begin time.Time, _ bool) (spread, grace time.Duration) {
		left := deadline.Sub(begin)
		spread = max(0, min(o.Spread, left-o.Grace))
		return spread, left - spread
	}
}

// changeDrain begins a drain, or changes the one in progress.
func (s *Server) changeDrain(plan drainPlan, o DrainOptions, mode drainMode) (changed bool) {
	if err := CheckText(o.Reason); err != nil {
		o.Reason = fmt.Sprintf("%.40q", o.Reason)
	}
	var begun, shortened, forced bool
	var end time.Time
	var conns []*Conn
	var callbacks []func()
	s.state.With(func(st *state) {
		if st.phase == StateStopped {
			return
		}
		if st.frozen && !st.handedOver || st.committing {
			st.handover.deferred = append(st.handover.deferred, deferredDrain{plan, o, mode})
			changed = true
			return
		}
		now := time.Now()
		if begun = st.drain == nil; begun {
			s.beginDrain(st, plan, o, now)
			if st.handover != nil {
				st.handover.cancel(&DrainingError{Deadline: st.drain.deadline})
			}
			callbacks = slices.Clone(st.onShutdown)
			st.tasks += len(callbacks)
		}
		d := st.drain
		d.final = d.final || o.Final || mode == drainForce
		keepEnds := st.handedOver && !begun && d.acceptUntil.After(now)
		if keepEnds { // what stayed behind is drained now
			d.acceptUntil = now
		}
		begin := d.begin(now)
		spread, grace := plan(begin, false)
		end = begin.Add(spread + grace)
		if (mode >= drainShorten || keepEnds) && !d.expired && end.Before(d.deadline) {
			shortened = true
			d.set(begin, spread, grace)
			if conns = st.conns.all(); d.telling {
				st.unschedule(d.cause)
				s.tellAll(st, d.cause, st.untold(), d.tellUntil)
			}
		}
		if mode == drainForce && !d.forced {
			forced = true
			d.forced = true
			st.unschedule(d.cause)
		}
		end = d.deadline
	})
	if changed {
		return true
	}
	for _, f := range callbacks {
		go s.callOnShutdown(f)
	}
	for _, c := range conns {
		c.moveDeadline(func(d connDrain) time.Time { return earlier(d.deadline, end) })
	}
	fields := []zap.Field{zap.String("reason", o.Reason), zap.Time("deadline", end)}
	if begun && o.Spread > 0 {
		fields = append(fields, zap.Duration("spread", o.Spread))
	}
	switch {
	case s.isHandedOver() && begun:
		s.log.Debug("draining the connections that stayed behind", fields...)
	case forced:
		s.log.Warn("closing all connections now", zap.String("reason", o.Reason))
	case begun && o.Delay > 0:
		s.log.Info("draining: still accepting until the delay is over",
			append(fields, zap.Duration("delay", o.Delay))...)
	case begun:
		s.log.Info("draining: no new connections, telling clients", fields...)
	case shortened:
		s.log.Info("drain deadline brought forward", fields...)
	}
	return begun || shortened || forced
}

// beginDrain begins a drain.
func (s *Server) beginDrain(st *state, plan drainPlan, o DrainOptions, now time.Time) {
	d := &drain{since: now, acceptUntil: now.Add(o.Delay), cause: &drainCause{reason: o.Reason, closed: ReasonDeadline}}
	spread, grace := plan(d.acceptUntil, true)
	d.set(d.acceptUntil, spread, grace)
	if o.StopTimeout > 0 {
		d.latest = now.Add(o.StopTimeout - stopMargin)
	}
	st.drain = d
	st.enter(StateDraining) // before the holds end, or the server would seem to run in between
	if !now.Before(d.acceptUntil) {
		st.stopAccepting()
	}
	go s.runDrain(d)
}

// stopMargin is how long after the deadline the server has stopped.
const stopMargin = 2 * time.Second

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// CancelDrain cancels a drain during its delay, before any client has been told, on behalf of by. The server is then
// running or paused, as before the drain. The error is ErrNotDraining or ErrDrainFinal.
func (s *Server) CancelDrain(by Caller) error {
	if s.log == nil {
		return errNotNew
	}
	var err error
	var reason string
	s.state.With(func(st *state) {
		d := st.drain
		switch {
		case d == nil:
			err = ErrNotDraining
		case d.notAccepting:
			err = fmt.Errorf("%w: the server has stopped accepting, and clients are told", ErrDrainFinal)
		case d.final:
			err = fmt.Errorf("%w: it was begun (%s) by a caller that relies on the stop", ErrDrainFinal, d.cause.reason)
		default:
			reason = d.cause.reason
			st.drain = nil
			st.enter(StateRunning)
		}
	})
	if err == nil {
		s.log.Info("drain cancelled", append(by.fields(""), zap.String("reason", reason))...)
	}
	return err
}

// ExtendDrain extends the deadline of a drain, and the grace period of each client, by at most d, on behalf of by.
// Clients are not told again. It returns the extension, which is less than d, or zero, if DrainOptions.StopTimeout
// leaves no more time. The error is ErrNotDraining, or ErrDrainFinal if the deadline has passed.
func (s *Server) ExtendDrain(d time.Duration, by Caller) (extended time.Duration, err error) {
	switch {
	case s.log == nil:
		return 0, errNotNew
	case d <= 0:
		return 0, fmt.Errorf("extending the drain: %s is not more than 0", d)
	}
	var conns []*Conn
	var deadline time.Time
	s.state.With(func(st *state) {
		switch drain := st.drain; {
		case drain == nil:
			err = ErrNotDraining
		case drain.over() || st.phase == StateStopped:
			err = fmt.Errorf("%w: connections are being closed", ErrDrainFinal)
		default:
			extended = min(d, maxDrain-drain.deadline.Sub(drain.since))
			if !drain.latest.IsZero() {
				extended = min(extended, drain.latest.Sub(drain.deadline))
			}
			if extended = max(0, extended); extended > 0 {
				drain.deadline = drain.deadline.Add(extended)
				drain.cause.grace += extended
				conns = st.conns.all()
			}
			deadline = drain.deadline
		}
	})
	for _, c := range conns {
		c.moveDeadline(func(d connDrain) time.Time {
			if d.closed != ReasonDeadline {
				return d.deadline
			}
			return earlier(d.deadline.Add(extended), deadline)
		})
	}
	if extended > 0 {
		s.log.Info("drain extended", append(by.fields(""), zap.Duration("by", extended), zap.Time("deadline", deadline))...)
	}
	return extended, err
}

// maxDrain bounds how long a drain can become by extending it.
const maxDrain = 365 * 24 * time.Hour

// nothingLeft reports whether a server that was handed over has no connection left to drain.
func (st *state) nothingLeft() bool { return st.handedOver && st.finished() }

// finished reports whether the drain has nothing left to wait for: no connection of this server, and no listener that
// was taken over but is not served yet. After a handover it also waits for the predecessor's connections, because
// this server forwards their ends.
func (st *state) finished() bool {
	if st.handedOver {
		return st.tasks == 0 && len(st.behind) == 0
	}
	return st.tasks == 0 && len(st.adopted) == 0
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

// acceptorsStop bounds how long notices wait for the accept loops to stop letting new connections in.
const acceptorsStop = 250 * time.Millisecond

// behindAfter is how long after the deadline a server that was handed over passes on how connections of its own
// predecessor ended.
const behindAfter = 2 * time.Second

// runDrain is the goroutine that runs the drain, from its beginning until the server has stopped.
func (s *Server) runDrain(d *drain) {
	if !s.awaitDelay(d) {
		return
	}
	s.awaitFor(acceptorsStop, func(st *state) bool { return len(st.acceptors) == 0 || st.drain.over() })
	s.startTelling()
	s.awaitDeadline()

	var conns []*Conn
	var forced bool
	var deadline time.Time
	s.state.With(func(st *state) {
		st.drain.expired = true
		conns, forced, deadline = st.conns.all(), st.drain.forced, st.drain.deadline
	})
	stuck := s.closeRest(conns, forced, deadline)
	// The predecessor of this server still reports how the connections that it kept end.
	s.awaitFor(time.Until(deadline.Add(behindAfter)), func(st *state) bool {
		return !st.handedOver || st.drain.forced || len(st.behind) == 0
	})
	s.stopSweeper()
	s.state.With(func(st *state) {
		st.drain.stuck = stuck
		st.drain.ended = time.Now()
		st.enter(StateStopped)
		for _, sub := range st.subscribers {
			sub.end()
		}
		st.subscribers = nil
	})
	for _, done := range []chan struct{}{s.forwarder(), s.follower()} {
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
			done = !goOn || d.notAccepting || d.forced || st.nothingLeft() || !time.Now().Before(until)
			if done && goOn && !d.notAccepting {
				st.stopAccepting()
			}
		})
		if done {
			return goOn
		}
		s.awaitFor(time.Until(until), func(st *state) bool {
			return st.drain != d || d.forced || st.nothingLeft() || !d.acceptUntil.Equal(until)
		})
	}
}

// startTelling begins to tell the clients that are being served.
func (s *Server) startTelling() {
	var conns []*Conn
	var deadline time.Time
	s.state.With(func(st *state) {
		st.drain.telling = true
		deadline = st.drain.deadline
		if st.drain.forced {
			return
		}
		conns = st.conns.all()
		s.tellAll(st, st.drain.cause, st.untold(), st.drain.tellUntil)
	})
	for _, c := range conns { // those told before, by an eviction or for their age
		c.moveDeadline(func(d connDrain) time.Time { return earlier(d.deadline, deadline) })
	}
}

// tellIfDraining tells a client that was admitted after the notices to the others were scheduled.
func (s *Server) tellIfDraining(c *Conn) {
	s.state.With(func(st *state) {
		if st.drain != nil && st.drain.telling && !st.drain.forced && !c.told {
			s.tellAll(st, st.drain.cause, []*Conn{c}, st.drain.tellUntil)
		}
	})
}

// tellAfterDeadline is how long after the deadline clients without a grace period are still told.
const tellAfterDeadline = 600 * time.Millisecond

// tell begins the drain of a connection: it sends the notice to the client, or counts it as failed when it is too late.
func (s *Server) tell(e dueEntry) {
	c, cause := e.c, e.tell
	var late bool
	s.state.With(func(st *state) {
		late = st.drain != nil && (st.drain.forced || time.Since(st.drain.deadline) > tellAfterDeadline)
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
	notice := Notice{Kind: NoticeDrain, Reason: cause.reason, Closed: cause.closed, Deadline: e.deadline, Left: e.left}
	if late {
		done(c.unsent(notice))
		return
	}
	c.post(&message{notice: notice, done: done})
	c.startDrain(connDrain{deadline: e.deadline, reason: cause.reason, closed: cause.closed})
}

// countNotice counts a notice of a drain, an eviction or a connection's age.
func (st *state) countNotice(sent bool) {
	inDrain := st.drain != nil && st.drain.telling
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

// awaitDeadline counts down until the last connection is closed, the deadline has passed, or the drain is forced. All
// clients have been told by then.
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
			allTold = st.allTold()
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
			return st.finished() || st.drain.forced || !st.drain.deadline.Equal(deadline) || st.allTold() && !told
		})
	}
}

// nextCountdown is the time left at which the countdown is logged next: each of the last ten seconds, every ten seconds
// in the last minute, every minute before.
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

// closeRest closes the connections that are still open, and returns the number of handlers that did not return. Its
// time limits count from the deadline, so that earlier delays do not add up.
func (s *Server) closeRest(conns []*Conn, forced bool, deadline time.Time) (stuck int) {
	if !forced {
		for c := range inTurns(conns, promptTurn) {
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
		s.log.Error("handler ignores its context and is left behind",
			zap.String("handler", handlerName(c.from.handler)),
			zap.Uint64("conn", c.id), zap.Stringer("remote", c.RemoteAddr()),
			zap.Duration("open_for", time.Since(c.srv.at(c.opened)).Round(time.Millisecond)))
		c.closeMessages()
		go c.finish(c.endReason()) // on a goroutine, because OnClose may block, too
	}
	s.awaitFor(abandonAfter, func(st *state) bool { return st.conns.len() == 0 })
	return len(conns)
}

func (s *Server) isForced() (yes bool) {
	s.state.With(func(st *state) { yes = st.drain.forced })
	return yes
}

// awaitFor waits for cond, for d at most.
func (s *Server) awaitFor(d time.Duration, cond func(*state) bool) {
	ctx, cancel := context.WithTimeoutCause(context.Background(), d, errWaitOver)
	defer cancel()
	_ = s.state.Await(ctx, cond)
}

var errWaitOver = errors.New("the wait is over")

func (s *Server) logReport() {
	r, _ := s.Report()
	s.log.Info("drained", zap.String("reason", r.Reason), zap.Duration("took", r.Took.Round(time.Millisecond)),
		zap.Int("notified", r.Notified), zap.Int("notices_failed", r.NoticeFailed),
		zap.Int("left_by_themselves", r.Left), zap.Int("closed_at_deadline", r.AtDeadline), zap.Int("forced", r.Forced),
		zap.Int("rejected", r.Rejected), zap.Int("closed_otherwise", r.Otherwise),
		zap.Int("handlers_left_behind", r.Stuck))
}

// Work on all connections sleeps for a rest after each turn, so that clients need not wait for it. The scheduler
// preempts only after 10 ms. runtime.Gosched or a shorter sleep does not help: the same goroutine runs again.
const (
	promptTurn = 2 * time.Millisecond   // where clients wait for the work
	quietTurn  = 200 * time.Microsecond // where none does: half of what 64 busy clients wait for an echo
	rest       = 1 * time.Millisecond
)

// inTurns ranges over all, and sleeps for a rest after each turn.
func inTurns[T any](all []T, turn time.Duration) iter.Seq[T] {
	const between = 16 // looks at the clock
	return func(yield func(T) bool) {
		began := time.Now()
		for i, v := range all {
			if i%between == between-1 && time.Since(began) >= turn {
				time.Sleep(rest)
				began = time.Now()
			}
			if !yield(v) {
				return
			}
		}
	}
}
