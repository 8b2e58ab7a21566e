package simulate

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"echod/server"
)

func (m *model) judgeClient(t *trace, l life) {
	bad := func(rule, format string, args ...any) {
		m.w.violate(rule, "client %d: %s", t.plan.ID, fmt.Sprintf(format, args...))
	}
	if t.connected.IsZero() {
		if m.drain == nil || m.w.began.Add(t.plan.Start+m.w.skew()).Before(m.drain.acceptUntil) {
			bad("nobody is refused before the server stops accepting", "it was")
		}
		return
	}
	read := t.sent
	if len(l.closed) > 0 {
		read = int(l.closed[0].BytesIn)
	}
	echo, notices, err := t.parse(read)
	if err != nil {
		bad("every byte in order", "%v", err)
		return
	}
	if !t.left {
		bad("clients end", "it still runs")
	}
	switch {
	case len(l.closed) > 1:
		bad("a connection ends once", "it was closed %d times", len(l.closed))
		return
	case len(l.closed) == 0 && len(l.ids) > 0:
		bad("a connection ends once", "it was accepted, and never closed")
		return
	case len(l.closed) == 0:
		if m.drain != nil && m.drain.acceptUntil.Add(-time.Millisecond).After(t.connected) && m.drain.forced.IsZero() && m.drain.latest.Sub(m.drain.acceptUntil) > backoffTime {
			bad("nobody in the accept queue is reset", "it connected at %v and was not accepted", t.connected.Sub(m.w.began))
		}
		return
	}
	c := l.closed[0]
	m.judgeReason(t, l, c, bad)
	m.judgeNotices(t, l, c, echo, notices, bad)
	m.judgeBytes(t, c, echo, bad)
	if t.sawEOF() && c.Closed.After(t.endAt.Add(lingerTime+t.plan.Delay+m.w.slack())) {
		bad("a closed connection does not linger", "its stream ended at %v, and it was closed at %v",
			t.endAt.Sub(m.w.began), c.Closed.Sub(m.w.began))
	}

	// Nobody is admitted during a pause.
	for _, h := range m.holds {
		over := h.over()
		if m.drain != nil && (over.IsZero() || m.drain.acceptUntil.Before(over)) {
			over = m.drain.acceptUntil
		}
		if l.served.After(h.inForce.Add(m.w.skew())) && (over.IsZero() || l.served.Add(m.w.skew()).Before(over)) {
			bad("nobody is admitted during a pause", "it was admitted at %v, and hold %s was in force from %v to %v",
				l.served.Sub(m.w.began), h.id, h.inForce.Sub(m.w.began), over.Sub(m.w.began))
		}
	}
}

