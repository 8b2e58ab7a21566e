package simulate

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"echod/control"
	"echod/server"
)

// The model says what clients and operators may see. It knows what the operators did and what they were answered, what
// each client did and saw, and what the server says about itself; it knows nothing about how the server works. Where
// two things happen at the same instant, either order is right.

// Bounds that the server promises, or that follow from its documentation.
const (
	drainBudget  = 2 * time.Second        // after the deadline everything is closed
	tellTime     = 300 * time.Millisecond // after the end of accepting everybody was told
	flushTime    = time.Second            // for what was read when the server ends a connection
	abortTime    = 1350 * time.Millisecond
	lingerTime   = 300 * time.Millisecond // for the client's FIN after the server's
	forceTime    = 800 * time.Millisecond // until everything is closed by force
	answerTime   = time.Second            // of the control plane
	freezeTime   = 500 * time.Millisecond // in an upgrade
	commitTime   = 5500 * time.Millisecond
	backoffTime  = time.Second // after accepting failed
	keepTime     = time.Second // asked for in an upgrade: until what stays behind is told
	sweepPercent = 125         // of a timeout, within which it takes effect, and at most a second more
)

type model struct {
	w *world

	mu       sync.Mutex
	holds    []*modelHold
	drain    *modelDrain
	ops      []*opResult
	pending  map[*opResult]bool
	messages int
	killed   int // as answered
	accepted uint64
	bytesIn  uint64
	reasons  map[string]uint64
}

// modelHold is a hold that an operator has placed.
type modelHold struct {
	id      string
	mode    string
	asked   time.Time // it is in force after this
	inForce time.Time // since when the operator knows
	expires time.Time // zero: never
	ended   time.Time // since when it may be over; zero: not released
	gone    time.Time // since when it is certainly over
	fades   bool      // its caller has gone, and the server may not know yet
}

// modelDrain is the drain, as an operator may expect it. Where a request overlaps an upgrade, the times are bounds.
type modelDrain struct {
	began       time.Time     // when it was asked for
	acceptUntil time.Time     // new clients are served until then
	deadline    time.Time     // the earliest
	latest      time.Time     // and the latest that it may be
	spread      time.Duration // how long the first request took
	uncertain   bool          // it was asked for during an upgrade, which it may have to wait for
	forced      time.Time     // when it was forced
}

func newModel(w *world) *model {
	return &model{w: w, pending: make(map[*opResult]bool), reasons: make(map[string]uint64)}
}

// live reports whether the hold stands at time now.
func (h *modelHold) live(now time.Time) bool {
	return h.ended.IsZero() && (h.expires.IsZero() || now.Before(h.expires))
}

// over is when the hold may have ended at the earliest.
func (h *modelHold) over() time.Time {
	end := h.ended
	if !h.expires.IsZero() && (end.IsZero() || h.expires.Before(end)) {
		end = h.expires
	}
	return end
}

func (m *model) begin(r *opResult) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.pending[r] = true
	m.ops = append(m.ops, r)
}

func (m *model) draining() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.drain != nil
}

// bound is when the drain of a generation must be over. One that has handed over keeps what stayed behind for a while.
func (m *model) bound(g *generation) time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, o := range m.ops {
		if o.upgraded && o.on == g {
			return o.ended.Add(keepTime + m.w.h.Server.Grace + drainBudget)
		}
	}
	return m.drain.latest.Add(drainBudget)
}

func (m *model) nextMessage() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.messages++
	return m.messages
}

// holdID is the id of a hold for an operator to release, who may have the wrong one.
func (m *model) holdID(which int) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.holds) == 0 {
		return "h1"
	}
	return m.holds[which%len(m.holds)].id
}

// leaves notes that the caller of a hold that is tied to its connection is about to go.
func (m *model) leaves(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, h := range m.holds {
		if h.id == id && h.ended.IsZero() {
			h.ended, h.gone, h.fades = time.Now(), time.Now().Add(100*time.Millisecond), true
		}
	}
}

