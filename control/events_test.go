package control

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp/cmpopts"

	"echod/server"
)

// follow gathers the client's events until they end, which collect waits for.
func (r *rig) follow(ctx context.Context, t *testing.T) (collect func() []Event) {
	t.Helper()
	var events []Event
	done := make(chan struct{})
	before := r.plane.streams.count()
	go func() {
		defer close(done)
		for e, err := range r.client.Events(ctx) {
			if err != nil {
				t.Errorf("events: %v", err)
				return
			}
			events = append(events, e)
		}
	}()
	synctest.Wait()
	wantEqual(t, "streams under way", r.plane.streams.count(), before+1)
	return func() []Event { <-done; return events }
}

func TestEventsTellAllThatHappensInItsOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		collect := r.follow(t.Context(), t)
		began := time.Now()
		c := r.echoClient(t)
		time.Sleep(time.Second)
		_ = c.Close()
		r.awaitConns(t, 0)
		must[Hold](t)(r.client.Pause(t.Context(), PauseRequest{Reason: "backup", TTL: time.Second}))
		time.Sleep(2 * time.Second)
		r.echoClient(t)
		must[Change](t)(r.client.Shutdown(t.Context(), ShutdownRequest{Now: true}))

		at := func(s int) time.Time { return began.Add(time.Duration(s) * time.Second) }
		hold := &Hold{ID: "h1", Reason: "backup", Mode: "hold", Since: at(1), Expires: new(at(2))}
		opened := func(id uint64, s int) *Conn {
			return &Conn{ID: id, Remote: "pipe", Local: "pipe", State: "waiting", Opened: at(s)}
		}
		want := []Event{
			{Time: at(0), Type: "opened", Conn: opened(1, 0)},
			{Time: at(1), Type: "closed", Closed: &ClosedConn{
				ID: 1, Remote: "pipe", Local: "pipe", Reason: "client-closed", Opened: at(0), Closed: at(1), DurationSeconds: 1, BytesIn: 6, BytesOut: 6,
			}},
			{Time: at(1), Type: "hold", Hold: hold},
			{Time: at(1), Type: "state", State: "paused"},
			{Time: at(2), Type: "released", Hold: hold, Cause: server.ErrExpired.Error()},
			{Time: at(2), Type: "state", State: "running"},
			{Time: at(3), Type: "opened", Conn: opened(2, 3)},
			{Time: at(3), Type: "state", State: "draining"},
			{Type: "closed", Closed: &ClosedConn{ID: 2, Remote: "pipe", Local: "pipe", Reason: "forced", Opened: at(3), BytesIn: 6, BytesOut: 6}},
			{Type: "state", State: "stopped"},
		}
		got := collect()
		if n := len(got); n == len(want) { // how long closing by force takes is the server's affair
			got[n-2].Time, got[n-1].Time = time.Time{}, time.Time{}
			got[n-2].Closed.Closed, got[n-2].Closed.DurationSeconds = time.Time{}, 0
		}
		wantEqual(t, "events", got, want)
	})
}

func TestEventsBeginWithTheirAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		resp, err := r.client.http.Get("http://echod/v1/events")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		wantEqual(t, "type", resp.Header.Get("Content-Type"), "application/jsonl")
		// Whoever has seen the answer misses nothing from then on.
		hold, err := r.srv.Pause(server.PauseOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var e Event
		readJSON(t, bufio.NewReader(resp.Body), &e)
		wantEqual(t, "first event", e.Hold.ID, hold.ID())
	})
}

func TestEventsEndWhenTheCallerHasEnough(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		ctx, cancel := context.WithCancel(t.Context())
		collect := r.follow(ctx, t)
		must[Hold](t)(r.client.Pause(t.Context(), PauseRequest{}))
		synctest.Wait()
		cancel()
		wantEqual(t, "events", len(collect()), 2)
		synctest.Wait()
		wantEqual(t, "streams under way", r.plane.streams.count(), 0)

		go func() {
			for range r.client.Events(t.Context()) {
				break
			}
		}()
		synctest.Wait()
		must[Change](t)(r.client.Resume(t.Context()))
		synctest.Wait()
		wantEqual(t, "streams under way after a break", r.plane.streams.count(), 0)
	})
}

// pauses places and releases n holds: four events each.
func (r *rig) pauses(t *testing.T, n int) {
	t.Helper()
	for range n {
		hold, err := r.srv.Pause(server.PauseOptions{})
		if err != nil {
			t.Fatal(err)
		}
		hold.Release()
	}
}

func TestSlowReaderOfEventsHoldsNobodyUpAndIsToldWhatItMissed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		conn := r.rawConn(t)
		if _, err := io.WriteString(conn, "GET /v1/events HTTP/1.1\r\nHost: echod\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		const pauses = 1500
		began := time.Now()
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil) // its Close would wait for the stream's end
		if err != nil {
			t.Fatal(err)
		}
		r.pauses(t, pauses)
		wantEqual(t, "time that went by", time.Since(began), time.Duration(0))

		lines := bufio.NewReader(resp.Body)
		seen, missed := 0, 0
		for seen+missed < 4*pauses {
			var e Event
			readJSON(t, lines, &e)
			if e.Type == "missed" {
				missed += e.Missed
			} else {
				seen++
			}
		}
		wantEqual(t, "events seen and missed", seen+missed, 4*pauses)
		if missed == 0 {
			t.Error("nothing was missed: the test tests nothing")
		}
	})
}

func TestReaderOfEventsWhoDoesNotReadIsDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		conn := r.rawConn(t)
		if _, err := io.WriteString(conn, "GET /v1/events HTTP/1.1\r\nHost: echod\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if _, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		wantEqual(t, "streams with nothing to read", r.plane.streams.count(), 1)
		r.pauses(t, 100)
		time.Sleep(answerTimeout - time.Millisecond)
		wantEqual(t, "streams before the time is over", r.plane.streams.count(), 1)
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		wantEqual(t, "streams after", r.plane.streams.count(), 0)
		_, err := io.Copy(io.Discard, conn)
		wantEqual(t, "end of the stream", err, nil, cmpopts.EquateErrors())
	})
}
