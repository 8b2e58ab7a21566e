package simulate

import (
	"slices"
	"sync"
	"time"
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

// overlapsUpgrade reports whether an upgrade was in progress while r was. Only one process answers in the end, and it
// may be another one than was asked.
func (m *model) overlapsUpgrade(r *opResult) bool {
	return slices.ContainsFunc(m.ops, func(o *opResult) bool {
		return o != r && o.plan.Do == "upgrade" && !o.began.After(r.ended) && (m.pending[o] || !o.ended.Before(r.began))
	})
}

// upgradedLately reports whether there was an upgrade, in whose freeze nobody is served, rejected or closed.
func (m *model) upgradedLately(now time.Time) bool {
	return slices.ContainsFunc(m.ops, func(o *opResult) bool { return o.plan.Do == "upgrade" && now.Sub(o.ended) < 2*time.Second })
}

// staysBehind reports whether a connection was with a predecessor at that time, where limits do not count it.
func (m *model) staysBehind(l life, when time.Time) bool {
	return slices.ContainsFunc(m.ops, func(o *opResult) bool { return o.upgraded && o.on == l.closedBy && !o.began.After(when) })
}

// stopsAtOnce reports whether a generation stopped in the moment in which it took over.
func (m *model) stopsAtOnce(g *generation) bool {
	rep, ok := g.srv.Report()
	return ok && slices.ContainsFunc(m.ops, func(o *opResult) bool { return o.upgraded && rep.Ended.Sub(o.ended) < 100*time.Millisecond })
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

func latest(times ...time.Time) time.Time { return slices.MaxFunc(times, time.Time.Compare) }
