package server

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net"
	"slices"
	"time"

	"go.uber.org/zap"
)

// Status is the server at one instant: its figures agree with one another. Only the bytes may be a moment younger.
type Status struct {
	State             State
	Started           time.Time
	Listeners         []ListenerInfo
	Connections       int           // open ones, in whatever phase
	Phases            map[Phase]int // of these
	MaxConns          int           // how many are served at once, with what Options.MaxConns left open filled in; zero is unlimited
	Accepted          uint64        // always Connections plus the sum over Closed
	Closed            map[Reason]uint64
	BytesIn, BytesOut uint64 // of all connections, open and closed
	Holds             []HoldInfo
	Drain             *DrainInfo // nil until a drain begins
	Full              bool       // no place is left of Options.MaxConns: new clients get what AtLimit says
	AtLimit           AtLimit

	Grace, DrainDelay time.Duration // of a drain that names no grace itself, as in Options; no grace is zero

	NoticesSent, NoticesFailed uint64           // texts to clients, of a drain and of Notify: those that the kernel took, and did not
	Transitions                map[State]uint64 // how often each state was entered
}

// ListenerInfo describes an open listener.
type ListenerInfo struct {
	Address net.Addr
	// AcceptQueue is how many clients wait in the kernel to be accepted, AcceptQueueLimit how many
	// can. Both are -1 where the system does not tell.
	AcceptQueue, AcceptQueueLimit int
}

// ConnInfo describes an open connection.
type ConnInfo struct {
	ID                uint64
	Remote, Local     net.Addr
	Phase             Phase
	Opened            time.Time
	Idle              time.Duration // since a byte moved last
	BytesIn, BytesOut uint64
	Notified          bool // of the drain
}

// ClosedConn describes a closed connection.
type ClosedConn struct {
	ID                uint64
	Remote, Local     net.Addr
	Opened, Closed    time.Time
	Reason            Reason
	BytesIn, BytesOut uint64
	Notified          bool
}

// Status returns the server's status.
func (s *Server) Status() Status {
	st := Status{
		Started: s.started, MaxConns: s.opts.MaxConns, Grace: max(0, s.opts.Grace), DrainDelay: s.opts.DrainDelay,
		Closed: make(map[Reason]uint64), Phases: make(map[Phase]int), Transitions: make(map[State]uint64),
	}
	var listeners []net.Listener
	var conns []*Conn
	st.AtLimit = s.opts.AtLimit
	s.book.With(func(l *ledger) {
		st.State = l.status()
		st.Full = s.full(l)
		st.Connections = l.conns.len()
		st.Accepted = l.accepted
		for why, n := range l.closed {
			if n > 0 {
				st.Closed[Reason(why)] = n
			}
		}
		st.BytesIn, st.BytesOut = l.bytesIn, l.bytesOut
		st.NoticesSent, st.NoticesFailed = l.noticesSent, l.noticesFailed
		for state, n := range l.transitions {
			if n > 0 {
				st.Transitions[State(state)] = n
			}
		}
		conns = l.conns.all()
		for _, h := range l.holds {
			st.Holds = append(st.Holds, h.info)
		}
		if l.drain != nil {
			st.Drain = new(l.drain.info())
		}
		for _, a := range l.acceptors {
			listeners = append(listeners, a.ln)
		}
	})
	for c := range inTurns(conns, quietTurn) { // not under the lock: those that close meanwhile keep their figures
		st.Phases[Phase(c.phase.Load())]++
		st.BytesIn += c.BytesIn()
		st.BytesOut += c.BytesOut()
	}
	for _, ln := range listeners {
		info := ListenerInfo{Address: ln.Addr(), AcceptQueue: -1, AcceptQueueLimit: -1}
		if n, limit, ok := acceptQueue(ln); ok {
			info.AcceptQueue, info.AcceptQueueLimit = n, limit
		}
		st.Listeners = append(st.Listeners, info)
	}
	return st
}

