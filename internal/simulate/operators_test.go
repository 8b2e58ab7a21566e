package simulate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	"echod/control"
	"echod/server"
)

// opResult is what an operator did, and what the server answered.
type opResult struct {
	plan         opPlan
	on           *generation
	began, ended time.Time
	target       *trace // of a kill
	holdID       string // of a release
	code         int
	hold         control.Hold
	change       control.Change
	settings     control.SettingsChanged
	notified     control.Notified
	text         string
	upgraded     bool
	report       server.HandoverReport
	err          error // of an upgrade, or of the request
}

// perform performs one action, and gives the result to the model.
func (w *world) perform(op opPlan) {
	w.opsInProgress.Add(1)
	w.opEvents.Add(1)
	defer func() {
		w.opEvents.Add(1)
		w.opsInProgress.Add(-1)
	}()
	r := &opResult{plan: op, on: w.current(), began: time.Now()}
	w.model.started(r)
	w.act(r)
	r.ended = time.Now()
	w.note("operator: %s: %s", op, r.answer())
	w.model.checkOp(r)
}

func (w *world) act(r *opResult) {
	op := r.plan
	switch op.Do {
	case "pause":
		w.pause(r)
	case "resume":
		w.request(r, http.MethodPost, "/v1/resume", map[string]any{"all": true}, &r.change)
	case "release":
		r.holdID = w.model.holdID(op.Which)
		w.request(r, http.MethodDelete, "/v1/holds/"+r.holdID, nil, &r.change)
	case "kill":
		r.target = w.traces[op.Which%len(w.traces)]
		if id := w.idOf(r.target); id > 0 {
			w.request(r, http.MethodDelete, fmt.Sprintf("/v1/conns/%d", id), nil, &r.change)
		}
	case "killidle":
		w.request(r, http.MethodDelete, "/v1/conns?min_idle="+op.TTL.String(), nil, &r.change)
	case "killall":
		w.request(r, http.MethodDelete, "/v1/conns?all=true", nil, &r.change)
	case "notify":
		r.text = fmt.Sprintf("message %d", w.model.nextMessage())
		w.request(r, http.MethodPost, "/v1/notify", map[string]any{"text": r.text}, &r.notified)
	case "drain":
		body := map[string]any{"reason": toldDrain}
		if op.TTL >= 0 {
			body["grace"] = op.TTL.String()
		}
		if op.Spread > 0 {
			body["spread"] = op.Spread.String()
		}
		w.request(r, http.MethodPost, "/v1/shutdown", body, &r.change)
	case "extend":
		w.request(r, http.MethodPost, "/v1/shutdown", map[string]any{"extend": op.TTL.String()}, &r.change)
	case "cancel":
		w.request(r, http.MethodDelete, "/v1/shutdown", nil, &r.change)
	case "set":
		w.request(r, http.MethodPatch, "/v1/settings", map[string]any{op.Set: op.value()}, &r.settings)
	case "force":
		w.request(r, http.MethodPost, "/v1/shutdown", map[string]any{"now": true, "reason": toldDrain}, &r.change)
	case "upgrade":
		w.upgrade(r)
	}
}

// request makes a request on the control plane.
func (w *world) request(r *opResult, method, path string, body map[string]any, answer any) {
	var text []byte
	if body != nil {
		text, _ = json.Marshal(body) // strings and booleans
	}
	var got []byte
	r.code, got, _, r.err = w.call(r.on, method, path, string(text), false)
	if r.err == nil && r.code < 300 {
		r.err = json.Unmarshal(got, answer)
	}
}

