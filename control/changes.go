package control

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"strconv"
	"time"

	"echod/server"
)

// Endpoints that change something. A repeated request has no further effect, except that each pause places a hold,
// each notify sends a message, and each extension moves the deadline. Most answer with the change and the new state;
// pause answers with its hold, and notify with the number of clients.

func (p *Plane) postPause(w *response, r *http.Request) error {
	var connected bool
	if err := decodeQuery(r, fields{"while": wordField("connected", &connected)}); err != nil {
		return err
	}
	who := callerFrom(r.Context())
	opts := server.PauseOptions{By: who.identity()}
	ttl, grace := time.Duration(-1), time.Duration(-1)
	err := decodeBody(w, r, fields{
		"reason": lineField(&opts.Reason), "ttl": durationField(&ttl), "mode": pauseModeField(&opts.Mode),
		"evict": boolField(&opts.Evict), "spread": durationField(&opts.Spread), "grace": durationField(&grace),
	})
	switch {
	case err != nil:
		return err
	case opts.Spread > 0 && !opts.Evict:
		return invalid("spread", "it needs evict")
	case grace >= 0 && !opts.Evict:
		return invalid("grace", "it needs evict")
	case ttl == 0:
		return invalid("ttl", "must be more than 0")
	case ttl > 0:
		opts.TTL = ttl
	}
	opts.Grace = drainOption(grace)
	if connected {
		return p.pauseWhileConnected(w, r, opts)
	}
	h, err := p.srv.Pause(opts)
	if err != nil {
		return err
	}
	w.Header().Set("Location", "/v1/holds/"+h.ID())
	return answerJSON(w, http.StatusCreated, NewHold(h.Info()))
}

func (p *Plane) postResume(w *response, r *http.Request) error {
	var all bool
	if err := errors.Join(decodeQuery(r, nil), decodeBody(w, r, fields{"all": boolField(&all)})); err != nil {
		return err
	}
	resume := p.srv.Resume
	if all {
		resume = p.srv.ResumeAll
	}
	n, err := resume(callerFrom(r.Context()).identity())
	if err != nil {
		return err
	}
	return p.answerChange(w, Change{Changed: n > 0, Released: &n})
}

func (p *Plane) deleteHold(w *response, r *http.Request) error {
	if err := decodeQuery(r, nil); err != nil {
		return err
	}
	if err := p.srv.ReleaseHold(r.PathValue("id"), callerFrom(r.Context()).identity()); err != nil {
		return err
	}
	return p.answerChange(w, Change{Changed: true, Released: new(1)})
}

func (p *Plane) deleteConn(w *response, r *http.Request) error {
	if err := decodeQuery(r, nil); err != nil {
		return err
	}
	id, err := strconv.ParseUint(r.PathValue("id"), 10, 64)
	if err != nil {
		return invalid("id", "%s is not a connection's id", strconv.Quote(shorten(r.PathValue("id"))))
	}
	if err := p.srv.Kill(id); err != nil {
		return err
	}
	return p.answerChange(w, Change{Changed: true, Killed: new(1)})
}

func (p *Plane) postNotify(w *response, r *http.Request) error {
	var message string
	if err := errors.Join(decodeQuery(r, nil), decodeBody(w, r, fields{"text": lineField(&message)})); err != nil {
		return err
	}
	if message == "" {
		return invalid("text", "say what to tell the clients")
	}
	// A caller that half-closes still gets its answer. The server bounds the time.
	sent, failed, err := p.srv.Notify(context.WithoutCancel(r.Context()), message)
	if err != nil {
		return err
	}
	return answerJSON(w, http.StatusOK, Notified{Sent: sent, Failed: failed})
}

func (p *Plane) postShutdown(w *response, r *http.Request) error {
	reason, grace, spread, extend := "", time.Duration(-1), time.Duration(-1), time.Duration(-1)
	var now, predecessor bool
	err := errors.Join(
		decodeQuery(r, nil),
		decodeBody(w, r, fields{
			"grace": durationField(&grace), "spread": durationField(&spread), "extend": durationField(&extend), "reason": lineField(&reason),
			"now": boolField(&now), "predecessor": boolField(&predecessor),
		}))
	switch {
	case err != nil:
		return err
	case now && (grace > 0 || spread > 0):
		return invalid("now", "now leaves no grace period: give either now, or grace and spread")
	case extend == 0:
		return invalid("extend", "must be more than 0")
	case extend > 0 && (now || grace >= 0 || spread >= 0 || reason != ""):
		return invalid("extend", "it cannot be given with something else")
	case extend > 0:
		return p.extendDrain(w, r, extend)
	}
	opts := server.DrainOptions{Grace: drainOption(grace), Spread: drainOption(spread), Reason: cmp.Or(reason, "control")}
	if predecessor {
		if err := p.srv.DrainPredecessor(opts, now); err != nil {
			return err
		}
		return answerJSON(w, http.StatusAccepted, Change{Changed: true, State: p.srv.Status().State.String()})
	}
	var changed bool
	if now {
		changed = p.srv.Force(opts.Reason)
	} else {
		changed = p.srv.StartDrain(opts)
	}
	return p.answerDrain(w, Change{Changed: changed})
}

// drainOption returns the value of a DrainOptions field for d from a request. If d is negative, the request does not
// give it, and the server's default applies.
func drainOption(d time.Duration) time.Duration {
	switch {
	case d < 0:
		return 0
	case d == 0:
		return server.Off
	default:
		return d
	}
}

func (p *Plane) extendDrain(w *response, r *http.Request, d time.Duration) error {
	extended, err := p.srv.ExtendDrain(d, callerFrom(r.Context()).identity())
	if err != nil {
		return err
	}
	return p.answerDrain(w, Change{Changed: extended > 0, ExtendedSeconds: new(extended.Seconds())})
}

func (p *Plane) deleteShutdown(w *response, r *http.Request) error {
	if err := errors.Join(decodeQuery(r, nil), decodeBody(w, r, nil)); err != nil {
		return err
	}
	if err := p.srv.CancelDrain(callerFrom(r.Context()).identity()); err != nil {
		return err
	}
	return p.answerChange(w, Change{Changed: true})
}

// answerDrain answers a request about a drain: 202 if it changed something.
func (p *Plane) answerDrain(w http.ResponseWriter, c Change) error {
	st := p.srv.Status()
	c.State, c.Drain = st.State.String(), wireDrain(st.Drain)
	status := http.StatusOK
	if c.Changed {
		status = http.StatusAccepted
	}
	return answerJSON(w, status, c)
}

// postUpgrade replaces the running program. The answer comes from the predecessor.
func postUpgrade(upgrade func(context.Context, time.Duration) (Upgraded, error)) endpoint {
	return func(w *response, r *http.Request) error {
		timeout := time.Duration(-1)
		if err := errors.Join(decodeQuery(r, nil),
			decodeBody(w, r, fields{"timeout": durationField(&timeout)})); err != nil {
			return err
		}
		if timeout == 0 {
			return invalid("timeout", "must be more than 0")
		}
		// The answer comes when the successor is ready. The upgrade continues if the caller leaves.
		_ = http.NewResponseController(w).SetWriteDeadline(time.Time{})
		done, err := upgrade(context.WithoutCancel(r.Context()), max(0, timeout))
		if err != nil {
			return err
		}
		return answerJSON(w, http.StatusOK, done)
	}
}

func (p *Plane) answerChange(w http.ResponseWriter, c Change) error {
	c.State = p.srv.Status().State.String()
	return answerJSON(w, http.StatusOK, c)
}
