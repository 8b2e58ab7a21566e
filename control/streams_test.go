package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"echod/server"
)

func TestWait(t *testing.T) {
	t.Run("returns at once if the condition holds", testWaitHolds)
	t.Run("returns when the condition has held, however briefly", testWaitBriefly)
	t.Run("for two conditions waits for both at once", testWaitBoth)
	t.Run("times out", testWaitTimeout)
	t.Run("ends when a drain makes the condition impossible", testWaitDrain)
	t.Run("ends with its caller", testWaitCaller)
}

func testWaitHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		r.echoClient(t)
		for _, req := range []WaitRequest{
			{State: "running"},
			{Connections: new(1)},
			{State: "running", Connections: new(1)},
			{State: "running", Timeout: new(time.Duration(0))},
		} {
			began := time.Now()
			got := must[Waited](t)(r.client.Wait(t.Context(), req))
			wantEqual(t, "answer", got, Waited{State: "running", Connections: 1})
			wantEqual(t, "time waited", time.Since(began), time.Duration(0))
		}
	})
}

func testWaitBriefly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		waited := make(chan Waited, 1)
		go func() {
			got, _ := r.client.Wait(t.Context(), WaitRequest{State: "paused"})
			waited <- got
		}()
		time.Sleep(10 * time.Minute)
		select {
		case got := <-waited:
			t.Fatalf("the wait returned %+v before the pause", got)
		default:
		}
		hold, err := r.srv.Pause(server.PauseOptions{})
		if err != nil {
			t.Fatal(err)
		}
		hold.Release()
		wantEqual(t, "answer", receive(t, "the wait", waited), Waited{State: "paused"})
	})
}

func testWaitBoth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		waited := make(chan Waited, 1)
		go func() {
			got, _ := r.client.Wait(t.Context(), WaitRequest{State: "paused", Connections: new(0)})
			waited <- got
		}()
		pending := func(why string) {
			t.Helper()
			synctest.Wait()
			select {
			case got := <-waited:
				t.Fatalf("the wait returned %+v with %s", got, why)
			default:
			}
		}
		pending("no connections, but the server running")
		c := r.echoClient(t)
		must[Hold](t)(r.client.Pause(t.Context(), PauseRequest{}))
		pending("the server paused, but one connection")
		_ = c.Close()
		wantEqual(t, "answer", receive(t, "the wait", waited), Waited{State: "paused", Connections: 0})
	})
}

func testWaitTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		r.echoClient(t)
		for _, timeout := range []time.Duration{0, 1500 * time.Millisecond, time.Hour} {
			began := time.Now()
			_, err := r.client.Wait(t.Context(), WaitRequest{State: "paused", Timeout: &timeout})
			problem := wantProblem(t, err, ProblemTimeout)
			want := &Problem{
				Type: ProblemTimeout, Title: "The wait timed out", Status: http.StatusRequestTimeout,
				Detail: "the wait timed out: the server is running with 1 connection", State: "running",
			}
			wantEqual(t, "problem", problem, want)
			wantEqual(t, "time waited", time.Since(began), timeout)
		}
	})
}

func testWaitDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{Drain: server.DrainOptions{Grace: time.Minute}})
		r.echoClient(t)
		type result struct {
			got Waited
			err error
		}
		wait := func(req WaitRequest) <-chan result {
			done := make(chan result, 1)
			go func() {
				got, err := r.client.Wait(t.Context(), req)
				done <- result{got, err}
			}()
			return done
		}
		paused := wait(WaitRequest{State: "paused"})
		two := wait(WaitRequest{Connections: new(2)})
		empty := wait(WaitRequest{Connections: new(0)})
		stopped := wait(WaitRequest{State: "stopped"})
		synctest.Wait()

		began := time.Now()
		r.srv.StartDrain(server.DrainOptions{Reason: "SIGTERM"})
		problem := wantProblem(t, receive(t, "the wait for paused", paused).err, ProblemDraining)
		wantEqual(t, "deadline", problem.Deadline.Sub(began), time.Minute)
		wantEqual(t, "time waited for paused", time.Since(began), time.Duration(0))
		synctest.Wait()
		if len(two)+len(empty)+len(stopped) > 0 {
			t.Error("a wait for what a drain may still bring has returned when the drain began")
		}

		<-r.srv.Done()
		wantEqual(t, "no connections", receive(t, "the wait for none", empty).err, error(nil))
		wantEqual(t, "stopped", receive(t, "the wait for stopped", stopped), result{got: Waited{State: "stopped"}}, cmp.AllowUnexported(result{}), cmpopts.EquateErrors())
		problem = wantProblem(t, receive(t, "the wait for two", two).err, ProblemDraining)
		wantEqual(t, "state", problem.State, "stopped")
	})
}

func testWaitCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		conn := r.rawConn(t)
		if _, err := io.WriteString(conn, "GET /v1/wait?state=paused HTTP/1.1\r\nHost: echod\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		wantEqual(t, "requests that last", r.plane.streams.count(), 1)
		_ = conn.Close()
		synctest.Wait()
		wantEqual(t, "requests that last after the caller has left", r.plane.streams.count(), 0)
	})
}

// follow receives events until they end; collect waits for that.
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
	wantEqual(t, "requests that last", r.plane.streams.count(), before+1)
	return func() []Event { <-done; return events }
}

func TestEvents(t *testing.T) {
	t.Run("come in order", testEventsOrder)
	t.Run("begin with the answer", testEventsBegin)
	t.Run("continue after an event", testEventsAfter)
	t.Run("end when the caller leaves", testEventsEnd)
	t.Run("a slow reader delays nobody and is told how many it missed", testEventsSlow)
	t.Run("a reader that takes nothing is disconnected", testEventsDropped)
}

func testEventsAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		first := uint64(time.Now().UnixMicro()) + 1 // after the event of the start
		read := func(after uint64, n int) (types []string, missed int) {
			for e, err := range r.client.EventsAfter(t.Context(), after) {
				if err != nil {
					t.Fatal(err)
				}
				if types = append(types, e.Type); e.Missed > 0 {
					missed = e.Missed
				}
				if len(types) == n {
					break
				}
			}
			synctest.Wait() // until the server has noticed that the caller has gone
			return types, missed
		}
		place := func() { must[Hold](t)(r.client.Pause(t.Context(), PauseRequest{})) }
		place() // no caller reads, so its events, "hold" and "state", are not kept
		types, missed := read(first-1, 1)
		wantEqual(t, "without a reader", types, []string{"missed"})
		wantEqual(t, "number that is missed", missed, 2)

		place() // somebody has just read
		place()
		types, missed = read(first+1, 2)
		wantEqual(t, "events while nobody reads", types, []string{"hold", "hold"})
		wantEqual(t, "number that is missed", missed, 0)
		types, _ = read(first+2, 1)
		wantEqual(t, "events after the first hold", types, []string{"hold"})
		types, missed = read(first-1, 3)
		wantEqual(t, "events from the start", types, []string{"missed", "hold", "hold"})
		wantEqual(t, "number that is missed", missed, 2)

		types, missed = read(first-1000, 1) // of the server before a restart
		wantEqual(t, "events after those of another server", types, []string{"missed"})
		wantEqual(t, "number that is missed, which is not known", missed, 0)
		time.Sleep(2 * time.Minute)
		place()
		types, missed = read(first+2, 1)
		wantEqual(t, "events two minutes later", types, []string{"missed"})
		wantEqual(t, "number that is missed", missed, 2)
	})
}

func testEventsOrder(t *testing.T) {
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
			{Type: "closed", Closed: &ClosedConn{ID: 2, Remote: "pipe", Local: "pipe", Reason: "forced", Opened: at(3), BytesIn: 6, BytesOut: 6, Error: server.ErrForced.Error()}},
			{Type: "state", State: "stopped"},
		}
		got := collect()
		for i := range got {
			wantEqual(t, "id", got[i].ID, uint64(began.UnixMicro()+int64(i)+1))
			got[i].ID = 0
		}
		if n := len(got); n == len(want) { // closing by force takes some time
			got[n-2].Time, got[n-1].Time = time.Time{}, time.Time{}
			got[n-2].Closed.Closed, got[n-2].Closed.DurationSeconds = time.Time{}, 0
		}
		wantEqual(t, "events", got, want)
	})
}

func testEventsBegin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		resp, err := r.client.http.Get("http://echod/v1/events")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		wantEqual(t, "type", resp.Header.Get("Content-Type"), "application/jsonl")
		// Nothing that happens after the answer has begun is missed.
		hold, err := r.srv.Pause(server.PauseOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var e Event
		readJSON(t, bufio.NewReader(resp.Body), &e)
		wantEqual(t, "first event", e.Hold.ID, hold.ID())
	})
}

func testEventsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		ctx, cancel := context.WithCancel(t.Context())
		collect := r.follow(ctx, t)
		must[Hold](t)(r.client.Pause(t.Context(), PauseRequest{}))
		synctest.Wait()
		cancel()
		wantEqual(t, "events", len(collect()), 2)
		synctest.Wait()
		wantEqual(t, "requests that last", r.plane.streams.count(), 0)

		go func() {
			for range r.client.Events(t.Context()) {
				break
			}
		}()
		synctest.Wait()
		must[Change](t)(r.client.Resume(t.Context()))
		synctest.Wait()
		wantEqual(t, "requests that last after a break", r.plane.streams.count(), 0)
	})
}

// pauses places and releases n holds, with four events each.
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

func testEventsSlow(t *testing.T) {
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
		wantEqual(t, "time that has passed", time.Since(began), time.Duration(0))

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
			t.Error("no events were missed: the test is too small")
		}
	})
}

func testEventsDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		conn := r.rawConn(t)
		if _, err := io.WriteString(conn, "GET /v1/events HTTP/1.1\r\nHost: echod\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if _, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Minute)
		wantEqual(t, "streams with nothing to read", r.plane.streams.count(), 1)
		r.pauses(t, 100)
		time.Sleep(answerTimeout - time.Millisecond)
		wantEqual(t, "streams before the time is over", r.plane.streams.count(), 1)
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		wantEqual(t, "streams after", r.plane.streams.count(), 0)
		_, err := io.Copy(io.Discard, conn)
		wantEqual(t, "error at the end", err, nil, cmpopts.EquateErrors())
	})
}

// pauseByHand pauses on conn without our client, and reads the hold.
func pauseByHand(t *testing.T, conn net.Conn, more string) (Hold, *bufio.Reader) {
	t.Helper()
	_, err := io.WriteString(conn, "POST /v1/pause?while=connected HTTP/1.1\r\nHost: echod\r\nContent-Length: 19\r\n\r\n"+`{"reason":"backup"}`+more)
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(conn)
	resp, err := http.ReadResponse(lines, nil) // its Close would wait for the stream's end
	if err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "status", resp.StatusCode, http.StatusCreated)
	wantEqual(t, "type", resp.Header.Get("Content-Type"), "application/jsonl")
	lines = bufio.NewReader(resp.Body)
	var hold Hold
	readJSON(t, lines, &hold)
	wantEqual(t, "Location", resp.Header.Get("Location"), "/v1/holds/"+hold.ID)
	return hold, lines
}

// readJSON reads a line of a stream.
func readJSON(t *testing.T, lines *bufio.Reader, out any) {
	t.Helper()
	line, err := lines.ReadBytes('\n')
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(line, out); err != nil {
		t.Fatal(err)
	}
}

func TestPauseWhileConnected(t *testing.T) {
	t.Run("ends with its caller", testPauseCaller)
	t.Run("outlasts every time limit", testPauseLong)
	t.Run("says why it ended", testPauseReason)
	t.Run("the program ends only once the last line is sent", testPauseLastLine)
	t.Run("is released by closing the lease", testLeaseClose)
	t.Run("is released with its context", testLeaseContext)
}

func testPauseCaller(t *testing.T) {
	for _, caller := range []struct {
		name  string
		tail  string // in the same packet as the request
		leave func(*testing.T, net.Conn)
	}{
		{"closes", "", func(_ *testing.T, c net.Conn) { _ = c.Close() }},
		{"half-closes", "", func(_ *testing.T, c net.Conn) { _ = c.(*net.UnixConn).CloseWrite() }},
		{"sent one byte too many", "\n", func(_ *testing.T, c net.Conn) { _ = c.Close() }},
		{"sends a byte later", "", func(t *testing.T, c net.Conn) {
			if _, err := io.WriteString(c, "\n"); err != nil {
				t.Error(err)
			}
			_ = c.Close()
		}},
		{"sent another request behind it", "GET /v1/status HTTP/1.1\r\nHost: echod\r\n\r\n", func(_ *testing.T, c net.Conn) { _ = c.Close() }},
	} {
		t.Run(caller.name, func(t *testing.T) {
			r := newRig(t, server.Options{})
			conn := r.rawConn(t)
			hold, _ := pauseByHand(t, conn, caller.tail)
			wantEqual(t, "state", r.srv.Status().State, server.StatePaused)
			wantEqual(t, "reason", hold.Reason, "backup")
			caller.leave(t, conn)
			r.await(t, server.StateRunning)
		})
	}
}

