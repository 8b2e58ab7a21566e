package simulate

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A history is everything that a seed determines: the server's options, what the network, the clients and the operators
// do, and when. It does not determine the order in which Go runs goroutines that are ready at the same time.
type history struct {
	Seed    uint64
	Server  serverPlan
	Network faultPlan
	Clients []clientPlan
	Ops     []opPlan
	Horizon time.Duration // clients connect and operators act until then; afterwards the server settles and drains
}

// serverPlan is the server's options. Zero is the server's default.
type serverPlan struct {
	MaxConns    int
	RejectFull  bool // Limits.AtLimit is LimitReject
	PerAddress  int
	Idle, Stall time.Duration
	MaxAge      time.Duration
	Grace       time.Duration
	Delay       time.Duration
	Spread      time.Duration // of a drain's notices
}

// clientPlan is what one client does. Times are counted from its start, one step after another.
type clientPlan struct {
	ID      int
	Start   time.Duration
	Address int // clients with the same address count together
	Service bool
	Handler handlerPlan // for clients of the service; server.Echo serves the others
	Window  int         // bytes
	Delay   time.Duration
	Steps   []step
	Heeds   bool          // stops sending once it was told
	Leaves  time.Duration // from the notice until it half-closes; -1: it stays
	Floods  bool          // continues to send after the server has ended the stream
}

// handlerPlan is how the service's handler treats a client.
type handlerPlan struct {
	Think          time.Duration // between reading and writing
	ErrorAfter     int           // bytes after which it returns an error; 0: never
	PanicAfter     int           // or panics
	ReturnAfter    int           // or returns nil
	Hang           time.Duration // after the first read; it ignores its context meanwhile
	ReturnsOnDrain bool          // returns when it is told to drain and has no request
}

// step is one action of a client.
type step struct {
	Do string        // send, wait, stopreading, await, finish, close, reset
	N  int           // bytes to send
	D  time.Duration // to wait
}

// opPlan is one action of an operator.
type opPlan struct {
	At     time.Duration
	Do     string // pause, resume, release, kill, killidle, killall, notify, set, drain, extend, cancel, force, upgrade
	Mode   string
	TTL    time.Duration // of a pause; or the grace period of a drain, its extension, or the value of a timeout
	Which  int           // of the holds or clients; or the value of a limit
	While  bool          // pause while connected, for TTL
	Evict  bool          // the pause sends clients away
	Spread time.Duration // of the notices of a drain or an eviction; 0: not requested
	Set    string        // the name of a setting
	Fault  linkFault     // of an upgrade
	Refuse bool          // the successor refuses
}

// linkFault is what happens at the Nth message that one side of a handover sends or receives.
type linkFault struct {
	Successor bool // its side
	At        int  // 0: no fault
	Do        string
}

// shape is how large histories are, and how long what happens in them takes.
type shape struct {
	clients  int // at most
	horizon  time.Duration
	scale    time.Duration // unit of the waits between steps
	timeouts time.Duration // unit of timeouts and grace periods
	delay    time.Duration // of the network, at most
	bulk     int           // bytes in one send, at most
	upgrades bool
	sockets  bool
}

// bubbleShape is the shape of histories in a bubble, where waiting takes no real time.
var bubbleShape = shape{
	clients: 30, horizon: 20 * time.Second, scale: 2 * time.Second, timeouts: time.Second, delay: 50 * time.Millisecond,
	bulk: 200 << 10, upgrades: true,
}

// draw generates the history of a seed.
func draw(seed uint64, sh shape) *history {
	d := &generator{rand.New(rand.NewPCG(seed, 0x68697374)), sh}
	h := &history{Seed: seed, Horizon: d.between(sh.horizon/10, sh.horizon)}
	h.Server = d.server()
	h.Network = d.network()
	for i := range 1 + d.IntN(sh.clients) {
		h.Clients = append(h.Clients, d.client(i, h.Horizon))
	}
	h.Ops = d.ops(h)
	return h
}

type generator struct {
	*rand.Rand
	shape shape
}

func (d *generator) between(a, b time.Duration) time.Duration {
	if b <= a {
		return a
	}
	return a + time.Duration(d.Int64N(int64(b-a)))
}

// oneIn reports true once in n times.
func (d *generator) oneIn(n int) bool { return d.IntN(n) == 0 }

func (d *generator) server() (s serverPlan) {
	unit := d.shape.timeouts
	s.Grace = d.between(unit/5, 5*unit)
	if d.oneIn(3) {
		s.MaxConns = 1 + d.IntN(10)
		s.RejectFull = d.oneIn(2)
	}
	if d.oneIn(5) {
		s.PerAddress = 1 + d.IntN(3)
	}
	if d.oneIn(3) {
		s.Idle = d.between(unit, 6*unit)
	}
	if d.oneIn(2) {
		s.Stall = d.between(3*unit/2, 4*unit)
	}
	if d.oneIn(3) {
		s.Delay = d.between(unit/10, 2*unit)
	}
	if d.oneIn(4) {
		s.Spread = d.between(unit/5, 3*unit)
	}
	if d.oneIn(5) {
		s.MaxAge = d.between(unit, 8*unit)
	}
	return s
}

