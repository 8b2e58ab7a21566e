package simulate

import (
	"slices"
	"time"
)

// judgeOp judges the answer to an operator.
func (m *model) judgeOp(r *opResult) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.pending, r)
	upgrading := m.overlapsUpgrade(r)
	most := answerTime
	switch {
	case r.plan.Do == "upgrade":
		most = 20 * time.Second
	case upgrading:
		most += freezeTime + commitTime
	case r.plan.Do == "notify":
		most += time.Second // for clients that do not read
	}
	if took := r.ended.Sub(r.began); took > most+m.w.slack() {
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
		m.judgePause(r)
	case "resume":
		m.judgeResume(r, upgrading)
	case "release":
		m.judgeRelease(r, upgrading)
	case "kill", "killall", "killidle":
		if r.code == 200 && r.change.Killed != nil {
			m.killed += *r.change.Killed
		}
	case "drain", "force":
		m.judgeDrain(r, upgrading)
	case "upgrade":
		m.judgeUpgrade(r)
	}
}

func (m *model) judgePause(r *opResult) {
	if r.code != 201 {
		return
	}
	h := &modelHold{id: r.hold.ID, mode: r.plan.Mode, asked: r.began, inForce: r.ended}
	if r.hold.Mode != r.plan.Mode {
		m.w.violate("a hold is as it was asked for", "%s has mode %s, want %s", r.hold.ID, r.hold.Mode, r.plan.Mode)
	}
	if r.plan.TTL > 0 && !r.plan.While {
		h.expires = r.began.Add(r.plan.TTL)
		if r.hold.Expires == nil || r.hold.Expires.Before(h.expires) || r.hold.Expires.After(r.ended.Add(r.plan.TTL)) {
			m.w.violate("a hold is as it was asked for", "%s expires %v, want %v", r.hold.ID, r.hold.Expires, h.expires)
		}
		h.expires = *r.hold.Expires
	} else if r.hold.Expires != nil {
		m.w.violate("a hold is as it was asked for", "%s expires, and should not", r.hold.ID)
	}
	if slices.ContainsFunc(m.holds, func(o *modelHold) bool { return o.id == h.id }) {
		m.w.violate("ids of holds are unique", "%s exists already", h.id)
	}
	m.holds = append(m.holds, h)
}

// judgeResume expects that all holds are released, and that the answer says how many.
func (m *model) judgeResume(r *opResult, upgrading bool) {
	if r.code != 200 {
		return
	}
	live, fading := 0, 0
	for _, h := range m.holds {
		switch {
		case h.live(r.began):
			live++
			h.ended, h.gone = r.began, r.ended
		case h.fades && r.ended.Sub(h.ended) < 100*time.Millisecond, h.over().Equal(r.began):
			fading++
		}
	}
	if r.change.Released == nil || *r.change.Released < live || *r.change.Released > live+fading {
		if !upgrading {
			m.w.violate("resume releases every hold", "answered %v, want %d", deref(r.change.Released), live)
		}
	}
}

func (m *model) judgeRelease(r *opResult, upgrading bool) {
	id := m.holds
	i := slices.IndexFunc(id, func(h *modelHold) bool { return h.id == r.holdID })
	switch {
	case r.code == 200 && (i < 0 || !id[i].live(r.began) && !id[i].fades && !id[i].over().Equal(r.began)):
		m.w.violate("only a hold that stands is released", "%s: released", r.plan)
	case r.code == 404 && i >= 0 && id[i].live(r.ended) && !upgrading:
		m.w.violate("a hold that stands is released", "%s: not found", r.plan)
	case r.code == 200:
		id[i].ended, id[i].gone = r.began, r.ended
	}
}

// judgeDrain computes the deadline: a drain begins with the grace period that was asked for, or the server's own, after
// the delay. Later requests can only bring it forward.
func (m *model) judgeDrain(r *opResult, upgrading bool) {
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
	want := true // something changes
	force := r.plan.Do == "force"
	switch d := m.drain; {
	case d == nil:
		d = &modelDrain{began: r.began, acceptUntil: r.began.Add(p.Delay), spread: r.ended.Sub(r.began)}
		d.deadline, d.latest = d.acceptUntil.Add(grace), r.ended.Add(p.Delay+grace)
		if force {
			d.deadline, d.latest, d.forced = r.began, r.ended, r.ended
		}
		if d.deadline.Before(d.acceptUntil) {
			d.acceptUntil = d.deadline
		}
		m.drain = d
	case force:
		want = d.forced.IsZero()
		if want {
			d.forced = r.ended
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
		want = r.began.Before(d.deadline) && end.Before(d.deadline)
		if want {
			d.shorten(end, end.Add(d.spread+r.ended.Sub(r.began)))
		}
	}
	d := m.drain
	if upgrading {
		d.latest, d.uncertain = d.latest.Add(commitTime+freezeTime), true
		return
	}
	if want != r.change.Changed && !d.uncertain && !r.began.Equal(d.deadline) && !m.w.shape.sockets {
		m.w.violate("a drain changes as asked", "%s: changed %v, want %v", r.plan, r.change.Changed, want)
	}
	if r.change.Drain == nil {
		m.w.violate("a shutdown answers the deadline", "%s: no drain in the answer", r.plan)
	} else {
		m.judgeDeadline(r.change.Drain.Deadline)
	}
}

func (m *model) judgeDeadline(got time.Time) {
	if got.Before(m.drain.deadline) || got.After(m.drain.latest) {
		m.w.violate("the deadline is as asked for", "it is %v, want %v to %v",
			got.Sub(m.w.began), m.drain.deadline.Sub(m.w.began), m.drain.latest.Sub(m.w.began))
	}
}

// judgeUpgrade expects an upgrade to succeed unless something was drawn that hinders it.
func (m *model) judgeUpgrade(r *opResult) {
	hindered := r.plan.Refuse || r.plan.Fault.At > 0 || m.drain != nil || m.overlapsUpgrade(r)
	switch {
	case r.err != nil && !hindered:
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
