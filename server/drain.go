package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"go.uber.org/zap"
)

// DrainOptions configures a drain. In Options.Drain a zero field means the default given here; in the argument of
// Drain it means Options.Drain's.
type DrainOptions struct {
	// Grace is the time that clients have after they were told. Zero means DefaultGrace. Off means none: clients are
	// told and closed at once.
	Grace time.Duration
	// Delay is how long the server still accepts before it tells its clients; the grace period begins after it. It gives
	// load balancers time to notice that the server is not ready. A pause stays in force during the delay, and ends with
	// it at the latest. Zero and Off mean no delay.
	Delay time.Duration
	// Reason is told to clients and logged: one line of printable text. Empty means "shutdown".
	Reason string
}

func (o DrainOptions) check() error {
	var errs []error
	if o.Grace < Off {
		errs = append(errs, fmt.Errorf("grace %s is negative", o.Grace))
	}
	if o.Delay < Off {
		errs = append(errs, fmt.Errorf("delay %s is negative", o.Delay))
	}
	if err := CheckText(o.Reason); err != nil {
		errs = append(errs, fmt.Errorf("reason: %w", err))
	}
	return errors.Join(errs...)
}

// withDefaults fills in zero fields from d, and turns Off into zero.
func (o DrainOptions) withDefaults(d DrainOptions) DrainOptions {
	return DrainOptions{
		Grace:  max(0, cmp.Or(o.Grace, d.Grace)),
		Delay:  max(0, cmp.Or(o.Delay, d.Delay)),
		Reason: cmp.Or(o.Reason, d.Reason),
	}
}

// drain is a drain in progress, or a finished one. It is a part of state.
type drain struct {
	since, deadline time.Time
	acceptUntil     time.Time // end of the delay; not after the deadline
	reason          string

	notAccepting bool // the delay is over
	telling      bool // clients are told; those admitted from now on are told at once
	expired      bool // the deadline has passed
	forced       bool // everything is closed now
	aborting     bool // the flush after the deadline is over, too

	notified, noticeFailed                         int
	left, atDeadline, byForce, rejected, otherwise int

	stuck int
	ended time.Time
}

// DrainInfo describes a drain.
type DrainInfo struct {
	Since        time.Time
	Ended        time.Time // zero until the server has stopped
	AcceptUntil  time.Time // new clients are served as usual until then; Since without a DrainOptions.Delay
	Deadline     time.Time
	Reason       string
	Notified     int // clients whose notice the kernel took
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
		Since: d.since, Ended: d.ended, AcceptUntil: d.acceptUntil, Deadline: d.deadline, Reason: d.reason,
		Notified: d.notified, NoticeFailed: d.noticeFailed,
	}
}

func (d *drain) report() Report {
	return Report{
		DrainInfo: d.info(), Took: d.ended.Sub(d.since), Left: d.left, AtDeadline: d.atDeadline, Forced: d.byForce,
		Rejected: d.rejected, Otherwise: d.otherwise, Stuck: d.stuck,
	}
}

// bringForward sets an earlier deadline.
func (d *drain) bringForward(deadline time.Time) {
	d.deadline = deadline
	if deadline.Before(d.acceptUntil) {
		d.acceptUntil = deadline
	}
}

// over reports whether connections get no more time.
func (d *drain) over() bool { return d != nil && (d.expired || d.forced) }

// count counts a connection that closed during the drain.
func (d *drain) count(why Reason) {
	switch why {
	case ReasonDeadline:
		d.atDeadline++
	case ReasonForced:
		d.byForce++
	case ReasonRejectedPaused, ReasonRejectedLimit, ReasonRejectedDraining, ReasonRejectedHandshake,
		ReasonHandshakeFailed:
		d.rejected++
	case ReasonClientClosed, ReasonClientReset, ReasonClientLeft, ReasonHandlerDone:
		d.left++
	default:
		d.otherwise++
	}
}

// notAccepting reports whether new clients are no longer accepted.
func (st *state) notAccepting() bool { return st.drain != nil && st.drain.notAccepting }

// Drain drains the server, waits for the end, and returns the report. The server stops accepting, after o.Delay; then
// it tells every client; it closes those that are still there at the deadline; and it has stopped at most two seconds
// later. See StartDrain for a drain that is in progress already.
func (s *Server) Drain(o DrainOptions) Report {
	s.StartDrain(o)
	<-s.stopped
	report, _ := s.Report()
	return report
}

// StartDrain begins a drain and returns at once; see Done for its end. It reports whether it changed anything. During a
// drain it can only bring the deadline forward, to o.Grace from now or from the end of the delay; a zero o.Grace leaves
// the drain as it is.
func (s *Server) StartDrain(o DrainOptions) (changed bool) {
	mode := drainShorten
	if o.Grace == 0 {
		mode = drainAdopt
	}
	o = o.withDefaults(s.opts.Drain)
	return s.changeDrain(func(begin time.Time) time.Time { return begin.Add(o.Grace) }, o, mode)
}

