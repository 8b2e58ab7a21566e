package simulate

import (
	"cmp"
	"slices"
	"time"

	"echod/server"
)

// checkEnd checks the whole history after every client and server has ended.
func (m *model) checkEnd() {
	m.mu.Lock()
	defer m.mu.Unlock()
	records := m.w.snapshot()
	for _, t := range m.w.traces {
		t.mu.Lock()
		m.checkClient(t, records[t])
		t.mu.Unlock()
	}
	m.checkOrder(records)
	m.checkLimits(records)
	m.checkSpread(records)
	m.checkMessages()
	m.checkCounts(records)
}

// checkOrder requires clients to be accepted and served in the order in which they connected.
func (m *model) checkOrder(records map[*trace]connRecord) {
	for _, service := range []bool{false, true} {
		var queue []*trace
		for _, t := range m.w.traces {
			if t.plan.Service == service && len(records[t].ids) > 0 {
				queue = append(queue, t)
			}
		}
		slices.SortFunc(queue, func(a, b *trace) int { return cmp.Compare(records[a].ids[0], records[b].ids[0]) })
		var last, served *trace
		for _, t := range queue {
			if last != nil && t.connected.Before(last.connected) && !m.w.shape.sockets {
				m.w.violate("clients are accepted in order", "client %d connected before client %d, and was accepted after it", t.plan.ID, last.plan.ID)
			}
			last = t
			if records[t].served.IsZero() {
				continue
			}
			if served != nil && records[t].served.Before(records[served].served) && !m.w.shape.sockets {
				m.w.violate("clients are served in order", "client %d was served before client %d", t.plan.ID, served.plan.ID)
			}
			served = t
		}
	}
}

// checkLimits requires that no more clients are served than the limits allow, and that none is rejected below them.
func (m *model) checkLimits(records map[*trace]connRecord) {
	p := m.w.h.Server
	// servedAt counts the connections that were served at that time; strictly, or including its limits.
	servedAt := func(when time.Time, address int, strict bool) (n int) {
		for t, l := range records {
			if l.served.IsZero() || len(l.closed) == 0 || address >= 0 && t.plan.Address != address || strict && m.stayedBehind(l, when) {
				continue
			}
			from, to := l.served, l.closed[0].Closed
			if strict && from.Before(when) && to.After(when) || !strict && !from.After(when) && !to.Before(when) {
				n++
			}
		}
		return n
	}
	for t, l := range records {
		if l.served.IsZero() || m.drain != nil && !l.served.Before(m.drain.acceptUntil) {
			continue // a drain also serves the clients in the accept queue
		}
		limit := int(m.maxConns.most(l.served, l.served))
		if n := servedAt(l.served, -1, true); limit > 0 && n >= limit {
			m.w.violate("limits hold", "client %d was served besides %d others", t.plan.ID, n)
		}
		if n := servedAt(l.served, t.plan.Address, true); p.PerAddress > 0 && n >= p.PerAddress {
			m.w.violate("limits hold", "client %d was served besides %d others of its address", t.plan.ID, n)
		}
	}
	for t, l := range records {
		if len(l.closed) == 0 || l.closed[0].Reason != server.ReasonRejectedLimit && l.closed[0].Reason != server.ReasonRejectedAddressLimit {
			continue
		}
		// The client was rejected at some time after it connected. At that time enough others must have been served.
		busy := false
		times := []time.Time{t.connected}
		for _, other := range records {
			if other.served.After(t.connected) && !other.served.After(l.closed[0].Closed) {
				times = append(times, other.served)
			}
		}
		limit := int(m.maxConns.least(t.connected, l.closed[0].Closed))
		for _, when := range times {
			busy = busy || limit > 0 && p.RejectFull && servedAt(when, -1, false) >= limit
			busy = busy || p.PerAddress > 0 && servedAt(when, t.plan.Address, false) >= p.PerAddress
		}
		if !busy && !m.w.shape.sockets && m.w.h.Network.Accept == 0 && len(m.holds) == 0 && limit == 0 {
			m.w.violate("only a full limit rejects", "client %d was rejected, and its address had room", t.plan.ID)
		}
	}
}

