package server

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math"
	"net"
	"slices"
	"time"

	"go.uber.org/zap"
)

// Status is a consistent snapshot of a server. Only the byte counts of open connections are read a moment later.
type Status struct {
	State             State
	Started           time.Time
	Listeners         []ListenerInfo
	Connections       int           // open connections, in any phase
	KeptByPredecessor int           // open connections that the predecessor still serves; see Server.TakeOver
	Phases            map[Phase]int // open connections by phase, without those of the predecessor
	MaxConns          int           // maximum number served at once; 0 means no limit
	Accepted          uint64        // always Connections plus the sum over Closed
	Closed            map[Reason]uint64
	BytesIn, BytesOut uint64 // of all connections, open and closed
	Holds             []HoldInfo
	Drain             *DrainInfo // nil until a drain begins
	HasPredecessor    bool       // the predecessor has not ended
	Full              bool       // MaxConns are being served; AtLimit says what happens to new clients
	AtLimit           LimitMode
	ReachedLimits     []ReachedLimit

	Told int // open connections whose clients were told to leave: by a drain, an eviction, or for their age

	Settings []SettingChange // settings that Configure has changed, with their initial values

	Grace, DrainDelay, Spread time.Duration // defaults of a drain
	MaxAge                    time.Duration // Timeouts.MaxAge; 0 is no limit

	NoticesSent, NoticesFailed uint64           // notices of drains and of Notify that the kernel has accepted, or not
	Transitions                map[State]uint64 // how often each state was entered
}

// ReachedLimit is a limit that keeps new clients out now.
type ReachedLimit struct {
	Setting string // its name for Settings.Get
	Value   string
	Clients int  // for a limit per client: how many clients have reached it; 0 for a limit on all of them
	Rejects bool // further clients are rejected; otherwise they wait in the accept queue
}

// ListenerInfo describes a listener that accepts connections.
type ListenerInfo struct {
	Address net.Addr
	TLS     bool // Listener.TLSConfig is set
	// AcceptQueue is the number of clients in the accept queue, and AcceptQueueLimit its maximum length. Both are -1 on
	// systems that do not report them.
	AcceptQueue, AcceptQueueLimit int
}

// ConnInfo describes an open connection.
type ConnInfo struct {
	ID                uint64
	Remote, Local     net.Addr
	Phase             Phase
	Opened            time.Time
	Active            time.Time     // when a byte was last read or written, or when the connection was opened
	Idle              time.Duration // time since Active
	BytesIn, BytesOut uint64
	Notified          bool      // the kernel has accepted the drain notice
	DrainDeadline     time.Time // when the server closes it; zero if its client was not told to leave
	DrainReason       string
	Labels            map[string]string
}

// ClosedConn describes a closed connection.
type ClosedConn struct {
	ID                uint64
	Remote, Local     net.Addr
	Opened, Closed    time.Time
	Reason            Reason
	BytesIn, BytesOut uint64
	Notified          bool
	Labels            map[string]string
	Err               error // error of the handler, of WrapConn or of the handshake
}

// Status returns the server's status.
func (s *Server) Status() Status {
	set := s.activeSettings()
	status := Status{
		Started: s.started, Grace: set.drain.Grace, DrainDelay: set.drain.Delay, Spread: set.drain.Spread,
		MaxAge: set.timeouts.MaxAge, AtLimit: set.limits.AtLimit,
		Closed: make(map[Reason]uint64), Phases: make(map[Phase]int), Transitions: make(map[State]uint64),
	}
	if set.limits.MaxConns != math.MaxInt {
		status.MaxConns = set.limits.MaxConns
	}
	status.Settings = diffSettings(s.initialSettings, set.toSettings())
	var listeners []Listener
	var conns []*Conn
	s.state.With(func(st *state) {
		status.State = st.publicState()
		status.Full = st.admitted >= set.limits.MaxConns
		status.ReachedLimits = st.reachedLimits(&set.limits)
		status.Connections = st.open()
		status.KeptByPredecessor = len(st.keptConns)
		status.Told = st.told
		status.HasPredecessor = st.predecessor != nil
		status.Accepted = st.accepted
		for why, n := range st.closed {
			if n > 0 {
				status.Closed[Reason(why)] = n
			}
		}
		status.BytesIn, status.BytesOut = st.bytesIn, st.bytesOut
		for _, b := range st.keptConns {
			status.BytesIn += b.BytesIn
			status.BytesOut += b.BytesOut
		}
		status.NoticesSent, status.NoticesFailed = st.noticesSent, st.noticesFailed
		for phase, n := range st.transitions {
			if n > 0 {
				status.Transitions[State(phase)] = n
			}
		}
		conns = st.conns.all()
		status.Holds = st.holdInfos()
		status.Drain = st.drainInfo()
		for _, a := range st.acceptors {
			listeners = append(listeners, a.ln)
		}
	})
	status.ReachedLimits = append(status.ReachedLimits, set.reachedRates(time.Now())...)
	for c := range paced(conns, backgroundBurst) { // without the lock; a connection that closes meanwhile keeps its figures
		status.Phases[Phase(c.phase.Load())]++
		status.BytesIn += c.BytesIn()
		status.BytesOut += c.BytesOut()
	}
	for _, ln := range listeners {
		info := ListenerInfo{Address: ln.Addr(), TLS: ln.TLSConfig != nil, AcceptQueue: -1, AcceptQueueLimit: -1}
		if n, limit, ok := acceptQueue(ln.Listener); ok {
			info.AcceptQueue, info.AcceptQueueLimit = n, limit
		}
		status.Listeners = append(status.Listeners, info)
	}
	return status
}