func (d *generator) network() (f faultPlan) {
	f.Segment = 1 + d.IntN(32<<10)
	if d.oneIn(6) {
		f.Segment = 1 + d.IntN(2000)
	}
	if d.oneIn(3) {
		f.Accept = d.Float64() / 3
	}
	if d.oneIn(2) {
		f.AcceptSlips = d.Float64() / 2
	}
	return f
}

func (d *generator) client(id int, horizon time.Duration) clientPlan {
	c := clientPlan{
		ID: id, Start: d.between(0, horizon), Address: d.IntN(4), Window: 1 << (10 + d.IntN(7)),
		Heeds: !d.oneIn(4), Leaves: -1,
	}
	if d.oneIn(3) { // many come at the same time
		c.Start = horizon / 4 * time.Duration(d.IntN(4))
	}
	if !d.oneIn(3) {
		c.Delay = d.between(0, d.shape.delay)
	}
	if d.oneIn(3) {
		c.Leaves = d.between(0, d.shape.timeouts)
	}
	if d.oneIn(3) {
		c.Service, c.Handler = true, d.handler()
	}
	c.Floods = d.oneIn(10)
	if d.oneIn(12) { // a probe
		c.Steps = []step{{Do: [...]string{"close", "reset", "finish"}[d.IntN(3)]}}
		return c
	}
	for range d.IntN(8) {
		c.Steps = append(c.Steps, d.step())
	}
	switch d.IntN(6) {
	case 0, 1:
		c.Steps = append(c.Steps, step{Do: "finish"})
	case 2:
		c.Steps = append(c.Steps, step{Do: [...]string{"close", "reset"}[d.IntN(2)]})
	}
	return c
}

func (d *generator) step() step {
	switch d.IntN(9) {
	case 0, 1, 2:
		return step{Do: "send", N: 1 + d.IntN(200)}
	case 3:
		n := 1 + d.IntN(20<<10)
		if d.oneIn(3) {
			n = 1 + d.IntN(d.shape.bulk)
		}
		return step{Do: "send", N: n}
	case 4, 5:
		return step{Do: "wait", D: d.between(0, d.shape.scale)}
	case 6:
		return step{Do: "stopreading", D: d.between(0, 3*d.shape.scale)}
	default:
		return step{Do: "await"}
	}
}

func (d *generator) handler() (m handlerPlan) {
	if d.oneIn(2) {
		m.Think = d.between(0, d.shape.timeouts/5)
	}
	m.ReturnsOnDrain = d.oneIn(2)
	n := 1 + d.IntN(3000)
	switch d.IntN(8) {
	case 0:
		m.ErrorAfter = n
	case 1:
		m.PanicAfter = n
	case 2:
		m.ReturnAfter = n
	case 3:
		m.Hang = d.between(0, 5*d.shape.timeouts)
	}
	return m
}

func (d *generator) ops(h *history) (ops []opPlan) {
	unit, horizon := d.shape.timeouts, h.Horizon
	for range d.IntN(14) {
		op := opPlan{At: d.between(0, horizon), Which: d.IntN(len(h.Clients))}
		switch d.IntN(14) {
		case 0, 1, 2:
			op.Do, op.Mode = "pause", [...]string{"hold", "reject"}[d.IntN(2)]
			if d.oneIn(2) {
				op.TTL = d.between(unit/10, 5*unit)
				op.While = d.oneIn(3)
			}
			if op.Evict = d.oneIn(4); op.Evict && d.oneIn(2) {
				op.Spread = d.between(unit/10, 3*unit)
			}
		case 12, 13:
			d.set(&op)
		case 3:
			op.Do = "resume"
		case 4:
			op.Do = "release"
		case 5:
			op.Do = "kill"
		case 6:
			op.Do, op.TTL = "killidle", d.between(0, 3*unit)
		case 7, 8:
			op.Do = "notify"
		case 9:
			op.Do = "killall"
		default:
			if !d.shape.upgrades {
				op.Do = "resume"
				break
			}
			op.Do = "upgrade"
			if d.oneIn(2) {
				op.Fault = linkFault{Successor: d.oneIn(2), At: 1 + d.IntN(8), Do: [...]string{"break", "delay", "stall"}[d.IntN(3)]}
				if op.Fault.Successor && d.oneIn(4) {
					op.Fault.Do = "die"
				}
			} else {
				op.Refuse = d.oneIn(8)
			}
		}
		ops = append(ops, op)
	}
	// How it ends. A drain may come early, be changed, and be cancelled. Then there may be another one.
	for more := !d.oneIn(3); more; more = d.oneIn(3) {
		ops = append(ops, d.drain(h)...)
	}
	slices.SortStableFunc(ops, func(a, b opPlan) int { return int(a.At - b.At) })
	return ops
}

