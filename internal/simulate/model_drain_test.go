package simulate

import (
	"time"

	"echod/server"
)

// modelDrain is a drain, as an operator may expect it. Times are bounds, because a request takes a while, and longer when
// it overlaps an upgrade.
type modelDrain struct {
	began       time.Time // when it was requested
	acceptUntil time.Time // new clients are served until then, at least
	tellUntil   time.Time // every client is told by then
	earliest    time.Time // the earliest
	latest      time.Time // and the latest that it may be
	took        time.Duration
	uncertain   bool      // it was requested during an upgrade, which it may have to wait for
	forcedAt    time.Time // when it was forced
	cancelled   time.Time // when
	changes     []drainChange
}

// drainChange is what a request made of a drain.
type drainChange struct {
	at     time.Time     // when it was requested
	grace  time.Duration // that clients have who are told from now on
	extend time.Duration // added to the time of those who were told
	end    time.Time     // the drain's deadline: the earliest
	latest time.Time     // and the latest
}

// change notes what a request has made of the drain.
func (d *modelDrain) change(at time.Time, grace, extend time.Duration) {
	d.changes = append(d.changes, drainChange{at, grace, extend, d.earliest, d.latest})
}

func (d *modelDrain) grace() time.Duration { return d.changes[len(d.changes)-1].grace }

// shorten brings the deadline forward.
func (d *modelDrain) shorten(deadline, latest time.Time) {
	if deadline.Before(d.earliest) {
		d.earliest = deadline
	}
	if latest.Before(d.latest) {
		d.latest = latest
	}
	if d.earliest.Before(d.acceptUntil) {
		d.acceptUntil = d.earliest
	}
}

// closes returns when the connection is closed, at the earliest and at the latest, of a client that was told between
// from and to. It has the grace period that was in force then, but not beyond the drain's deadline. Later requests bring
// that forward or extend it, until the client's deadline.
func (d *modelDrain) closes(from, to time.Time) (earliest, latest time.Time) {
	for i, c := range d.changes {
		if c.at.After(to) || i+1 < len(d.changes) && d.changes[i+1].at.Before(from) {
			continue // it was not in force when the client was told
		}
		early, late := sooner(from.Add(c.grace), c.end), sooner(to.Add(c.grace), c.latest)
		for _, next := range d.changes[i+1:] {
			if next.at.Before(early) {
				early = sooner(early.Add(next.extend), next.end)
			}
			if !next.at.After(late) {
				late = sooner(late.Add(next.extend), next.latest)
			}
		}
		if earliest.IsZero() || early.Before(earliest) {
			earliest = early
		}
		if late.After(latest) {
			latest = late
		}
	}
	return earliest, latest
}