// AwaitStatus returns nil once the state and the number of open connections were such that match
// returned true, however briefly, else the cause of ctx's end. match must be quick and
// must not call the server.
func (s *Server) AwaitStatus(ctx context.Context, match func(state State, connections int) bool) error {
	return s.book.Await(ctx, func(l *ledger) bool { return match(l.status(), l.conns.len()) })
}

// Info describes the connection as it is now.
func (c *Conn) Info() ConnInfo {
	return ConnInfo{
		ID: c.id, Remote: c.RemoteAddr(), Local: c.LocalAddr(), Phase: Phase(c.phase.Load()), Opened: c.opened,
		Idle:    max(0, time.Since(c.srv.at(c.active.Load()))),
		BytesIn: c.BytesIn(), BytesOut: c.BytesOut(), Notified: c.notified.Load(),
	}
}

// Conns ranges over the connections that were open when it was called, oldest first. Where there are very many, it lets
// others have the CPU now and then.
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
	s.book.With(func(l *ledger) { closed = l.recent.newestFirst() })
	return closed
}

func (s *Server) snapshot() (conns []*Conn) {
	s.book.With(func(l *ledger) { conns = l.conns.all() })
	return conns
}

// Kill ends an open connection: what was read is written back, and the client sees an end of
// stream. It returns at once. The error is ErrNoConn when id is not open, or is ending already.
func (s *Server) Kill(id uint64) error {
	var c *Conn
	s.book.With(func(l *ledger) { c = l.conns.get(id) })
	if c == nil || !s.kill(c) {
		return fmt.Errorf("%w: %d", ErrNoConn, id)
	}
	return nil
}

// KillFunc ends, like Kill, each open connection for which match returns true, and returns how many.
func (s *Server) KillFunc(match func(ConnInfo) bool) (killed int) {
	for c := range inTurns(s.snapshot(), promptTurn) {
		if match(c.Info()) && s.kill(c) {
			killed++
		}
	}
	return killed
}

func (s *Server) kill(c *Conn) bool {
	if !c.end(Killed, ErrKilled) {
		return false
	}
	s.log.Info("connection killed", zap.Uint64("conn", c.id), zap.Stringer("remote", c.RemoteAddr()))
	s.book.With(func(*ledger) {}) // for those who wait at the gate to look up
	return true
}

// Notify sends the line "NOTICE text" to every client that is being served. It waits a second for the last of
// them, and returns how many texts the kernel took, and how many it did not. The error says what is
// wrong with text.
func (s *Server) Notify(ctx context.Context, text string) (sent, failed int, err error) {
	if text == "" {
		return 0, 0, errors.New("notifying: the text is empty")
	}
	if err := CheckText(text); err != nil {
		return 0, 0, fmt.Errorf("notifying: text: %w", err)
	}
	conns := slices.DeleteFunc(s.snapshot(), func(c *Conn) bool { return Phase(c.phase.Load()) != Serving })
	var tally awaited[[2]int] // sent, failed
	line := []byte("NOTICE " + text + "\n")
	for c := range inTurns(conns, promptTurn) {
		c.post(&posting{text: line, settled: func(ok bool) {
			tally.With(func(n *[2]int) {
				if ok {
					n[0]++
				} else {
					n[1]++
				}
			})
		}})
	}
	ctx, cancel := context.WithTimeoutCause(ctx, notifyTimeout, errWaitOver)
	defer cancel()
	_ = tally.Await(ctx, func(n *[2]int) bool { return n[0]+n[1] == len(conns) })
	tally.With(func(n *[2]int) { sent = n[0] })
	failed = len(conns) - sent
	s.book.With(func(l *ledger) {
		l.noticesSent += uint64(sent)
		l.noticesFailed += uint64(failed)
	})
	s.log.Info("clients notified", zap.String("text", text), zap.Int("sent", sent), zap.Int("failed", failed))
	return sent, failed, nil
}