// drain generates a drain, and requests that may change it.
func (d *generator) drain(h *history) (ops []opPlan) {
	unit := d.shape.timeouts
	drain := opPlan{At: d.between(h.Horizon/4, h.Horizon), Do: "drain", TTL: d.between(0, 5*unit)}
	if d.oneIn(3) {
		drain.TTL = -1 // the default
	}
	if d.oneIn(4) {
		drain.Spread = d.between(unit/10, 3*unit)
	}
	ops = append(ops, drain)
	if h.Server.Delay > 0 && d.oneIn(2) {
		ops = append(ops, opPlan{At: d.between(drain.At, drain.At+h.Server.Delay), Do: "cancel"})
	}
	for range d.IntN(4) {
		op := opPlan{At: d.between(drain.At, drain.At+3*unit), Do: "drain", TTL: d.between(0, 5*unit)}
		switch d.IntN(9) {
		case 0:
			op.Do = "force"
		case 1:
			op.Do, op.Mode = "pause", "hold"
		case 2:
			op.Do = "resume"
		case 3:
			op.TTL = -1
		case 4:
			op.Do = "cancel"
		case 5, 6:
			op.Do, op.TTL = "extend", d.between(unit/10, 3*unit)
		case 7:
			op.Spread = d.between(unit/10, 2*unit)
		}
		ops = append(ops, op)
	}
	return ops
}

// set chooses a setting and its value: a limit is in Which, a timeout in TTL, and 0 disables either.
func (d *generator) set(op *opPlan) {
	unit := d.shape.timeouts
	op.Do, op.Which = "set", 0
	switch d.IntN(4) {
	case 0:
		op.Set, op.TTL = settingIdle, d.between(unit, 6*unit)
	case 1:
		op.Set, op.TTL = settingMaxAge, d.between(unit, 8*unit)
	case 2:
		op.Set, op.TTL = settingGrace, d.between(unit/5, 5*unit)
		return
	default:
		op.Set, op.Which = settingMaxConns, 1+d.IntN(10)
	}
	if d.oneIn(4) {
		op.TTL, op.Which = 0, 0
	}
}

// The settings that operators change.
const (
	settingMaxConns = "max-conns"
	settingIdle     = "idle-timeout"
	settingMaxAge   = "max-conn-age"
	settingGrace    = "grace"
)

// value is what a setting is set to, as text.
func (o opPlan) value() string {
	if o.Set == settingMaxConns {
		return strconv.Itoa(o.Which)
	}
	return o.TTL.String()
}

// clone copies h so deep that its lists can be changed.
func (h *history) clone() *history {
	c := *h
	c.Clients = slices.Clone(h.Clients)
	for i := range c.Clients {
		c.Clients[i].Steps = slices.Clone(c.Clients[i].Steps)
	}
	c.Ops = slices.Clone(h.Ops)
	return &c
}

// String describes the history for people.
func (h *history) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "server %+v\nnetwork %+v\nhorizon %v\n", h.Server, h.Network, h.Horizon)
	for _, op := range h.Ops {
		fmt.Fprintf(&b, "%9.3fs operator: %s\n", op.At.Seconds(), op)
	}
	for i := range h.Clients {
		fmt.Fprintf(&b, "%9.3fs %s\n", h.Clients[i].Start.Seconds(), &h.Clients[i])
	}
	return b.String()
}

func (o opPlan) String() string {
	text := o.Do
	switch o.Do {
	case "pause":
		text += " " + o.Mode
		if o.While {
			text += " while connected"
		}
		if o.TTL > 0 {
			text += " for " + o.TTL.String()
		}
		if o.Evict {
			text += " and evict, spread " + o.Spread.String()
		}
	case "set":
		text += " " + o.Set + " " + o.value()
	case "killidle", "extend":
		text += " " + o.TTL.String()
	case "drain":
		text += " grace " + o.TTL.String() + " spread " + o.Spread.String()
	case "kill", "release":
		text += fmt.Sprintf(" %d", o.Which)
	case "upgrade":
		if o.Refuse {
			text += ", the successor refuses"
		}
		if o.Fault.At > 0 {
			text += fmt.Sprintf(", at message %d of the %s: %s", o.Fault.At, map[bool]string{true: "successor", false: "predecessor"}[o.Fault.Successor], o.Fault.Do)
		}
	}
	return text
}

func (c *clientPlan) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "client %d from address %d, window %d, delay %v", c.ID, c.Address, c.Window, c.Delay)
	if c.Service {
		fmt.Fprintf(&b, ", service %+v", c.Handler)
	}
	b.WriteString(":")
	for _, s := range c.Steps {
		b.WriteString(" " + s.Do)
		switch {
		case s.N > 0:
			fmt.Fprintf(&b, " %d", s.N)
		case s.D > 0:
			b.WriteString(" " + s.D.String())
		}
		b.WriteString(";")
	}
	if !c.Heeds {
		b.WriteString(" sends on when told;")
	}
	if c.Floods {
		b.WriteString(" sends on after the end;")
	}
	if c.Leaves >= 0 {
		fmt.Fprintf(&b, " leaves %v after the notice;", c.Leaves)
	}
	return b.String()
}
