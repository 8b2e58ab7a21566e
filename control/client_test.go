package control

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"echod/server"
)

// calls are the client's methods, with arguments that a server with one connection accepts.
var calls = []struct {
	name string
	call func(context.Context, *Client) error
}{
	{"Status", func(ctx context.Context, c *Client) error { _, err := c.Status(ctx); return err }},
	{"Conns", func(ctx context.Context, c *Client) error {
		_, err := c.Conns(ctx, 5, ConnFilter{MinIdle: time.Second})
		return err
	}},
	{"Closed", func(ctx context.Context, c *Client) error { _, err := c.Closed(ctx, 5); return err }},
	{"Pause", func(ctx context.Context, c *Client) error { _, err := c.Pause(ctx, PauseRequest{}); return err }},
	{"ReleaseHold", func(ctx context.Context, c *Client) error { _, err := c.ReleaseHold(ctx, "h1"); return err }},
	{"Resume", func(ctx context.Context, c *Client) error { _, err := c.Resume(ctx); return err }},
	{"PauseWhileConnected", func(ctx context.Context, c *Client) error {
		lease, err := c.PauseWhileConnected(ctx, PauseRequest{})
		if err == nil {
			lease.Close()
		}
		return err
	}},
	{"Notify", func(ctx context.Context, c *Client) error { _, err := c.Notify(ctx, "hello"); return err }},
	{"Wait", func(ctx context.Context, c *Client) error {
		_, err := c.Wait(ctx, WaitRequest{Connections: new(1)})
		return err
	}},
	{"Kill", func(ctx context.Context, c *Client) error { _, err := c.Kill(ctx, 1); return err }},
	{"KillMatching", func(ctx context.Context, c *Client) error {
		_, err := c.KillMatching(ctx, ConnFilter{MinIdle: time.Second})
		return err
	}},
	{"KillAll", func(ctx context.Context, c *Client) error { _, err := c.KillAll(ctx); return err }},
	{"Shutdown", func(ctx context.Context, c *Client) error { _, err := c.Shutdown(ctx, ShutdownRequest{}); return err }},
}

// events reads all events; the server must end them.
func events(ctx context.Context, c *Client) (err error) {
	for _, err = range c.Events(ctx) {
	}
	return err
}

func TestClient(t *testing.T) {
	t.Run("every call is answered", testCalls)
	t.Run("requests have the documented form", testRequests)
	t.Run("OnAnswer gets each answer as it came", testOnAnswer)
	t.Run("problems are errors", testProblemErrors)
	t.Run("without a server, every call says so", testNoServer)
	t.Run("a server that goes away is reported", testServerGone)
	t.Run("a GET is repeated if it was closed unanswered", testClosedUnanswered)
	t.Run("a lease ends when the server goes away", testLeaseGone)
	t.Run("answers that are not the API are reported", testBadAnswers)
	t.Run("calls end with the cause of their context", testContext)
	t.Run("a server that does not answer is reported", testSilentServer)
	t.Run("an upgrade may take longer than other answers", testSlowUpgrade)
	t.Run("answers are bounded", testHugeAnswers)
	t.Run("@name is a file", testAtName)
}

func testCalls(t *testing.T) {
	r := newRig(t, server.Options{})
	r.echoClient(t)
	for _, c := range calls {
		if err := c.call(t.Context(), r.client); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	<-r.ended
}

func testNoServer(t *testing.T) {
	dir := shortDir(t)
	_ = listenControl(t, filepath.Join(dir, "another.sock")).Close()
	c := NewClient(filepath.Join(dir, "none.sock"))
	want := "no server answers on control socket " + filepath.Join(dir, "none.sock") + ": no such file or directory"
	for _, call := range calls {
		err := call.call(t.Context(), c)
		if _, ok := errors.AsType[*UnreachableError](err); !ok || err.Error() != want {
			t.Errorf("%s: error is %v: want an UnreachableError that says: %s", call.name, err, want)
		}
		if !errors.Is(err, syscall.ENOENT) {
			t.Errorf("%s: the error does not wrap ENOENT", call.name)
		}
	}
	wantEqual(t, "Events", events(t.Context(), c).Error(), want)
}

// answering returns a client whose server reads each request and then calls answer. HEAD is answered with 200.
func answering(answer func(net.Conn)) *Client {
	return &Client{path: "/run/echod.sock", http: &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			served, conn := net.Pipe()
			go func() {
				defer served.Close()
				req, err := http.ReadRequest(bufio.NewReader(served))
				if err != nil {
					return
				}
				_, _ = io.Copy(io.Discard, req.Body)
				if req.Method == http.MethodHead {
					_, _ = io.WriteString(served, "HTTP/1.1 200 OK\r\n\r\n")
					return
				}
				answer(served)
			}()
			return conn, nil
		},
	}}}
}

