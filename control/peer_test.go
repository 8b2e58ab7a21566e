//go:build linux || darwin

package control

import (
	"net/http"
	"os"
	"strings"
	"testing"

	"go.uber.org/zap"

	"echod/server"
)

func TestHoldNamesWhoAskedForIt(t *testing.T) {
	r := newRig(t, server.Options{})
	hold := must[Hold](t)(r.client.Pause(t.Context(), PauseRequest{}))
	wantEqual(t, "uid", hold.UID, new(os.Getuid()))
	wantEqual(t, "pid", hold.PID, new(os.Getpid()))
	lease, err := r.client.PauseWhileConnected(t.Context(), PauseRequest{})
	if err != nil {
		t.Fatal(err)
	}
	defer lease.Close()
	wantEqual(t, "pid of a lease", lease.Hold.PID, new(os.Getpid()))
	info := r.srv.Status().Holds[0]
	wantEqual(t, "uid and pid on the server", [2]int{info.UID, info.PID}, [2]int{os.Getuid(), os.Getpid()})
}

func TestEveryChangeIsLoggedWithWhoAskedForIt(t *testing.T) {
	r := newRig(t, server.Options{})
	r.echoClient(t)
	who := map[string]any{"uid": int64(os.Getuid()), "pid": int64(os.Getpid())}
	for _, request := range []struct {
		method, target, body string
		status               int
		problem              string
	}{
		{"POST", "/v1/pause", `{"reason":"backup"}`, http.StatusCreated, ""},
		{"DELETE", "/v1/holds/h1", ``, http.StatusOK, ""},
		{"POST", "/v1/resume", ``, http.StatusOK, ""},
		{"POST", "/v1/notify", `{"text":"hello"}`, http.StatusOK, ""},
		{"DELETE", "/v1/conns/1", ``, http.StatusOK, ""},
		{"DELETE", "/v1/conns?all=true", ``, http.StatusOK, ""},
		{"DELETE", "/v1/holds/h9", ``, http.StatusNotFound, `no such hold: "h9"`},
		{"POST", "/v1/pause", `{"ttl":"-1s"}`, http.StatusBadRequest, "ttl: -1s is negative"},
		{"POST", "/v1/shutdown", `{"grace":"1h"}`, http.StatusAccepted, ""},
		{"PATCH", "/v1/status", ``, http.StatusMethodNotAllowed, "PATCH is not allowed here: want GET"},
	} {
		r.logs.TakeAll()
		what := request.method + " " + request.target
		wantEqual(t, what+": status", r.do(t, request.method, request.target, request.body).status, request.status)
		r.do(t, http.MethodGet, "/v1/status", "") // on the same connection, so that the line above has been written

		req, _ := http.NewRequest(request.method, "http://echod"+request.target, nil)
		want := map[string]any{"method": request.method, "path": req.URL.Path, "uid": who["uid"], "pid": who["pid"]}
		if request.problem != "" {
			want["status"], want["error"] = int64(request.status), request.problem
		}
		lines := r.logs.FilterMessage("control request").All()
		if len(lines) != 1 {
			t.Errorf("%s: %d lines in the log: want one", what, len(lines))
			continue
		}
		wantEqual(t, what+": line in the log", lines[0].ContextMap(), want)
		wantEqual(t, what+": level", lines[0].Level, zap.InfoLevel)
	}
}

func TestReadingIsNotLogged(t *testing.T) {
	r := newRig(t, server.Options{})
	for _, target := range []string{"/v1/status", "/v1/conns", "/v1/nothing", "/v1/conns?limit=x"} {
		r.do(t, http.MethodGet, target, "")
	}
	wantEqual(t, "lines in the log", r.logs.FilterMessage("control request").Len(), 0)
}

func TestLogLinesStayShortWhateverIsAsked(t *testing.T) {
	r := newRig(t, server.Options{})
	long := strings.Repeat("0123456789", 600)
	r.logs.TakeAll()
	r.do(t, http.MethodDelete, "/v1/holds/"+long, "")
	r.do(t, http.MethodPost, "/v1/pause", `{"`+long+`":1}`)
	r.do(t, http.MethodGet, "/v1/status", "")
	lines := r.logs.FilterMessage("control request").All()
	wantEqual(t, "lines in the log", len(lines), 2)
	for _, line := range lines {
		for key, value := range line.ContextMap() {
			if text, ok := value.(string); ok && len(text) > maxDetail+10 {
				t.Errorf("%s has %d bytes: want at most %d", key, len(text), maxDetail+10)
			}
		}
	}
}