// overlapsUpgrade reports whether an upgrade was in progress while r was. Only one process answers in the end, and it
// may be another one than was asked.
func (m *model) overlapsUpgrade(r *opResult) bool {
	return slices.ContainsFunc(m.ops, func(o *opResult) bool {
		return o != r && o.plan.Do == "upgrade" && !o.began.After(r.ended) && (m.pending[o] || !o.ended.Before(r.began))
	})
}

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

func (d *modelDrain) shorten(deadline, latest time.Time) {
	if deadline.Before(d.deadline) {
		d.deadline = deadline
	}
	if latest.Before(d.latest) {
		d.latest = latest
	}
	if d.deadline.Before(d.acceptUntil) {
		d.acceptUntil = d.deadline
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

// late is how late the server may be on a busy machine.
func (w *world) late() time.Duration {
	if w.shape.sockets {
		return w.slack()
	}
	return 0
}

// least is how long a client must have been quiet at least to be closed for a timeout. On a busy machine the client's
// clock and the server's are not looked at in the same instant.
func (w *world) least(timeout time.Duration) time.Duration {
	if w.shape.sockets {
		return timeout / 2
	}
	return timeout
}

// skew is how far apart the same event can be for the server and for an operator.
func (w *world) skew() time.Duration {
	if w.shape.sockets {
		return 200 * time.Millisecond
	}
	return 0
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

// upgradedLately reports whether there was an upgrade, in whose freeze nobody is served, rejected or closed.
func (m *model) upgradedLately(now time.Time) bool {
	return slices.ContainsFunc(m.ops, func(o *opResult) bool { return o.plan.Do == "upgrade" && now.Sub(o.ended) < 2*time.Second })
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

func latest(times ...time.Time) time.Time { return slices.MaxFunc(times, time.Time.Compare) }

// snapshot copies what the servers have said about the clients.
func (w *world) snapshot() map[*trace]life {
	w.mu.Lock()
	defer w.mu.Unlock()
	lives := make(map[*trace]life)
	for t, l := range w.lives {
		lives[t] = *l
	}
	return lives
}

// lag is how long it can take until what the server writes at once has reached a client that reads.
func (t *trace) lag() time.Duration {
	rounds := 2 + 4<<10/t.plan.Window
	return time.Duration(2*rounds)*t.plan.Delay + t.plan.Manner.Think
}

// prompt reports whether the client has read all the time, so that the server's bounds are enough for it.
func (t *trace) prompt() bool { return !t.idled && t.lag() < flushTime/2 && t.plan.Manner.Deaf == 0 }

// parse splits what a client has received into the echo of what it sent, of which it returns the length, and the
// server's notices. A notice is a line of its own: if the byte before it is not the end of a line, a newline comes first.
//
// An added newline can look like one of the client's own. Then the echo may be a byte longer or shorter, and read says
// which length is expected.
func (t *trace) parse(read int) (echo int, notices []string, err error) {
	at := []int{0} // where the echo may be
	choose := func() int {
		if slices.Contains(at, read) {
			return read
		}
		return slices.Max(at)
	}
	rest := t.got
	sent := func(p int, chunk []byte) bool {
		if p+len(chunk) > t.offered {
			return false
		}
		want := make([]byte, len(chunk))
		content(t.plan.ID, p, want)
		return bytes.Equal(want, chunk)
	}
	for {
		i := bytes.IndexAny(rest, "SNPB")
		chunk, isLast := rest, i < 0
		if !isLast {
			chunk = rest[:i]
		}
		var next []int
		for _, p := range at {
			if (isLast || len(chunk) == 0 || chunk[len(chunk)-1] == '\n') && sent(p, chunk) {
				next = append(next, p+len(chunk))
			}
			if n := len(chunk) - 1; !isLast && n > 0 && chunk[n] == '\n' && chunk[n-1] != '\n' && sent(p, chunk[:n]) {
				next = append(next, p+n)
			}
			if isLast && len(chunk) > 0 && chunk[len(chunk)-1] == '\n' && !t.sawEOF() && sent(p, chunk[:len(chunk)-1]) {
				next = append(next, p+len(chunk)-1) // a notice was cut off after its newline
			}
		}
		if at = next; len(at) == 0 {
			return 0, notices, fmt.Errorf("%q after %d bytes and %d notices is neither echo nor notice", clip(chunk), len(t.got)-len(rest), len(notices))
		}
		if isLast {
			return choose(), notices, nil
		}
		rest = rest[i:]
		end := bytes.IndexByte(rest, '\n')
		if end < 0 {
			if t.sawEOF() && t.prompt() { // otherwise the server may have given up in the middle
				return 0, notices, fmt.Errorf("the notice %q is cut off", clip(rest))
			}
			return choose(), notices, nil
		}
		notices = append(notices, string(rest[:end]))
		rest = rest[end+1:]
	}
}

func clip(p []byte) []byte { return p[:min(len(p), 60)] }

// judgeEnd judges everything when all is over.
func (m *model) judgeEnd() {
	m.mu.Lock()
	defer m.mu.Unlock()
	lives := m.w.snapshot()
	for _, t := range m.w.traces {
		t.mu.Lock()
		m.judgeClient(t, lives[t])
		t.mu.Unlock()
	}
	m.judgeOrder(lives)
	m.judgeLimits(lives)
	m.judgeMessages()
	m.judgeCounts(lives)
}

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

// judgeOrder expects that clients are accepted and admitted in the order in which they connected.
func (m *model) judgeOrder(lives map[*trace]life) {
	for _, service := range []bool{false, true} {
		var queue []*trace
		for _, t := range m.w.traces {
			if t.plan.Service == service && len(lives[t].ids) > 0 {
				queue = append(queue, t)
			}
		}
		slices.SortFunc(queue, func(a, b *trace) int { return cmp.Compare(lives[a].ids[0], lives[b].ids[0]) })
		var last, served *trace
		for _, t := range queue {
			if last != nil && t.connected.Before(last.connected) && !m.w.shape.sockets {
				m.w.violate("clients are accepted in order", "client %d connected before client %d, and was accepted after it", t.plan.ID, last.plan.ID)
			}
			last = t
			if lives[t].served.IsZero() {
				continue
			}
			if served != nil && lives[t].served.Before(lives[served].served) && !m.w.shape.sockets {
				m.w.violate("clients are served in order", "client %d was served before client %d", t.plan.ID, served.plan.ID)
			}
			served = t
		}
	}
}

// judgeLimits expects that never more clients are served than allowed, and that none is turned away before that.
func (m *model) judgeLimits(lives map[*trace]life) {
	p := m.w.h.Server
	if p.MaxConns == 0 && p.PerAddress == 0 {
		return
	}
	at := func(when time.Time, address int, strict bool) (n int) {
		for t, l := range lives {
			if l.served.IsZero() || len(l.closed) == 0 || address >= 0 && t.plan.Address != address || strict && m.staysBehind(l, when) {
				continue
			}
			from, to := l.served, l.closed[0].Closed
			if strict && from.Before(when) && to.After(when) || !strict && !from.After(when) && !to.Before(when) {
				n++
			}
		}
		return n
	}
	for t, l := range lives {
		if l.served.IsZero() || m.drain != nil && !l.served.Before(m.drain.acceptUntil) {
			continue // a drain serves those in the queue too
		}
		if n := at(l.served, -1, true); p.MaxConns > 0 && n >= p.MaxConns {
			m.w.violate("limits hold", "client %d was served besides %d others", t.plan.ID, n)
		}
		if n := at(l.served, t.plan.Address, true); p.PerAddress > 0 && n >= p.PerAddress {
			m.w.violate("limits hold", "client %d was served besides %d others of its address", t.plan.ID, n)
		}
	}
	for t, l := range lives {
		if len(l.closed) == 0 || l.closed[0].Reason != server.ReasonRejectedLimit && l.closed[0].Reason != server.ReasonRejectedAddressLimit {
			continue
		}
		// It was rejected at some time after it connected. Enough others must have been served at one such time.
		busy := false
		times := []time.Time{t.connected}
		for _, other := range lives {
			if other.served.After(t.connected) && !other.served.After(l.closed[0].Closed) {
				times = append(times, other.served)
			}
		}
		for _, when := range times {
			busy = busy || p.MaxConns > 0 && p.RejectFull && at(when, -1, false) >= p.MaxConns
			busy = busy || p.PerAddress > 0 && at(when, t.plan.Address, false) >= p.PerAddress
		}
		if !busy && !m.w.shape.sockets && m.w.h.Network.Accept == 0 && len(m.holds) == 0 && p.MaxConns == 0 {
			m.w.violate("limits reject only beyond them", "client %d was rejected, and its address had room", t.plan.ID)
		}
	}
}

// staysBehind reports whether a connection was with a predecessor at that time, where limits do not count it.
func (m *model) staysBehind(l life, when time.Time) bool {
	return slices.ContainsFunc(m.ops, func(o *opResult) bool { return o.upgraded && o.on == l.closedBy && !o.began.After(when) })
}

// judgeMessages expects that as many clients got an operator's message as the answer says.
func (m *model) judgeMessages() {
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
			case !t.sawEOF() || !t.prompt():
				uncertain++
			}
		}
		if got > o.notified.Sent+o.notified.Failed || got+uncertain < o.notified.Sent {
			m.w.violate("messages are counted", "%q: answered sent %d, failed %d, and %d clients have it", o.text, o.notified.Sent, o.notified.Failed, got)
		}
	}
}

// stopsAtOnce reports whether a generation stopped in the moment in which it took over.
func (m *model) stopsAtOnce(g *generation) bool {
	rep, ok := g.srv.Report()
	return ok && slices.ContainsFunc(m.ops, func(o *opResult) bool { return o.upgraded && rep.Ended.Sub(o.ended) < 100*time.Millisecond })
}

// judgeCounts expects that the owner's counters are exact in the end.
func (m *model) judgeCounts(lives map[*trace]life) {
	g := m.w.current()
	st := g.srv.Status()
	var accepted, bytesIn, bytesOut uint64
	notified, lost := 0, false
	closed := make(map[server.Reason]uint64)
	for _, l := range lives {
		if len(l.closed) == 0 {
			continue
		}
		accepted++
		if end, ok := g.srv.Report(); ok && l.closedBy != g && l.closed[0].Closed.After(end.Ended) || m.stopsAtOnce(g) && l.closedBy != g &&
			st.Closed[server.ReasonLost] > closed[server.ReasonLost] && st.Closed[l.closed[0].Reason] == closed[l.closed[0].Reason] {
			closed[server.ReasonLost]++ // the predecessor had not reported its end when the successor stopped
			lost = true
			continue
		}
		closed[l.closed[0].Reason]++
		bytesIn += l.closed[0].BytesIn
		bytesOut += l.closed[0].BytesOut
		if l.closedBy == g && l.closed[0].Notified {
			notified++
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
	if rep.Notified != notified {
		m.w.violate("counts are exact", "the drain's report says that %d were notified, and %d were", rep.Notified, notified)
	}
	deaf := slices.ContainsFunc(m.w.traces, func(t *trace) bool { return t.plan.Manner.Deaf > 0 })
	if !d.forced.IsZero() && !deaf && rep.Ended.After(d.forced.Add(forceTime+m.w.slack())) && !d.uncertain {
		m.w.violate("force closes everything at once", "it was forced at %v, and ended at %v",
			d.forced.Sub(m.w.began), rep.Ended.Sub(m.w.began))
	}
	if rep.Ended.After(d.latest.Add(drainBudget + m.w.slack())) {
		m.w.violate("closed within the bound", "the drain ended at %v, and its deadline was %v", rep.Ended.Sub(m.w.began), d.latest.Sub(m.w.began))
	}
	last := d.acceptUntil
	if d.uncertain {
		last = last.Add(commitTime + freezeTime)
	}
	for _, l := range lives {
		if len(l.closed) > 0 {
			last = latest(last, l.closed[0].Closed)
		}
	}
	if limit := last.Add(backoffTime + 500*time.Millisecond + m.w.slack()); rep.Ended.After(limit) && rep.Stuck == 0 {
		m.w.violate("a drain ends when all have left", "it ended at %v, and the last one left at %v", rep.Ended.Sub(m.w.began), last.Sub(m.w.began))
	}
}

func deref(p *int) int {
	if p == nil {
		return -1
	}
	return *p
}