func (w *world) pause(r *opResult) {
	op := r.plan
	body := map[string]any{"reason": toldDrain, "mode": op.Mode}
	if op.Evict {
		body["reason"], body["evict"] = toldEvict, true
		if op.Spread > 0 {
			body["spread"] = op.Spread.String()
		}
	}
	if !op.While {
		if op.TTL > 0 {
			body["ttl"] = op.TTL.String()
		}
		w.request(r, http.MethodPost, "/v1/pause", body, &r.hold)
		return
	}
	text, _ := json.Marshal(body)
	code, line, nc, err := w.call(r.on, http.MethodPost, "/v1/pause?while=connected", string(text), true)
	r.code, r.err = code, err
	if code == http.StatusCreated && err == nil {
		r.err = json.Unmarshal(line, &r.hold)
		time.AfterFunc(op.TTL, func() {
			w.model.callerLeaves(r.hold.ID)
			_ = nc.Close()
		})
	} else if nc != nil {
		_ = nc.Close()
	}
}

// idOf returns the id of a client's connection; 0 if it has none.
func (w *world) idOf(t *trace) uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	if ids := w.records[t].ids; len(ids) > 0 {
		return ids[0]
	}
	return 0
}

var errRefused = errors.New("refused by the test")

// upgrade hands the server over to the next generation.
func (w *world) upgrade(r *opResult) {
	from := r.on
	w.mu.Lock()
	to := &generation{name: fmt.Sprintf("server %d", len(w.all)+1)}
	w.all = append(w.all, to)
	w.mu.Unlock()
	near, far, err := w.platform.links(from, to, r.plan.Fault)
	if err != nil {
		r.err = err
		return
	}
	taken := make(chan error, 1)
	to.serving.Go(func() { taken <- w.takeOver(to, far, r.plan.Refuse) })
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	freeze := time.Duration(0)
	if w.shape.sockets { // the machine may be busy
		freeze = 5 * time.Second
	}
	r.report, r.err = from.srv.HandOver(ctx, near, server.HandoverOptions{
		FreezeTimeout: freeze,
		Program:       from.name,
		Kill:          func() { w.platform.kill(to) },
		Committed: func() {
			w.mu.Lock()
			w.owner = to
			w.mu.Unlock()
		},
		Keep: keepTime,
	})
	r.upgraded = r.err == nil
	if err := <-taken; err == nil && !r.upgraded && !w.platform.isDead(to) {
		w.violate("an upgrade leaves one owner", "HandOver: %v, and TakeOver succeeded", r.err)
	} else if err != nil && r.upgraded {
		w.violate("an upgrade leaves one owner", "HandOver succeeded, and TakeOver: %v", err)
	}
}

// takeOver is the next generation's side.
func (w *world) takeOver(to *generation, link server.Link, refuse bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	offer, err := server.ReceiveOffer(ctx, link)
	if err != nil {
		return err
	}
	if refuse || len(offer.Listeners) != 2 {
		offer.Refuse(errRefused)
		for _, l := range offer.Listeners {
			_ = l.Close()
		}
		return errRefused
	}
	if err := to.start(w); err != nil {
		return err
	}
	listeners := offer.Listeners
	for i := range listeners {
		listeners[i].Inherited = false
		if listeners[i].Addr().String() == w.current().service.Addr().String() {
			listeners[i].Handler = service{w}
			to.service = listeners[i].Listener
		} else {
			to.echo = listeners[i].Listener
		}
	}
	if err := to.srv.TakeOver(ctx, offer, listeners); err != nil {
		for _, l := range listeners {
			_ = l.Close()
		}
		return err
	}
	to.owned = true
	to.plane.ContinuePauses()
	to.serve(w, server.Listener{Listener: to.echo}, server.Listener{Listener: to.service})
	return nil
}

// answer says how an action ended, for people.
func (r *opResult) answer() string {
	switch {
	case r.err != nil:
		return r.err.Error()
	case r.plan.Do == "upgrade":
		return fmt.Sprintf("handed over %d, behind %v, frozen %v", r.report.HandedOver, r.report.Kept, r.report.Frozen)
	case r.plan.Do == "notify":
		return fmt.Sprintf("%q sent %d, failed %d", r.text, r.notified.Sent, r.notified.Failed)
	case r.hold.ID != "":
		return fmt.Sprintf("%d %s", r.code, r.hold.ID)
	case r.code != 0:
		return fmt.Sprint(r.code)
	default:
		return "nothing to do"
	}
}
