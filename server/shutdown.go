package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"
)

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
		mode = drainUnchanged
	}
	again := max(0, o.Spread)
	o = o.withDefaults(s.activeSettings().drain)
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
		o := s.activeSettings().drain
		o.Final = true
		s.changeDrain(planEndingAt(deadline, o), o, drainShorten)
	} else {
		s.StartDrain(DrainOptions{Final: true})
	}
	select {
	case <-s.stopped:
	case <-ctx.Done():
		if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
			s.changeDrain(planEndingAt(time.Now(), DrainOptions{}), s.activeSettings().drain, drainForce)
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
	return s.changeDrain(planEndingAt(time.Now(), DrainOptions{}), DrainOptions{Reason: reason}, drainForce)
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
			err = fmt.Errorf("%w: it was begun (%s) by a caller that relies on the server's stop", ErrDrainFinal, d.cause.reason)
		default:
			reason = d.cause.reason
			st.drain = nil
			st.setLifecycle(StateRunning)
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
		case drain.over() || st.lifecycle == StateStopped:
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

// RegisterOnShutdown registers a function that the server calls on its own goroutine when a drain begins, before the
// delay. f can, for example, end work that runs outside of handlers. Clients are still accepted when f is called; f can
// wait for Draining. Status().Drain has the deadline. The drain waits for f as it does for a handler. If a drain has
// already begun, f is called at once. After CancelDrain, the next drain calls f again.
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

// Report returns the report of the drain; ok is false until the server has stopped.
func (s *Server) Report() (r Report, ok bool) {
	s.state.With(func(st *state) {
		if ok = st.lifecycle == StateStopped; ok {
			r = st.drain.report()
		}
	})
	return r, ok
}

// drainMode says how a call changes a drain that is in progress.
type drainMode int

const (
	drainUnchanged drainMode = iota + 1 // it does not change
	drainShorten                        // its deadline is brought forward
	drainForce                          // it ends now
)

// A drainPlan returns the spread and the grace period of a drain whose first notice is sent at begin. begun reports
// whether this call begins the drain.
type drainPlan func(begin time.Time, begun bool) (spread, grace time.Duration)

// planEndingAt returns the plan of a drain that ends at deadline. The spread is o.Spread, or less if that leaves less
// than o.Grace. The grace period is the rest of the time.
func planEndingAt(deadline time.Time, o DrainOptions) drainPlan {
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
		if st.lifecycle == StateStopped {
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
		endKeep := st.handedOver && !begun && d.acceptUntil.After(now)
		if endKeep { // a new drain ends HandoverOptions.Keep
			d.acceptUntil = now
		}
		begin := d.nextNoticeTime(now)
		spread, grace := plan(begin, begun)
		end = begin.Add(spread + grace)
		if (mode >= drainShorten || endKeep) && !d.expired && end.Before(d.deadline) {
			shortened = true
			d.setTimes(begin, spread, grace)
			if conns = st.conns.all(); d.notifying {
				st.cancelNotices(d.cause)
				s.scheduleNotices(st, d.cause, st.untold(), d.tellUntil)
			}
		}
		if mode == drainForce && !d.forced {
			forced = true
			d.forced = true
			st.cancelNotices(d.cause)
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
		s.log.Debug("draining the connections that were not handed over", fields...)
	case forced:
		s.log.Warn("closing all connections now", zap.String("reason", o.Reason))
	case begun && o.Delay > 0:
		s.log.Info("draining: accepting until the delay is over",
			append(fields, zap.Duration("delay", o.Delay))...)
	case begun:
		s.log.Info("draining: no new connections, telling clients", fields...)
	case shortened:
		s.log.Info("drain deadline brought forward", fields...)
	}
	return begun || shortened || forced
}

// beginDrain makes the drain, and starts its goroutine.
func (s *Server) beginDrain(st *state, plan drainPlan, o DrainOptions, now time.Time) {
	d := &drain{since: now, acceptUntil: now.Add(o.Delay), cause: &drainCause{reason: o.Reason, closed: ReasonDeadline}}
	spread, grace := plan(d.acceptUntil, true)
	d.setTimes(d.acceptUntil, spread, grace)
	if o.StopTimeout > 0 {
		d.latest = now.Add(o.StopTimeout - stopMargin)
	}
	st.drain = d
	st.setLifecycle(StateDraining) // before the holds end, so that the server is not running in between
	if !now.Before(d.acceptUntil) {
		st.stopAccepting()
	}
	go s.runDrain(d)
}

// stopMargin is the time after the deadline within which the server stops.
const stopMargin = 2 * time.Second

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// maxDrain is the longest time to which ExtendDrain extends a drain.
const maxDrain = 365 * 24 * time.Hour
