package control

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"echod/server"
)

func TestPage(t *testing.T) {
	t.Run("it shows the state, the holds and how to act", testPageState)
	t.Run("texts of clients and operators are escaped", testPageEscapes)
	t.Run("a search shows only what matches", testPageSearch)
	t.Run("a wrong query is refused", testPageQuery)
	t.Run("the policy allows the page's own files only", testPagePolicy)
	t.Run("events send a section when it changes", testPageEvents)
	t.Run("every close reason has a meaning", func(t *testing.T) {
		for _, why := range server.Reasons() {
			if reasonMeanings[why] == "" {
				t.Errorf("%s has none", why)
			}
		}
	})
}

// wantPage checks what the page says, and returns it.
func wantPage(t *testing.T, h http.Handler, path string, parts ...string) string {
	t.Helper()
	status, body := asked(t, h, http.MethodGet, path)
	if status != http.StatusOK {
		t.Fatalf("%s: %d %s", path, status, body)
	}
	for _, part := range parts {
		if !strings.Contains(body, part) {
			t.Errorf("%s lacks %q:\n%s", path, part, body)
		}
	}
	return body
}

func testPageState(t *testing.T) {
	r := newRig(t, server.Options{Limits: server.Limits{MaxConns: 10}})
	web := NewWeb(r.srv, Options{Version: "1.2.3"})
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
	wantPage(t, web, "/", "1.2.3", "running", "1 client connected", nc.LocalAddr().String(),
		`<meter min="0" max="10" high="9" optimum="0" value="1">10 %</meter>`, "echod ctl pause")

	hold, err := r.srv.Pause(server.PauseOptions{Reason: "backup", TTL: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	wantPage(t, web, "/", "paused", "backup", "wait in the accept queue", "echod ctl resume "+hold.ID())
	hold.Release()

	r.srv.StartDrain(server.DrainOptions{Grace: time.Hour, Reason: "deploy"})
	if err := r.srv.AwaitStatus(t.Context(), func(st server.State, _ int) bool { return st == server.StateDraining }); err != nil {
		t.Fatal(err)
	}
	wantPage(t, web, "/", "draining", "Reason: deploy.", "Clients that stay are closed in ", "echod ctl shutdown --now")
}

// servePipes serves handler in memory, and returns a dialer.
func servePipes(t *testing.T, handler server.HandlerFunc) (*server.Server, *pipeListener) {
	t.Helper()
	srv, err := server.New(handler, server.Options{})
	if err != nil {
		t.Fatal(err)
	}
	ln := newPipeListener()
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(ln) }()
	t.Cleanup(func() {
		_ = srv.Close()
		<-ended
	})
	return srv, ln
}

func testPageEscapes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const hostile = `<script>alert(1)</script>"'&`
		srv, ln := servePipes(t, func(_ context.Context, c *server.Conn) error {
			if err := c.SetLabel("name", hostile); err != nil {
				return err
			}
			_, err := c.Read(make([]byte, 1))
			return err
		})
		nc, err := ln.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		synctest.Wait() // until it is served
		if _, err := srv.Pause(server.PauseOptions{Reason: hostile}); err != nil {
			t.Fatal(err)
		}
		body := wantPage(t, NewWeb(srv, Options{Version: hostile}), "/?q="+url.QueryEscape(hostile))
		if strings.Contains(body, "<script>") || strings.Contains(body, hostile) {
			t.Errorf("markup reached the page:\n%s", body)
		}
		const escaped = "&lt;script&gt;alert(1)&lt;/script&gt;"
		if n := strings.Count(body, escaped); n != 4 { // version, reason, label, search
			t.Errorf("the page shows %d of 4 texts:\n%s", n, body)
		}
	})
}

