package simulate

import (
	"slices"
	"time"

	"echod/control"
)

// judgeStatus judges a status. It is exact if no operator did anything meanwhile.
func (m *model) judgeStatus(g *generation, st control.Status, exact bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	var closed uint64
	for _, n := range st.Closed {
		closed += n
	}
	if st.Accepted != uint64(st.Connections)+closed {
		m.w.violate("accepted = open + closed", "%s: %d accepted, %d open, %d closed", g.name, st.Accepted, st.Connections, closed)
	}
	if g != m.w.current() || !exact {
		return
	}
	m.judgeTimeouts(now)
	m.judgeRejects(now)
	if st.Accepted < m.accepted || st.BytesIn < m.bytesIn {
		m.w.violate("counters never go back", "%s: accepted %d after %d, bytes in %d after %d", g.name, st.Accepted, m.accepted, st.BytesIn, m.bytesIn)
	}
	m.accepted, m.bytesIn = st.Accepted, st.BytesIn
	for why, n := range m.reasons {
		if st.Closed[why] < n {
			m.w.violate("counters never go back", "%s: closed %s %d after %d", g.name, why, st.Closed[why], n)
		}
	}
	m.reasons = st.Closed
	if m.drain != nil {
		if st.State != "draining" && st.State != "stopped" {
			m.w.violate("the state is true", "%s is %s in a drain", g.name, st.State)
		} else if st.Drain != nil {
			m.judgeDeadline(st.Drain.Deadline)
		}
		return
	}
	var want []string
	for _, h := range m.holds {
		if h.fades && now.Sub(h.ended) < 100*time.Millisecond || !h.expires.IsZero() && now.Sub(h.expires).Abs() < 10*time.Millisecond+m.w.late() {
			return // it may be over or not
		}
		if h.live(now) {
			want = append(want, h.id+" "+h.mode)
		}
	}
	var got []string
	for _, h := range st.Holds {
		got = append(got, h.ID+" "+h.Mode)
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		m.w.violate("the holds are those that were placed", "%s has %v, want %v", g.name, got, want)
	}
	state := "running"
	if len(want) > 0 {
		state = "paused"
	}
	if st.State != state {
		m.w.violate("the state is true", "%s is %s, want %s", g.name, st.State, state)
	}
}

// judgeRest judges a server that had time to come to rest: nobody pauses or drains it.
func (m *model) judgeRest() {
	now := time.Now()
	served, full := 0, false
	for _, l := range m.w.snapshot() {
		if !l.served.IsZero() && len(l.closed) == 0 {
			served++
		}
	}
	if p := m.w.h.Server; p.MaxConns > 0 {
		full = served >= p.MaxConns
	}
	lives := m.w.snapshot()
	for _, t := range m.w.traces {
		l := lives[t]
		t.mu.Lock()
		open := !t.connected.IsZero() && !t.ended()
		if open && l.served.IsZero() && !full && len(l.closed) == 0 {
			m.w.violate("clients are served", "client %d has waited since %v", t.plan.ID, t.connected.Sub(m.w.began))
		}
		reads := t.shutSince.IsZero()
		moved := latest(t.gotAt, t.sentAt, l.served)
		if open && reads && !l.served.IsZero() && t.plan.Manner.Deaf == 0 && now.Sub(moved) > 5*m.w.shape.timeouts {
			if echo, _, err := t.parse(t.sent); err == nil && echo < t.sent {
				m.w.violate("what is sent is echoed", "client %d has %d of %d bytes", t.plan.ID, echo, t.sent)
			}
		}
		t.mu.Unlock()
	}
}

// judgeRejects expects that nobody waits while a hold rejects, whichever other holds there are.
func (m *model) judgeRejects(now time.Time) {
	i := slices.IndexFunc(m.holds, func(h *modelHold) bool { return h.mode == "reject" && h.live(now) })
	if i < 0 || m.drain != nil || m.upgradedLately(now) {
		return
	}
	lives := m.w.snapshot()
	for _, t := range m.w.traces {
		l := lives[t]
		t.mu.Lock()
		waits := !t.connected.IsZero() && l.served.IsZero() && len(l.closed) == 0 && len(t.got) == 0 && !t.ended()
		if since := latest(t.connected, m.holds[i].inForce); waits && now.Sub(since) > backoffTime+2*t.plan.Delay+m.w.slack() {
			m.w.violate("a hold that rejects lets nobody wait", "client %d waits since %v", t.plan.ID, since.Sub(m.w.began))
		}
		t.mu.Unlock()
	}
}

// judgeTimeouts expects that no client is served that is idle, or that takes nothing, for too long.
func (m *model) judgeTimeouts(now time.Time) {
	p := m.w.h.Server
	if p.Idle == 0 && p.Stall == 0 || m.upgradedLately(now) {
		return
	}
	lives := m.w.snapshot()
	for _, t := range m.w.traces {
		l := lives[t]
		t.mu.Lock()
		open := !t.connected.IsZero() && !t.ended() && !l.served.IsZero() && len(l.closed) == 0 && t.plan.Manner.Deaf == 0
		margin := time.Second + flushTime + lingerTime + 2*t.lag() + m.w.slack()
		moved := latest(t.moved, l.served)
		if open && t.shutSince.IsZero() && p.Idle > 0 && now.Sub(moved) > p.Idle*sweepPercent/100+margin {
			m.w.violate("idle clients are closed", "client %d is idle since %v", t.plan.ID, moved.Sub(m.w.began))
		}
		// More is on its way to the client than its window and the server's buffer hold.
		blocked := t.sent-len(t.got) > 2*t.plan.Window+2*4<<10 && !m.w.shape.sockets
		if open && !t.shutSince.IsZero() && blocked && p.Stall > 0 &&
			now.Sub(latest(moved, t.shutSince)) > p.Stall*sweepPercent/100+margin {
			m.w.violate("stalled clients are closed", "client %d has taken nothing since %v",
				t.plan.ID, t.shutSince.Sub(m.w.began))
		}
		t.mu.Unlock()
	}
}
