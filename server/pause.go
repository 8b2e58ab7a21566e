package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"go.uber.org/zap"
)

// Caller identifies the process that made a request, for logs and events. A zero PID means that it is unknown.
type Caller struct {
	UID, PID int
	User     string // the name of UID; empty if it is not known
	Claims   string // what the caller says about itself, unverified
}

func (c Caller) fields(prefix string) []zap.Field {
	if c.PID == 0 {
		return nil
	}
	fields := []zap.Field{zap.Int(prefix+"uid", c.UID), zap.Int(prefix+"pid", c.PID)}
	if c.User != "" {
		fields = append(fields, zap.String(prefix+"user", c.User))
	}
	if c.Claims != "" {
		fields = append(fields, zap.String(prefix+"claims", c.Claims))
	}
	return fields
}

// PauseOptions describes a pause. The zero value is a hold without a reason that lasts until it is released.
type PauseOptions struct {
	Reason string        // one line of text
	TTL    time.Duration // time after which the hold ends by itself; zero and Off mean never
	Mode   PauseMode
	By     Caller
	// Evict sends the connected clients away: each is told to leave, with Reason or "evicted", has
	// Grace, and is then closed with ReasonEvicted. The server stays up. When the hold ends, clients that have not been
	// told stay connected. Those that have been told are still closed.
	Evict bool
	// Spread is the time over which these clients are told, one after another at random moments. Zero and Off mean
	// all at once.
	Spread time.Duration
	// Grace is the time that each of these clients has after it was told. Zero means Options.Drain.Grace, and Off means
	// none.
	Grace time.Duration
	// Conn is the connection on which the hold depends, for example that of the caller of a control plane. A handover
	// passes it on with the hold; see TakenOverHolds. The server does not use it otherwise: the caller must release the
	// hold when the connection ends.
	Conn net.Conn
}

// HoldInfo describes a hold.
type HoldInfo struct {
	ID      string
	Reason  string
	Mode    PauseMode
	Since   time.Time
	Expires time.Time // zero if the hold does not expire
	By      Caller
	Evict   bool          // clients are sent away
	Spread  time.Duration // time over which clients are told, from Since
	Grace   time.Duration // of each client, from when it is told; Off is none
}

// A Hold is one reason for the server to be paused. The server is paused while any hold exists. All methods may be
// called concurrently, and Release more than once.
type Hold struct {
	srv       *Server
	info      HoldInfo
	conn      net.Conn    // PauseOptions.Conn
	takenOver bool        // taken over with conn, and not returned by TakenOverHolds yet; guarded by Server.state
	timer     *time.Timer // nil without a TTL; guarded by Server.state
	cause     *drainCause // nil without an eviction; set once
	ended     context.Context
	end       context.CancelCauseFunc
}

// maxHolds bounds the memory for holds, in case a caller pauses repeatedly and never resumes.
const maxHolds = 1024