func sooner(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// firstClose returns when the drain closes the first connection, at the earliest.
func (d *modelDrain) firstClose() time.Time {
	first, _ := d.closes(d.acceptUntil, d.acceptUntil)
	for _, c := range d.changes {
		first = sooner(first, sooner(c.end, c.at.Add(c.grace)))
	}
	return first
}

// longestGrace returns the longest grace period that a client may be told.
func (d *modelDrain) longestGrace() (longest time.Duration) {
	for _, c := range d.changes {
		longest = max(longest, c.grace)
	}
	return longest
}

// checkDrain computes when clients are told and closed. A drain tells them after the delay, within the spread, and closes
// each a grace period after it was told. What is not requested is the server's own. Later requests can only bring the
// deadline forward.
func (m *model) checkDrain(r *opResult, upgrading bool) {
	p := m.w.h.Server
	grace, spread := time.Duration(m.grace.last()), p.Spread
	if r.plan.TTL >= 0 {
		grace = r.plan.TTL
	}
	if r.plan.Spread > 0 {
		spread = r.plan.Spread
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
		d = &modelDrain{began: r.began, acceptUntil: r.began.Add(p.Delay), took: r.ended.Sub(r.began)}
		d.tellUntil = r.ended.Add(p.Delay + spread)
		d.earliest, d.latest = d.acceptUntil.Add(spread+grace), d.tellUntil.Add(grace)
		if force {
			d.earliest, d.latest, d.forcedAt = r.began, r.ended, r.ended
		}
		if d.earliest.Before(d.acceptUntil) {
			d.acceptUntil = d.earliest
		}
		d.change(r.began, grace, 0)
		m.drain = d
	case force:
		want = d.forcedAt.IsZero()
		if want {
			d.forcedAt = r.ended
		}
		d.shorten(r.began, r.ended)
		d.change(r.began, 0, 0)
	case r.plan.TTL < 0:
		want = false
	default:
		begin := latest(r.began, d.acceptUntil)
		end := begin.Add(r.plan.Spread + grace)
		want = r.began.Before(d.earliest) && end.Before(d.earliest)
		if want {
			d.tellUntil = latest(r.ended, d.acceptUntil.Add(d.took)).Add(r.plan.Spread)
			late := d.took + r.ended.Sub(r.began)
			if d.uncertain {
				late += commitTime + freezeTime
			}
			d.shorten(end, end.Add(late))
			d.change(r.began, grace, 0)
		}
	}
	d := m.drain
	if upgrading {
		d.latest, d.uncertain = d.latest.Add(commitTime+freezeTime), true
		d.tellUntil = d.tellUntil.Add(commitTime + freezeTime)
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

// checkExtend expects that a drain whose deadline has not passed is extended by what was requested.
func (m *model) checkExtend(r *opResult, upgrading bool) {
	d := m.drain
	switch {
	case d == nil && r.code != 409 && !upgrading:
		m.w.violate("only a drain is extended", "%s: code %d, and there is no drain", r.plan, r.code)
	case d == nil || r.code == 503:
	case r.code != 202:
		over := !d.forcedAt.IsZero() || !r.ended.Before(d.earliest) || m.stopped()
		if !over && !d.uncertain && !upgrading {
			m.w.violate("a drain changes as requested", "%s: code %d, and the deadline has not passed", r.plan, r.code)
		}
	case !d.forcedAt.IsZero() || r.began.After(d.latest):
		m.w.violate("a drain changes as requested", "%s: extended after the deadline", r.plan)
	default:
		if got := r.change.ExtendedSeconds; got == nil || *got != r.plan.TTL.Seconds() {
			m.w.violate("a drain changes as requested", "%s: extended by %v seconds", r.plan, got)
		}
		d.earliest, d.latest = d.earliest.Add(r.plan.TTL), d.latest.Add(r.plan.TTL)
		d.change(r.began, d.grace()+r.plan.TTL, r.plan.TTL)
		if r.change.Drain != nil && !d.uncertain {
			m.checkDeadline(r.change.Drain.Deadline)
		}
	}
}

// checkCancel expects that a drain is cancelled during its delay, while nobody has been told, and not later.
func (m *model) checkCancel(r *opResult, upgrading bool) {
	d := m.drain
	switch {
	case d == nil && r.code != 409 && !upgrading:
		m.w.violate("only a drain is cancelled", "%s: code %d, and there is no drain", r.plan, r.code)
	case d == nil:
	case r.code == 200:
		if !d.forcedAt.IsZero() || r.began.After(d.acceptUntil.Add(d.took)) && !d.uncertain {
			m.w.violate("a drain is cancelled while no client is told", "%s: it was, after %v", r.plan, d.acceptUntil.Sub(m.w.began))
		}
		d.cancelled = r.ended
		m.drain, m.drains = nil, append(m.drains, d)
	case d.forcedAt.IsZero() && r.ended.Before(d.acceptUntil) && !d.uncertain && !upgrading:
		m.w.violate("a drain is cancelled while no client is told", "%s: code %d before %v", r.plan, r.code, d.acceptUntil.Sub(m.w.began))
	}
}

// stopped reports whether the owner has stopped, since its last client has left.
func (m *model) stopped() bool {
	_, ok := m.w.current().srv.Report()
	return ok
}

// drained reports whether there was a drain at some time from..to.
func (m *model) drained(from, to time.Time) bool {
	if m.drain != nil && !m.drain.began.After(to) {
		return true
	}
	for _, d := range m.drains {
		if !d.began.After(to) && !d.cancelled.Before(from) {
			return true
		}
	}
	return false
}

func (m *model) checkDeadline(got time.Time) {
	if got.Before(m.drain.earliest) || got.After(m.drain.latest) {
		m.w.violate("the deadline is as requested", "it is %v, want %v to %v",
			got.Sub(m.w.began), m.drain.earliest.Sub(m.w.began), m.drain.latest.Sub(m.w.began))
	}
}

// checkTold expects that a client was told only for a reason, not before its time, and that it has its full grace period
// after that, and no more.
func (m *model) checkTold(t *trace, l connRecord, c server.ClosedConn, violated func(string, string, ...any)) {
	if t.told.IsZero() || c.Reason == server.ReasonRejectedDraining {
		return
	}
	from, to := t.told.Add(-t.lag()-m.w.expirySlack()), t.told // when the server told it
	var earliest, last time.Time
	add := func(early, late time.Time) {
		if earliest.IsZero() || early.Before(earliest) {
			earliest = early
		}
		last = latest(last, late)
	}
	switch t.toldFor {
	case toldDrain:
		if m.drain == nil || t.told.Before(m.drain.acceptUntil) {
			violated("a client is told only for a reason", "it was told at %v of a drain", t.told.Sub(m.w.began))
			return
		}
		add(m.drain.closes(from, to))
	case toldEvict:
		for _, h := range m.holds {
			over := latest(h.mayEnd(), h.latestEnd)
			if h.evict && !h.requested.After(to) && (over.IsZero() || !over.Before(from) || !t.readsPromptly()) {
				add(from.Add(h.grace), to.Add(h.grace))
			}
		}
		if earliest.IsZero() {
			violated("a client is told only for a reason", "it was told at %v of an eviction, and no hold evicts", t.told.Sub(m.w.began))
			return
		}
	case toldAge:
		young := true
		for _, age := range m.maxAge.between(l.accepted, to) {
			young = young && (age == 0 || t.told.Sub(t.connected) < time.Duration(age)*ageLeast/100)
		}
		if young {
			violated("a client is told only for a reason", "it was told of its age, at %v", t.told.Sub(t.connected))
			return
		}
		if ages := m.maxAge.between(l.accepted, to); len(ages) == 1 && !m.upgradedBefore(to) {
			age := time.Duration(ages[0])
			by := latest(l.accepted.Add(age*ageMost/100), l.served).Add(2*min(age/8, time.Second) + 2*t.lag() + m.w.slack()) // a changed setting restarts the sweep
			if t.readsPromptly() && t.told.After(by) {
				violated("old clients are told", "it was told of its age at %v, later than %v", t.told.Sub(m.w.began), by.Sub(m.w.began))
			}
		}
		for _, grace := range m.grace.between(from, to) {
			add(from.Add(time.Duration(grace)), to.Add(time.Duration(grace)))
		}
	case toldUpgrade:
		return // it stays with a process of which operators know little
	default:
		violated("a client is told only for a reason", "it was told because of %q", t.toldFor)
		return
	}
	if d := m.drain; d != nil && t.toldFor != toldDrain { // a drain also ends the connections of those told before
		for _, c := range d.changes {
			earliest = sooner(earliest, c.end)
		}
	}
	byDeadline := c.Reason == server.ReasonDeadline || c.Reason == server.ReasonEvicted || c.Reason == server.ReasonMaxAge
	if !byDeadline || !t.readsPromptly() || m.upgradedBefore(c.Closed) {
		return
	}
	if c.Closed.Before(earliest) {
		violated("each client has its full grace period", "it was told at %v (%s), and closed at %v, before %v",
			t.told.Sub(m.w.began), t.toldFor, c.Closed.Sub(m.w.began), earliest.Sub(m.w.began))
	}
	if c.Closed.After(last.Add(drainBudget + m.w.slack())) {
		violated("each client is closed at its own deadline", "it was told at %v (%s), and closed at %v, long after %v",
			t.told.Sub(m.w.began), t.toldFor, c.Closed.Sub(m.w.began), last.Sub(m.w.began))
	}
}

// upgradedBefore reports whether an upgrade had begun by then that succeeded.
func (m *model) upgradedBefore(when time.Time) bool {
	for _, o := range m.ops {
		if o.upgraded && !o.began.After(when) {
			return true
		}
	}
	return false
}

// checkUntold expects that a client that was not told need not have been: by a drain, by an eviction, or for its age.
func (m *model) checkUntold(t *trace, l connRecord, c server.ClosedConn, violated func(string, string, ...any)) {
	if !t.told.IsZero() || !t.readsPromptly() || l.served.IsZero() || !t.finished.IsZero() || t.end == errGivenUp {
		return
	}
	ended := c.Closed // for the client, too
	if !t.endAt.IsZero() {
		ended = sooner(ended, t.endAt)
	}
	if !t.closed.IsZero() {
		ended = sooner(ended, t.closed)
	}
	margin := tellTime + 2*t.lag() + m.w.slack()
	if d := m.drain; d != nil && d.forcedAt.IsZero() {
		by := latest(d.tellUntil, l.served).Add(margin)
		if d.uncertain {
			by = by.Add(commitTime + freezeTime)
		}
		if ended.After(by) && d.latest.After(by) {
			violated("every client is told", "it was served from %v to %v, and the drain told nobody at %v",
				l.served.Sub(m.w.began), ended.Sub(m.w.began), d.tellUntil.Sub(m.w.began))
		}
	}
	if m.upgradedBefore(ended) {
		return
	}
	for _, h := range m.holds {
		by := h.inForce.Add(h.spread + margin)
		over := h.mayEnd()
		if m.drained(h.inForce, by) || !over.IsZero() && over.Before(by) || !h.evict || !l.served.Before(h.requested) {
			continue
		}
		if ended.After(by) {
			violated("every client is told", "it was served from %v to %v, and hold %s evicts since %v",
				l.served.Sub(m.w.began), ended.Sub(m.w.began), h.id, h.inForce.Sub(m.w.began))
		}
	}
	if age, since := time.Duration(m.maxAge.last()), m.maxAge.since(); age > 0 {
		by := latest(l.accepted.Add(age*ageMost/100), l.served, since).Add(2*min(age/8, time.Second) + margin)
		if ended.After(by) && (m.drain == nil || by.Before(m.drain.began)) {
			violated("old clients are told", "it was served from %v to %v, and at most %v old connections are told to leave",
				l.served.Sub(m.w.began), ended.Sub(m.w.began), age)
		}
	}
}

// checkSpread requires that a drain's notices are spread evenly: of n clients about a quarter is told in each quarter of
// the time. Clients whose notices take long to arrive are not counted.
func (m *model) checkSpread(records map[*trace]connRecord) {
	d := m.drain
	if d == nil || len(d.changes) > 1 || d.uncertain || m.w.shape.sockets || m.upgradedBefore(d.earliest) {
		return
	}
	spread := d.earliest.Sub(d.acceptUntil) - d.grace()
	n := 0
	var told []time.Time
	for t, l := range records {
		if l.served.IsZero() || !l.served.Before(d.acceptUntil) || len(l.closed) == 0 || l.closed[0].Closed.Before(d.acceptUntil) {
			continue
		}
		n++
		if t.toldFor == toldDrain && t.lag() < spread/20 && !t.stoppedReading {
			told = append(told, t.told)
		}
	}
	for _, from := range told {
		in := 0
		for _, at := range told {
			if !at.Before(from) && at.Before(from.Add(spread/4)) {
				in++
			}
		}
		if in > n/4+3 {
			m.w.violate("a drain spreads its notices", "%d of %d clients were told from %v on within a quarter of %v", in, n, from.Sub(m.w.began), spread)
			return
		}
	}
}
