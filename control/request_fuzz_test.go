package control

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"echod/server"
)

// FuzzRequest sends a request line's path and query, and a body, to every method of a Plane. Whatever they are, the answer
// has a known status, and a refusal is a problem.
func FuzzRequest(f *testing.F) {
	for _, seed := range [][3]string{
		{"GET", "/v1/conns?limit=1&min_idle=1s", ""},
		{"DELETE", "/v1/conns?all=true", ""},
		{"POST", "/v1/notify", `{"text":"x"}`},
		{"POST", "/v1/pause?while=idle", `{"ttl":"1s"}`},
		{"DELETE", "/v1/holds/h1", ""},
		{"DELETE", "/v1/conns/%31", ""},
		{"PUT", "/v1/../v1/status", ""},
		{"GET", "/v1/status?%zz", ""},
		{"GET", "//v1//status?x=1&x=2", ""},
		{"POST", "/v1/pause", "\x00\xff"},
		{"GET", "/v1/wait?state=running&timeout=0s", ""},
	} {
		f.Add(seed[0], seed[1], seed[2])
	}
	f.Fuzz(func(t *testing.T, method, target, body string) {
		if strings.Contains(target, "/shutdown") || strings.Contains(target, "while=connected") {
			t.Skip("it ends the server, or lasts until its caller goes")
		}
		r, err := http.NewRequest(method, "http://echod", strings.NewReader(body))
		if err != nil {
			t.Skip("net/http refuses such a method")
		}
		if r.URL, err = r.URL.Parse(target); err != nil {
			t.Skip("net/http refuses such a path")
		}
		srv, err := server.New(server.Echo, server.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer srv.Close()
		w := httptest.NewRecorder()
		done := make(chan struct{})
		go func() {
			defer close(done)
			New(srv, Options{}).ServeHTTP(w, r)
		}()
		select {
		case <-done:
		case <-time.After(patience):
			t.Fatal(errors.New("no answer"))
		}
		if w.Code >= 400 && !strings.HasPrefix(w.Header().Get("Content-Type"), "application/problem+json") {
			t.Errorf("%s %q: status %d with the type %q", method, target, w.Code, w.Header().Get("Content-Type"))
		}
	})
}
