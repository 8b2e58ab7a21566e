package simulate

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"echod/server"
)

// checkClient checks what one client saw, and how its connection ended.
func (m *model) checkClient(t *trace, l connRecord) {
	violated := func(rule, format string, args ...any) {
		m.w.violate(rule, "client %d: %s", t.plan.ID, fmt.Sprintf(format, args...))
	}
	if t.connected.IsZero() {
		if m.drain == nil || m.w.began.Add(t.plan.Start+m.w.skew()).Before(m.drain.acceptUntil) {
			violated("no client is refused before the server stops accepting", "its connect was refused")
		}
		return
	}
	read := t.sent
	if len(l.closed) > 0 {
		read = int(l.closed[0].BytesIn)
	}
	echo, notices, err := t.parse(read)
	if err != nil {
		violated("echoes arrive in order", "%v", err)
		return
	}
	if !t.done {
		violated("clients end", "it still runs")
	}
	switch {
	case len(l.closed) > 1:
		violated("a connection ends once", "it was closed %d times", len(l.closed))
		return
	case len(l.closed) == 0 && len(l.ids) > 0:
		violated("a connection ends once", "it was accepted, and never closed")
		return
	case len(l.closed) == 0:
		if m.drain != nil && m.drain.acceptUntil.Add(-time.Millisecond).After(t.connected) && m.drain.forcedAt.IsZero() && m.drain.latest.Sub(m.drain.acceptUntil) > backoffTime {
			violated("no client in the accept queue is reset", "it connected at %v and was not accepted", t.connected.Sub(m.w.began))
		}
		return
	}
	c := l.closed[0]
	m.checkReason(t, l, c, violated)
	m.checkNotices(t, c, echo, notices, violated)
	m.checkTold(t, l, c, violated)
	m.checkUntold(t, l, c, violated)
	m.checkBytes(t, c, echo, violated)
	if t.sawEOF() && c.Closed.After(t.endAt.Add(lingerTime+t.plan.Delay+m.w.slack())) {
		violated("a closed connection does not linger", "its stream ended at %v, and it was closed at %v",
			t.endAt.Sub(m.w.began), c.Closed.Sub(m.w.began))
	}

	// No client is admitted during a pause.
	for _, h := range m.holds {
		over := h.mayEnd()
		if m.drain != nil && (over.IsZero() || m.drain.acceptUntil.Before(over)) {
			over = m.drain.acceptUntil
		}
		if l.served.After(h.inForce.Add(m.w.skew())) && (over.IsZero() || l.served.Add(m.w.skew()).Before(over)) {
			violated("no client is admitted during a pause", "it was admitted at %v, and hold %s was in force from %v to %v",
				l.served.Sub(m.w.began), h.id, h.inForce.Sub(m.w.began), over.Sub(m.w.began))
		}
	}
}

