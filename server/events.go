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
	srv   *Server
	queue awaited[eventQueue] // taken under the lock of Server.book by those who write
}

type eventQueue struct {
	events []Event
	missed int // how many came after events, and found no room
	ended  bool
}

// Subscribe begins to receive events. The caller must Close the subscription. A subscriber that is too
// slow never holds the server up: it misses events, and is told how many.
func (s *Server) Subscribe() *Subscription {
	sub := &Subscription{srv: s}
	s.book.With(func(l *ledger) {
		if l.state == Stopped {
			sub.end()
			return
		}
		l.subscribers = append(l.subscribers, sub)
	})
	return sub
}

// Events ranges over the events in the order in which they happened, until ctx is done, or until the
// subscription is closed or the server has stopped and all that was received is read.
func (sub *Subscription) Events(ctx context.Context) iter.Seq[Event] {
	return func(yield func(Event) bool) {
		for ctx.Err() == nil {
			e, ok := sub.next(ctx)
			if !ok || !yield(e) {
				return
			}
		}
	}
}

// next waits for an event; not ok means that none will come.
func (sub *Subscription) next(ctx context.Context) (e Event, ok bool) {
	_ = sub.queue.Await(ctx, func(q *eventQueue) bool {
		switch {
		case len(q.events) > 0:
			e, q.events, ok = q.events[0], q.events[1:], true
		case q.missed > 0:
			e, q.missed, ok = Event{Time: time.Now(), Type: EventsMissed, Missed: q.missed}, 0, true
		}
		return ok || q.ended
	})
	return e, ok
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

// offer gives e to the subscriber, or, from the first for which there is no room until it has read
// all before that, counts it as missed.
func (sub *Subscription) offer(e Event) {
	sub.queue.With(func(q *eventQueue) {
		if q.missed > 0 || len(q.events) >= eventBuffer {
			q.missed++
			return
		}
		q.events = append(q.events, e)
	})
}

func (sub *Subscription) end() { sub.queue.With(func(q *eventQueue) { q.ended = true }) }
