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
	case "extend":
		m.checkExtend(r, upgrading)
	case "cancel":
		m.checkCancel(r, upgrading)
	case "set":
		m.checkSet(r, upgrading)
	case "upgrade":
		m.checkUpgrade(r)
	}
}

// checkPause requires the hold in the answer to be the one that was requested.
func (m *model) checkPause(r *opResult) {
	if r.code != 201 {
		return
	}
	h := &modelHold{
		id: r.hold.ID, mode: r.plan.Mode, requested: r.began, inForce: r.ended,
		evict: r.plan.Evict, spread: r.plan.Spread, grace: time.Duration(m.grace.last()),
	}
	if r.hold.Evict != r.plan.Evict || r.hold.SpreadSeconds != r.plan.Spread.Seconds() {
		m.w.violate("a hold is as requested", "%s evicts %v within %v s", r.hold.ID, r.hold.Evict, r.hold.SpreadSeconds)
	}
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
		case h.callerLeft && r.ended.Before(h.latestEnd), h.mayEnd().Equal(r.began):
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

// checkUpgrade requires an upgrade to succeed, unless the history has a fault, a drain or another upgrade at that time.
func (m *model) checkUpgrade(r *opResult) {
	mayFail := r.plan.Refuse || r.plan.Fault.At > 0 || m.drained(r.began, r.ended) || m.overlapsUpgrade(r)
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
