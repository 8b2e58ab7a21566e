package control

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"echod/server"
)

// The endpoints that change something. Each says what it changed and, but for a pause and a notice, whose
// answers are the hold and the tally, what state holds then. All can be repeated without harm; a pause
// places a hold each time.

func (p *Plane) postPause(w *caller, r *http.Request, arg string) error {
	var connected bool
	if err := decodeQuery(r, fields{"while": exactly("connected", &connected)}); err != nil {
		return err
	}
	who := peerFrom(r.Context())
	opts := server.PauseOptions{UID: who.uid, PID: who.pid}
	ttl := time.Duration(-1)
	err := decodeBody(w, r, fields{"reason": text(&opts.Reason), "ttl": duration(&ttl), "mode": pauseMode(&opts.Mode)})
	switch {
	case err != nil:
		return err
	case ttl == 0:
		return invalid("ttl", "a pause of no time at all makes no sense")
	case ttl > 0:
		opts.TTL = ttl
	}
	if connected {
		return p.stream(w, r, func(w *caller, r *http.Request, _ string) error { return p.pauseWhileConnected(w, r, opts) })
	}
	h, err := p.srv.Pause(opts)
	if err != nil {
		return err
	}
	w.Header().Set("Location", "/v1/holds/"+h.ID())
	return answer(w, http.StatusCreated, wireHold(h.Info()))
}

// pauseWhileConnected holds the server paused until the caller has gone.
func (p *Plane) pauseWhileConnected(w *caller, r *http.Request, opts server.PauseOptions) error {
	h, err := p.srv.Pause(opts)
	if err != nil {
		return err
	}
	defer h.Release()
	p.logRequest(w, r, nil)
	w.Header().Set("Content-Type", "application/jsonl")
	w.Header().Set("Location", "/v1/holds/"+h.ID())
	w.WriteHeader(http.StatusCreated)
	lines := json.NewEncoder(w)
	if lines.Encode(wireHold(h.Info())) != nil {
		return nil // the caller has gone
	}
	select {
	case <-r.Context().Done():
	case <-h.Done():
		_ = lines.Encode(Released{Released: h.Cause().Error(), State: p.srv.Status().State.String()})
	}
	return nil
}

func (p *Plane) postResume(w *caller, r *http.Request, _ string) error {
	if err := errors.Join(decodeQuery(r, nil), decodeBody(w, r, nil)); err != nil {
		return err
	}
	n, err := p.srv.Resume()
	if err != nil {
		return err
	}
	return p.changed(w, Change{Changed: n > 0, Released: &n})
}

func (p *Plane) deleteHold(w *caller, r *http.Request, id string) error {
	if err := decodeQuery(r, nil); err != nil {
		return err
	}
	if err := p.srv.ReleaseHold(id); err != nil {
		return err
	}
	return p.changed(w, Change{Changed: true, Released: new(1)})
}

func (p *Plane) deleteConn(w *caller, r *http.Request, arg string) error {
	if err := decodeQuery(r, nil); err != nil {
		return err
	}
	id, err := strconv.ParseUint(arg, 10, 64)
	if err != nil {
		return invalid("id", "%s is not a connection's id", strconv.Quote(shorten(arg)))
	}
	if err := p.srv.Kill(id); err != nil {
		return err
	}
	return p.changed(w, Change{Changed: true, Killed: new(1)})
}

func (p *Plane) deleteConns(w *caller, r *http.Request, _ string) error {
	var all bool
	minIdle := time.Duration(-1)
	if err := decodeQuery(r, fields{"all": boolean(&all), "min_idle": duration(&minIdle)}); err != nil {
		return err
	}
	if all == (minIdle >= 0) {
		return invalid("all", "say which connections: all=true or min_idle, and not both")
	}
	n := p.srv.KillFunc(func(c server.ConnInfo) bool { return all || c.Idle >= minIdle })
	return p.changed(w, Change{Changed: n > 0, Killed: &n})
}

func (p *Plane) postNotify(w *caller, r *http.Request, _ string) error {
	var message string
	if err := errors.Join(decodeQuery(r, nil), decodeBody(w, r, fields{"text": text(&message)})); err != nil {
		return err
	}
	if message == "" {
		return invalid("text", "say what to tell the clients")
	}
	sent, failed, err := p.srv.Notify(r.Context(), message)
	if err != nil {
		return err
	}
	return answer(w, http.StatusOK, Notified{Sent: sent, Failed: failed})
}

func (p *Plane) postShutdown(w *caller, r *http.Request, _ string) error {
	reason, grace, now := "", time.Duration(-1), false
	err := errors.Join(
		decodeQuery(r, nil),
		decodeBody(w, r, fields{"grace": duration(&grace), "reason": text(&reason), "now": boolean(&now)}))
	switch {
	case err != nil:
		return err
	case now && grace > 0:
		return invalid("now", "now leaves no grace: say one or the other")
	}
	reason = cmp.Or(reason, "control")
	var changed bool
	switch {
	case now:
		changed = p.srv.Force(reason)
	case grace < 0:
		changed = p.srv.Drain(0, reason) // the server's own grace
	case grace == 0:
		changed = p.srv.Drain(-1, reason)
	default:
		changed = p.srv.Drain(grace, reason)
	}
	st := p.srv.Status()
	status := http.StatusOK
	if changed {
		status = http.StatusAccepted
	}
	return answer(w, status, Change{Changed: changed, State: st.State.String(), Drain: wireDrain(st.Drain)})
}

func (p *Plane) changed(w http.ResponseWriter, c Change) error {
	c.State = p.srv.Status().State.String()
	return answer(w, http.StatusOK, c)
}

func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
