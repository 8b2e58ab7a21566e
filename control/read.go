package control

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"time"

	"echod/server"
)

// The endpoints that change nothing.

func (p *Plane) getStatus(w *caller, r *http.Request, _ string) error {
	if err := decodeQuery(r, nil); err != nil {
		return err
	}
	return answer(w, http.StatusOK, wireStatus(p.srv.Status(), p.version))
}

func (p *Plane) getConns(w *caller, r *http.Request, _ string) error {
	limit, minIdle := -1, time.Duration(0)
	if err := decodeQuery(r, fields{"limit": count(&limit), "min_idle": duration(&minIdle)}); err != nil {
		return err
	}
	list := newListing(w)
	for c := range p.srv.Conns() {
		if limit >= 0 && list.length >= limit {
			break
		}
		if c.Idle >= minIdle && list.add(wireConn(c)) != nil {
			return nil // the caller has gone
		}
	}
	list.end()
	return nil
}

func (p *Plane) getClosed(w *caller, r *http.Request, _ string) error {
	limit := -1
	if err := decodeQuery(r, fields{"limit": count(&limit)}); err != nil {
		return err
	}
	list := ClosedConns{Connections: []ClosedConn{}}
	for _, c := range p.srv.Closed() {
		if limit >= 0 && len(list.Connections) >= limit {
			break
		}
		list.Connections = append(list.Connections, wireClosed(c))
	}
	return answer(w, http.StatusOK, list)
}

var errWaitTimeout = errors.New("the wait timed out")

func (p *Plane) getWait(w *caller, r *http.Request, _ string) error {
	var (
		wanted  server.State
		open    = -1
		timeout time.Duration
	)
	if err := decodeQuery(r, fields{"state": state(&wanted), "connections": count(&open), "timeout": duration(&timeout)}); err != nil {
		return err
	}
	if wanted == server.Starting {
		return invalid("state", "a server that answers has started")
	}
	query := r.URL.Query()
	if wanted == 0 && open < 0 {
		return invalid("state", "say what to wait for: state, connections or both")
	}
	ctx := r.Context()
	if query.Has("timeout") {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, timeout, errWaitTimeout)
		defer cancel()
	}

	var seen Waited
	var met bool
	err := p.srv.AwaitStatus(ctx, func(st server.State, connections int) bool {
		seen = Waited{State: st.String(), Connections: connections}
		met = (wanted == 0 || st == wanted) && (open < 0 || connections == open)
		hopeless := st == server.Stopped || st == server.Draining && wanted != 0 && wanted < server.Draining
		return met || hopeless
	})
	switch {
	case err != nil:
		return &Problem{
			Type: ProblemTimeout, Title: "The wait timed out", Status: http.StatusRequestTimeout,
			Detail: "the wait timed out: the server is " + seen.State + " with " + plural(seen.Connections, "connection"), State: seen.State,
		}
	case !met:
		st := p.srv.Status()
		return &server.DrainingError{Deadline: cmp.Or(st.Drain, &server.DrainInfo{}).Deadline}
	default:
		return answer(w, http.StatusOK, seen)
	}
}

func (p *Plane) getEvents(w *caller, r *http.Request, _ string) error {
	if err := decodeQuery(r, nil); err != nil {
		return err
	}
	sub := p.srv.Subscribe()
	defer sub.Close()

	w.Header().Set("Content-Type", "application/jsonl")
	w.WriteHeader(http.StatusOK)
	lines := json.NewEncoder(w)
	for e := range sub.Events(r.Context()) {
		if lines.Encode(wireEvent(e)) != nil {
			return nil // the caller has gone, or reads nothing
		}
	}
	return nil
}
