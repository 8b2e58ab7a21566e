package main

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode"
)

// A hostile server must not reach the operator's terminal with control characters.
func TestCtlOutputIsPrintable(t *testing.T) {
	const evil = "\\u001b[2Jred\\u202e\\u009b31m\\u2028" // escaped in JSON
	conn := `{"id":1,"remote":"` + evil + `","local":"` + evil + `","state":"` + evil + `","reason":"` + evil + `"}`
	hold := `{"id":"` + evil + `","reason":"` + evil + `","mode":"` + evil + `","since":"2026-11-23T12:00:00Z"}`
	answers := map[string]string{
		"GET /v1/status": `{"state":"` + evil + `","version":"` + evil + `","listeners":[{"address":"` + evil + `"}],"closed":{"` + evil + `":1},` +
			`"holds":[` + hold + `],"drain":{"reason":"` + evil + `","deadline":"2026-11-23T12:00:00Z"}}`,
		"GET /v1/conns":         `{"connections":[` + conn + `]}`,
		"GET /v1/conns/closed":  `{"connections":[` + conn + `]}`,
		"GET /v1/wait":          `{"state":"` + evil + `","connections":1}`,
		"POST /v1/pause":        hold,
		"POST /v1/resume":       `{"changed":true,"state":"` + evil + `","released":1}`,
		"DELETE /v1/holds/{id}": `{"changed":true,"state":"` + evil + `","released":1}`,
		"POST /v1/notify":       `{"sent":1}`,
		"POST /v1/upgrade":      `{"pid":1,"handed_over":1,"behind":{"` + evil + `":1}}`,
		"DELETE /v1/conns":      `{"changed":true,"state":"` + evil + `","killed":1}`,
		"POST /v1/shutdown":     `{"changed":true,"state":"` + evil + `"}`,
		"GET /v1/events":        `{"type":"` + evil + `"}` + "\n" + `{"type":"opened","conn":` + conn + `}` + "\n" + `{"type":"released","cause":"` + evil + `","hold":` + hold + "}\n",
		"DELETE /v1/conns/{id}": `{"type":"` + evil + `","title":"` + evil + `","detail":"` + evil + `"}`,
	}
	mux := http.NewServeMux()
	for pattern, answer := range answers {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			if strings.Contains(answer, `"title"`) {
				w.Header().Set("Content-Type", "application/problem+json")
				w.WriteHeader(http.StatusConflict)
			}
			fmt.Fprint(w, answer)
		})
	}
	dir, err := os.MkdirTemp("", "ctl")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "c")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: mux}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = srv.Serve(ln)
	}()
	defer func() {
		_ = srv.Close()
		<-served
	}()
	for _, args := range []string{
		"status", "conns", "closed", "events", "wait --state paused", "pause", "resume", "resume h1", "notify x", "kill --all", "kill 1", "shutdown", "upgrade",
	} {
		var out bytes.Buffer
		code := execute(append(append([]string{"ctl"}, strings.Fields(args)...), "--control", path), nil, &out, &out)
		if code != 0 && args != "kill 1" {
			t.Errorf("ctl %s: exit code %d", args, code)
		}
		for _, r := range out.String() {
			if !unicode.IsPrint(r) && r != '\n' {
				t.Errorf("ctl %s prints %U in %q", args, r, out.String())
				break
			}
		}
		if out.Len() == 0 || args == "status" && !strings.Contains(out.String(), "red") {
			t.Errorf("ctl %s prints %q", args, out.String())
		}
	}
}
