package control

import (
	"net/http"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"echod/server"
)

func TestStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		r := newBubble(t, server.Options{Drain: server.DrainOptions{Grace: time.Minute}})
		left := r.echoClient(t)
		r.echoClient(t)
		_ = left.Close()
		r.awaitConns(t, 1)
		time.Sleep(90 * time.Second)
		must[Hold](t)(r.client.Pause(t.Context(), PauseRequest{Reason: "backup"}))

		set := must[SettingsChanged](t)(r.client.ChangeSettings(t.Context(), map[string]any{"max-conns": "1"}))

		st := must[Status](t)(r.client.Status(t.Context()))
		wantEqual(t, "status", st, Status{
			State: "paused", PID: os.Getpid(), Version: "1.2.3", Started: began, UptimeSeconds: 90,
			Listeners:   []Listener{{Address: "memory"}},
			Connections: 1, Phases: map[string]int{"serving": 1}, Accepted: 2, Closed: map[string]uint64{"client-closed": 1}, BytesIn: 12, BytesOut: 12,
			Holds:        []Hold{{ID: "h1", Reason: "backup", Mode: "hold", Since: began.Add(90 * time.Second)}},
			GraceSeconds: 60, MaxConns: new(1), AtLimit: "wait", Full: true, SettingsChanged: set.Changes,
			LimitsReached: []ReachedLimit{{Name: "max-conns", Value: "1", Then: "wait"}},
		})

		r.srv.StartDrain(server.DrainOptions{Reason: "SIGTERM"})
		synctest.Wait()
		st = must[Status](t)(r.client.Status(t.Context()))
		wantEqual(t, "state", st.State, "draining")
		wantEqual(t, "holds", st.Holds, []Hold{})
		wantEqual(t, "notices", st.Notices, Notices{Sent: 1})
		wantEqual(t, "drain", st.Drain, &Drain{
			Since: began.Add(90 * time.Second), Deadline: began.Add(150 * time.Second), Reason: "SIGTERM", Told: 1,
			Notified: 1,
		})
	})
}

func TestLists(t *testing.T) {
	t.Run("open connections, the oldest first", testConnList)
	t.Run("closed connections, the latest first", testClosedList)
}

func testConnList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		began := time.Now()
		for range 3 {
			r.echoClient(t)
			time.Sleep(10 * time.Second)
		}
		ids := func(limit int, minIdle time.Duration) (ids []uint64) {
			for _, c := range must[Conns](t)(r.client.Conns(t.Context(), limit, ConnFilter{MinIdle: minIdle})).Connections {
				ids = append(ids, c.ID)
			}
			return ids
		}
		wantEqual(t, "all", ids(-1, 0), []uint64{1, 2, 3})
		wantEqual(t, "two at most", ids(2, 0), []uint64{1, 2})
		wantEqual(t, "none at most", ids(0, 0), []uint64(nil))
		wantEqual(t, "idle for 20 s", ids(-1, 20*time.Second), []uint64{1, 2})
		wantEqual(t, "idle for 20 s, one at most", ids(1, 20*time.Second), []uint64{1})

		first := must[Conns](t)(r.client.Conns(t.Context(), 1, ConnFilter{})).Connections[0]
		wantEqual(t, "the oldest", first, Conn{
			ID: 1, Remote: "pipe", Local: "pipe", State: "serving", Opened: began, IdleSeconds: 30, BytesIn: 6, BytesOut: 6,
		})
	})
}

func testClosedList(t *testing.T) {
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

func TestRoutes(t *testing.T) {
	t.Run("HEAD is GET without the body", testHead)
	t.Run("unknown paths and methods are refused with a problem", testUnknownRoutes)
}

func testHead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		got := r.do(t, http.MethodHead, "/v1/status", "")
		wantEqual(t, "status", got.status, http.StatusOK)
		wantEqual(t, "type", got.header.Get("Content-Type"), "application/json")
		wantEqual(t, "body", got.body, "")
	})
}

func testUnknownRoutes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		for _, target := range []string{"/", "/v1", "/v2/status", "/v1/status/", "/v1/conns/", "/v1/conns/1/2", "/v1/holds/", "/v1//status", "//v1/status", "/v1/../v1/status"} {
			got := r.do(t, http.MethodGet, target, "")
			wantEqual(t, target+": status", got.status, http.StatusNotFound)
			wantEqual(t, target+": problem", strings.Contains(got.body, ProblemNotFound), true)
		}
		for target, allowed := range map[string]string{
			"/v1/status": "GET, HEAD", "/v1/conns": "DELETE, GET, HEAD", "/v1/settings": "GET, HEAD, PATCH", "/v1/pause": "POST",
			"/v1/holds/h1": "DELETE", "/v1/events": "GET", "/v1/wait": "GET",
		} {
			got := r.do(t, http.MethodPut, target, "")
			wantEqual(t, target+": status", got.status, http.StatusMethodNotAllowed)
			wantEqual(t, target+": Allow", got.header.Get("Allow"), allowed)
			wantEqual(t, target+": problem", strings.Contains(got.body, ProblemMethod), true)
		}
	})
}
