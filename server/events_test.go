package server

import (
	"context"
	"testing"
	"time"
)

// collect reads all events until the subscription ends.
func collect(t *testing.T, sub *Subscription) (all []Event) {
	t.Helper()
	for e := range sub.Events(t.Context()) {
		all = append(all, e)
	}
	return all
}

// brief shows an event in a word or two.
func brief(e Event) string {
	switch e.Type {
	case EventState:
		return e.State.String()
	case EventClosed:
		return "closed " + e.Closed.Reason.String()
	case EventHoldReleased:
		return "released: " + e.Cause
	default:
		return string(e.Type)
	}
}

func TestEvents(t *testing.T) {
	t.Run("come in the order in which things happen", bubbled(func(t *testing.T) {
		s, _ := newServer(t, Echo, Options{})
		sub := s.Subscribe()
		r := &rig{Server: s, ln: newFakeListener()}
		serve(t, s, r.ln)
		c := r.dial(t)
		a, b := r.pause(t, PauseOptions{Reason: "a"}), r.pause(t, PauseOptions{TTL: time.Second})
		ann := Caller{UID: 1000, PID: 42}
		if err := s.ReleaseHold(a.ID(), ann); err != nil {
			t.Fatal(err)
		}
		<-b.Done()
		c.leave(t)
		_ = s.Close()
		var got []string
		for _, e := range collect(t, sub) {
			got = append(got, brief(e))
			if e.Time.IsZero() {
				t.Errorf("event %q has no time", brief(e))
			}
			if e.Type == EventHoldReleased {
				wantEqual(t, "who released it", e.By, map[string]Caller{a.ID(): ann, b.ID(): {}}[e.Hold.ID])
			}
		}
		wantEqual(t, "events", got, []string{
			"running", "opened", "hold", "paused", "hold", "released: the hold was released",
			"released: the hold expired", "running", "closed client-closed", "draining", "stopped",
		})
	}))

	t.Run("do not show a paused server as running when it drains", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		r.pause(t, PauseOptions{})
		r.pause(t, PauseOptions{})
		sub := r.Subscribe()
		_ = r.Close()
		var states []State
		for _, e := range collect(t, sub) {
			if e.Type == EventState {
				states = append(states, e.State)
			}
		}
		wantEqual(t, "states", states, []State{StateDraining, StateStopped})
	}))

	t.Run("that a slow subscriber missed are counted", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		sub := r.Subscribe()
		defer sub.Close()
		for range eventBuffer { // four events each
			r.pause(t, PauseOptions{}).Release()
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		n := 0
		var last Event
		for e := range sub.Events(ctx) { // although no event follows
			n++
			last = e
		}
		wantEqual(t, "events received, and the count of the others", n, eventBuffer+1)
		if last.Type != EventMissed || last.Missed != 3*eventBuffer {
			t.Errorf("last event is %+v, want %d missed", last, 3*eventBuffer)
		}
		_ = r.Close()
		for e := range sub.Events(t.Context()) {
			wantEqual(t, "next event", brief(e), "draining")
			break
		}
	}))

	t.Run("that were missed are counted after the server has stopped, too", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		sub := r.Subscribe()
		for range eventBuffer / 4 {
			r.pause(t, PauseOptions{}).Release()
		}
		_ = r.Close()
		all := collect(t, sub)
		if last := all[len(all)-1]; last.Type != EventMissed || last.Missed != 2 {
			t.Errorf("last event is %+v, want 2 missed: draining and stopped", last)
		}
	}))

	t.Run("end with the context, the subscription, or the server", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		sub := r.Subscribe()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		for e := range sub.Events(ctx) {
			t.Errorf("unexpected event %q", brief(e))
		}
		r.dial(t)
		for e := range sub.Events(ctx) {
			t.Errorf("event %q after the context ended", brief(e))
		}
		sub.Close()
		sub.Close()
		wantEqual(t, "events left after Close", len(collect(t, sub)), 1)
		_ = r.Close()
		wantEqual(t, "events of a stopped server", len(collect(t, r.Subscribe())), 0)
	}))
}