func TestStreamsEndWithTheirCaller(t *testing.T) {
	for _, request := range []string{"GET /v1/wait?connections=9999", "GET /v1/events", "POST /v1/pause?while=connected"} {
		t.Run(request, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newBubble(t, server.Options{})
				conn := r.rawConn(t)
				ask(t, conn, request+" HTTP/1.1\r\nHost: echod\r\n\r\n")
				synctest.Wait()
				wantEqual(t, "places taken", r.plane.streams.count(), 1)
				ask(t, conn, "\n") // after one more byte net/http no longer looks
				_ = conn.Close()
				synctest.Wait()
				wantEqual(t, "places taken once the caller has gone", r.plane.streams.count(), 0)
			})
		})
	}
}

func testPauseLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		conn := r.rawConn(t)
		pauseByHand(t, conn, "\n")
		ask(t, conn, "GET /v1/status HTTP/1.1\r\nHost: echod\r\n\r\n") // not answered
		time.Sleep(10 * time.Minute)
		wantEqual(t, "state ten minutes later", r.srv.Status().State, server.StatePaused)
		_ = conn.Close()
		r.await(t, server.StateRunning)
	})
}

func testPauseReason(t *testing.T) {
	for _, end := range []struct {
		name string
		end  func(*rig)
		want Released
	}{
		{"resumed", func(r *rig) { _, _ = r.srv.Resume(server.Caller{}) }, Released{server.ErrResumed.Error(), "running"}},
		{"released", func(r *rig) { _ = r.srv.ReleaseHold("h1", server.Caller{}) }, Released{server.ErrReleased.Error(), "running"}},
		{"expired", func(*rig) { time.Sleep(time.Minute) }, Released{server.ErrExpired.Error(), "running"}},
		{"drained", func(r *rig) { r.srv.StartDrain(server.DrainOptions{Reason: "SIGTERM"}) }, Released{"", "draining"}},
	} {
		t.Run(end.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newBubble(t, server.Options{})
				r.echoClient(t) // keeps the drain from ending at once
				lease, err := r.client.PauseWhileConnected(t.Context(), PauseRequest{TTL: time.Minute})
				if err != nil {
					t.Fatal(err)
				}
				defer lease.Close()
				wantEqual(t, "state", r.srv.Status().State, server.StatePaused)
				end.end(r)
				<-lease.Ended()
				if end.want.Released == "" {
					end.want.Released = (&server.DrainingError{Deadline: r.srv.Status().Drain.Deadline}).Error()
				}
				wantEqual(t, "last line", lease.released, end.want)
				wantEqual(t, "why", lease.EndReason(), end.want.Released)
			})
		})
	}
}

func testPauseLastLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		_, lines := pauseByHand(t, r.rawConn(t), "")
		r.srv.StartDrain(server.DrainOptions{Reason: "SIGTERM"})
		<-r.srv.Done() // at once: there are no connections
		synctest.Wait()
		select {
		case <-r.ended:
			t.Error("the actors have returned before the caller was told")
		default:
		}
		var last Released
		readJSON(t, lines, &last)
		wantEqual(t, "state", last.State == "draining" || last.State == "stopped", true)
		<-r.ended
	})
}

func testLeaseClose(t *testing.T) {
	r := newRig(t, server.Options{})
	lease, err := r.client.PauseWhileConnected(t.Context(), PauseRequest{Reason: "backup"})
	if err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "holds", len(r.srv.Status().Holds), 1)
	wantEqual(t, "hold", lease.Hold.Reason, "backup")
	lease.Close()
	lease.Close()
	r.await(t, server.StateRunning)
}

func testLeaseContext(t *testing.T) {
	r := newRig(t, server.Options{})
	ctx, cancel := context.WithCancelCause(t.Context())
	lease, err := r.client.PauseWhileConnected(ctx, PauseRequest{})
	if err != nil {
		t.Fatal(err)
	}
	defer lease.Close()
	cancel(errors.New("done"))
	r.await(t, server.StateRunning)
	<-lease.Ended()
	wantEqual(t, "why", lease.EndReason(), "the connection to the server has ended")
}

func TestStreamsNeedHijack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		w := &plainWriter{header: http.Header{}}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "/v1/pause?while=connected", http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		r.plane.ServeHTTP(w, req)
		wantEqual(t, "status", w.status, http.StatusInternalServerError)
		wantEqual(t, "problem", strings.Contains(w.body.String(), ProblemUnexpected), true)
		wantEqual(t, "state", r.srv.Status().State, server.StateRunning)
	})
}

// plainWriter is a response of a server that cannot hand over its connections, as with HTTP/2.
type plainWriter struct {
	header http.Header
	status int
	body   strings.Builder
}

func (w *plainWriter) Header() http.Header         { return w.header }
func (w *plainWriter) WriteHeader(status int)      { w.status = status }
func (w *plainWriter) Write(p []byte) (int, error) { return w.body.Write(p) }
