package control

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"echod/server"
)

// asked returns what a plane answers to a request.
func asked(t *testing.T, h http.Handler, method, path string) (status int, body string) {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), method, "http://localhost"+path, nil))
	return w.Code, w.Body.String()
}

func TestWeb(t *testing.T) {
	t.Run("a paused or draining server is alive and not ready", testWebStates)
	t.Run("a starting or stopped server is not ready", testWebEnds)
	t.Run("at the connection limit, readiness follows what new clients get", testWebFull)
	t.Run("livez probes the server", testWebLive)
	t.Run("no request changes the server", testWebReadOnly)
	t.Run("only allowed host names read it", testWebHosts)
	t.Run("Debug answers below /debug/", testWebDebug)
}

func testWebStates(t *testing.T) {
	r := newRig(t, server.Options{})
	web := NewWeb(r.srv, Options{})
	want := func(path string, status int, parts ...string) {
		t.Helper()
		got, body := asked(t, web, http.MethodGet, path)
		if got != status {
			t.Errorf("%s: %d %q, want %d", path, got, body, status)
		}
		for _, part := range parts {
			if !strings.Contains(body, part) {
				t.Errorf("%s says %q, want %q in it", path, body, part)
			}
		}
	}
	want("/livez", 200, "running")
	want("/readyz", 200, "ready")
	h, err := r.srv.Pause(server.PauseOptions{Reason: "backup"})
	if err != nil {
		t.Fatal(err)
	}
	want("/livez", 200, "paused")
	want("/readyz", 503, "paused", "h1", "backup")
	h.Release()
	want("/readyz", 200, "ready")
	nc, err := r.dialEcho(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if _, err := nc.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := nc.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	r.srv.StartDrain(server.DrainOptions{Grace: time.Minute, Reason: "deploy"})
	want("/livez", 200, "draining")
	want("/readyz", 503, "draining", "deploy", "until")
}

func testWebEnds(t *testing.T) {
	srv, err := server.New(server.Echo, server.Options{Notifier: server.DefaultLineNotifier()})
	if err != nil {
		t.Fatal(err)
	}
	web := NewWeb(srv, Options{})
	for _, state := range []string{"starting", "stopped"} {
		if status, body := asked(t, web, http.MethodGet, "/readyz"); status != http.StatusServiceUnavailable || body != "not ready: "+state+"\n" && state == "starting" {
			t.Errorf("/readyz while %s: %d %q, want 503", state, status, body)
		}
		if status, body := asked(t, web, http.MethodGet, "/livez"); status != http.StatusOK || body != "alive: "+state+"\n" {
			t.Errorf("/livez while %s: %d %q, want 200", state, status, body)
		}
		_ = srv.Close()
	}
}

func testWebFull(t *testing.T) {
	for name, tt := range map[string]struct {
		atLimit server.LimitMode
		status  int
		body    string
	}{
		"wait":   {server.LimitQueue, 200, "ready: full, with 1 connection: new clients wait for a place\n"},
		"reject": {server.LimitReject, 503, "not ready: full, with 1 connection\n"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, server.Options{Limits: server.Limits{MaxConns: 1, AtLimit: tt.atLimit}})
			web := NewWeb(r.srv, Options{})
			c := r.echoClient(t)
			if status, body := asked(t, web, http.MethodGet, "/readyz"); status != tt.status || body != tt.body {
				t.Errorf("/readyz at the limit: %d %q, want %d %q", status, body, tt.status, tt.body)
			}
			_ = c.Close()
			r.awaitConns(t, 0)
			if status, body := asked(t, web, http.MethodGet, "/readyz"); status != 200 || body != "ready: 0 connections\n" {
				t.Errorf("/readyz after that: %d %q, want 200", status, body)
			}
		})
	}
}

func testWebLive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv, err := server.New(server.Echo, server.Options{Notifier: server.DefaultLineNotifier()})
		if err != nil {
			t.Fatal(err)
		}
		ln := stuckListener{newPipeListener(), make(chan struct{})}
		var serving sync.WaitGroup
		serving.Go(func() { _ = srv.Serve(ln) })
		<-ln.entered
		began := time.Now()
		status, body := asked(t, NewWeb(srv, Options{}), http.MethodGet, "/livez")
		if status != http.StatusServiceUnavailable || !strings.Contains(body, "accepting from memory is stuck") {
			t.Errorf("/livez of a server whose accept loop is stuck: %d %q, want 503", status, body)
		}
		wantEqual(t, "time until the answer", time.Since(began), probeTimeout)
		_ = ln.Close()
		_ = srv.Close()
		serving.Wait()
	})
}

