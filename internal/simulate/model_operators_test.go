package simulate

import (
	"slices"
	"time"
)

// checkOp checks the answer to a request, and updates the model.
func (m *model) checkOp(r *opResult) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.pending, r)
	upgrading := m.overlapsUpgrade(r)
	limit := answerTime
	switch {
	case r.plan.Do == "upgrade":
		limit = 20 * time.Second
	case upgrading:
		limit += freezeTime + commitTime
	case r.plan.Do == "notify":
		limit += time.Second // for clients that do not read
	}
	if took := r.ended.Sub(r.began); took > limit+m.w.slack() {
		m.w.violate("operators are answered in time", "%s took %v", r.plan, took)
	}
	if r.plan.Do != "upgrade" && r.err != nil {
		m.w.violate("the control plane answers", "%s: %v", r.plan, r.err)
		return
	}
	refused := r.code == 409
	switch r.plan.Do {
	case "pause", "resume", "release":
		if refused && m.drain == nil && !upgrading {
			m.w.violate("only a drain refuses a pause or a resume", "%s: refused, and there is no drain", r.plan)
		}
		if !refused && m.drain != nil && m.drain.began.Before(r.began) && !upgrading {
			m.w.violate("a drain refuses a pause or a resume", "%s: code %d in a drain", r.plan, r.code)
		}
	}
	switch r.plan.Do {
	case "pause":
		m.checkPause(r)
	case "resume":
		m.checkResume(r, upgrading)
	case "release":
		m.checkRelease(r, upgrading)
	case "kill", "killall", "killidle":
		if r.code == 200 && r.change.Killed != nil {
			m.killed += *r.change.Killed
		}
	case "drain", "force":
		m.checkDrain(r, upgrading)
	case "upgrade":
		m.checkUpgrade(r)
	}
}

// checkPause requires the hold in the answer to be the one that was requested.
func (m *model) checkPause(r *opResult) {
	if r.code != 201 {
		return
	}
	h := &modelHold{id: r.hold.ID, mode: r.plan.Mode, requested: r.began, inForce: r.ended}
	if r.hold.Mode != r.plan.Mode {
		m.w.violate("a hold is as requested", "%s has mode %s, want %s", r.hold.ID, r.hold.Mode, r.plan.Mode)
	}
	if r.plan.TTL > 0 && !r.plan.While {
		h.expires = r.began.Add(r.plan.TTL)
		if r.hold.Expires == nil || r.hold.Expires.Before(h.expires) || r.hold.Expires.After(r.ended.Add(r.plan.TTL)) {
			m.w.violate("a hold is as requested", "%s expires %v, want %v", r.hold.ID, r.hold.Expires, h.expires)
		}
		h.expires = *r.hold.Expires
	} else if r.hold.Expires != nil {
		m.w.violate("a hold is as requested", "%s expires, and should not", r.hold.ID)
	}
	if slices.ContainsFunc(m.holds, func(o *modelHold) bool { return o.id == h.id }) {
		m.w.violate("ids of holds are unique", "%s exists already", h.id)
	}
	m.holds = append(m.holds, h)
}

// checkResume requires all holds to be released. The answer must say how many there were; a hold that ends at the same
// time may be counted or not.
func (m *model) checkResume(r *opResult, upgrading bool) {
	if r.code != 200 {
		return
	}
	live, ending := 0, 0
	for _, h := range m.holds {
		switch {
		case h.live(r.began):
			live++
			h.earliestEnd, h.latestEnd = r.began, r.ended
		case h.callerLeft && r.ended.Sub(h.earliestEnd) < 100*time.Millisecond, h.mayEnd().Equal(r.began):
			ending++
		}
	}
	if r.change.Released == nil || *r.change.Released < live || *r.change.Released > live+ending {
		if !upgrading {
			m.w.violate("resume releases every hold", "answered %v, want %d", deref(r.change.Released), live)
		}
	}
}

