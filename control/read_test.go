package control

import (
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"echod/server"
)

func TestStatusTellsAllThatHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		r := newBubble(t, server.Options{Drain: server.DrainOptions{Grace: time.Minute}})
		left := r.echoClient(t)
		r.echoClient(t)
		_ = left.Close()
		r.awaitConns(t, 1)
		time.Sleep(90 * time.Second)
		must[Hold](t)(r.client.Pause(t.Context(), PauseRequest{Reason: "backup"}))

		st := must[Status](t)(r.client.Status(t.Context()))
		wantEqual(t, "status", st, Status{
			State: "paused", PID: os.Getpid(), Version: "1.2.3", Started: began, UptimeSeconds: 90,
			Listeners:   []Listener{{Address: "memory"}},
			Connections: 1, Phases: map[string]int{"serving": 1}, Accepted: 2, Closed: map[string]uint64{"client-closed": 1}, BytesIn: 12, BytesOut: 12,
			Holds:        []Hold{{ID: "h1", Reason: "backup", Mode: "hold", Since: began.Add(90 * time.Second)}},
			GraceSeconds: 60,
		})

		r.srv.StartDrain(server.DrainOptions{Reason: "SIGTERM"})
		synctest.Wait()
		st = must[Status](t)(r.client.Status(t.Context()))
		wantEqual(t, "state", st.State, "draining")
		wantEqual(t, "holds", st.Holds, []Hold{})
		wantEqual(t, "notices", st.Notices, Notices{Sent: 1})
		wantEqual(t, "drain", st.Drain, &Drain{
			Since: began.Add(90 * time.Second), Deadline: began.Add(150 * time.Second), Reason: "SIGTERM", Notified: 1,
		})
	})
}

func TestConnectionsAreListedOldestFirstWithinLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		began := time.Now()
		for range 3 {
			r.echoClient(t)
			time.Sleep(10 * time.Second)
		}
		ids := func(limit int, minIdle time.Duration) (ids []uint64) {
			for _, c := range must[Conns](t)(r.client.Conns(t.Context(), limit, minIdle)).Connections {
				ids = append(ids, c.ID)
			}
			return ids
		}
		wantEqual(t, "all", ids(-1, 0), []uint64{1, 2, 3})
		wantEqual(t, "two at most", ids(2, 0), []uint64{1, 2})
		wantEqual(t, "none at most", ids(0, 0), []uint64(nil))
		wantEqual(t, "idle for 20 s", ids(-1, 20*time.Second), []uint64{1, 2})
		wantEqual(t, "idle for 20 s, one at most", ids(1, 20*time.Second), []uint64{1})

		first := must[Conns](t)(r.client.Conns(t.Context(), 1, 0)).Connections[0]
		wantEqual(t, "the oldest", first, Conn{
			ID: 1, Remote: "pipe", Local: "pipe", State: "serving", Opened: began, IdleSeconds: 30, BytesIn: 6, BytesOut: 6,
		})
	})
}

func TestClosedConnectionsAreListedLatestFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		began := time.Now()
		for range 3 {
			c := r.echoClient(t)
			time.Sleep(time.Second)
			_ = c.Close()
			r.awaitConns(t, 0)
		}
		closed := must[ClosedConns](t)(r.client.Closed(t.Context(), 2)).Connections
		want := ClosedConn{
			Remote: "pipe", Local: "pipe", Reason: "client-closed", DurationSeconds: 1, BytesIn: 6, BytesOut: 6,
		}
		third, second := want, want
		third.ID, third.Opened, third.Closed = 3, began.Add(2*time.Second), began.Add(3*time.Second)
		second.ID, second.Opened, second.Closed = 2, began.Add(1*time.Second), began.Add(2*time.Second)
		wantEqual(t, "the last two", closed, []ClosedConn{third, second})
		wantEqual(t, "all", len(must[ClosedConns](t)(r.client.Closed(t.Context(), -1)).Connections), 3)
	})
}

func TestHeadAnswersAsGetWithoutTheBody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		got := r.do(t, http.MethodHead, "/v1/status", "")
		wantEqual(t, "status", got.status, http.StatusOK)
		wantEqual(t, "type", got.header.Get("Content-Type"), "application/json")
		wantEqual(t, "body", got.body, "")
	})
}

func TestUnknownPathsAndMethodsAreRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		for _, target := range []string{"/", "/v1", "/v2/status", "/v1/status/", "/v1/conns/", "/v1/conns/1/2", "/v1/holds/", "/v1//status", "//v1/status", "/v1/../v1/status"} {
			got := r.do(t, http.MethodGet, target, "")
			wantEqual(t, target+": status", got.status, http.StatusNotFound)
			wantEqual(t, target+": problem", strings.Contains(got.body, ProblemNotFound), true)
		}
		for target, allowed := range map[string]string{"/v1/status": "GET", "/v1/conns": "DELETE, GET", "/v1/pause": "POST", "/v1/holds/h1": "DELETE"} {
			got := r.do(t, http.MethodPut, target, "")
			wantEqual(t, target+": status", got.status, http.StatusMethodNotAllowed)
			wantEqual(t, target+": Allow", got.header.Get("Allow"), allowed)
			wantEqual(t, target+": problem", strings.Contains(got.body, ProblemMethod), true)
		}
	})
}

func TestWaitReturnsAtOnceWhereItHoldsAlready(t *testing.T) {
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

func TestWaitReturnsWhenItComesTrueHoweverBriefly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		waited := make(chan Waited, 1)
		go func() {
			got, _ := r.client.Wait(t.Context(), WaitRequest{State: "paused"})
			waited <- got
		}()
		time.Sleep(time.Hour)
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

func TestWaitForTwoThingsWaitsForBothAtOnce(t *testing.T) {
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
		pending("nobody there, but running")
		c := r.echoClient(t)
		must[Hold](t)(r.client.Pause(t.Context(), PauseRequest{}))
		pending("the server paused, but one connection")
		_ = c.Close()
		wantEqual(t, "answer", receive(t, "the wait", waited), Waited{State: "paused", Connections: 0})
	})
}

func TestWaitTimesOutWhenItSays(t *testing.T) {
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

func TestWaitGivesUpWhenADrainMakesItHopeless(t *testing.T) {
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

func TestWaitEndsWithItsCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		conn := r.rawConn(t)
		if _, err := io.WriteString(conn, "GET /v1/wait?state=paused HTTP/1.1\r\nHost: echod\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		wantEqual(t, "streams under way", r.plane.streams.count(), 1)
		_ = conn.Close()
		synctest.Wait()
		wantEqual(t, "streams under way after the caller has left", r.plane.streams.count(), 0)
	})
}