// checkMessages requires that as many clients got an operator's message as the answer said.
func (m *model) checkMessages() {
	for _, o := range m.ops {
		if o.plan.Do != "notify" || o.code != 200 {
			continue
		}
		got, uncertain := 0, 0
		for _, t := range m.w.traces {
			if t.connected.IsZero() {
				continue
			}
			_, notices, err := t.parse(t.sent)
			switch {
			case err != nil:
				return
			case slices.Contains(notices, "NOTICE "+o.text):
				got++
			case !t.sawEOF() || !t.readsPromptly():
				uncertain++
			}
		}
		if got > o.notified.Sent+o.notified.Failed || got+uncertain < o.notified.Sent {
			m.w.violate("messages are counted", "%q: answered sent %d, failed %d, and %d clients have it", o.text, o.notified.Sent, o.notified.Failed, got)
		}
	}
}

// checkCounts requires the last server's counters to be the sums over all clients, and the drain to have ended in time.
func (m *model) checkCounts(records map[*trace]connRecord) {
	g := m.w.current()
	st := g.srv.Status()
	var accepted, bytesIn, bytesOut uint64
	notified, unsure, lost := 0, 0, false
	closed := make(map[server.Reason]uint64)
	for t, l := range records {
		if len(l.closed) == 0 {
			continue
		}
		accepted++
		if end, ok := g.srv.Report(); ok && l.closedBy != g && l.closed[0].Closed.After(end.Ended) || m.stoppedAtOnce(g) && l.closedBy != g &&
			st.Closed[server.ReasonLost] > closed[server.ReasonLost] && st.Closed[l.closed[0].Reason] == closed[l.closed[0].Reason] {
			closed[server.ReasonLost]++ // the predecessor had not reported its close when the successor stopped
			lost = true
			continue
		}
		closed[l.closed[0].Reason]++
		bytesIn += l.closed[0].BytesIn
		bytesOut += l.closed[0].BytesOut
		switch { // the drain's report does not count clients that were told before it
		case l.closedBy != g || !l.closed[0].Notified:
		case t.toldFor == toldDrain:
			notified++
		case t.told.IsZero() || m.drain != nil && !t.told.Before(m.drain.acceptUntil):
			unsure++
		}
	}
	if st.State != server.StateStopped || st.Connections != 0 {
		m.w.violate("a drain ends", "%s is %v with %d connections", g.name, st.State, st.Connections)
	}
	if st.Accepted != accepted || (st.BytesIn != bytesIn || st.BytesOut != bytesOut) && !lost {
		m.w.violate("counts are exact", "%s: accepted %d, bytes in %d, out %d; its connections add up to %d, %d and %d", g.name,
			st.Accepted, st.BytesIn, st.BytesOut, accepted, bytesIn, bytesOut)
	}
	for _, why := range server.Reasons() {
		if st.Closed[why] != closed[why] {
			m.w.violate("counts are exact", "%s: closed %v %d, and there were %d", g.name, why, st.Closed[why], closed[why])
		}
	}
	if n := closed[server.ReasonKilled]; n != uint64(m.killed) && !lost {
		m.w.violate("counts are exact", "operators were told of %d killed connections, and %d were closed for it", m.killed, n)
	}
	rep, ok := g.srv.Report()
	if !ok {
		return
	}
	d := m.drain
	if d == nil {
		return
	}
	if rep.Notified < notified || rep.Notified > notified+unsure {
		m.w.violate("counts are exact", "the drain's report says that %d were notified, and %d to %d were", rep.Notified, notified, notified+unsure)
	}
	hangs := slices.ContainsFunc(m.w.traces, func(t *trace) bool { return t.plan.Handler.Hang > 0 })
	if !d.forcedAt.IsZero() && !hangs && rep.Ended.After(d.forcedAt.Add(forceTime+m.w.slack())) && !d.uncertain {
		m.w.violate("force closes everything at once", "it was forced at %v, and ended at %v",
			d.forcedAt.Sub(m.w.began), rep.Ended.Sub(m.w.began))
	}
	if rep.Ended.After(d.latest.Add(drainBudget + m.w.slack())) {
		m.w.violate("a drain closes all clients in time", "the drain ended at %v, and its deadline was %v", rep.Ended.Sub(m.w.began), d.latest.Sub(m.w.began))
	}
	last := latest(d.acceptUntil, d.began)
	if d.uncertain {
		last = last.Add(commitTime + freezeTime)
	}
	for _, l := range records {
		if len(l.closed) > 0 {
			last = latest(last, l.closed[0].Closed)
		}
	}
	if limit := last.Add(backoffTime + 500*time.Millisecond + m.w.slack()); rep.Ended.After(limit) && rep.Stuck == 0 {
		m.w.violate("a drain ends when all have left", "it ended at %v, and the last one left at %v", rep.Ended.Sub(m.w.began), last.Sub(m.w.began))
	}
}
