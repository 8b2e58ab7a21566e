package simulate

import (
	"slices"
	"sync"
	"time"
)

// The model specifies what clients and operators may observe. It knows the operators' requests and their answers, what
// each client did and saw, and what the server reports about itself. It does not know how the server works. If two
// things happen at the same instant, the model accepts either order.
//
// Each check* method states some rules. A rule that does not hold is a violation (world.violate).
//
//	model_operators_test.go  the answer to each request
//	model_drain_test.go      drains, and what clients are told
//	model_settings_test.go   settings that change
//	model_status_test.go     the status, at any time
//	model_clients_test.go    each client, at the end
//	model_end_test.go        all clients and counters, at the end

// Time limits that the server promises, or that follow from its documentation.
const (
	drainBudget  = 2 * time.Second         // from the deadline until all connections are closed
	tellTime     = 300 * time.Millisecond  // from the end of accepting until every client is told
	flushTime    = time.Second             // to write what was read, when the server closes a connection
	abortTime    = 1350 * time.Millisecond // from the deadline until connections may be closed by force
	lingerTime   = 300 * time.Millisecond  // from the server's FIN to the client's
	forceTime    = 800 * time.Millisecond  // from a forced drain until all connections are closed
	answerTime   = time.Second             // for an answer of the control plane
	freezeTime   = 500 * time.Millisecond  // the freeze of an upgrade
	commitTime   = 5500 * time.Millisecond // the wait for a successor's acknowledgement
	backoffTime  = time.Second             // between accepts that fail
	keepTime     = time.Second             // HandoverOptions.Keep in each upgrade
	sweepPercent = 125                     // a timeout takes effect within so much of it, and a second
	ageLeast     = 90                      // the percentage of the maximum age at which a client is told, at least
	ageMost      = 110                     // and at most
)

type model struct {
	w *world

	mu     sync.Mutex
	holds  []*modelHold  // all that were ever placed
	drain  *modelDrain   // nil until one is requested, and after it was cancelled
	drains []*modelDrain // that were cancelled

	maxConns, idle, maxAge, grace timeline

	ops      []*opResult
	pending  map[*opResult]bool
	messages int
	killed   int // the sum of the answers to kills

	// The counters in the last status.
	accepted uint64
	bytesIn  uint64
	reasons  map[string]uint64
}

// modelHold is a hold that an operator has placed. It begins between requested and inForce. Once it is released, or its
// caller has left, it ends between earliestEnd and latestEnd.
type modelHold struct {
	id          string
	mode        string
	requested   time.Time
	inForce     time.Time // when the operator got the answer
	expires     time.Time // zero: never
	earliestEnd time.Time // zero: not released
	latestEnd   time.Time
	callerLeft  bool // the server may not have noticed yet

	evict  bool // clients are told within spread, and have grace
	spread time.Duration
	grace  time.Duration
}

func newModel(w *world) *model {
	m := &model{w: w, pending: make(map[*opResult]bool), reasons: make(map[string]uint64)}
	p := w.h.Server
	m.maxConns.add(w.began, w.began, int64(p.MaxConns))
	m.idle.add(w.began, w.began, int64(p.Idle))
	m.maxAge.add(w.began, w.began, int64(p.MaxAge))
	m.grace.add(w.began, w.began, int64(p.Grace))
	return m
}

// started records a request that has no answer yet.
func (m *model) started(r *opResult) {
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

// drainLimit returns when the drain of a generation must have ended. After a handover the drain covers the connections
// that stayed behind, and begins after keepTime.
func (m *model) drainLimit(g *generation) time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, o := range m.ops {
		if o.upgraded && o.on == g {
			return o.ended.Add(keepTime + m.w.h.Server.Spread + time.Duration(m.grace.most(m.w.began, o.ended)) + drainBudget)
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

// holdID returns the id that an operator releases. The hold may have ended, or never existed.
func (m *model) holdID(which int) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.holds) == 0 {
		return "h1"
	}
	return m.holds[which%len(m.holds)].id
}

// callerLeaves records that the caller of a hold is about to close its connection, which ends the hold.
func (m *model) callerLeaves(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, h := range m.holds {
		if h.id == id && h.earliestEnd.IsZero() {
			h.earliestEnd, h.latestEnd, h.callerLeft = time.Now(), time.Now().Add(m.leaveTime()), true
		}
	}
}

// leaveTime is how long a hold may be in force after its caller has left: in an upgrade until the end of the freeze.
func (m *model) leaveTime() time.Duration {
	for _, o := range m.ops {
		if o.plan.Do == "upgrade" && (m.pending[o] || time.Since(o.ended) < time.Second) {
			return freezeTime + commitTime
		}
	}
	return 100 * time.Millisecond
}

// live reports whether the hold is in force.
func (h *modelHold) live(now time.Time) bool {
	return h.earliestEnd.IsZero() && (h.expires.IsZero() || now.Before(h.expires))
}

// mayEnd returns the earliest time at which the hold may have ended; zero if it has no end yet.
func (h *modelHold) mayEnd() time.Time {
	end := h.earliestEnd
	if !h.expires.IsZero() && (end.IsZero() || h.expires.Before(end)) {
		end = h.expires
	}
	return end
}

// overlapsUpgrade reports whether an upgrade was in progress during r. Then either process may have answered.
func (m *model) overlapsUpgrade(r *opResult) bool {
	return slices.ContainsFunc(m.ops, func(o *opResult) bool {
		return o != r && o.plan.Do == "upgrade" && !o.began.After(r.ended) && (m.pending[o] || !o.ended.Before(r.began))
	})
}

// recentUpgrade reports whether an upgrade ended less than 2 s ago. Its freeze delays every other action.
func (m *model) recentUpgrade(now time.Time) bool {
	return slices.ContainsFunc(m.ops, func(o *opResult) bool { return o.plan.Do == "upgrade" && now.Sub(o.ended) < 2*time.Second })
}

// stayedBehind reports whether a connection was not handed over, so that limits no longer counted it at that time.
func (m *model) stayedBehind(l connRecord, when time.Time) bool {
	return slices.ContainsFunc(m.ops, func(o *opResult) bool { return o.upgraded && o.on == l.closedBy && !o.began.After(when) })
}

// stoppedAtOnce reports whether a generation stopped right after it took over.
func (m *model) stoppedAtOnce(g *generation) bool {
	rep, ok := g.srv.Report()
	return ok && slices.ContainsFunc(m.ops, func(o *opResult) bool { return o.upgraded && rep.Ended.Sub(o.ended) < 100*time.Millisecond })
}

// expirySlack is how late a hold may expire on a busy machine.
func (w *world) expirySlack() time.Duration {
	if w.shape.sockets {
		return w.slack()
	}
	return 0
}

// minQuiet is how long a client must have been quiet, by its own clock, before the server may close it for a timeout. On
// a busy machine the client and the server note the same byte at different times.
func (w *world) minQuiet(timeout time.Duration) time.Duration {
	if w.shape.sockets {
		return timeout / 2
	}
	return timeout
}

// skew is how far apart the server and an operator can see the same event.
func (w *world) skew() time.Duration {
	if w.shape.sockets {
		return 200 * time.Millisecond
	}
	return 0
}

func latest(times ...time.Time) time.Time { return slices.MaxFunc(times, time.Time.Compare) }
