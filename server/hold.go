package server

import (
	"context"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"
)

// PauseMode says what becomes of clients that come during a pause.
type PauseMode int

const (
	// HoldNew leaves them in the kernel's accept queue and serves them on resume, oldest first. It
	// is the zero value.
	HoldNew PauseMode = iota
	// RejectNew accepts them, says PAUSED, and closes.
	RejectNew
)

// String gives the mode's name as the control plane shows it.
func (m PauseMode) String() string {
	switch m {
	case HoldNew:
		return "hold"
	case RejectNew:
		return "reject"
	default:
		return fmt.Sprintf("PauseMode(%d)", int(m))
	}
}

// ParsePauseMode is the inverse of String; empty text means HoldNew.
func ParsePauseMode(name string) (PauseMode, error) {
	switch name {
	case "", "hold":
		return HoldNew, nil
	case "reject":
		return RejectNew, nil
	default:
		return 0, fmt.Errorf("unknown mode %q: want hold or reject", name)
	}
}

// PauseOptions describes a pause. The zero value is a hold without a reason that stands until released.
type PauseOptions struct {
	Reason string        // why, for people: one line of text
	TTL    time.Duration // the hold is released by itself after this; zero: never
	Mode   PauseMode
	UID    int // who asked; only means something where PID is not zero
	PID    int // zero when unknown
}

// HoldInfo describes a hold.
type HoldInfo struct {
	ID      string
	Reason  string
	Mode    PauseMode
	Since   time.Time
	Expires time.Time // zero when it does not
	UID     int
	PID     int
}

// A Hold is one reason for the server to be paused: it is paused while any hold stands. All methods
// may be called concurrently, and Release more than once.
type Hold struct {
	srv   *Server
	info  HoldInfo
	timer *time.Timer // nil without a time to live; guarded by the lock of Server.book
	ended context.Context
	end   context.CancelCauseFunc
}

// maxHolds bounds what somebody who pauses again and again, and never resumes, can pile up.
const maxHolds = 1024

// Pause stops admitting connections until the hold that it returns, and every other, is gone. When it
// returns the pause is in force: nobody is admitted any more. Connections that are being served
// notice nothing. It may be called before Serve. The error is a *DrainingError once a drain has
// begun, ErrTooManyHolds, or says which option makes no sense.
func (s *Server) Pause(o PauseOptions) (*Hold, error) {
	if err := CheckText(o.Reason); err != nil {
		return nil, fmt.Errorf("pausing: reason: %w", err)
	}
	if o.TTL < 0 {
		return nil, fmt.Errorf("pausing: time to live %s is negative", o.TTL)
	}
	if o.Mode != HoldNew && o.Mode != RejectNew {
		return nil, fmt.Errorf("pausing: unknown mode %d", o.Mode)
	}
	h := &Hold{srv: s, info: HoldInfo{Reason: o.Reason, Mode: o.Mode, Since: time.Now(), UID: o.UID, PID: o.PID}}
	h.ended, h.end = context.WithCancelCause(context.Background())

	var refused error
	s.book.With(func(l *ledger) {
		if l.state >= Draining {
			refused = &DrainingError{Deadline: l.drain.deadline}
			return
		}
		if len(l.holds) >= maxHolds {
			refused = ErrTooManyHolds
			return
		}
		before := l.status()
		l.lastHold++
		h.info.ID = fmt.Sprintf("h%d", l.lastHold)
		if o.TTL > 0 {
			h.info.Expires = h.info.Since.Add(o.TTL)
			h.timer = time.AfterFunc(o.TTL, func() { s.release(h, ErrExpired) })
		}
		l.holds = append(l.holds, h)
		l.publish(Event{Type: HoldPlaced, Hold: new(h.info)})
		l.announce(before)
		l.wakeAcceptors()
	})
	if refused != nil {
		h.end(refused)
		return nil, refused
	}
	s.log.Info("paused", holdFields(h.info)...)
	return h, nil
}

