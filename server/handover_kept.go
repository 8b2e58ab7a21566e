package server

import (
	"context"
	"fmt"
	"time"

	"go.uber.org/zap"
)

// The connections that the predecessor keeps after a handover. The successor counts them as open until the predecessor
// reports that they have ended.

// forwardEnds is the predecessor's goroutine that reports to the successor how the kept connections ended. It ends with
// the server, and the drain waits for it.
func (s *Server) forwardEnds(link Link) {
	defer close(s.forwardDone())
	received := make(chan struct{})
	go s.receiveFromSuccessor(link, received)
	defer func() {
		_ = link.Close()
		<-received
	}()
	for {
		var ends []handoverEnd
		var stopped bool
		_ = s.state.Await(context.Background(), func(st *state) bool {
			ends, st.unreportedEnds = st.unreportedEnds, nil
			stopped = st.lifecycle == StateStopped
			return len(ends) > 0 || stopped
		})
		if len(ends) > 0 {
			if err := (handoverMessage{Type: msgEnded, Ends: ends}).send(link, nil); err != nil {
				s.log.Warn("cannot report ended connections to the successor", zap.Error(err))
				return
			}
		}
		if stopped {
			return
		}
	}
}

// forwardDone returns the channel that forwardEnds closes; nil if nothing was handed over.
func (s *Server) forwardDone() (done chan struct{}) {
	s.state.With(func(st *state) { done = st.forwardDone })
	return done
}

// receiveFromSuccessor is the goroutine that drains this server when the successor asks for it; see DrainPredecessor.
// forwardEnds starts it and waits for it.
func (s *Server) receiveFromSuccessor(link Link, done chan<- struct{}) {
	defer close(done)
	for {
		m, files, err := receiveMessage(link)
		closeFiles(files)
		if err != nil {
			return
		}
		if m.Type != msgDrain || m.Drain == nil {
			continue
		}
		_ = s.DrainPredecessor(*m.Drain, m.Force) // the error says that there is none
		if m.Force {
			s.Force(m.Drain.Reason)
		} else {
			s.StartDrain(*m.Drain)
		}
	}
}

// receiveFromPredecessor is the successor's goroutine that receives how the kept connections ended. It ends when the
// predecessor closes its end of the link, or when this server has stopped. The drain waits for it.
func (s *Server) receiveFromPredecessor(link Link) {
	defer close(s.predecessorDone())
	defer link.Close()
	stop := context.AfterFunc(s.backgroundCtx, func() { _ = link.SetDeadline(aLongTimeAgo) })
	defer stop()
	for {
		m, files, err := receiveMessage(link)
		closeFiles(files)
		if err != nil {
			break
		}
		switch m.Type {
		case msgEnded:
			s.countKeptEnds(m.Ends)
		case msgDrain:
			if m.Force {
				s.Force("upgrade")
			} else if m.Drain != nil {
				s.StartDrain(*m.Drain)
			}
		}
	}
	s.countKeptLost()
}

// predecessorDone returns the channel that receiveFromPredecessor closes; nil if nothing was taken over.
func (s *Server) predecessorDone() (done chan struct{}) {
	s.state.With(func(st *state) { done = st.predecessorDone })
	return done
}

// DrainPredecessor makes the predecessor drain the connections that it keeps, without waiting for HandoverOptions.Keep.
// With force the predecessor closes them at once. The error is ErrNoPredecessor if the predecessor has ended.
func (s *Server) DrainPredecessor(o DrainOptions, force bool) error {
	if err := CheckText(o.Reason); err != nil {
		return fmt.Errorf("draining the predecessor: reason: %w", err)
	}
	var link Link
	s.state.With(func(st *state) { link = st.predecessor })
	if link == nil {
		return ErrNoPredecessor
	}
	s.predecessorSendMu.Lock()
	defer s.predecessorSendMu.Unlock()
	if err := (handoverMessage{Type: msgDrain, Drain: &o, Force: force}).send(link, nil); err != nil {
		return fmt.Errorf("draining the predecessor: %w", err)
	}
	return nil
}

// countKeptEnds counts kept connections that have ended in the predecessor.
func (s *Server) countKeptEnds(ends []handoverEnd) {
	s.state.With(func(st *state) {
		for _, e := range ends {
			b, ok := st.keptConns[e.ID]
			if !ok {
				continue
			}
			delete(st.keptConns, e.ID)
			if st.reportEnds { // the successor of this server counts them as open, too
				st.unreportedEnds = append(st.unreportedEnds, e)
			}
			st.closed[parseReason(e.Reason)]++
			st.bytesIn += e.BytesIn
			st.bytesOut += e.BytesOut
			st.publish(Event{Type: EventClosed, Closed: &ClosedConn{
				ID: e.ID, Remote: parseAddr(b.Remote), Local: textAddr(""), Opened: b.Opened, Closed: time.Now(),
				Reason: parseReason(e.Reason), BytesIn: e.BytesIn, BytesOut: e.BytesOut,
			}})
		}
	})
}

// countKeptLost counts the connections whose end the predecessor did not report as lost. It is called when the
// predecessor has ended.
func (s *Server) countKeptLost() {
	var lost int
	s.state.With(func(st *state) {
		lost = len(st.keptConns)
		st.predecessor = nil
		st.closed[ReasonLost] += uint64(lost)
		for _, b := range st.keptConns {
			st.bytesIn += b.BytesIn
			st.bytesOut += b.BytesOut
		}
		clear(st.keptConns)
	})
	if lost == 0 {
		s.log.Info("the predecessor has ended")
	} else {
		s.log.Warn("the predecessor ended without reporting its connections", zap.Int("lost", lost))
	}
}
