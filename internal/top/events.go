package top

import (
	"context"
	"errors"
	"sync"
	"time"

	"echod/control"
)

// eventsMsg is what has happened since the last.
type eventsMsg struct {
	at     time.Time
	events []control.Event
}

const (
	maxQueued = 4096                   // events that wait to be shown; the lists make up for more
	batchRest = 200 * time.Millisecond // between two batches
)

// queue keeps the events that were read until they are shown. Beyond its bound they are dropped.
type queue struct {
	mu      sync.Mutex
	events  []control.Event
	dropped bool
	filled  chan struct{}
}

func newQueue() *queue { return &queue{filled: make(chan struct{}, 1)} }

func (q *queue) put(e control.Event) {
	q.mu.Lock()
	if len(q.events) < maxQueued {
		q.events = append(q.events, e)
	} else {
		q.dropped = true
	}
	q.mu.Unlock()
	wake(q.filled)
}

func (q *queue) take() (events []control.Event, dropped bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	events, dropped = q.events, q.dropped
	q.events, q.dropped = nil, false
	return events, dropped
}

var errNoEvents = errors.New("the server has ended the stream of events")

// follow reads events, from one server after the other.
func (f *feed) follow(ctx context.Context) {
	pause := f.interval
	for {
		err := errNoEvents
		for e, failed := range f.client.Events(ctx) {
			if failed != nil {
				err = failed
				break
			}
			f.events.put(e)
			if pause = f.interval; e.Missed > 0 {
				wake(f.resync)
			}
		}
		if ctx.Err() != nil {
			return
		}
		if !errors.Is(err, errNoEvents) { // which is how a server ends
			f.report("events", err)
		}
		if !rest(ctx, pause, nil) {
			return
		}
		pause = max(f.interval, min(2*pause, slowest))
		wake(f.resync)
	}
}

// deliver hands on what follow has read.
func (f *feed) deliver(ctx context.Context) {
	for {
		select {
		case <-f.events.filled:
		case <-ctx.Done():
			return
		}
		events, dropped := f.events.take()
		if dropped {
			wake(f.resync)
		}
		f.send(eventsMsg{time.Now(), events})
		if !rest(ctx, batchRest, nil) {
			return
		}
	}
}