// AwaitStatus waits until match returns true for the state and the number of open connections, and returns nil. It
// misses no state, however brief. The error is the cause of ctx if that ends first, or ErrHandedOver. match must be
// quick and must not call the server.
func (s *Server) AwaitStatus(ctx context.Context, match func(state State, connections int) bool) error {
	if s.log == nil {
		return errNotNew
	}
	var handedOver bool
	err := s.state.Await(ctx, func(st *state) bool {
		handedOver = st.handedOver
		return handedOver || match(st.publicState(), st.open())
	})
	if err == nil && handedOver {
		return ErrHandedOver
	}
	return err
}

// Info describes the connection as it is now.
func (c *Conn) Info() ConnInfo {
	deadline, _ := c.DrainDeadline()
	active := c.srv.timeAt(c.lastActive.Load())
	return ConnInfo{
		ID: c.id, Remote: c.RemoteAddr(), Local: c.LocalAddr(), Phase: Phase(c.phase.Load()),
		Opened:  c.srv.timeAt(c.opened),
		Active:  active,
		Idle:    max(0, time.Since(active)),
		BytesIn: c.BytesIn(), BytesOut: c.BytesOut(), Notified: c.flags.has(flagNotified),
		DrainDeadline: deadline, DrainReason: c.DrainReason(), Labels: c.Labels(),
	}
}

// Conns ranges over the connections that were open when it was called, oldest first. It sleeps regularly so that a
// long listing does not delay clients.
func (s *Server) Conns() iter.Seq[ConnInfo] {
	conns := s.openConns()
	return func(yield func(ConnInfo) bool) {
		for c := range paced(conns, backgroundBurst) {
			if !yield(c.Info()) {
				return
			}
		}
	}
}

// Closed returns the last 1,024 closed connections, the latest first.
func (s *Server) Closed() (closed []ClosedConn) {
	s.state.With(func(st *state) { closed = st.recentClosed.newestFirst() })
	return closed
}

func (s *Server) openConns() (conns []*Conn) {
	s.state.With(func(st *state) { conns = st.conns.all() })
	return conns
}

// Kill ends an open connection, and returns at once. Its handler has a second to write what it has read. Then the client
// sees the end of the stream. The error is ErrNoConn if no connection with that id is open, or if it is already
// ending.
func (s *Server) Kill(id uint64) error {
	if err := s.AwaitOwner(); err != nil {
		return err
	}
	var c *Conn
	s.state.With(func(st *state) { c = st.conns.get(id) })
	if c == nil || !s.kill(c) {
		return fmt.Errorf("%w: %d", ErrNoConn, id)
	}
	return nil
}

// KillFunc kills each open connection for which match returns true, and returns how many.
func (s *Server) KillFunc(match func(ConnInfo) bool) (killed int) {
	if s.AwaitOwner() != nil {
		return 0
	}
	for c := range paced(s.openConns(), promptBurst) {
		if match(c.Info()) && s.kill(c) {
			killed++
		}
	}
	return killed
}

func (s *Server) kill(c *Conn) bool {
	if !c.end(ReasonKilled, ErrKilled) {
		return false
	}
	s.log.Info("connection killed", zap.Uint64("conn", c.id), zap.Stringer("remote", c.RemoteAddr()))
	s.state.With(func(*state) {}) // wakes a connection that waits for admission
	return true
}

// Notify sends an operator's message to every client that is being served, encoded by its Notifier. It waits for at
// most a second. It returns how many messages the kernel has accepted and how many have failed. Clients whose Notifier
// returns nil count as neither. The error says why text is invalid; see CheckText.
func (s *Server) Notify(ctx context.Context, text string) (sent, failed int, err error) {
	if s.log == nil {
		return 0, 0, errNotNew
	}
	if text == "" {
		return 0, 0, errors.New("notifying: the text is empty")
	}
	if err := CheckText(text); err != nil {
		return 0, 0, fmt.Errorf("notifying: text: %w", err)
	}
	conns := slices.DeleteFunc(s.openConns(), func(c *Conn) bool { return Phase(c.phase.Load()) != PhaseServing })
	var results monitor[map[messageResult]int]
	for c := range paced(conns, promptBurst) {
		c.queueMessage(&message{
			notice: Notice{Kind: NoticeMessage, Text: text},
			done: func(result messageResult) {
				results.With(func(n *map[messageResult]int) {
					if *n == nil {
						*n = make(map[messageResult]int)
					}
					(*n)[result]++
				})
			},
		})
	}
	ctx, cancel := context.WithTimeoutCause(ctx, messageTimeout, errWaitTimeout)
	defer cancel()
	_ = results.Await(ctx, func(n *map[messageResult]int) bool {
		return (*n)[messageSent]+(*n)[messageFailed]+(*n)[messageSilent] == len(conns)
	})
	results.With(func(n *map[messageResult]int) {
		sent, failed = (*n)[messageSent], len(conns)-(*n)[messageSent]-(*n)[messageSilent]
	})
	s.state.With(func(st *state) {
		st.noticesSent += uint64(sent)
		st.noticesFailed += uint64(failed)
	})
	s.log.Info("clients notified", zap.String("text", text), zap.Int("sent", sent), zap.Int("failed", failed))
	return sent, failed, nil
}