func testWebReadOnly(t *testing.T) {
	r := newRig(t, server.Options{})
	web := NewWeb(r.srv, Options{Metrics: http.NotFoundHandler()})
	for _, path := range []string{"/livez", "/readyz", "/v1/status", "/metrics"} {
		for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodDelete, http.MethodPatch} {
			if status, body := asked(t, web, method, path); status != http.StatusMethodNotAllowed {
				t.Errorf("%s %s: %d %q, want 405", method, path, status, body)
			}
		}
	}
	for _, path := range []string{"/v1/pause", "/v1/resume", "/v1/shutdown", "/v1/notify", "/v1/conns", "/v1/events", "/debug/pprof/"} {
		for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodDelete} {
			if status, body := asked(t, web, method, path); status != http.StatusNotFound {
				t.Errorf("%s %s: %d %q, want 404", method, path, status, body)
			}
		}
	}
}

func TestOptions(t *testing.T) {
	t.Run("OnRequest gets routes, not paths", testOnRequest)
	t.Run("Metrics answers /metrics", testMetrics)
}

// testOnRequest checks that callers cannot make up routes or methods, each of which would be a metric.
func testOnRequest(t *testing.T) {
	r := newRig(t, server.Options{})
	var mu sync.Mutex
	seen := make(map[string]int)
	plane := New(r.srv, Options{OnRequest: func(route, method string, code int) {
		mu.Lock()
		defer mu.Unlock()
		seen[method+" "+route+" "+http.StatusText(code)]++
	}})
	asked(t, plane, http.MethodGet, "/v1/status")
	asked(t, plane, http.MethodGet, "/v1/status?x=1")
	asked(t, plane, http.MethodDelete, "/v1/conns/17")
	asked(t, plane, http.MethodPost, "/v1/status")
	asked(t, plane, "BREW", "/v1/status")
	asked(t, plane, http.MethodGet, "/nowhere/1")
	asked(t, plane, http.MethodGet, "/nowhere/2")
	for what, want := range map[string]int{
		"GET /v1/status OK": 1, "GET /v1/status Bad Request": 1, "DELETE /v1/conns/* Not Found": 1,
		"POST /v1/status Method Not Allowed": 1, "other /v1/status Method Not Allowed": 1, "GET  Not Found": 2,
	} {
		if seen[what] != want {
			t.Errorf("%q was seen %d times, want %d; all: %v", what, seen[what], want, seen)
		}
	}
}

func testMetrics(t *testing.T) {
	r := newRig(t, server.Options{})
	metrics := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("metrics")) })
	if _, body := asked(t, New(r.srv, Options{Metrics: metrics}), http.MethodGet, "/metrics"); body != "metrics" {
		t.Errorf("/metrics is %q", body)
	}
	if status, _ := asked(t, New(r.srv, Options{}), http.MethodGet, "/metrics"); status != http.StatusNotFound {
		t.Errorf("without metrics: %d, want 404", status)
	}
}

func testWebHosts(t *testing.T) {
	r := newRig(t, server.Options{})
	web := NewWeb(r.srv, Options{Metrics: http.HandlerFunc(someMetrics), Debug: http.HandlerFunc(someMetrics), Hosts: []string{"Allowed.example"}})
	status := func(host, path string) int {
		w := httptest.NewRecorder()
		req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, http.NoBody)
		req.Host = host
		web.ServeHTTP(w, req)
		return w.Code
	}
	for host, want := range map[string]int{
		"127.0.0.1": 200, "127.0.0.1:9090": 200, "[::1]:9090": 200, "[::1]": 200, "10.1.2.3:80": 200, "[fe80::1%25eth0]:80": 200,
		"localhost:9090": 200, "echod": 200, "allowed.example": 200, "ALLOWED.example.:9090": 200, "": 200,
		"evil.example": 421, "evil.example:9090": 421, "localhost.evil.example": 421, "127.0.0.1.evil.example": 421, "sub.allowed.example": 421, "evil": 421,
	} {
		for _, path := range []string{"/v1/status", "/metrics", "/debug/pprof/heap"} {
			wantEqual(t, "status of "+path+" for "+host, status(host, path), want)
		}
		wantEqual(t, "status of /livez for "+host, status(host, "/livez"), 200)
		wantEqual(t, "status of /readyz for "+host, status(host, "/readyz"), 200)
	}
}

func testWebDebug(t *testing.T) {
	r := newRig(t, server.Options{})
	web := NewWeb(r.srv, Options{Debug: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write([]byte(r.URL.Path)) })})
	for _, path := range []string{"/debug/pprof/", "/debug/pprof/heap", "/debug/vars"} {
		status, body := asked(t, web, http.MethodGet, path)
		wantEqual(t, path, [2]any{status, body}, [2]any{http.StatusOK, path})
	}
	if status, _ := asked(t, NewWeb(r.srv, Options{}), http.MethodGet, "/debug/pprof/"); status != http.StatusNotFound {
		t.Errorf("without Debug: %d, want 404", status)
	}
}
