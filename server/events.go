package server

import (
	"context"
	"iter"
	"slices"
	"time"
)

// EventType is the kind of an event.
type EventType string

// The event types.
const (
	EventState        EventType = "state"
	EventOpened       EventType = "opened"
	EventClosed       EventType = "closed"
	EventHoldPlaced   EventType = "hold"
	EventHoldReleased EventType = "released"
	// EventMissed replaces events that a slow subscriber has missed.
	EventMissed EventType = "missed"
)

// Event is something that happened. The comments say for which types a field is set.
type Event struct {
	Time   time.Time
	Type   EventType
	State  State       // EventState
	Conn   *ConnInfo   // EventOpened
	Closed *ClosedConn // EventClosed
	Hold   *HoldInfo   // EventHoldPlaced, EventHoldReleased
	Cause  string      // EventHoldReleased: why
	By     Caller      // EventHoldReleased: who released it, if a caller did
	Missed int         // EventMissed: how many
}

// eventBuffer is how many events a subscriber may be behind.
const eventBuffer = 4096

// A Subscription receives the events from Subscribe on. One goroutine reads it.
type Subscription struct {
	srv   *Server
	queue awaited[eventQueue] // locked inside Server.state by those who write
}

type eventQueue struct {
	events []Event
	missed int // how many came after events and found no room
	ended  bool
}

// Subscribe starts to receive events. The caller must Close the subscription. A slow subscriber never delays the
// server: it misses events, and is told how many.
func (s *Server) Subscribe() *Subscription {
	sub := &Subscription{srv: s}
	s.state.With(func(st *state) {
		if st.phase == StateStopped {
			sub.end()
			return
		}
		st.subscribers = append(st.subscribers, sub)
	})
	return sub
}

// Events ranges over the events in the order in which they happened, until ctx is done, or until the subscription was
// closed or the server has stopped and all events that were received have been read.
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

// next waits for an event; ok is false when there will be none.
func (sub *Subscription) next(ctx context.Context) (e Event, ok bool) {
	_ = sub.queue.Await(ctx, func(q *eventQueue) bool {
		switch {
		case len(q.events) > 0:
			e, q.events, ok = q.events[0], q.events[1:], true
		case q.missed > 0:
			e, q.missed, ok = Event{Time: time.Now(), Type: EventMissed, Missed: q.missed}, 0, true
		}
		return ok || q.ended
	})
	return e, ok
}

// Close ends the subscription. It may be called more than once.
func (sub *Subscription) Close() {
	sub.srv.state.With(func(st *state) {
		if i := slices.Index(st.subscribers, sub); i >= 0 {
			st.subscribers = slices.Delete(st.subscribers, i, i+1)
			sub.end()
		}
	})
}

// offer gives e to the subscriber. From the first event that finds no room until the subscriber has read all before it,
// events are counted as missed.
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