// judgeReason expects that each close reason has its cause.
func (m *model) judgeReason(t *trace, l life, c server.ClosedConn, bad func(string, string, ...any)) {
	p := m.w.h.Server
	rule := "a close reason has its cause"
	gone := !t.closed.IsZero() || t.plan.Floods || t.end == errGivenUp
	inDrain := m.drain != nil && !c.Closed.Before(m.drain.deadline)
	behind := c.Closed // an upgrade drains what it cannot hand over
	upgraded := slices.ContainsFunc(m.ops, func(o *opResult) bool { return o.upgraded && !o.began.After(behind) })
	switch c.Reason {
	case server.ReasonClientClosed, server.ReasonClientLeft:
		if t.finished.IsZero() && !gone {
			bad(rule, "%v, and it did not leave", c.Reason)
		}
		before := t.told.IsZero() || t.finished.Before(t.told.Add(t.plan.Delay+m.w.skew())) // it left before it was told
		if c.Reason == server.ReasonClientLeft && !c.Notified || c.Reason == server.ReasonClientClosed && c.Notified && !before {
			bad(rule, "%v, and notified is %v", c.Reason, c.Notified)
		}
	case server.ReasonClientReset:
		if !gone {
			bad(rule, "%v, and it reset nothing", c.Reason)
		}
	case server.ReasonIdleTimeout:
		quiet := max(t.longest, c.Closed.Sub(t.moved))
		if p.Idle == 0 || quiet < m.w.least(p.Idle-2*t.lag()) && !t.idled && t.plan.Manner.Deaf == 0 {
			bad(rule, "%v, and it was never quiet for more than %v", c.Reason, quiet)
		}
	case server.ReasonStalled:
		if !t.idled && t.lag() < p.Stall {
			bad(rule, "%v, and it read all the time", c.Reason)
		}
	case server.ReasonHandlerDone:
		if t.plan.Manner.Done == 0 && !(t.plan.Manner.Polite && (c.Notified || m.drain != nil || upgraded)) {
			bad(rule, "%v, and the handler does not return", c.Reason)
		}
	case server.ReasonHandlerError:
		if t.plan.Manner.Errors == 0 {
			bad(rule, "%v, and the handler returns none", c.Reason)
		}
	case server.ReasonHandlerPanic:
		if t.plan.Manner.Panics == 0 {
			bad(rule, "%v, and the handler does not panic", c.Reason)
		}
	case server.ReasonKilled:
		if !m.wasKilled(t, c) {
			bad(rule, "%v, and nobody killed it", c.Reason)
		}
	case server.ReasonRejectedPaused:
		if !slices.ContainsFunc(m.holds, func(h *modelHold) bool {
			over := latest(h.over(), h.gone)
			return h.mode == "reject" && !h.asked.After(c.Closed) && (over.IsZero() || !over.Before(t.connected))
		}) {
			bad(rule, "%v, and no hold rejects", c.Reason)
		}
	case server.ReasonRejectedLimit:
		if !(p.MaxConns > 0 && p.RejectFull) {
			bad(rule, "%v, and there is no limit", c.Reason)
		}
	case server.ReasonRejectedAddressLimit:
		if p.PerAddress == 0 {
			bad(rule, "%v, and there is no limit", c.Reason)
		}
	case server.ReasonRejectedDraining:
		if !inDrain {
			bad(rule, "%v, and the drain had time", c.Reason)
		}
	case server.ReasonDeadline:
		if !inDrain && !upgraded {
			bad(rule, "%v at %v, before the deadline", c.Reason, c.Closed.Sub(m.w.began))
		}
	case server.ReasonForced:
		late := m.drain != nil && !c.Closed.Before(m.drain.deadline.Add(abortTime))
		if !late && !upgraded && (m.drain == nil || m.drain.forced.IsZero()) {
			bad(rule, "%v, and nobody forced the drain", c.Reason)
		}
	default:
		bad(rule, "%v was not drawn", c.Reason)
	}
}

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

// judgeNotices expects that a client is told what concerns it, once.
func (m *model) judgeNotices(t *trace, l life, c server.ClosedConn, echo int, notices []string, bad func(string, string, ...any)) {
	told := 0
	// While it lingers, a rejected client can be ended for another reason.
	ended := c.Reason == server.ReasonKilled || c.Reason == server.ReasonDeadline || c.Reason == server.ReasonForced
	seen := make(map[string]bool)
	for i, n := range notices {
		word, rest, _ := strings.Cut(n, " ")
		switch {
		case word == "SHUTDOWN":
			told++
			m.judgeSeconds(t, c, rest, bad)
		case word == "NOTICE":
			if seen[rest] || !slices.ContainsFunc(m.ops, func(o *opResult) bool { return o.text == rest && rest != "" }) {
				bad("a message is told once", "it was told %q twice, or nobody sent it", rest)
			}
			seen[rest] = true
		case len(notices) > 1 || echo > 0:
			bad("a client is told what concerns it", "it was told %q as one of %d notices", n, len(notices))
		case n == "PAUSED" && (c.Reason == server.ReasonRejectedPaused || ended):
		case n == "BUSY" && (c.Reason == server.ReasonRejectedLimit || c.Reason == server.ReasonRejectedAddressLimit || ended):
		default:
			bad("a client is told what concerns it", "it was told %q as notice %d, and was closed as %v", n, i, c.Reason)
		}
	}
	if told > 1 {
		bad("told once", "it was told %d times that the server drains", told)
	}
	switch c.Reason {
	case server.ReasonRejectedPaused, server.ReasonRejectedLimit, server.ReasonRejectedAddressLimit, server.ReasonRejectedDraining:
		if t.sawEOF() && len(notices) != 1 {
			bad("a client is told what concerns it", "%v, and it was told %q", c.Reason, notices)
		}
	default:
		if t.sawEOF() && (told > 0) != c.Notified && t.prompt() {
			bad("told once", "it was told %d times, and the server says notified %v", told, c.Notified)
		}
	}
	if c.Reason == server.ReasonDeadline && t.prompt() && t.sawEOF() && told == 0 {
		bad("everybody is told", "it was closed at the deadline, and not told before")
	}
	// Every client that is served when the drain begins is told, unless the connection ends in this moment.
	if d := m.drain; d != nil && d.forced.IsZero() && told == 0 && t.prompt() && !l.served.IsZero() {
		by := latest(d.acceptUntil, l.served).Add(tellTime + 2*t.lag() + m.w.slack())
		ended := c.Closed
		if !t.endAt.IsZero() && t.endAt.Before(ended) {
			ended = t.endAt
		}
		if !t.closed.IsZero() && t.closed.Before(ended) {
			ended = t.closed
		}
		if d.uncertain {
			by = by.Add(commitTime + freezeTime)
		}
		if ended.After(by) && t.finished.IsZero() && d.latest.After(by) && t.plan.Manner.Deaf == 0 && t.end != errGivenUp {
			bad("everybody is told", "it was served from %v to %v, and the drain told nobody at %v", l.served.Sub(m.w.began), ended.Sub(m.w.began), d.acceptUntil.Sub(m.w.began))
		}
	}
}

