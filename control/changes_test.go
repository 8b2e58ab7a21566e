package control

import (
	"errors"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"echod/server"
)

func TestPause(t *testing.T) {
	t.Run("holds are released one by one", testHolds)
	t.Run("the answer has the location of the hold", testPauseLocation)
	t.Run("resume releases the hold, and of several only those that are asked for", testResume)
	t.Run("an eviction sends clients away", testEvict)
	t.Run("a hold ends with its time to live", testTTL)
	t.Run("mode reject rejects new clients", testReject)
}

func testHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		first := must[Hold](t)(r.client.Pause(t.Context(), PauseRequest{Reason: "backup"}))
		second := must[Hold](t)(r.client.Pause(t.Context(), PauseRequest{Reason: "upgrade", Mode: "reject"}))
		wantEqual(t, "first hold", first, Hold{ID: "h1", Reason: "backup", Mode: "hold", Since: first.Since})
		wantEqual(t, "holds in the status", must[Status](t)(r.client.Status(t.Context())).Holds, []Hold{first, second})

		change := must[Change](t)(r.client.ReleaseHold(t.Context(), first.ID))
		wantEqual(t, "release of the first", change, Change{Changed: true, State: "paused", Released: new(1)})
		change = must[Change](t)(r.client.ReleaseHold(t.Context(), second.ID))
		wantEqual(t, "release of the last", change, Change{Changed: true, State: "running", Released: new(1)})

		_, err := r.client.ReleaseHold(t.Context(), second.ID)
		wantProblem(t, err, ProblemNotFound)
	})
}

func testPauseLocation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		got := r.do(t, http.MethodPost, "/v1/pause", "")
		wantEqual(t, "status", got.status, http.StatusCreated)
		wantEqual(t, "Location", got.header.Get("Location"), "/v1/holds/h1")
		got = r.do(t, http.MethodDelete, got.header.Get("Location"), "")
		wantEqual(t, "answer to DELETE", got.body, `{"changed":true,"state":"running","released":1}`+"\n")
	})
}

func testResume(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		var holds []Hold
		for range 3 {
			holds = append(holds, must[Hold](t)(r.client.Pause(t.Context(), PauseRequest{})))
		}
		_, err := r.client.Resume(t.Context())
		wantProblem(t, err, ProblemHolds)
		if problem, ok := errors.AsType[*Problem](err); ok {
			wantEqual(t, "holds in the problem", problem.Holds, holds)
		}
		r.await(t, server.StatePaused)
		change := must[Change](t)(r.client.ResumeAll(t.Context()))
		wantEqual(t, "resume of all", change, Change{Changed: true, State: "running", Released: new(3)})
		must[Hold](t)(r.client.Pause(t.Context(), PauseRequest{}))
		change = must[Change](t)(r.client.Resume(t.Context()))
		wantEqual(t, "resume of one", change, Change{Changed: true, State: "running", Released: new(1)})
		change = must[Change](t)(r.client.Resume(t.Context()))
		wantEqual(t, "resume of a running server", change, Change{Changed: false, State: "running", Released: new(0)})
	})
}

func testEvict(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{Drain: server.DrainOptions{Grace: 5 * time.Second}})
		c := r.echoClient(t)
		hold := must[Hold](t)(r.client.Pause(t.Context(), PauseRequest{
			Reason: "m", Evict: true, Spread: 10 * time.Second, Grace: new(8 * time.Second),
		}))
		if !hold.Evict || hold.SpreadSeconds != 10 || *hold.GraceSeconds != 8 {
			t.Errorf("hold %+v, want an eviction over 10 s with 8 s of grace", hold)
		}
		wantEqual(t, "the client reads", <-c.lines, "SHUTDOWN 8 m\n")
		synctest.Wait() // its drain is recorded after that
		wantEqual(t, "told", must[Status](t)(r.client.Status(t.Context())).Told, 1)
		drain := must[Conns](t)(r.client.Conns(t.Context(), -1, ConnFilter{})).Connections[0].Drain
		if drain == nil || drain.Reason != "m" || time.Until(drain.Deadline) != 8*time.Second {
			t.Errorf("drain of the connection: %+v, want one in 8 s", drain)
		}
		r.awaitConns(t, 0)
		st := must[Status](t)(r.client.Status(t.Context()))
		wantEqual(t, "closed", st.Closed, map[string]uint64{"evicted": 1})
		wantEqual(t, "state", st.State, "paused")
	})
}

func testTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		began := time.Now()
		hold := must[Hold](t)(r.client.Pause(t.Context(), PauseRequest{TTL: 90 * time.Second}))
		if hold.Expires == nil || !hold.Expires.Equal(began.Add(90*time.Second)) {
			t.Errorf("the hold expires at %v: want %v", hold.Expires, began.Add(90*time.Second))
		}
		r.await(t, server.StatePaused)
		must[Waited](t)(r.client.Wait(t.Context(), WaitRequest{State: "running"}))
		wantEqual(t, "time paused", time.Since(began), 90*time.Second)
	})
}

func testReject(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		must[Hold](t)(r.client.Pause(t.Context(), PauseRequest{Mode: "reject"}))
		conn, err := r.dialEcho(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		got := make([]byte, 7)
		if n, err := conn.Read(got); err != nil || string(got[:n]) != "PAUSED\n" {
			t.Errorf("a new client reads %q, %v: want PAUSED", got[:n], err)
		}
	})
}

func TestKill(t *testing.T) {
	t.Run("one connection, once", testKillOne)
	t.Run("by idle time, and all", testKillMany)
}

func testKillOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		r.echoClient(t)
		target := r.echoClient(t)
		id := must[Conns](t)(r.client.Conns(t.Context(), -1, ConnFilter{})).Connections[1].ID

		change := must[Change](t)(r.client.Kill(t.Context(), id))
		wantEqual(t, "kill", change, Change{Changed: true, State: "running", Killed: new(1)})
		if line, open := <-target.lines; open {
			t.Errorf("the killed client reads %q: want the end", line)
		}
		r.awaitConns(t, 1)
		_, err := r.client.Kill(t.Context(), id)
		wantProblem(t, err, ProblemNotFound)
	})
}

func testKillMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		r.echoClient(t)
		time.Sleep(time.Minute)
		r.echoClient(t)
		r.echoClient(t)
		time.Sleep(time.Second)

		change := must[Change](t)(r.client.KillMatching(t.Context(), ConnFilter{MinIdle: 30 * time.Second}))
		wantEqual(t, "kill of the idle", change, Change{Changed: true, State: "running", Killed: new(1)})
		r.awaitConns(t, 2)
		change = must[Change](t)(r.client.KillAll(t.Context()))
		wantEqual(t, "kill of all", change, Change{Changed: true, State: "running", Killed: new(2)})
		r.awaitConns(t, 0)
		change = must[Change](t)(r.client.KillAll(t.Context()))
		wantEqual(t, "kill without connections", change, Change{Changed: false, State: "running", Killed: new(0)})
	})
}

func TestNotify(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		told := r.echoClient(t)
		deaf, err := r.dialEcho(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer deaf.Close()
		r.awaitConns(t, 2)

		got := must[Notified](t)(r.client.Notify(t.Context(), "back at noon"))
		wantEqual(t, "answer", got, Notified{Sent: 1, Failed: 1})
		wantEqual(t, "line", receive(t, "the notice", told.lines), "NOTICE back at noon\n")
	})
}

func TestShutdown(t *testing.T) {
	t.Run("begins, shortens and forces a drain, and otherwise changes nothing", testShutdownSteps)
	t.Run("a grace of 0 is none, and not the default", testShutdownGraceZero)
	t.Run("the drain refuses pauses and resumes, and names its deadline", testRefusals)
}