func testServerGone(t *testing.T) {
	for _, half := range []string{
		"",
		"HTTP/1.1 200 OK\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{\"state\":",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"sta",
	} {
		synctest.Test(t, func(t *testing.T) {
			c := answering(func(conn net.Conn) { _, _ = io.WriteString(conn, half) })
			const want = "the server on control socket /run/echod.sock went away before it had answered"
			check := func(name string, err error) {
				t.Helper()
				if _, ok := errors.AsType[*UnreachableError](err); !ok || err.Error() != want {
					t.Errorf("%s after %q: error is %v: want an UnreachableError that says: %s", name, half, err, want)
				}
			}
			for _, call := range calls {
				check(call.name, call.call(t.Context(), c))
			}
			check("Events", events(t.Context(), c))
		})
	}
}

// At an upgrade the predecessor may close a connection that it has just accepted.
func testClosedUnanswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		requests := 0
		c := answering(func(conn net.Conn) {
			if requests++; requests > 2 {
				_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 19\r\n\r\n{\"state\":\"running\"}")
			}
		})
		st, err := c.Status(t.Context())
		wantEqual(t, "error", err, nil)
		wantEqual(t, "state", st.State, "running")
		wantEqual(t, "requests", requests, 3)

		requests = 0
		_, err = c.Pause(t.Context(), PauseRequest{})
		if _, ok := errors.AsType[*UnreachableError](err); !ok {
			t.Errorf("the error of a pause is %v: want an UnreachableError", err)
		}
		wantEqual(t, "requests to pause", requests, 1)
	})
}

func testLeaseGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := answering(func(conn net.Conn) {
			_, _ = io.WriteString(conn, "HTTP/1.1 201 Created\r\nConnection: close\r\n\r\n{\"id\":\"h1\"}\n")
			time.Sleep(time.Hour)
		})
		lease, err := c.PauseWhileConnected(t.Context(), PauseRequest{})
		if err != nil {
			t.Fatal(err)
		}
		defer lease.Close()
		began := time.Now()
		<-lease.Ended()
		wantEqual(t, "time it lasted", time.Since(began), time.Hour)
		wantEqual(t, "why", lease.EndReason(), "the connection to the server has ended")
	})
}

func testBadAnswers(t *testing.T) {
	for _, other := range []struct{ answer, want string }{
		{"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhey", "control socket /run/echod.sock answers with something other than the control API: invalid character 'h' looking for beginning of value"},
		{"HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\nhey", "control socket /run/echod.sock answers 404 Not Found"},
		{"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 2\r\n\r\n{}", "control socket /run/echod.sock answers 502 Bad Gateway"},
	} {
		synctest.Test(t, func(t *testing.T) {
			c := answering(func(conn net.Conn) { _, _ = io.WriteString(conn, other.answer) })
			_, err := c.Status(t.Context())
			if err == nil || err.Error() != other.want {
				t.Errorf("error is %v: want: %s", err, other.want)
			}
		})
	}
}

func testContext(t *testing.T) {
	enough := errors.New("enough")
	for _, half := range []string{"", "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"} {
		synctest.Test(t, func(t *testing.T) {
			c := answering(func(conn net.Conn) {
				_, _ = io.WriteString(conn, half)
				_, _ = io.Copy(io.Discard, conn) // until the client closes
			})
			for _, call := range calls {
				ctx, cancel := context.WithTimeoutCause(t.Context(), silenceTimeout/2, enough)
				if err := call.call(ctx, c); !errors.Is(err, enough) {
					t.Errorf("%s after %q: error is %v: want the context's cause", call.name, half, err)
				}
				cancel()
			}
		})
	}
}

func testProblemErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		_, err := r.client.Pause(t.Context(), PauseRequest{TTL: -time.Second})
		problem := wantProblem(t, err, ProblemInvalid)
		wantEqual(t, "problem", problem, &Problem{
			Type: ProblemInvalid, Title: "Invalid request", Status: http.StatusBadRequest, Detail: "ttl: -1s is negative", Field: "ttl",
		})
		wantEqual(t, "error", err.Error(), "ttl: -1s is negative")
		wantEqual(t, "error without a detail", (&Problem{Title: "Invalid request"}).Error(), "Invalid request")
	})
}

func testOnAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		var mu sync.Mutex
		var got []string
		r.client.OnAnswer = func(body []byte) {
			mu.Lock()
			defer mu.Unlock()
			got = append(got, string(body))
		}
		must[Change](t)(r.client.Resume(t.Context()))
		_, _ = r.client.Pause(t.Context(), PauseRequest{Mode: "halt"}) // a problem
		lease, err := r.client.PauseWhileConnected(t.Context(), PauseRequest{})
		if err != nil {
			t.Fatal(err)
		}
		must[Change](t)(r.client.Resume(t.Context()))
		<-lease.Ended()
		lease.Close()

		mu.Lock()
		defer mu.Unlock()
		since := lease.Hold.Since.Format(time.RFC3339Nano)
		resumed := `{"changed":true,"state":"running","released":1}` + "\n"
		released := `{"released":"the server was resumed","state":"running"}` + "\n"
		if len(got) == 4 && got[2] == released { // they come on two connections
			got[2], got[3] = got[3], got[2]
		}
		wantEqual(t, "answers", got, []string{
			`{"changed":false,"state":"running","released":0}` + "\n",
			`{"id":"h1","reason":"","mode":"hold","since":"` + since + `"}` + "\n",
			resumed,
			released,
		})
	})
}

func testRequests(t *testing.T) {
	var got string
	synctest.Test(t, func(t *testing.T) {
		c := &Client{path: "x", http: &http.Client{Transport: roundTrip(func(req *http.Request) (*http.Response, error) {
			got = req.Method + " " + req.URL.RequestURI()
			if req.Body != nil {
				body, _ := io.ReadAll(req.Body)
				got += " " + string(body)
			}
			return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(strings.NewReader("{}\n"))}, nil
		})}}
		for _, request := range []struct {
			want string
			call func() error
		}{
			{`GET /v1/conns`, func() error { _, err := c.Conns(t.Context(), -1, ConnFilter{}); return err }},
			{`GET /v1/conns?identity=%2A.example&limit=0&min_idle=1.5s`, func() error {
				_, err := c.Conns(t.Context(), 0, ConnFilter{MinIdle: 1500 * time.Millisecond, Identity: "*.example"})
				return err
			}},
			{`GET /v1/conns/closed`, func() error { _, err := c.Closed(t.Context(), -1); return err }},
			{`DELETE /v1/conns?min_idle=0s`, func() error { _, err := c.KillMatching(t.Context(), ConnFilter{}); return err }},
			{`DELETE /v1/conns?all=true`, func() error { _, err := c.KillAll(t.Context()); return err }},
			{`DELETE /v1/conns/7`, func() error { _, err := c.Kill(t.Context(), 7); return err }},
			{`DELETE /v1/holds/a%20b%3Fc`, func() error { _, err := c.ReleaseHold(t.Context(), "a b?c"); return err }},
			{`POST /v1/pause {"mode":"reject","reason":"<b>","ttl":"1m0s"}`, func() error {
				_, err := c.Pause(t.Context(), PauseRequest{Reason: "<b>", TTL: time.Minute, Mode: "reject"})
				return err
			}},
			{`POST /v1/shutdown {}`, func() error { _, err := c.Shutdown(t.Context(), ShutdownRequest{}); return err }},
			{`POST /v1/shutdown {"grace":"0s","now":true,"reason":"r"}`, func() error {
				_, err := c.Shutdown(t.Context(), ShutdownRequest{Reason: "r", Grace: new(time.Duration(0)), Now: true})
				return err
			}},
			{`GET /v1/wait?connections=0&state=paused&timeout=1s`, func() error {
				_, err := c.Wait(t.Context(), WaitRequest{State: "paused", Connections: new(0), Timeout: new(time.Second)})
				return err
			}},
		} {
			if err := request.call(); err != nil {
				t.Errorf("%s: %v", request.want, err)
			}
			wantEqual(t, "request", strings.NewReplacer(`\u003c`, "<", `\u003e`, ">").Replace(got), request.want)
		}
	})
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