// Shutdown drains, like net/http's: clients have until ctx ends, or for Options.Drain.Grace if ctx has no deadline.
// It returns nil when all connections ended by themselves. Otherwise it flushes and closes the rest, at most two
// seconds later, and returns ctx.Err(), or ErrDeadline if ctx has not ended. A ctx that is cancelled, rather than
// past its deadline, closes everything at once.
func (s *Server) Shutdown(ctx context.Context) error {
	if s.log == nil {
		return errNotNew
	}
	deadline, hasDeadline := ctx.Deadline()
	if hasDeadline {
		s.changeDrain(at(deadline), s.opts.Drain, drainShorten)
	} else {
		s.StartDrain(DrainOptions{})
	}
	select {
	case <-s.stopped:
	case <-ctx.Done():
		if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
			s.changeDrain(at(time.Now()), s.opts.Drain, drainForce)
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

// Force closes everything now: no notice, no grace period. It returns at once, and reports whether it changed
// anything. The reason counts only if no drain is in progress.
func (s *Server) Force(reason string) (changed bool) {
	return s.changeDrain(at(time.Now()), DrainOptions{Reason: reason}, drainForce)
}

// Close closes everything now, and returns when that is done: after about two seconds at most, also if handlers ignore
// their context.
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

// RegisterOnShutdown adds a function that is called, on a goroutine of its own, when a drain begins: before the delay,
// while clients are still accepted. What must come after that waits for Draining. Status().Drain has the deadline.
// Connections that work outside of the handler, such as hijacked ones, can be told to end that way. The drain waits for
// f as for a handler. If a drain has begun already, f is called at once.
func (s *Server) RegisterOnShutdown(f func()) {
	var begun bool
	s.state.With(func(st *state) {
		if begun = st.drain != nil; begun {
			st.tasks++
		} else {
			st.onShutdown = append(st.onShutdown, f)
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

// at is a deadline for changeDrain that does not depend on when the grace period begins.
func at(deadline time.Time) func(time.Time) time.Time {
	return func(time.Time) time.Time { return deadline }
}

// changeDrain begins a drain, or changes the one in progress. deadline computes the deadline from the time at which the
// grace period begins.
func (s *Server) changeDrain(deadline func(begin time.Time) time.Time, o DrainOptions, mode drainMode) (changed bool) {
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
		if st.committing {
			st.handover.deferred = append(st.handover.deferred, deferredDrain{deadline, o, mode})
			changed = true
			return
		}
		now := time.Now()
		if begun = st.drain == nil; begun {
			st.drain = &drain{since: now, acceptUntil: now.Add(o.Delay), reason: o.Reason}
			st.drain.bringForward(deadline(st.drain.acceptUntil))
			st.enter(StateDraining) // before the holds end, or the server would seem to run in between
			if !now.Before(st.drain.acceptUntil) {
				st.stopAccepting()
			}
			callbacks, st.onShutdown = st.onShutdown, nil
			st.tasks += len(callbacks)
		}
		begin := now
		if st.drain.acceptUntil.After(now) {
			begin = st.drain.acceptUntil
		}
		end = deadline(begin)
		if mode >= drainShorten && !st.drain.expired && end.Before(st.drain.deadline) {
			shortened = true
			st.drain.bringForward(end)
			conns = st.conns.all()
		}
		if mode == drainForce && !st.drain.forced {
			forced = true
			st.drain.forced = true
		}
		end = st.drain.deadline
	})
	if changed {
		return true
	}
	if begun {
		go s.runDrain() // before logging, which may block
	}
	for _, f := range callbacks {
		go s.callOnShutdown(f)
	}
	for _, c := range conns {
		if _, draining := c.DrainDeadline(); draining {
			c.startDrain(end, "")
		}
	}
	fields := []zap.Field{zap.String("reason", o.Reason), zap.Time("deadline", end)}
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
	return changed || begun || shortened || forced
}

// nothingLeft reports whether a server that was handed over has no connection left to drain.
func (st *state) nothingLeft() bool { return st.handedOver && st.finished() }

// finished reports whether nothing is left to wait for: no connection of this server, and no listener that was taken over
// and is not served yet. After a handover it is no connection of its predecessor, whose ends it passes on.
func (st *state) finished() bool {
	if st.handedOver {
		return st.tasks == 0 && len(st.behind) == 0
	}
	return st.tasks == 0 && len(st.adopted) == 0
}

// stopAccepting ends accepting, and with it every pause. A pause does not end earlier, in the drain's delay, because
// it protects work that is still in progress.
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

// runDrain carries the drain out, from its beginning to the stop.
func (s *Server) runDrain() {
	s.awaitDelay()
	s.awaitFor(acceptorsStop, func(st *state) bool { return len(st.acceptors) == 0 || st.drain.over() })
	s.tellAll()
	close(s.draining)
	s.awaitDeadline()

	var conns []*Conn
	var forced bool
	var deadline time.Time
	s.state.With(func(st *state) {
		st.drain.expired = true
		conns, forced, deadline = st.conns.all(), st.drain.forced, st.drain.deadline
	})
	stuck := s.closeRest(conns, forced, deadline)
	// Its own predecessor, which began to drain earlier, still reports how the connections end that stayed there.
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

// awaitDelay waits until the delay is over, and then stops accepting.
func (s *Server) awaitDelay() {
	for {
		var until time.Time
		var done bool
		s.state.With(func(st *state) {
			until = st.drain.acceptUntil
			done = st.drain.notAccepting || st.drain.forced || st.nothingLeft() || !time.Now().Before(until)
			if done && !st.drain.notAccepting {
				st.stopAccepting()
			}
		})
		if done {
			return
		}
		s.awaitFor(time.Until(until), func(st *state) bool {
			return st.drain.forced || st.nothingLeft() || !st.drain.acceptUntil.Equal(until)
		})
	}
}

// tellAll begins the drain of every connection that is being served.
func (s *Server) tellAll() {
	var conns []*Conn
	s.state.With(func(st *state) {
		st.drain.telling = true
		if st.drain.forced {
			return
		}
		conns = make([]*Conn, 0, st.conns.len())
		for _, c := range st.conns.all() {
			if c.admitted && !c.told {
				c.told = true
				conns = append(conns, c)
			}
		}
	})
	left := s.graceLeft() // the same for all, however long it takes to tell them
	for c := range inTurns(conns, promptTurn) {
		s.tell(c, left)
	}
}

// graceLeft is the time until the deadline of the drain.
func (s *Server) graceLeft() (left time.Duration) {
	s.state.With(func(st *state) { left = time.Until(st.drain.deadline) })
	return left
}

// tellIfDraining begins the drain of a connection that was admitted after the others had been told.
func (s *Server) tellIfDraining(c *Conn) {
	var tell bool
	s.state.With(func(st *state) {
		tell = st.drain != nil && st.drain.telling && !st.drain.forced && !c.told
		c.told = c.told || tell
	})
	if tell {
		s.tell(c, s.graceLeft())
	}
}

// tellAfterDeadline is how long after the deadline clients without a grace period are still told.
const tellAfterDeadline = 600 * time.Millisecond

// tell sends the notice of the drain to a client, or counts it as failed when it is too late.
func (s *Server) tell(c *Conn, left time.Duration) {
	var d DrainInfo
	var late bool
	s.state.With(func(st *state) {
		d = st.drain.info()
		late = st.drain.forced || time.Since(d.Deadline) > tellAfterDeadline
	})
	done := func(result messageResult) {
		if result == messageSilent {
			return
		}
		if result == messageSent {
			c.flags.set(flagNotified)
		}
		s.state.With(func(st *state) {
			if result == messageSent {
				st.drain.notified++
				st.noticesSent++
			} else {
				st.drain.noticeFailed++
				st.noticesFailed++
			}
		})
	}
	notice := Notice{Kind: NoticeDrain, Reason: d.Reason, Deadline: d.Deadline, Left: left}
	if late {
		done(c.unsent(notice))
		return
	}
	c.post(&message{notice: notice, done: done})
	c.startDrain(d.Deadline, d.Reason)
}

// awaitDeadline counts down until the last connection is closed, the deadline has passed, or the drain is forced.
func (s *Server) awaitDeadline() {
	for {
		var deadline time.Time
		var open int
		var done bool
		s.state.With(func(st *state) {
			deadline, open = st.drain.deadline, st.conns.len()
			done = st.finished() || st.drain.forced
		})
		left := time.Until(deadline)
		if done || left <= 0 {
			return
		}
		s.log.Info("draining", zap.Int("seconds_left", int((left+time.Second-1)/time.Second)),
			zap.Int("connections", open))
		s.awaitFor(left-nextCountdown(left), func(st *state) bool {
			return st.finished() || st.drain.forced || !st.drain.deadline.Equal(deadline)
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

// closeRest closes the connections that are still open, and returns how many handlers ignored that. Its time limits
// count from the deadline, so earlier delays do not add up.
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

// inTurns ranges over conns, and sleeps for a rest after each turn.
func inTurns(conns []*Conn, turn time.Duration) iter.Seq[*Conn] {
	const between = 16 // looks at the clock
	return func(yield func(*Conn) bool) {
		began := time.Now()
		for i, c := range conns {
			if i%between == between-1 && time.Since(began) >= turn {
				time.Sleep(rest)
				began = time.Now()
			}
			if !yield(c) {
				return
			}
		}
	}
}