func testShutdownSteps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{Drain: server.DrainOptions{Grace: 5 * time.Second}})
		client := r.echoClient(t)
		began := time.Now()
		for _, step := range []struct {
			name     string
			req      ShutdownRequest
			status   int
			deadline time.Duration // since began
		}{
			{"first", ShutdownRequest{Reason: "upgrade", Grace: new(time.Minute)}, http.StatusAccepted, time.Minute},
			{"same again", ShutdownRequest{Reason: "upgrade", Grace: new(time.Minute)}, http.StatusOK, time.Minute},
			{"longer", ShutdownRequest{Grace: new(time.Hour)}, http.StatusOK, time.Minute},
			{"without a grace", ShutdownRequest{}, http.StatusOK, time.Minute},
			{"shorter", ShutdownRequest{Grace: new(10 * time.Second)}, http.StatusAccepted, 10 * time.Second},
			{"now", ShutdownRequest{Now: true}, http.StatusAccepted, 0},
		} {
			change, err := r.client.Shutdown(t.Context(), step.req)
			if err != nil {
				t.Fatalf("%s: %v", step.name, err)
			}
			synctest.Wait() // the notice
			wantEqual(t, step.name+": changed", change.Changed, step.status == http.StatusAccepted)
			if now := change.State; now != "draining" && (now != "stopped" || !step.req.Now) {
				t.Errorf("%s: state is %s", step.name, now)
			}
			wantEqual(t, step.name+": reason", change.Drain.Reason, "upgrade")
			wantEqual(t, step.name+": deadline", change.Drain.Deadline.Sub(began), step.deadline)
		}
		wantEqual(t, "notice", receive(t, "the notice", client.lines), "SHUTDOWN 60 upgrade\n")
		<-r.ended
		wantEqual(t, "time from begin to end is less than a second", time.Since(began) < time.Second, true)
	})
}

func testShutdownGraceZero(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{Drain: server.DrainOptions{Grace: time.Hour}})
		client := r.echoClient(t)
		began := time.Now()
		got := r.do(t, http.MethodPost, "/v1/shutdown", `{"grace":"0s"}`)
		wantEqual(t, "status", got.status, http.StatusAccepted)
		wantEqual(t, "notice", receive(t, "the notice", client.lines), "SHUTDOWN 0 control\n")
		<-r.ended
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("the drain took %s: want at most two seconds", took)
		}
	})
}

func testRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		r.echoClient(t)
		deadline := must[Change](t)(r.client.Shutdown(t.Context(), ShutdownRequest{Grace: new(time.Minute)})).Drain.Deadline

		for _, refused := range []struct{ method, target string }{
			{http.MethodPost, "/v1/pause"},
			{http.MethodPost, "/v1/pause?while=connected"},
			{http.MethodPost, "/v1/resume"},
			{http.MethodDelete, "/v1/holds/h1"},
			{http.MethodGet, "/v1/wait?state=running"},
		} {
			got := r.do(t, refused.method, refused.target, "")
			what := refused.method + " " + refused.target
			wantEqual(t, what+": status", got.status, http.StatusConflict)
			wantEqual(t, what+": type", got.header.Get("Content-Type"), "application/problem+json")
			for _, part := range []string{
				`"type":"` + ProblemDraining + `"`, `"state":"draining"`,
				`"deadline":"` + deadline.Format(time.RFC3339Nano) + `"`,
				"draining until " + deadline.Format(time.RFC3339),
			} {
				if !strings.Contains(got.body, part) {
					t.Errorf("%s: %s lacks %s", what, got.body, part)
				}
			}
		}
	})
}

func TestContradictoryRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		for _, bad := range []struct{ method, target, body, field string }{
			{http.MethodPost, "/v1/pause", `{"ttl":"0s"}`, "ttl"},
			{http.MethodPost, "/v1/pause?while=asleep", ``, "while"},
			{http.MethodPost, "/v1/pause", `{"mode":"halt"}`, "mode"},
			{http.MethodPost, "/v1/pause", `{"reason":"two\nlines"}`, "reason"},
			{http.MethodPost, "/v1/resume", `{"all":1}`, "all"},
			{http.MethodPost, "/v1/resume?all=true", ``, "all"},
			{http.MethodDelete, "/v1/holds/h1?now=true", ``, "now"},
			{http.MethodDelete, "/v1/conns", ``, "all"},
			{http.MethodDelete, "/v1/conns?all=false", ``, "all"},
			{http.MethodDelete, "/v1/conns?all=true&min_idle=1s", ``, "all"},
			{http.MethodDelete, "/v1/conns/eleven", ``, "id"},
			{http.MethodDelete, "/v1/conns/1?force=true", ``, "force"},
			{http.MethodPost, "/v1/notify", ``, "text"},
			{http.MethodPost, "/v1/notify", `{"text":""}`, "text"},
			{http.MethodPost, "/v1/shutdown", `{"now":true,"grace":"5s"}`, "now"},
			{http.MethodPost, "/v1/shutdown", `{"now":1}`, "now"},
			{http.MethodGet, "/v1/status?verbose=true", ``, "verbose"},
			{http.MethodGet, "/v1/conns?limit=-1", ``, "limit"},
			{http.MethodGet, "/v1/conns/closed?min_idle=1s", ``, "min_idle"},
			{http.MethodGet, "/v1/events?type=state", ``, "type"},
			{http.MethodGet, "/v1/wait", ``, "state"},
			{http.MethodGet, "/v1/wait?state=asleep", ``, "state"},
			{http.MethodGet, "/v1/wait?state=paused&timeout=-1s", ``, "timeout"},
			{http.MethodGet, "/v1/wait?state=paused&timeout=%zz", ``, "query"},
		} {
			got := r.do(t, bad.method, bad.target, bad.body)
			what := bad.method + " " + bad.target + " " + bad.body
			wantEqual(t, what+": status", got.status, http.StatusBadRequest)
			if want := `"field":"` + bad.field + `"`; !strings.Contains(got.body, want) {
				t.Errorf("%s: %s lacks %s", what, got.body, want)
			}
		}
		wantEqual(t, "state", r.srv.Status().State, server.StateRunning)
	})
}

func TestShutdownChanges(t *testing.T) {
	drain := server.DrainOptions{Delay: 10 * time.Second, Spread: 20 * time.Second, Grace: 5 * time.Second, StopTimeout: time.Minute}

	t.Run("a drain is cancelled during its delay", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := newBubble(t, server.Options{Drain: drain})
			_, err := r.client.CancelShutdown(t.Context())
			wantProblem(t, err, ProblemNotDraining)
			change := must[Change](t)(r.client.Shutdown(t.Context(), ShutdownRequest{}))
			if d := change.Drain; d.AcceptingUntil == nil || d.TellingUntil == nil || d.Deadline.Sub(d.Since) != 35*time.Second ||
				d.TellingUntil.Sub(*d.AcceptingUntil) != 20*time.Second {
				t.Errorf("drain %+v, want 10 s, 20 s and 5 s", d)
			}
			change = must[Change](t)(r.client.CancelShutdown(t.Context()))
			wantEqual(t, "cancelled", change, Change{Changed: true, State: "running"})

			r.echoClient(t)
			must[Change](t)(r.client.Shutdown(t.Context(), ShutdownRequest{}))
			time.Sleep(11 * time.Second)
			_, err = r.client.CancelShutdown(t.Context())
			wantProblem(t, err, ProblemDraining)
		})
	})

	t.Run("a drain is extended up to the stop timeout", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := newBubble(t, server.Options{Drain: drain})
			_, err := r.client.ExtendShutdown(t.Context(), time.Second)
			wantProblem(t, err, ProblemNotDraining)
			r.echoClient(t)
			must[Change](t)(r.client.Shutdown(t.Context(), ShutdownRequest{}))
			for _, step := range []struct {
				by      time.Duration
				want    float64
				changed bool
			}{{10 * time.Second, 10, true}, {time.Hour, 13, true}, {time.Hour, 0, false}} {
				change := must[Change](t)(r.client.ExtendShutdown(t.Context(), step.by))
				if change.Changed != step.changed || change.ExtendedSeconds == nil || *change.ExtendedSeconds != step.want {
					t.Errorf("extending by %v: %+v, want %v s", step.by, change, step.want)
				}
			}
		})
	})

	t.Run("a drain names its own times", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := newBubble(t, server.Options{Drain: drain})
			r.echoClient(t)
			change := must[Change](t)(r.client.Shutdown(t.Context(), ShutdownRequest{Grace: new(time.Second), Spread: new(time.Duration(0))}))
			wantEqual(t, "duration", change.Drain.Deadline.Sub(change.Drain.Since), 11*time.Second)
			wantEqual(t, "untold", change.Drain.Untold, 1)
		})
	})
}