// checkReason requires a cause for the close reason: something that the client, its handler or an operator did.
func (m *model) checkReason(t *trace, l connRecord, c server.ClosedConn, violated func(string, string, ...any)) {
	p := m.w.h.Server
	limit := m.maxConns.least(t.connected, c.Closed)
	idle := time.Duration(m.idle.least(m.w.began, c.Closed))
	rule := "a close reason has its cause"
	gone := !t.closed.IsZero() || t.plan.Floods || t.end == errGivenUp
	inDrain := m.drain != nil && !c.Closed.Before(m.drain.earliest)
	// After an upgrade the predecessor drains the connections that it could not hand over.
	upgraded := slices.ContainsFunc(m.ops, func(o *opResult) bool { return o.upgraded && !o.began.After(c.Closed) })
	switch c.Reason {
	case server.ReasonClientClosed, server.ReasonClientLeft:
		if t.finished.IsZero() && !gone {
			violated(rule, "closed as %v, but the client did not leave", c.Reason)
		}
		before := t.told.IsZero() || t.finished.Before(t.told.Add(t.plan.Delay+m.w.skew())) // it left before it was told
		if c.Reason == server.ReasonClientLeft && !c.Notified || c.Reason == server.ReasonClientClosed && c.Notified && !before {
			violated(rule, "closed as %v, but notified is %v", c.Reason, c.Notified)
		}
	case server.ReasonClientReset:
		if !gone {
			violated(rule, "closed as %v, but the client did not reset", c.Reason)
		}
	case server.ReasonIdleTimeout:
		quiet := max(t.longestQuiet, c.Closed.Sub(t.lastMoved))
		if idle == 0 || quiet < m.w.minQuiet(idle-2*t.lag()) && !t.stoppedReading && t.plan.Handler.Hang == 0 {
			violated(rule, "closed as %v, but the client was never quiet for more than %v", c.Reason, quiet)
		}
	case server.ReasonStalled:
		if !t.stoppedReading && t.lag() < p.Stall {
			violated(rule, "closed as %v, but the client read all the time", c.Reason)
		}
	case server.ReasonHandlerDone:
		if t.plan.Handler.ReturnAfter == 0 && !(t.plan.Handler.ReturnsOnDrain && (c.Notified || t.toldFor != "" || m.drain != nil || upgraded)) {
			violated(rule, "closed as %v, but the handler does not return", c.Reason)
		}
	case server.ReasonHandlerError:
		if t.plan.Handler.ErrorAfter == 0 {
			violated(rule, "closed as %v, but the handler returns no error", c.Reason)
		}
	case server.ReasonHandlerPanic:
		if t.plan.Handler.PanicAfter == 0 {
			violated(rule, "closed as %v, but the handler does not panic", c.Reason)
		}
	case server.ReasonKilled:
		if !m.wasKilled(t, c) {
			violated(rule, "closed as %v, but no operator killed it", c.Reason)
		}
	case server.ReasonRejectedPaused:
		if !slices.ContainsFunc(m.holds, func(h *modelHold) bool {
			over := latest(h.mayEnd(), h.latestEnd)
			return h.mode == "reject" && !h.requested.After(c.Closed) && (over.IsZero() || !over.Before(t.connected))
		}) {
			violated(rule, "closed as %v, but no hold rejects", c.Reason)
		}
	case server.ReasonRejectedLimit:
		if !(limit > 0 && p.RejectFull) {
			violated(rule, "closed as %v, but there is no limit", c.Reason)
		}
	case server.ReasonRejectedAddressLimit:
		if p.PerAddress == 0 {
			violated(rule, "closed as %v, but there is no limit", c.Reason)
		}
	case server.ReasonRejectedDraining:
		if !inDrain {
			violated(rule, "closed as %v, but before the deadline", c.Reason)
		}
	case server.ReasonDeadline:
		if (m.drain == nil || c.Closed.Before(m.drain.firstClose())) && !upgraded {
			violated(rule, "closed as %v at %v, before the deadline", c.Reason, c.Closed.Sub(m.w.began))
		}
	case server.ReasonEvicted:
		if !slices.ContainsFunc(m.holds, func(h *modelHold) bool { return h.evict && !h.requested.Add(h.grace).After(c.Closed) }) {
			violated(rule, "closed as %v, but no hold evicts", c.Reason)
		}
	case server.ReasonMaxAge:
		if age := m.maxAge.least(l.accepted, c.Closed); age == 0 || c.Closed.Sub(t.connected) < time.Duration(age)*ageLeast/100 {
			violated(rule, "closed as %v, at an age of %v", c.Reason, c.Closed.Sub(t.connected))
		}
	case server.ReasonForced:
		late := m.drain != nil && !c.Closed.Before(m.drain.earliest.Add(abortTime))
		if !late && !upgraded && (m.drain == nil || m.drain.forcedAt.IsZero()) {
			violated(rule, "closed as %v, but no operator forced the drain", c.Reason)
		}
	default:
		violated(rule, "closed as %v, which nothing in the history can cause", c.Reason)
	}
}

// wasKilled reports whether an operator may have killed the connection.
func (m *model) wasKilled(t *trace, c server.ClosedConn) bool {
	return slices.ContainsFunc(m.ops, func(o *opResult) bool {
		switch o.plan.Do {
		case "kill":
			return o.target == t && o.code == 200 && !o.began.After(c.Closed)
		case "killall", "killidle":
			return o.code == 200 && !o.began.After(c.Closed)
		}
		return false
	})
}