// Pause stops admitting connections until the hold that it returns, and every other hold, has ended. The pause is in
// force when Pause returns. Connections that are being served are not affected, unless o.Evict sends them away. It
// may be called before Serve. The error is a *DrainingError once a drain has begun, ErrTooManyHolds, or names an
// invalid option.
func (s *Server) Pause(o PauseOptions) (*Hold, error) {
	if s.log == nil {
		return nil, errNotNew
	}
	if err := CheckText(o.Reason); err != nil {
		return nil, fmt.Errorf("pausing: reason: %w", err)
	}
	if o.TTL < Off {
		return nil, fmt.Errorf("pausing: TTL %s is negative", o.TTL)
	}
	if o.Spread < Off {
		return nil, fmt.Errorf("pausing: spread %s is negative", o.Spread)
	}
	if o.Grace < Off {
		return nil, fmt.Errorf("pausing: grace %s is negative", o.Grace)
	}
	if o.Spread > 0 && !o.Evict {
		return nil, errors.New("pausing: a spread needs Evict")
	}
	if o.Grace != 0 && !o.Evict {
		return nil, errors.New("pausing: a grace period needs Evict")
	}
	if o.Mode != PauseQueue && o.Mode != PauseReject {
		return nil, fmt.Errorf("pausing: unknown mode %d", o.Mode)
	}
	if err := s.AwaitOwner(); err != nil {
		return nil, err
	}
	h := &Hold{srv: s, conn: o.Conn, info: HoldInfo{Reason: o.Reason, Mode: o.Mode, Since: time.Now(), By: o.By}}
	if o.Evict {
		h.info.Evict, h.info.Spread = true, max(0, o.Spread)
		h.info.Grace = cmp.Or(o.Grace, s.activeSettings().drain.Grace, Off)
	}
	h.ended, h.end = context.WithCancelCause(context.Background())

	var refused error
	s.state.With(func(st *state) {
		switch {
		case st.handedOver:
			refused = ErrHandedOver
			return
		case st.lifecycle >= StateDraining:
			refused = &DrainingError{Deadline: st.drain.deadline}
			return
		}
		if len(st.holds) >= maxHolds {
			refused = ErrTooManyHolds
			return
		}
		before := st.publicState()
		st.lastHold++
		h.info.ID = fmt.Sprintf("h%d", st.lastHold)
		if o.TTL > 0 {
			h.info.Expires = h.info.Since.Add(o.TTL)
			h.timer = time.AfterFunc(o.TTL, func() { s.release(h, ErrExpired, Caller{}) })
		}
		st.holds = append(st.holds, h)
		s.evict(st, h)
		st.publish(Event{Type: EventHoldPlaced, Hold: new(h.info)})
		st.publishChange(before)
		st.interruptAcceptors()
	})
	if refused != nil {
		h.end(refused)
		return nil, refused
	}
	s.log.Info("paused", h.info.fields()...)
	return h, nil
}

// evict begins the eviction that h asks for, or continues it after a handover.
func (s *Server) evict(st *state, h *Hold) {
	if h.info.Evict {
		reason := cmp.Or(h.info.Reason, ReasonEvicted.String())
		grace := max(0, cmp.Or(h.info.Grace, s.activeSettings().drain.Grace)) // older predecessors hand over none
		h.cause = &drainCause{reason: reason, closed: ReasonEvicted, grace: grace}
		s.scheduleNotices(st, h.cause, st.untold(), h.info.Since.Add(h.info.Spread))
	}
}

// ID returns the hold's id, which is unique in the server.
func (h *Hold) ID() string { return h.info.ID }

// Info describes the hold.
func (h *Hold) Info() HoldInfo { return h.info }

// Done returns a channel that is closed when the hold has ended.
func (h *Hold) Done() <-chan struct{} { return h.ended.Done() }

// Cause returns why the hold has ended: ErrReleased, ErrResumed, ErrExpired or a *DrainingError. It returns nil while the
// hold exists.
func (h *Hold) Cause() error { return context.Cause(h.ended) }

// Release ends the hold, and resumes the server if it was the last one. It reports whether the hold existed.
func (h *Hold) Release() bool { return h.srv.release(h, ErrReleased, h.info.By) }

func (s *Server) release(h *Hold, cause error, by Caller) (existed bool) {
	var left int
	s.state.With(func(st *state) {
		i := slices.Index(st.holds, h)
		if existed = i >= 0; existed {
			st.endHold(i, cause, by)
		}
		left = len(st.holds)
	})
	if existed {
		s.logReleased(h.info, cause, by, left)
	}
	return existed
}

func (s *Server) logReleased(h HoldInfo, cause error, by Caller, left int) {
	fields := slices.Concat(h.fields(), by.fields("released_by_"),
		[]zap.Field{zap.NamedError("cause", cause), zap.Int("holds_left", left)})
	s.log.Info("hold released", fields...)
}

