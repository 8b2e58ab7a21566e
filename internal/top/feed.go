package top

import (
	"context"
	"errors"
	"fmt"
	"time"

	tea "charm.land/bubbletea/v2"

	"echod/control"
)

// What comes from the server, each with when it came.
type (
	statusMsg struct {
		at     time.Time
		status control.Status
	}
	// lostMsg says that the server did not give its status.
	lostMsg struct {
		at  time.Time
		err error
	}
	// listMsg is all that was open at some instant between two, up to maxRows of them, and what was closed last.
	listMsg struct {
		began, at time.Time
		open      []control.Conn
		closed    []control.ClosedConn
	}
	// troubleMsg says what hinders the lists or events of a server that does answer.
	troubleMsg struct {
		of  string
		err error
	}
	// doneMsg says what became of an action.
	doneMsg struct {
		said string
		err  error
	}
)

// An action is something to do that the operator has confirmed. It says what it has done.
type action func(ctx context.Context, c *control.Client) (said string, err error)

const (
	statusTimeout = 2 * time.Second  // after which a server counts as not answering
	listTimeout   = 10 * time.Second // for all connections of a large server
	actionTimeout = 10 * time.Second

	// listRest is the least that passes between two lists, in multiples of what one took: the server
	// is busy with them for a twentieth of the time at most, or for a fifth while events are missed.
	listRest, listRestMissed = 19, 4

	slowest = 5 * time.Second // between two attempts to reach a server
)

// feed is what talks to the server.
type feed struct {
	client   *control.Client
	interval time.Duration
	send     func(tea.Msg) // to the model; blocks until that takes it, or the program has ended

	events  *queue
	polled  chan struct{} // wakes poll before its time
	resync  chan struct{} // wakes list before its time, since events are missing
	actions chan action
}

func newFeed(c *control.Client, interval time.Duration) *feed {
	return &feed{
		client: c, interval: interval, events: newQueue(),
		polled: make(chan struct{}, 1), resync: make(chan struct{}, 1), actions: make(chan action, 1),
	}
}

// do has an action carried out, unless another is under way that nobody has taken up yet.
func (f *feed) do(a action) bool {
	select {
	case f.actions <- a:
		return true
	default:
		return false
	}
}

// within bounds a question to the server.
func within(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, limit, fmt.Errorf("no answer within %v", limit))
}

// wake wakes who waits for it, if he is not awake already.
func wake(who chan struct{}) {
	select {
	case who <- struct{}{}:
	default:
	}
}

// rest waits for d, or until woken; false means that ctx has ended.
func rest(ctx context.Context, d time.Duration, woken <-chan struct{}) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-woken:
	case <-ctx.Done():
	}
	return ctx.Err() == nil
}

// look asks for the status once.
func look(ctx context.Context, c *control.Client) (statusMsg, error) {
	ctx, cancel := within(ctx, statusTimeout)
	defer cancel()
	st, err := c.Status(ctx)
	return statusMsg{time.Now(), st}, err
}

func (f *feed) poll(ctx context.Context) {
	pause := f.interval
	for rest(ctx, pause, f.polled) {
		msg, err := look(ctx, f.client)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			f.send(lostMsg{time.Now(), err})
			pause = max(f.interval, min(2*pause, slowest))
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
			f.report("list of connections", err)
		}
		due := max(f.interval, listRest*took)
		if rest(ctx, listRestMissed*took, nil) {
			rest(ctx, due-listRestMissed*took, f.resync)
		}
	}
}

func (f *feed) listOnce(ctx context.Context) (listMsg, error) {
	ctx, cancel := within(ctx, listTimeout)
	defer cancel()
	msg := listMsg{began: time.Now()}
	open, err := f.client.Conns(ctx, maxRows, 0)
	if err != nil {
		return msg, err
	}
	closed, err := f.client.Closed(ctx, maxClosed)
	msg.open, msg.closed, msg.at = open.Connections, closed.Connections, time.Now()
	return msg, err
}

// report tells of trouble, but not that the server is away: poll knows that better.
func (f *feed) report(of string, err error) {
	if _, away := errors.AsType[*control.UnreachableError](err); !away {
		f.send(troubleMsg{of, err})
	}
}

func (f *feed) carry(ctx context.Context) {
	for {
		select {
		case a := <-f.actions:
			bounded, cancel := within(ctx, actionTimeout)
			said, err := a(bounded, f.client)
			cancel()
			f.send(doneMsg{said, err})
			wake(f.polled)
		case <-ctx.Done():
			return
		}
	}
}