// judgeSeconds expects that the notice names the time that is left.
func (m *model) judgeSeconds(t *trace, c server.ClosedConn, text string, bad func(string, string, ...any)) {
	number, reason, _ := strings.Cut(text, " ")
	seconds, err := strconv.Atoi(number)
	if err != nil || reason != "test" && reason != "upgrade" {
		bad("a notice says when and why", "it was told %q", text)
		return
	}
	d := m.drain
	if reason == "upgrade" || d == nil || c.Reason == server.ReasonRejectedDraining {
		if reason != "upgrade" && d == nil {
			bad("a notice says when and why", "it was told %q, and there is no drain", text)
		}
		return
	}
	// A later request may have brought the deadline forward.
	most := max(m.w.h.Server.Grace, 5*m.w.shape.timeouts) + m.w.h.Server.Delay + time.Second
	if float64(seconds) > most.Seconds()+1 {
		bad("a notice says when and why", "it was told %q, which is more than %v", text, most)
	}
}

// judgeBytes expects that what the server has read is echoed, and that everything was read if the client ended its
// stream by itself.
func (m *model) judgeBytes(t *trace, c server.ClosedConn, echo int, bad func(string, string, ...any)) {
	if c.BytesIn > uint64(t.offered) && !t.plan.Floods {
		bad("bytes are counted", "%d in, and it sent %d", c.BytesIn, t.offered)
	}
	if t.sawEOF() && c.BytesOut != uint64(len(t.got)) {
		bad("bytes are counted", "%d out, and it received %d", c.BytesOut, len(t.got))
	}
	if uint64(len(t.got)) > c.BytesOut {
		bad("bytes are counted", "%d out, and it received %d", c.BytesOut, len(t.got))
	}
	clean := c.Reason != server.ReasonForced && c.Reason != server.ReasonStalled && c.Reason != server.ReasonClientReset
	if t.sawEOF() && clean && t.prompt() && uint64(echo) != c.BytesIn && !isRejection(c.Reason) && !t.plan.Floods {
		bad("no byte is lost", "%v: the server read %d bytes, and it received %d of them", c.Reason, c.BytesIn, echo)
	}
	own := c.Reason == server.ReasonClientClosed || c.Reason == server.ReasonClientLeft
	if own && t.sawEOF() && echo != t.sent && !t.finished.IsZero() && len(c.Labels) == 0 {
		bad("no byte is lost", "%v: it sent %d bytes and ended its stream, and received %d", c.Reason, t.sent, echo)
	}
	forced := m.drain != nil && !m.drain.forced.IsZero() // which may come while it is being closed for another reason
	if t.sawReset() && t.prompt() && !t.plan.Floods && !forced && c.Reason != server.ReasonForced && c.Reason != server.ReasonStalled && t.closed.IsZero() {
		bad("nobody is reset", "%v: it saw %v", c.Reason, t.end)
	}
}

func isRejection(r server.Reason) bool {
	return r == server.ReasonRejectedPaused || r == server.ReasonRejectedLimit || r == server.ReasonRejectedAddressLimit ||
		r == server.ReasonRejectedDraining
}