func testPageSearch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv, ln := servePipes(t, func(_ context.Context, c *server.Conn) error {
			user := "anna"
			if c.ID() > 1 {
				user = "ben"
			}
			if err := c.SetLabel("user", user); err != nil {
				return err
			}
			_, err := io.Copy(c, c)
			return err
		})
		web := NewWeb(srv, Options{})
		for i := range 3 {
			nc, err := ln.Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			if _, err := io.ReadFull(nc, echoed(nc, make([]byte, i+1))); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Minute) // the bubble's
		}
		synctest.Wait()
		for query, want := range map[string][]string{
			"":                 {"1", "2", "3"},
			"?sort=newest":     {"3", "2", "1"},
			"?sort=bytes":      {"3", "2", "1"},
			"?sort=idle":       {"1", "2", "3"},
			"?q=BEN":           {"2", "3"},
			"?q=2":             {"2"},
			"?q=serving":       {"1", "2", "3"},
			"?q=nobody":        nil,
			"?q=ben&sort=idle": {"2", "3"},
		} {
			var got []string
			for _, row := range regexp.MustCompile(`<td class="n">(\d+)</td><td>pipe`).FindAllStringSubmatch(wantPage(t, web, "/"+query), -1) {
				got = append(got, row[1])
			}
			wantEqual(t, query, got, want)
		}
		wantPage(t, web, "/?q=nobody", "None of 3 connections matches.")
		wantPage(t, web, "/?q=ben", "2 of 3 connections match, 2 shown.")
	})
}

// echoed writes data in the background, and returns a buffer for its echo.
func echoed(nc net.Conn, data []byte) []byte {
	go func() { _, _ = nc.Write(data) }() // ends with the read of the echo, or when nc is closed
	return make([]byte, len(data))
}

func testPageQuery(t *testing.T) {
	r := newRig(t, server.Options{})
	web := NewWeb(r.srv, Options{})
	for query, field := range map[string]string{
		"?sort=size": "sort", "?page=2": "page", "?q=a&q=b": "q", "?q=" + strings.Repeat("x", pageMaxText+1): "q",
	} {
		for _, path := range []string{"/", "/page/events"} {
			status, body := asked(t, web, http.MethodGet, path+query)
			var problem Problem
			if err := json.Unmarshal([]byte(body), &problem); err != nil || status != http.StatusBadRequest || problem.Field != field {
				t.Errorf("%s: %d %s, want a problem with %s", path+query, status, body, field)
			}
		}
	}
	wantPage(t, web, "/?q=42&sort=bytes", `value="42"`, "<option value=\"bytes\" selected>")
}

func testPagePolicy(t *testing.T) {
	r := newRig(t, server.Options{})
	web := NewWeb(r.srv, Options{})
	body := wantPage(t, web, "/")
	for _, forbidden := range []string{" style=", "<style", "onclick", "http://", "https://", "javascript:"} {
		if strings.Contains(body, forbidden) {
			t.Errorf("the page has %q, which the policy forbids", forbidden)
		}
	}
	for path, kind := range map[string]string{
		"/": "text/html; charset=utf-8", "/page/page.css": "text/css; charset=utf-8",
		"/page/page.js": "text/javascript; charset=utf-8", "/page/icon.svg": "image/svg+xml",
	} {
		w := httptest.NewRecorder()
		web.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "http://localhost"+path, nil))
		h := w.Header()
		if w.Code != http.StatusOK || h.Get("Content-Type") != kind || h.Get("X-Content-Type-Options") != "nosniff" ||
			!strings.HasPrefix(h.Get("Content-Security-Policy"), "default-src 'none'; ") {
			t.Errorf("%s: %d %v", path, w.Code, h)
		}
	}
	w := httptest.NewRecorder()
	web.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "http://evil.example/", nil))
	if w.Code != http.StatusMisdirectedRequest {
		t.Errorf("another host's name: %d", w.Code)
	}
	if status, _ := asked(t, New(r.srv, Options{}), http.MethodGet, "/"); status != http.StatusNotFound {
		t.Errorf("the control socket answers / with %d", status)
	}
}

