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
	EventSettings     EventType = "settings"
	// EventMissed replaces events that a subscriber has missed, because it is slow or subscribed too late.
	EventMissed EventType = "missed"
	// EventUpgraded means that another process serves now. A subscriber of the predecessor gets it as its last event,
	// and continues in the successor with SubscribeAfter.
	EventUpgraded EventType = "upgraded"
)

// Event is a change of the server. The comments say for which types a field is set.
type Event struct {
	ID     uint64 // increases by one with each event, also through a handover, and is greater after a restart
	Time   time.Time
	Type   EventType
	State  State       // EventState
	Conn   *ConnInfo   // EventOpened
	Closed *ClosedConn // EventClosed
	Hold   *HoldInfo   // EventHoldPlaced, EventHoldReleased
	Cause  string      // EventHoldReleased: why
	By     Caller      // EventHoldReleased, EventSettings: the caller that requested it, if there was one
	Missed int         // EventMissed: how many; zero if that is not known

	Settings []SettingChange // EventSettings
}

// eventBuffer is the maximum number of events queued for a subscriber.
const eventBuffer = 4096

// A Subscription receives the events that happen after Subscribe. Only one goroutine may read it.
type Subscription struct {
	srv   *Server
	queue monitor[eventQueue] // writers also hold the lock of Server.state, which they take first
}

type eventQueue struct {
	events     []Event
	missed     int    // number of events that were dropped because the queue was full
	lastMissed uint64 // id of the last dropped event
	ended      bool
}

// Bounds of the history for SubscribeAfter. Events are kept while there is a subscriber, and for historyTime after
// the last one was closed and after a handover.
const (
	eventHistory = 1024
	historyTime  = time.Minute
)

// history holds the latest events.
type history struct {
	first, last uint64    // ids of the first event of this server and its predecessors, and of the last one
	events      []Event   // the oldest first, without a gap
	until       time.Time // without a subscriber, events are kept until then
}

// firstEventID returns the id of a new server's first event. It comes from the clock, so that ids are greater after a
// restart.
func firstEventID() uint64 { return uint64(time.Now().UnixMicro()) }

// wantsEvents reports whether events are queued or kept. If not, they are only counted.
func (st *state) wantsEvents() bool {
	if len(st.subscribers) > 0 {
		return true
	}
	h := &st.history
	if h.until.IsZero() {
		return false
	}
	if time.Now().Before(h.until) {
		return true
	}
	h.until, h.events = time.Time{}, nil
	return false
}

func (h *history) add(e Event) {
	if len(h.events) >= 2*eventHistory { // moves the events rarely, so that adding takes amortized constant time
		h.events = append(h.events[:0], h.events[len(h.events)-eventHistory:]...)
	}
	h.events = append(h.events, e)
}

// since returns the kept events after the one with the given id.
func (h *history) since(id uint64) []Event {
	kept := h.events[max(0, len(h.events)-eventHistory):]
	i := slices.IndexFunc(kept, func(e Event) bool { return e.ID > id })
	if i < 0 {
		return nil
	}
	return slices.Clone(kept[i:])
}

// restore adds the events of a predecessor, oldest first. It drops events before a gap, because after needs a history
// without gaps.
func (h *history) restore(events []Event) {
	begin := len(events)
	for next := h.last; begin > 0 && events[begin-1].ID == next; next-- {
		begin--
	}
	h.events = slices.Clone(events[begin:])
}

// after returns the events after the one with the given id. If some are not kept, the first one is an EventMissed.
func (h *history) after(id uint64) []Event {
	kept := h.events[max(0, len(h.events)-eventHistory):]
	oldest := h.last + 1
	if len(kept) > 0 {
		oldest = kept[0].ID
	}
	lost := Event{ID: oldest - 1, Time: time.Now(), Type: EventMissed}
	switch {
	case id > h.last: // the id is that of another server
		return []Event{lost}
	case id+1 >= oldest:
		return slices.Clone(kept[id+1-oldest:])
	case id+1 >= h.first:
		lost.Missed = int(oldest - 1 - id)
	}
	return append([]Event{lost}, kept...)
}

// Subscribe starts to receive events. The caller must Close the subscription. A slow subscriber never delays the
// server: it misses events, and is told how many.
func (s *Server) Subscribe() *Subscription { return s.subscribe(nil) }

// SubscribeAfter is like Subscribe, but begins with the events after the one with the given id. The last 1,024 are kept
// while there are subscribers, for a minute after the last one was closed, and through a handover. An event of type
// EventMissed stands for events that are not kept.
func (s *Server) SubscribeAfter(id uint64) *Subscription { return s.subscribe(&id) }

func (s *Server) subscribe(after *uint64) *Subscription {
	sub := &Subscription{srv: s}
	s.state.With(func(st *state) {
		if after != nil {
			events := st.history.after(*after)
			sub.queue.With(func(q *eventQueue) { q.events = events })
		}
		if st.lifecycle == StateStopped || st.handedOver {
			sub.end()
			return
		}
		st.wantsEvents() // drops a history that has expired
		st.subscribers = append(st.subscribers, sub)
	})
	return sub
}

// Events ranges over the events in the order in which they happened. It ends when ctx is done. If the subscription is
// closed or the server stops, it ends after the events already received.
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
			e = Event{ID: q.lastMissed, Time: time.Now(), Type: EventMissed, Missed: q.missed}
			q.missed, ok = 0, true
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
			st.history.until = time.Now().Add(historyTime)
			sub.end()
		}
	})
}

// enqueue queues e for the subscriber. When the queue is full, it drops events, and counts them as missed, until the
// subscriber has read all queued ones.
func (sub *Subscription) enqueue(e Event) {
	sub.queue.With(func(q *eventQueue) {
		if q.missed > 0 || len(q.events) >= eventBuffer {
			q.missed++
			q.lastMissed = e.ID
			return
		}
		q.events = append(q.events, e)
	})
}

func (sub *Subscription) end() { sub.queue.With(func(q *eventQueue) { q.ended = true }) }