// ID names the hold among the server's.
func (h *Hold) ID() string { return h.info.ID }

// Info describes the hold.
func (h *Hold) Info() HoldInfo { return h.info }

// Done is closed when the hold is gone, whoever ended it.
func (h *Hold) Done() <-chan struct{} { return h.ended.Done() }

// Cause says why the hold is gone: ErrReleased, ErrResumed, ErrExpired or a *DrainingError; nil while it stands.
func (h *Hold) Cause() error { return context.Cause(h.ended) }

// Release takes the hold away; the server resumes when it was the last. It reports whether the hold still stood.
func (h *Hold) Release() bool { return h.srv.release(h, ErrReleased) }

func (s *Server) release(h *Hold, cause error) (stood bool) {
	var left int
	s.book.With(func(l *ledger) {
		i := slices.Index(l.holds, h)
		if stood = i >= 0; stood {
			l.drop(i, cause)
		}
		left = len(l.holds)
	})
	if stood {
		s.log.Info("hold released", append(holdFields(h.info), zap.NamedError("because", cause), zap.Int("holds_left", left))...)
	}
	return stood
}

// drop takes the i-th hold away.
func (l *ledger) drop(i int, cause error) {
	before, h := l.status(), l.holds[i]
	if h.timer != nil {
		h.timer.Stop()
	}
	l.holds = slices.Delete(l.holds, i, i+1)
	h.end(cause)
	l.publish(Event{Type: HoldReleased, Hold: new(h.info), Cause: cause.Error()})
	l.announce(before)
	if l.holding() {
		l.wakeAcceptors() // who may have been accepting to turn clients away
	}
}

// ReleaseHold releases the hold with the given id. The error is ErrNoHold, or a *DrainingError.
func (s *Server) ReleaseHold(id string) error {
	var found *Hold
	var err error
	s.book.With(func(l *ledger) {
		if l.state >= Draining {
			err = &DrainingError{Deadline: l.drain.deadline}
			return
		}
		if i := slices.IndexFunc(l.holds, func(h *Hold) bool { return h.info.ID == id }); i >= 0 {
			found = l.holds[i]
		}
	})
	switch {
	case err != nil:
		return err
	case found == nil || !s.release(found, ErrReleased):
		return fmt.Errorf("%w: %q", ErrNoHold, id)
	default:
		return nil
	}
}

// Resume releases every hold, and returns how many stood. When the server is not paused it does
// nothing. The error is a *DrainingError once a drain has begun.
func (s *Server) Resume() (released int, err error) {
	s.book.With(func(l *ledger) {
		if l.state >= Draining {
			err = &DrainingError{Deadline: l.drain.deadline}
			return
		}
		for len(l.holds) > 0 {
			l.drop(0, ErrResumed)
			released++
		}
	})
	if released > 0 {
		s.log.Info("resumed", zap.Int("holds_released", released))
	}
	return released, err
}

// WhilePaused calls f while the server is paused, and releases its hold whatever becomes of f. The
// context that f gets ends, with the cause, when the hold goes before f is done.
func (s *Server) WhilePaused(ctx context.Context, reason string, f func(context.Context) error) error {
	h, err := s.Pause(PauseOptions{Reason: reason})
	if err != nil {
		return err
	}
	defer h.Release()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(ErrReleased)
	defer context.AfterFunc(h.ended, func() { cancel(h.Cause()) })()
	return f(ctx)
}

func holdFields(h HoldInfo) []zap.Field {
	fields := []zap.Field{zap.String("hold", h.ID), zap.String("reason", h.Reason), zap.Stringer("mode", h.Mode)}
	if !h.Expires.IsZero() {
		fields = append(fields, zap.Time("expires", h.Expires))
	}
	if h.PID != 0 {
		fields = append(fields, zap.Int("uid", h.UID), zap.Int("pid", h.PID))
	}
	return fields
}