func testSilentServer(t *testing.T) {
	for _, half := range []string{"", "HTTP/1.1 200 OK\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"} {
		synctest.Test(t, func(t *testing.T) {
			c := answering(func(conn net.Conn) {
				_, _ = io.WriteString(conn, half)
				_, _ = io.Copy(io.Discard, conn)
			})
			for _, call := range calls {
				if call.name == "Wait" || call.name == "PauseWhileConnected" && half != "" && half[len(half)-1] == '{' {
					continue // may take any time once the server has answered
				}
				began := time.Now()
				err := call.call(t.Context(), c)
				const want = "the server on control socket /run/echod.sock does not answer: it sent nothing for 5s"
				if _, ok := errors.AsType[*UnreachableError](err); !ok || err.Error() != want {
					t.Errorf("%s after %q: error is %v, want an UnreachableError that says: %s", call.name, half, err, want)
				}
				wantEqual(t, call.name+": time", time.Since(began), silenceTimeout)
			}
		})
	}
	synctest.Test(t, func(t *testing.T) {
		c := &Client{path: "x", http: &http.Client{Transport: &http.Transport{
			DialContext: func(context.Context, string, string) (net.Conn, error) {
				served, conn := net.Pipe()
				go func() {
					defer served.Close()
					_, _ = io.Copy(io.Discard, served)
				}()
				return conn, nil
			},
		}}}
		began := time.Now()
		_, err := c.Wait(t.Context(), WaitRequest{State: "paused"})
		if _, ok := errors.AsType[*UnreachableError](err); !ok {
			t.Errorf("Wait: error is %v, want an UnreachableError", err)
		}
		wantEqual(t, "Wait: time", time.Since(began), silenceTimeout)
	})
	synctest.Test(t, func(t *testing.T) { // slow is not silent
		body := `{"connections":[]}` + strings.Repeat(" ", 20)
		c := answering(func(conn net.Conn) {
			_, _ = fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", len(body))
			for _, b := range body {
				time.Sleep(silenceTimeout - time.Second)
				_, _ = io.WriteString(conn, string(b))
			}
		})
		must[Conns](t)(c.Conns(t.Context(), -1, ConnFilter{}))
	})
}

func testSlowUpgrade(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := answering(func(conn net.Conn) {
			time.Sleep(time.Minute)
			_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{\"pid\":123}")
		})
		done := must[Upgraded](t)(c.Upgrade(t.Context(), 0))
		wantEqual(t, "pid", done.PID, 123)
	})
}

func testHugeAnswers(t *testing.T) {
	endless := func(head string) *Client {
		return answering(func(conn net.Conn) {
			_, _ = io.WriteString(conn, head)
			for chunk := []byte(strings.Repeat(" ", 1<<20)); ; {
				if _, err := conn.Write(chunk); err != nil {
					return
				}
			}
		})
	}
	_, err := endless("HTTP/1.1 200 OK\r\n\r\n").Status(t.Context())
	if want := "control socket /run/echod.sock answers with more than 64 MiB"; err == nil || err.Error() != want {
		t.Errorf("Status: error is %v, want: %s", err, want)
	}
	const want = "control socket /run/echod.sock answers with a line of more than 1 MiB"
	if err := events(t.Context(), endless("HTTP/1.1 200 OK\r\n\r\n")); err == nil || err.Error() != want {
		t.Errorf("Events: error is %v, want: %s", err, want)
	}
	if _, err := endless("HTTP/1.1 201 Created\r\n\r\n").PauseWhileConnected(t.Context(), PauseRequest{}); err == nil || err.Error() != want {
		t.Errorf("PauseWhileConnected: error is %v, want: %s", err, want)
	}
	if _, err := endless("HTTP/1.1 500 \x1b[31mred\r\n\r\n").Status(t.Context()); err == nil || strings.Contains(err.Error(), "\x1b") {
		t.Errorf("Status: error is %q, want no escapes", err)
	}
}

func testAtName(t *testing.T) {
	t.Chdir(shortDir(t))
	defer listenControl(t, "@name").Close()
	conn, err := dialSocket(t.Context(), "@name")
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
}