// checkNotices requires a client to get each notice that concerns it once, and no others.
func (m *model) checkNotices(t *trace, c server.ClosedConn, echo int, notices []string, violated func(string, string, ...any)) {
	told := 0
	// While a rejected connection lingers, it can be closed for another reason.
	ended := c.Reason == server.ReasonKilled || c.Reason == server.ReasonDeadline || c.Reason == server.ReasonForced
	seen := make(map[string]bool)
	for i, n := range notices {
		word, rest, _ := strings.Cut(n, " ")
		switch {
		case word == "SHUTDOWN":
			told++
			m.checkSeconds(c, rest, violated)
		case word == "NOTICE":
			if seen[rest] || !slices.ContainsFunc(m.ops, func(o *opResult) bool { return o.text == rest && rest != "" }) {
				violated("a message is told once", "it was told %q twice, or nobody sent it", rest)
			}
			seen[rest] = true
		case len(notices) > 1 || echo > 0:
			violated("a client is told what concerns it", "it was told %q as one of %d notices", n, len(notices))
		case n == "PAUSED" && (c.Reason == server.ReasonRejectedPaused || ended):
		case n == "BUSY" && (c.Reason == server.ReasonRejectedLimit || c.Reason == server.ReasonRejectedAddressLimit || ended):
		default:
			violated("a client is told what concerns it", "it was told %q as notice %d, and was closed as %v", n, i, c.Reason)
		}
	}
	if told > 1 {
		violated("a client is told once", "it was told %d times that the server drains", told)
	}
	switch c.Reason {
	case server.ReasonRejectedPaused, server.ReasonRejectedLimit, server.ReasonRejectedAddressLimit, server.ReasonRejectedDraining:
		if t.sawEOF() && len(notices) != 1 {
			violated("a client is told what concerns it", "%v, and it was told %q", c.Reason, notices)
		}
	default:
		if t.sawEOF() && (told > 0) != c.Notified && t.readsPromptly() {
			violated("a client is told once", "it was told %d times, and the server says notified %v", told, c.Notified)
		}
	}
	byDeadline := c.Reason == server.ReasonDeadline || c.Reason == server.ReasonEvicted || c.Reason == server.ReasonMaxAge
	if byDeadline && t.readsPromptly() && t.sawEOF() && told == 0 {
		violated("every client is told", "closed as %v, and not told before", c.Reason)
	}
}

// checkSeconds requires the notice to state the time that is left, in seconds and rounded up.
func (m *model) checkSeconds(c server.ClosedConn, text string, violated func(string, string, ...any)) {
	number, reason, _ := strings.Cut(text, " ")
	seconds, err := strconv.Atoi(number)
	if err != nil {
		violated("a notice says when and why", "it was told %q", text)
		return
	}
	if c.Reason == server.ReasonRejectedDraining || reason == toldUpgrade {
		return
	}
	longest := time.Duration(m.grace.most(m.w.began, c.Closed))
	if reason == toldDrain && m.drain != nil {
		longest = m.drain.longestGrace()
	}
	if float64(seconds) > longest.Seconds()+1 {
		violated("a notice says when and why", "it was told %q, which is more than %v", text, longest)
	}
}

// checkBytes requires the server to echo all that it read, and to read all that a client sent before it half-closed.
func (m *model) checkBytes(t *trace, c server.ClosedConn, echo int, violated func(string, string, ...any)) {
	if c.BytesIn > uint64(t.offered) && !t.plan.Floods {
		violated("bytes are counted", "%d in, and it sent %d", c.BytesIn, t.offered)
	}
	if t.sawEOF() && c.BytesOut != uint64(len(t.got)) {
		violated("bytes are counted", "%d out, and it received %d", c.BytesOut, len(t.got))
	}
	if uint64(len(t.got)) > c.BytesOut {
		violated("bytes are counted", "%d out, and it received %d", c.BytesOut, len(t.got))
	}
	clean := c.Reason != server.ReasonForced && c.Reason != server.ReasonStalled && c.Reason != server.ReasonClientReset
	if t.sawEOF() && clean && t.readsPromptly() && uint64(echo) != c.BytesIn && !isRejection(c.Reason) && !t.plan.Floods {
		violated("no byte is lost", "%v: the server read %d bytes, and it received %d of them", c.Reason, c.BytesIn, echo)
	}
	own := c.Reason == server.ReasonClientClosed || c.Reason == server.ReasonClientLeft
	if own && t.sawEOF() && echo != t.sent && !t.finished.IsZero() && len(c.Labels) == 0 {
		violated("no byte is lost", "%v: it sent %d bytes and ended its stream, and received %d", c.Reason, t.sent, echo)
	}
	// A drain may be forced while the connection is being closed for another reason.
	forced := m.drain != nil && !m.drain.forcedAt.IsZero()
	if t.sawReset() && t.readsPromptly() && !t.plan.Floods && !forced && c.Reason != server.ReasonForced && c.Reason != server.ReasonStalled && t.closed.IsZero() {
		violated("no client is reset", "%v: it saw %v", c.Reason, t.end)
	}
}

func isRejection(r server.Reason) bool {
	return r == server.ReasonRejectedPaused || r == server.ReasonRejectedLimit || r == server.ReasonRejectedAddressLimit ||
		r == server.ReasonRejectedDraining
}