// pageEvents reads server-sent events: their types and data.
func pageEvents(t *testing.T, body io.Reader) func() (kind, data string) {
	lines := bufio.NewScanner(body)
	lines.Buffer(nil, 1<<20)
	return func() (kind, data string) {
		t.Helper()
		for lines.Scan() {
			line := lines.Text()
			if rest, ok := strings.CutPrefix(line, "event: "); ok {
				kind = rest
			}
			if rest, ok := strings.CutPrefix(line, "data: "); ok {
				if err := json.Unmarshal([]byte(rest), &data); err != nil {
					t.Fatalf("%q: %v", line, err)
				}
				return kind, data
			}
		}
		t.Fatalf("the events ended: %v", lines.Err())
		return "", ""
	}
}

func testPageEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		weblisten := newPipeListener()
		r := newBubble(t, server.Options{}, func(r *rig) actor {
			return pair(NewWeb(r.srv, Options{}).Actor(weblisten))
		})
		web := &http.Client{Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return weblisten.Dial(ctx) },
		}}
		defer web.CloseIdleConnections()
		ctx, gone := context.WithCancel(t.Context())
		defer gone()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost/page/events?sort=idle", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := web.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if got := resp.Header.Get("Content-Type"); got != "text/event-stream" {
			t.Errorf("the content type is %s", got)
		}
		next := pageEvents(t, resp.Body)
		ids := map[string]bool{}
		for range 6 {
			kind, data := next()
			if kind == "title" {
				ids[data] = true
			} else {
				ids[regexp.MustCompile(`id="(\w+)"`).FindStringSubmatch(data)[1]] = true
			}
		}
		want := map[string]bool{
			"closed": true, "connections": true, "limits": true, "state": true, "traffic": true,
			"running · 0 connections · echod": true,
		}
		wantEqual(t, "first events", ids, want)

		began := time.Now()
		if _, err := r.srv.Pause(server.PauseOptions{Reason: "backup"}); err != nil {
			t.Fatal(err)
		}
		for {
			if kind, data := next(); kind == "section" && strings.Contains(data, `id="state"`) {
				if !strings.Contains(data, "backup") {
					t.Errorf("the state is %s", data)
				}
				break
			}
		}
		if took := time.Since(began); took > 2*pageEvery {
			t.Errorf("the pause was shown after %s", took)
		}
	})
}

func TestHistory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv, ln := servePipes(t, func(_ context.Context, c *server.Conn) error {
			_, err := io.Copy(c, c)
			return err
		})
		h := &history{srv: srv}
		h.addSample()
		for range 4 {
			nc, err := ln.Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(nc, echoed(nc, make([]byte, 1024))); err != nil {
				t.Fatal(err)
			}
			_ = nc.Close()
		}
		synctest.Wait()
		time.Sleep(sampleEvery) // the bubble's
		h.addSample()
		h.addSample() // too early: no sample
		time.Sleep(sampleEvery)
		h.addSample()
		got := map[string]string{}
		for _, c := range h.traffic().Charts {
			for _, l := range c.Lines {
				got[l.Name] = l.Now + ", " + l.Most
			}
		}
		wantEqual(t, "lines", got, map[string]string{
			"open": "0, 0", "accepted": "0/s, 2/s", "closed": "0/s, 2/s", "in": "0 B/s, 2.0 KiB/s", "out": "0 B/s, 2.0 KiB/s",
		})
		wantEqual(t, "span", h.traffic().Span, "4 s")
		points := strings.Fields(h.traffic().Charts[1].Lines[0].Points)
		wantEqual(t, "points", points, []string{"298.0,2.0", "300.0,58.0"})
		for range 2 * sampleCount {
			time.Sleep(sampleEvery)
			h.addSample()
		}
		wantEqual(t, "span", h.traffic().Span, "5 min 0 s")
	})
}
