package simulate

import (
	"slices"
	"time"

	"echod/control"
)

// checkStatus checks a status. Unless exact is set, an operator acted at the same time, and only the sum is checked.
func (m *model) checkStatus(g *generation, st control.Status, exact bool) {
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
	m.checkTimeouts(now)
	m.checkRejects(now)
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
			m.checkDeadline(st.Drain.Deadline)
		}
		return
	}
	m.checkSettings(g, st)
	var want []string
	for _, h := range m.holds {
		if h.callerLeft && now.Before(h.latestEnd) || !h.expires.IsZero() && now.Sub(h.expires).Abs() < 10*time.Millisecond+m.w.expirySlack() {
			return // it may have ended or not
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

// checkSettled checks a server that has been left alone for a while, not paused and not draining. It must have served
// every client and echoed every byte.
func (m *model) checkSettled() {
	now := time.Now()
	served, full := 0, false
	for _, l := range m.w.snapshot() {
		if !l.served.IsZero() && (len(l.closed) == 0 || now.Sub(l.closed[0].Closed) < backoffTime) {
			served++ // its place may be free only now
		}
	}
	if most := int(m.maxConns.last()); most > 0 {
		full = served >= most
	}
	records := m.w.snapshot()
	for _, t := range m.w.traces {
		l := records[t]
		t.mu.Lock()
		open := !t.connected.IsZero() && !t.ended()
		if open && l.served.IsZero() && !full && len(l.closed) == 0 {
			m.w.violate("clients are served", "client %d has waited since %v", t.plan.ID, t.connected.Sub(m.w.began))
		}
		reads := t.notReadingSince.IsZero()
		lastMoved := latest(t.lastGot, t.lastSent, l.served)
		if open && reads && !l.served.IsZero() && t.plan.Handler.Hang == 0 && now.Sub(lastMoved) > 5*m.w.shape.timeouts {
			if echo, _, err := t.parse(t.sent); err == nil && echo < t.sent {
				m.w.violate("what is sent is echoed", "client %d has %d of %d bytes", t.plan.ID, echo, t.sent)
			}
		}
		t.mu.Unlock()
	}
}

// checkRejects requires that no client waits while any hold rejects, whatever the other holds are.
func (m *model) checkRejects(now time.Time) {
	i := slices.IndexFunc(m.holds, func(h *modelHold) bool { return h.mode == "reject" && h.live(now) })
	if i < 0 || m.drain != nil || m.recentUpgrade(now) {
		return
	}
	records := m.w.snapshot()
	for _, t := range m.w.traces {
		l := records[t]
		t.mu.Lock()
		waits := !t.connected.IsZero() && l.served.IsZero() && len(l.closed) == 0 && len(t.got) == 0 && !t.ended()
		if since := latest(t.connected, m.holds[i].inForce); waits && now.Sub(since) > backoffTime+2*t.plan.Delay+m.w.slack() {
			m.w.violate("no client waits while a hold rejects", "client %d waits since %v", t.plan.ID, since.Sub(m.w.began))
		}
		t.mu.Unlock()
	}
}

// checkTimeouts requires that clients which are idle or stalled for too long are closed.
func (m *model) checkTimeouts(now time.Time) {
	p := m.w.h.Server
	idle := time.Duration(m.idle.last())
	if idle == 0 && p.Stall == 0 || m.recentUpgrade(now) {
		return
	}
	records := m.w.snapshot()
	for _, t := range m.w.traces {
		l := records[t]
		t.mu.Lock()
		open := !t.connected.IsZero() && !t.ended() && !l.served.IsZero() && len(l.closed) == 0 && t.plan.Handler.Hang == 0
		margin := time.Second + flushTime + lingerTime + 2*t.lag() + m.w.slack()
		lastMoved := latest(t.lastMoved, l.served)
		if open && t.notReadingSince.IsZero() && idle > 0 && now.Sub(latest(lastMoved, m.idle.since())) > idle*sweepPercent/100+margin {
			m.w.violate("idle clients are closed", "client %d is idle since %v", t.plan.ID, lastMoved.Sub(m.w.began))
		}
		// More data is outstanding than the client's window and the server's buffer can hold.
		blocked := t.sent-len(t.got) > 2*t.plan.Window+2*4<<10 && !m.w.shape.sockets
		if open && !t.notReadingSince.IsZero() && blocked && p.Stall > 0 &&
			now.Sub(latest(lastMoved, t.notReadingSince)) > p.Stall*sweepPercent/100+margin {
			m.w.violate("stalled clients are closed", "client %d has taken nothing since %v",
				t.plan.ID, t.notReadingSince.Sub(m.w.began))
		}
		t.mu.Unlock()
	}
}
