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

// Endpoints that change something. Each can be repeated without harm, except that every pause places a hold.
// Most answer what has changed and the state after that; a pause answers its hold, a notice how many got it.

func (p *Plane) postPause(w *response, r *http.Request) error {
	var connected bool
	if err := decodeQuery(r, fields{"while": exactly("connected", &connected)}); err != nil {
		return err
	}
	who := callerFrom(r.Context())
	opts := server.PauseOptions{By: who.identity()}
	ttl := time.Duration(-1)
	err := decodeBody(w, r, fields{"reason": line(&opts.Reason), "ttl": duration(&ttl), "mode": pauseMode(&opts.Mode)})
	switch {
	case err != nil:
		return err
	case ttl == 0:
		return invalid("ttl", "must be more than 0")
	case ttl > 0:
		opts.TTL = ttl
	}
	if connected {
		return p.pauseWhileConnected(w, r, opts)
	}
	h, err := p.srv.Pause(opts)
	if err != nil {
		return err
	}
	w.Header().Set("Location", "/v1/holds/"+h.ID())
	return answerJSON(w, http.StatusCreated, wireHold(h.Info()))
}

func (p *Plane) postResume(w *response, r *http.Request) error {
	if err := errors.Join(decodeQuery(r, nil), decodeBody(w, r, nil)); err != nil {
		return err
	}
	n, err := p.srv.Resume(callerFrom(r.Context()).identity())
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

func (p *Plane) deleteConns(w *response, r *http.Request) error {
	all, minIdle, identity := false, time.Duration(-1), ""
	if err := decodeQuery(r, fields{"all": boolean(&all), "min_idle": duration(&minIdle), "identity": line(&identity)}); err != nil {
		return err
	}
	if all == (minIdle >= 0 || identity != "") {
		return invalid("all", "say which connections: either all=true, or min_idle, identity or both")
	}
	n := p.srv.KillFunc(func(c server.ConnInfo) bool { return c.Idle >= minIdle && hasIdentity(c, identity) })
	return p.answerChange(w, Change{Changed: n > 0, Killed: &n})
}

func (p *Plane) postNotify(w *response, r *http.Request) error {
	var message string
	if err := errors.Join(decodeQuery(r, nil), decodeBody(w, r, fields{"text": line(&message)})); err != nil {
		return err
	}
	if message == "" {
		return invalid("text", "say what to tell the clients")
	}
	// A caller that half-closes gets its answer too. The server bounds how long it takes.
	sent, failed, err := p.srv.Notify(context.WithoutCancel(r.Context()), message)
	if err != nil {
		return err
	}
	return answerJSON(w, http.StatusOK, Notified{Sent: sent, Failed: failed})
}

func (p *Plane) postShutdown(w *response, r *http.Request) error {
	reason, grace, now := "", time.Duration(-1), false
	err := errors.Join(
		decodeQuery(r, nil),
		decodeBody(w, r, fields{"grace": duration(&grace), "reason": line(&reason), "now": boolean(&now)}))
	switch {
	case err != nil:
		return err
	case now && grace > 0:
		return invalid("now", "now leaves no grace period: give either now or grace")
	}
	reason = cmp.Or(reason, "control")
	var changed bool
	switch {
	case now:
		changed = p.srv.Force(reason)
	case grace < 0:
		changed = p.srv.StartDrain(server.DrainOptions{Reason: reason}) // the server's own grace period
	case grace == 0:
		changed = p.srv.StartDrain(server.DrainOptions{Grace: server.Off, Reason: reason})
	default:
		changed = p.srv.StartDrain(server.DrainOptions{Grace: grace, Reason: reason})
	}
	st := p.srv.Status()
	status := http.StatusOK
	if changed {
		status = http.StatusAccepted
	}
	return answerJSON(w, status, Change{Changed: changed, State: st.State.String(), Drain: wireDrain(st.Drain)})
}

// postUpgrade replaces the running program. The answer comes from the predecessor.
func postUpgrade(upgrade func(context.Context, time.Duration) (Upgraded, error)) endpoint {
	return func(w *response, r *http.Request) error {
		timeout := time.Duration(-1)
		if err := errors.Join(decodeQuery(r, nil),
			decodeBody(w, r, fields{"timeout": duration(&timeout)})); err != nil {
			return err
		}
		if timeout == 0 {
			return invalid("timeout", "must be more than 0")
		}
		// An answer takes as long as the successor needs; a caller that goes does not stop it.
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