// endHold ends the i-th hold.
func (st *state) endHold(i int, cause error, by Caller) {
	before, h := st.publicState(), st.holds[i]
	if h.timer != nil {
		h.timer.Stop()
	}
	if h.cause != nil {
		h.cause.stopped = true
	}
	st.holds = slices.Delete(st.holds, i, i+1)
	h.end(cause)
	st.publish(Event{Type: EventHoldReleased, Hold: new(h.info), Cause: cause.Error(), By: by})
	st.publishChange(before)
	st.interruptAcceptors() // loops that accept connections to reject them may have to stop
}

// ReleaseHold releases the hold with the given id on behalf of by. The error is ErrNoHold or a *DrainingError.
func (s *Server) ReleaseHold(id string, by Caller) error {
	if err := s.AwaitOwner(); err != nil {
		return err
	}
	var found *Hold
	var err error
	s.state.With(func(st *state) {
		if st.lifecycle >= StateDraining {
			err = &DrainingError{Deadline: st.drain.deadline}
			return
		}
		if i := slices.IndexFunc(st.holds, func(h *Hold) bool { return h.info.ID == id }); i >= 0 {
			found = st.holds[i]
		}
	})
	switch {
	case err != nil:
		return err
	case found == nil || !s.release(found, ErrReleased, by):
		return fmt.Errorf("%w: %q", ErrNoHold, id)
	default:
		return nil
	}
}

// Resume releases the only hold on behalf of by, and returns how many it released: one, or zero if there was none. If
// there are several, it releases none, because their owners may rely on them, and the error is a *HoldsError. The
// error is a *DrainingError once a drain has begun.
func (s *Server) Resume(by Caller) (released int, err error) { return s.resume(by, false) }

// ResumeAll releases every hold on behalf of by, and returns how many there were. The error is a *DrainingError once
// a drain has begun.
func (s *Server) ResumeAll(by Caller) (released int, err error) { return s.resume(by, true) }

func (s *Server) resume(by Caller, all bool) (released int, err error) {
	if s.log == nil {
		return 0, errNotNew
	}
	if err := s.AwaitOwner(); err != nil {
		return 0, err
	}
	var ended []HoldInfo
	s.state.With(func(st *state) {
		switch {
		case st.lifecycle >= StateDraining:
			err = &DrainingError{Deadline: st.drain.deadline}
			return
		case len(st.holds) > 1 && !all:
			err = &HoldsError{st.holdInfos()}
			return
		}
		for len(st.holds) > 0 {
			ended = append(ended, st.holds[0].info)
			st.endHold(0, ErrResumed, by)
		}
	})
	for i, h := range ended {
		s.logReleased(h, ErrResumed, by, len(ended)-1-i)
	}
	if len(ended) > 0 {
		s.log.Info("resumed", append(by.fields(""), zap.Int("holds_released", len(ended)))...)
	}
	return len(ended), err
}

func (st *state) holdInfos() (infos []HoldInfo) {
	for _, h := range st.holds {
		infos = append(infos, h.info)
	}
	return infos
}

// TakenOverHolds returns the holds that were taken over with a connection (PauseOptions.Conn), and these connections.
// Call it once after TakeOver, and release each hold when its connection ends.
func (s *Server) TakenOverHolds() (holds []*Hold, conns []net.Conn) {
	s.state.With(func(st *state) {
		for _, h := range st.holds {
			if h.takenOver {
				h.takenOver = false
				holds, conns = append(holds, h), append(conns, h.conn)
			}
		}
	})
	return holds, conns
}

// WhilePaused calls f while the server is paused, and releases its hold when f returns or panics. If the hold ends
// earlier, f's context is cancelled with the cause.
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

func (h HoldInfo) fields() []zap.Field {
	fields := []zap.Field{zap.String("hold", h.ID), zap.String("reason", h.Reason), zap.Stringer("mode", h.Mode)}
	if !h.Expires.IsZero() {
		fields = append(fields, zap.Time("expires", h.Expires))
	}
	if h.Evict {
		fields = append(fields, zap.Bool("evict", true), zap.Duration("spread", h.Spread), zap.Duration("grace", max(0, h.Grace)))
	}
	return append(fields, h.By.fields("placed_by_")...)
}
