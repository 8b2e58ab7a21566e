package server

import (
	"context"
	"iter"
	"slices"
	"time"
)

// EventType says what an event is about.
type EventType string

// The event types.
const (
	StateChanged EventType = "state"
	ConnOpened   EventType = "opened"
	ConnClosed   EventType = "closed"
	HoldPlaced   EventType = "hold"
	HoldReleased EventType = "released"
	// EventsMissed stands in the place of events that a slow subscriber has missed.
	EventsMissed EventType = "missed"
)

// Event is something that happened. Of the fields below Type, those that go with it are set.
type Event struct {
	Time   time.Time
	Type   EventType
	State  State       // StateChanged
	Conn   *ConnInfo   // ConnOpened
	Closed *ClosedConn // ConnClosed
	Hold   *HoldInfo   // HoldPlaced, HoldReleased
	Cause  string      // HoldReleased: why
	Missed int         // EventsMissed: how many
}

// eventBuffer is how many events a subscriber may be behind.
const eventBuffer = 4096

// A Subscription receives what happens from Subscribe on. One goroutine reads it.
type Subscription struct {
	srv    *Server
	events chan Event
	missed int // guarded by the lock of Server.book
}

// Subscribe begins to receive events. The caller must Close the subscription. A subscriber that is too
// slow never holds the server up: it misses events, and is told how many.
func (s *Server) Subscribe() *Subscription {
	sub := &Subscription{srv: s, events: make(chan Event, eventBuffer)}
	s.book.With(func(l *ledger) {
		if l.state == Stopped {
			close(sub.events)
			return
		}
		l.subscribers = append(l.subscribers, sub)
	})
	return sub
}

// Events ranges over the events in the order in which they happened, until ctx is done, the
// subscription is closed or the server has stopped.
func (sub *Subscription) Events(ctx context.Context) iter.Seq[Event] {
	return func(yield func(Event) bool) {
		for {
			select {
			case <-ctx.Done():
				return
			case e, ok := <-sub.events:
				if !ok || !yield(e) {
					return
				}
			}
		}
	}
}

// Close ends the subscription. It may be called more than once.
func (sub *Subscription) Close() {
	sub.srv.book.With(func(l *ledger) {
		if i := slices.Index(l.subscribers, sub); i >= 0 {
			l.subscribers = slices.Delete(l.subscribers, i, i+1)
			sub.end()
		}
	})
}

// offer and end are called under the lock of Server.book.

func (sub *Subscription) offer(e Event) {
	if sub.missed > 0 {
		select {
		case sub.events <- Event{Time: e.Time, Type: EventsMissed, Missed: sub.missed}:
			sub.missed = 0
		default:
			sub.missed++
			return
		}
	}
	select {
	case sub.events <- e:
	default:
		sub.missed++
	}
}

func (sub *Subscription) end() { close(sub.events) }
