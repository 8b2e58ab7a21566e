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
	Behind            int           // of these, those that a predecessor still serves; see Server.TakeOver
	Phases            map[Phase]int // of these
	MaxConns          int           // how many are served at once at most; 0 is no limit
	Accepted          uint64        // always Connections plus the sum over Closed
	Closed            map[Reason]uint64
	BytesIn, BytesOut uint64 // of all connections, open and closed
	Holds             []HoldInfo
	Drain             *DrainInfo // nil until a drain begins
	HasPredecessor    bool       // the process that handed over has not ended
	Full              bool       // MaxConns are being served: new clients get what AtLimit says
	AtLimit           LimitMode

	Told int // open connections whose clients were told to leave: by a drain, an eviction, or for their age

	Settings []SettingChange // those that Configure has changed, with their value at the start

	Grace, DrainDelay, Spread time.Duration // of a drain that names none itself
	MaxAge                    time.Duration // Timeouts.MaxAge; 0 is no limit

	NoticesSent, NoticesFailed uint64           // of drains and of Notify: taken by the kernel, or not
	Transitions                map[State]uint64 // how often each state was entered
}

// ListenerInfo describes a listener that accepts connections.
type ListenerInfo struct {
	Address net.Addr
	TLS     bool // Listener.TLSConfig is set
	// AcceptQueue is how many clients wait in the kernel to be accepted, and AcceptQueueLimit how many can. Both are
	// -1 where the system does not tell.
	AcceptQueue, AcceptQueueLimit int
}

// ConnInfo describes an open connection.
type ConnInfo struct {
	ID                uint64
	Remote, Local     net.Addr
	Phase             Phase
	Opened            time.Time
	Active            time.Time     // when a byte moved last, or when the connection was opened
	Idle              time.Duration // since then
	BytesIn, BytesOut uint64
	Notified          bool      // of the drain
	DrainDeadline     time.Time // when it is closed at the latest; zero while its client was not told to leave
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
	Err               error // what the handler returned, or why the connection could not be prepared
}

// Status returns the server's status.
func (s *Server) Status() Status {
	set := s.live()
	status := Status{
		Started: s.started, Grace: set.drain.Grace, DrainDelay: set.drain.Delay, Spread: set.drain.Spread,
		MaxAge: set.timeouts.MaxAge, AtLimit: set.limits.AtLimit,
		Closed: make(map[Reason]uint64), Phases: make(map[Phase]int), Transitions: make(map[State]uint64),
	}
	if set.limits.MaxConns != math.MaxInt {
		status.MaxConns = set.limits.MaxConns
	}
	status.Settings = changesBetween(s.initial, set.settings())
	var listeners []Listener
	var conns []*Conn
	s.state.With(func(st *state) {
		status.State = st.visible()
		status.Full = st.admitted >= set.limits.MaxConns
		status.Connections = st.open()
		status.Behind = len(st.behind)
		status.Told = st.told
		status.HasPredecessor = st.predecessor != nil
		status.Accepted = st.accepted
		for why, n := range st.closed {
			if n > 0 {
				status.Closed[Reason(why)] = n
			}
		}
		status.BytesIn, status.BytesOut = st.bytesIn, st.bytesOut
		for _, b := range st.behind {
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
	for c := range inTurns(conns, quietTurn) { // outside the lock: connections that close now keep their figures
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
		return handedOver || match(st.visible(), st.open())
	})
	if err == nil && handedOver {
		return ErrHandedOver
	}
	return err
}

// Info describes the connection as it is now.
func (c *Conn) Info() ConnInfo {
	deadline, _ := c.DrainDeadline()
	active := c.srv.at(c.active.Load())
	return ConnInfo{
		ID: c.id, Remote: c.RemoteAddr(), Local: c.LocalAddr(), Phase: Phase(c.phase.Load()),
		Opened:  c.srv.at(c.opened),
		Active:  active,
		Idle:    max(0, time.Since(active)),
		BytesIn: c.BytesIn(), BytesOut: c.BytesOut(), Notified: c.flags.has(flagNotified),
		DrainDeadline: deadline, DrainReason: c.DrainReason(), Labels: c.Labels(),
	}
}

// Conns ranges over the connections that were open when it was called, oldest first. It sleeps regularly so that a
// long listing does not delay clients.
func (s *Server) Conns() iter.Seq[ConnInfo] {
	conns := s.snapshot()
	return func(yield func(ConnInfo) bool) {
		for c := range inTurns(conns, quietTurn) {
			if !yield(c.Info()) {
				return
			}
		}
	}
}

// Closed returns the last 1,024 closed connections, the latest first.
func (s *Server) Closed() (closed []ClosedConn) {
	s.state.With(func(st *state) { closed = st.recent.newestFirst() })
	return closed
}

func (s *Server) snapshot() (conns []*Conn) {
	s.state.With(func(st *state) { conns = st.conns.all() })
	return conns
}

// Kill ends an open connection, and returns at once. Its handler has a second to write what it has read; then the
// client sees an end of stream. The error is ErrNoConn if no connection with that id is open, or if it is already
// ending.
func (s *Server) Kill(id uint64) error {
	if err := s.awaitThaw(); err != nil {
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
	if s.awaitThaw() != nil {
		return 0
	}
	for c := range inTurns(s.snapshot(), promptTurn) {
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
	s.state.With(func(*state) {}) // makes a connection that waits for its admission look again
	return true
}

// Notify sends an operator's message to every client that is being served, encoded by its Notifier. It waits for at
// most a second. It returns how many messages the kernel accepted and how many failed; clients whose Notifier returns
// nil count as neither. The error says why text is invalid; see CheckText.
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
	conns := slices.DeleteFunc(s.snapshot(), func(c *Conn) bool { return Phase(c.phase.Load()) != PhaseServing })
	var results awaited[map[messageResult]int]
	for c := range inTurns(conns, promptTurn) {
		c.post(&message{
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
	ctx, cancel := context.WithTimeoutCause(ctx, messageTimeout, errWaitOver)
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
