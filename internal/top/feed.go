package top

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	tea "charm.land/bubbletea/v2"

	"echod/control"
)

// Messages from the server.
type (
	statusMsg struct {
		at     time.Time
		status control.Status
	}
	// lostMsg: the server did not answer with its status.
	lostMsg struct {
		at  time.Time
		err error
	}
	// listMsg has the connections that were open at some time between began and at, up to maxRows, and
	// those that closed last.
	listMsg struct {
		began, at time.Time
		open      []control.Conn
		closed    []control.ClosedConn
	}
	// troubleMsg: a server that answers failed to list connections or to send events.
	troubleMsg struct {
		what string
		err  error
	}
	// doneMsg is the result of an action.
	doneMsg struct {
		result string
		err    error
	}
)

// An action is a request that the operator has confirmed. The result is for the operator.
type action func(ctx context.Context, c *control.Client) (result string, err error)

const (
	statusTimeout = 2 * time.Second  // after which a server counts as not answering
	listTimeout   = 10 * time.Second // a large server has many connections
	actionTimeout = 10 * time.Second

	// The pause after a list is a multiple of the time that the list took: lists keep the server busy for
	// at most a twentieth of the time, or for a fifth while events are missed.
	listPause, listPauseMissed = 19, 4

	maxRetryInterval = 5 * time.Second // between two attempts to reach a server
)

// feed talks to the server and sends messages to the model.
type feed struct {
	client   *control.Client
	interval time.Duration
	send     func(tea.Msg) // to the model; blocks until it is taken or the program ends

	events  *queue
	pollNow chan struct{}
	listNow chan struct{} // events are missing
	actions chan action
}

func newFeed(c *control.Client, interval time.Duration) *feed {
	return &feed{
		client: c, interval: interval, events: newQueue(),
		pollNow: make(chan struct{}, 1), listNow: make(chan struct{}, 1), actions: make(chan action, 1),
	}
}

// do runs an action in the background, unless another is waiting.
func (f *feed) do(a action) bool {
	select {
	case f.actions <- a:
		return true
	default:
		return false
	}
}

// withTimeout bounds a request.
func withTimeout(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, limit, fmt.Errorf("no answer within %v", limit))
}

// wake sends to c without blocking. Its capacity is 1.
func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// sleep waits for d or for a value from early. It returns false if ctx has ended.
func sleep(ctx context.Context, d time.Duration, early <-chan struct{}) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-early:
	case <-ctx.Done():
	}
	return ctx.Err() == nil
}

func getStatus(ctx context.Context, c *control.Client) (statusMsg, error) {
	ctx, cancel := withTimeout(ctx, statusTimeout)
	defer cancel()
	st, err := c.Status(ctx)
	return statusMsg{time.Now(), st}, err
}

func (f *feed) poll(ctx context.Context) {
	pause := f.interval
	for sleep(ctx, pause, f.pollNow) {
		msg, err := getStatus(ctx, f.client)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			f.send(lostMsg{time.Now(), err})
			pause = max(f.interval, min(2*pause, maxRetryInterval))
		default:
			f.send(msg)
			pause = f.interval
		}
	}
}

func (f *feed) list(ctx context.Context) {
	for ctx.Err() == nil {
		msg, err := f.listOnce(ctx)
		took := time.Since(msg.began)
		if err == nil {
			f.send(msg)
		} else {
			f.report("listing connections", err)
		}
		due := max(f.interval, listPause*took)
		if sleep(ctx, listPauseMissed*took, nil) {
			sleep(ctx, due-listPauseMissed*took, f.listNow)
		}
	}
}

func (f *feed) listOnce(ctx context.Context) (listMsg, error) {
	ctx, cancel := withTimeout(ctx, listTimeout)
	defer cancel()
	msg := listMsg{began: time.Now()}
	open, err := f.client.Conns(ctx, maxRows, control.ConnFilter{})
	if err != nil {
		return msg, err
	}
	closed, err := f.client.Closed(ctx, maxClosed)
	msg.open, msg.closed, msg.at = open.Connections, closed.Connections, time.Now()
	return msg, err
}

// report sends a troubleMsg, unless the server is away: poll reports that.
func (f *feed) report(what string, err error) {
	if _, away := errors.AsType[*control.UnreachableError](err); !away {
		f.send(troubleMsg{what, err})
	}
}

func (f *feed) act(ctx context.Context) {
	for {
		select {
		case a := <-f.actions:
			actionCtx, cancel := withTimeout(ctx, actionTimeout)
			result, err := a(actionCtx, f.client)
			cancel()
			f.send(doneMsg{result, err})
			wake(f.pollNow)
		case <-ctx.Done():
			return
		}
	}
}

// eventsMsg has the events since the last one.
type eventsMsg struct {
	at     time.Time
	events []control.Event
}

const (
	maxQueued  = 4096                   // events that wait for deliver; the next list replaces those beyond
	batchPause = 200 * time.Millisecond // between two batches
)

// queue holds up to maxQueued events for deliver. It drops the rest.
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

var errNoEvents = errors.New("the server ended the event stream")

// follow reads events, and connects again when the stream ends.
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
				wake(f.listNow)
			}
		}
		if ctx.Err() != nil {
			return
		}
		if !errors.Is(err, errNoEvents) { // a server that stops ends the stream
			f.report("reading events", err)
		}
		if !sleep(ctx, pause, nil) {
			return
		}
		pause = max(f.interval, min(2*pause, maxRetryInterval))
		wake(f.listNow)
	}
}

// deliver sends the events that follow has read.
func (f *feed) deliver(ctx context.Context) {
	for {
		select {
		case <-f.events.filled:
		case <-ctx.Done():
			return
		}
		events, dropped := f.events.take()
		if dropped {
			wake(f.listNow)
		}
		f.send(eventsMsg{time.Now(), events})
		if !sleep(ctx, batchPause, nil) {
			return
		}
	}
}