// checkRelease requires a hold to be released if and only if it is in force.
func (m *model) checkRelease(r *opResult, upgrading bool) {
	i := slices.IndexFunc(m.holds, func(h *modelHold) bool { return h.id == r.holdID })
	switch {
	case r.code == 200 && (i < 0 || !m.holds[i].live(r.began) && !m.holds[i].callerLeft && !m.holds[i].mayEnd().Equal(r.began)):
		m.w.violate("only an active hold is released", "%s: released", r.plan)
	case r.code == 404 && i >= 0 && m.holds[i].live(r.ended) && !upgrading:
		m.w.violate("an active hold is released", "%s: not found", r.plan)
	case r.code == 200:
		m.holds[i].earliestEnd, m.holds[i].latestEnd = r.began, r.ended
	}
}

// checkDrain computes the deadline. The first request sets it: after the server's delay and the grace period of the
// request, or of the server. Later requests can only bring it forward.
func (m *model) checkDrain(r *opResult, upgrading bool) {
	p := m.w.h.Server
	grace := p.Grace
	if r.plan.TTL >= 0 {
		grace = r.plan.TTL
	}
	if r.code != 200 && r.code != 202 {
		m.w.violate("a shutdown is accepted", "%s: code %d", r.plan, r.code)
		return
	}
	if m.drain != nil && !r.change.Changed && r.change.State == "stopped" {
		return // too late to change anything
	}
	want := true // whether the answer should say that the drain changed
	force := r.plan.Do == "force"
	switch d := m.drain; {
	case d == nil:
		d = &modelDrain{began: r.began, acceptUntil: r.began.Add(p.Delay), spread: r.ended.Sub(r.began)}
		d.earliest, d.latest = d.acceptUntil.Add(grace), r.ended.Add(p.Delay+grace)
		if force {
			d.earliest, d.latest, d.forcedAt = r.began, r.ended, r.ended
		}
		if d.earliest.Before(d.acceptUntil) {
			d.acceptUntil = d.earliest
		}
		m.drain = d
	case force:
		want = d.forcedAt.IsZero()
		if want {
			d.forcedAt = r.ended
		}
		d.shorten(r.began, r.ended)
	case r.plan.TTL < 0:
		want = false
	default:
		begin := r.began
		if d.acceptUntil.After(begin) {
			begin = d.acceptUntil
		}
		end := begin.Add(grace)
		want = r.began.Before(d.earliest) && end.Before(d.earliest)
		if want {
			d.shorten(end, end.Add(d.spread+r.ended.Sub(r.began)))
		}
	}
	d := m.drain
	if upgrading {
		d.latest, d.uncertain = d.latest.Add(commitTime+freezeTime), true
		return
	}
	if want != r.change.Changed && !d.uncertain && !r.began.Equal(d.earliest) && !m.w.shape.sockets {
		m.w.violate("a drain changes as requested", "%s: changed %v, want %v", r.plan, r.change.Changed, want)
	}
	if r.change.Drain == nil {
		m.w.violate("a shutdown answers the deadline", "%s: no drain in the answer", r.plan)
	} else {
		m.checkDeadline(r.change.Drain.Deadline)
	}
}

// checkDeadline requires a reported deadline to be within the model's bounds.
func (m *model) checkDeadline(got time.Time) {
	if got.Before(m.drain.earliest) || got.After(m.drain.latest) {
		m.w.violate("the deadline is as requested", "it is %v, want %v to %v",
			got.Sub(m.w.began), m.drain.earliest.Sub(m.w.began), m.drain.latest.Sub(m.w.began))
	}
}

// checkUpgrade requires an upgrade to succeed, unless the history has a fault, a drain or another upgrade at that time.
func (m *model) checkUpgrade(r *opResult) {
	mayFail := r.plan.Refuse || r.plan.Fault.At > 0 || m.drain != nil || m.overlapsUpgrade(r)
	switch {
	case r.err != nil && !mayFail:
		m.w.violate("an upgrade succeeds", "%v", r.err)
	case r.err == nil && r.plan.Refuse:
		m.w.violate("an upgrade that is refused fails", "it succeeded")
	case r.err == nil && m.drain != nil && m.drain.began.Before(r.began):
		m.w.violate("a drain refuses an upgrade", "it succeeded")
	}
	if r.err == nil && r.report.Frozen > freezeTime+m.w.slack() && r.plan.Fault.Do != "stall" {
		m.w.violate("the freeze is short", "it took %v", r.report.Frozen)
	}
}

func deref(p *int) int {
	if p == nil {
		return -1
	}
	return *p
}
