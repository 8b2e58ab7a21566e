//go:build unix

package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"echod/control"
)

func TestG7ControlSocketAnswersToTheEnd(t *testing.T) {
	t.Run("at each step of a drain the control socket answers truthfully", func(t *testing.T) {
		t.Parallel()
		overEach(t, testControlDrain)
	})
}

func testControlDrain(t *testing.T, over transport) {
	t.Parallel()
	e := over.start(t, "--grace", "20s")
	peers := e.crowd(3)
	events := e.events()
	e.signal(syscall.SIGTERM)
	for _, p := range peers {
		check(t, p.expect("SHUTDOWN 20 SIGTERM\n"))
	}
	for open := 3; open > 0; open-- {
		e.awaitOpen(open)
		st := e.status()
		if st.State != "draining" || st.Connections != open || st.Drain == nil || st.Drain.Reason != "SIGTERM" {
			t.Fatalf("with %d left the status is %+v", open, st)
		}
		if open < 3 && st.Drain.Notified != 3 { // a notice is counted after its client may have read it
			t.Errorf("%d were notified, want 3", st.Drain.Notified)
		}
		if left := time.Until(st.Drain.Deadline); left < 0 || left > 20*time.Second {
			t.Errorf("the deadline is in %s", left)
		}
		check(t, balanced(st))
		check(t, peers[open-1].leave())
	}
	e.wait(0)
	var states, closed []string
	for _, event := range <-events {
		switch {
		case event.Closed != nil:
			closed = append(closed, event.Closed.Reason)
		case event.Type == "state":
			states = append(states, event.State)
		}
	}
	if got := strings.Join(states, " "); got != "draining stopped" {
		t.Errorf("states: %s", got)
	}
	if got := strings.Join(closed, " "); got != "client-left client-left client-left" {
		t.Errorf("close reasons: %s", got)
	}
	if _, err := os.Lstat(e.socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the control socket is still there: %v", err)
	}
	_, err := e.control.Status(within(t, patience))
	if _, ok := errors.AsType[*control.UnreachableError](err); !ok {
		t.Errorf("the status of a server that has stopped: %v", err)
	}
}

// events collects all events from now on until the server stops.
func (e *echod) events() <-chan []control.Event {
	e.t.Helper()
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", e.socket)
	}
	client := &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(within(e.t, patience), http.MethodGet, "http://echod/v1/events", nil)
	check(e.t, err)
	resp, err := client.Do(req) // the answer begins once it is subscribed
	check(e.t, err)
	all := make(chan []control.Event, 1)
	go func() {
		defer resp.Body.Close()
		var seen []control.Event
		for dec := json.NewDecoder(resp.Body); ; {
			var event control.Event
			if dec.Decode(&event) != nil {
				all <- seen
				return
			}
			seen = append(seen, event)
		}
	}()
	return all
}

func TestG8CountsAgree(t *testing.T) {
	t.Run("counts agree at every instant, whatever ends connections", func(t *testing.T) {
		t.Parallel()
		overEach(t, testCounts)
	})
}

func testCounts(t *testing.T, over transport) {
	t.Parallel()
	e := over.start(t, "--max-conns", "60", "--at-limit", "reject")
	stop := make(chan struct{})
	var looking sync.WaitGroup
	looking.Go(func() {
		for n := 0; ; n++ {
			select {
			case <-stop:
				t.Logf("looked %d times", n)
				return
			default:
			}
			st, err := e.control.Status(t.Context())
			if err == nil {
				err = balanced(st)
			}
			if err != nil {
				t.Error(err)
				return
			}
		}
	})

	polite, rude, doomed := e.crowd(20), e.crowd(15), e.crowd(25)
	each(t, 10, func(int) error {
		p, err := e.connect()
		if err != nil {
			return err
		}
		defer p.Close()
		return p.expectRest("BUSY\n")
	})
	each(t, len(polite), func(i int) error { return polite[i].leave() })
	each(t, len(rude), func(i int) error { return rude[i].vanish() })
	e.awaitOpen(len(doomed))
	e.pause(control.PauseRequest{Mode: "reject"})
	for range 5 {
		check(t, e.dial().expectRest("PAUSED\n"))
	}
	e.resume()
	killed, err := e.control.KillAll(within(t, patience))
	check(t, err)
	if *killed.Killed != len(doomed) {
		t.Errorf("%d killed, want %d", killed.Killed, len(doomed))
	}
	each(t, len(doomed), func(i int) error {
		err := doomed[i].expectRest("")
		_ = doomed[i].Close()
		return err
	})
	e.awaitOpen(0)
	close(stop)
	looking.Wait()
	e.expectAccounts(map[string]uint64{
		"client-closed": 20, "client-reset": 15, "killed": 25, "rejected-limit": 10, "rejected-paused": 5,
	})
}

func TestG16AnswersWithinASecond(t *testing.T) {
	t.Run("malformed control requests do not disturb the echo", testMalformed)
	t.Run("operators and probes are answered at once, with idle and slow callers", testIdleCallers)
	t.Run("ctl reports a stopped server, and what it gave up never happens", testStoppedServer)
	t.Run("a removed control socket is created again", testRemovedSocket)
}

func testIdleCallers(t *testing.T) {
	t.Parallel()
	t.Run("over TCP", func(t *testing.T) {
		t.Parallel()
		testIdleCallersOn(t, "", "--http", "0")
	})
	t.Run("over TLS", func(t *testing.T) {
		slow(t)
		t.Parallel()
		flags, _ := tlsFlags(t, t.TempDir())
		testIdleCallersOn(t, "tls://", append(flags, "--http", "tls://127.0.0.1:0")...)
	})
}

// testIdleCallersOn starts servers with these flags, whose --http has this scheme.
func testIdleCallersOn(t *testing.T, scheme string, flags ...string) {
	for _, state := range []string{"running", "draining"} {
		e := start(t, append(flags, "--grace", "1h")...)
		p := e.served()
		if state == "draining" {
			e.signal(syscall.SIGTERM)
			check(t, p.expect("SHUTDOWN 3600 SIGTERM\n"))
		}
		requests := []string{
			"", "GET /v1/sta", "GET /v1/status HTTP/1.1\r\nHost: echod\r\n\r\n", "GET /v1/wait?connections=77 HTTP/1.1\r\nHost: echod\r\n\r\n",
			"GET /v1/events HTTP/1.1\r\nHost: echod\r\n\r\n", "POST /v1/pause HTTP/1.1\r\nHost: echod\r\nContent-Length: 9\r\n\r\n{",
		}
		for n := range 240 {
			for _, where := range [][2]string{{"tcp", e.web()}, {"unix", e.socket}} {
				nc, err := net.Dial(where[0], where[1])
				check(t, err)
				t.Cleanup(func() { _ = nc.Close() })
				_, _ = io.WriteString(nc, requests[n%len(requests)]) // it may be closed already
			}
		}
		began := time.Now()
		if got := e.ctl("status"); got.code != 0 || !strings.Contains(got.stdout, state) {
			t.Errorf("while %s, ctl status: %+v", state, got)
		}
		if code, body := ask(t, http.MethodGet, scheme+e.web(), "/livez"); code != 200 || !strings.Contains(body, state) {
			t.Errorf("while %s, /livez answers %d %q", state, code, body)
		}
		lease, err := e.control.PauseWhileConnected(within(t, patience), control.PauseRequest{})
		if state == "running" {
			check(t, err)
			lease.Close()
		}
		if took := time.Since(began); took > 5*time.Second { // for a start of ctl on a busy machine too
			t.Errorf("while %s, the answers took %s", state, took)
		}
		check(t, p.leave())
	}
}

func testStoppedServer(t *testing.T) {
	t.Parallel()
	e := start(t)
	p := e.served()
	check(t, e.cmd.Process.Signal(syscall.SIGSTOP))
	var asking sync.WaitGroup
	for _, args := range [][]string{{"status"}, {"pause"}, {"pause", "--", "true"}, {"kill", "--all"}, {"wait", "--connections", "0"}} {
		asking.Go(func() {
			if got := e.ctl(args...); got.code != 2 || !strings.Contains(got.stderr, "does not answer") {
				t.Errorf("ctl %s: %+v, want exit code 2", args, got)
			}
		})
	}
	asking.Wait()
	check(t, e.cmd.Process.Signal(syscall.SIGCONT))
	check(t, p.echo("still here\n"))
	st := e.status()
	if st.State != "running" || st.Connections != 1 || len(st.Holds) != 0 {
		t.Errorf("afterwards the status is %+v", st)
	}
	if _, text := ask(t, http.MethodGet, e.socket, "/metrics"); figuresOf(t, text)[`echod_state_transitions_total{state="paused"}`] != 0 {
		t.Error("a pause that was given up took effect")
	}
}

func testRemovedSocket(t *testing.T) {
	t.Parallel()
	e := start(t)
	check(t, os.Remove(e.socket))
	e.awaitLog("control socket was removed or replaced by another program", "path", e.socket)
	e.awaitLog("control socket created again", "path", e.socket)
	if st := e.status(); st.State != "running" {
		t.Errorf("the status is %+v", st)
	}
}

func testMalformed(t *testing.T) {
	t.Parallel()
	e := start(t)
	p := e.served()
	stop := make(chan struct{})
	var echoed atomic.Int64
	echoing := make(chan error, 1)
	go func() {
		for {
			select {
			case <-stop:
				echoing <- nil
				return
			default:
			}
			if err := p.echo("traffic\n"); err != nil {
				echoing <- err
				return
			}
			echoed.Add(1)
		}
	}()
	const requests, workers, halfOpen = 300, 30, 10
	each(t, workers+halfOpen, func(worker int) error {
		if worker >= workers {
			return e.refuses("GET /v1/sta", false, false)
		}
		random := rand.New(rand.NewPCG(uint64(worker), 0))
		for range requests / workers {
			request, answered := malformed(random)
			if err := e.refuses(request, true, answered); err != nil {
				return fmt.Errorf("%.200q: %w", request, err)
			}
		}
		return nil
	})
	close(stop)
	check(t, <-echoing)
	if echoed.Load() == 0 {
		t.Error("nothing was echoed in the meantime")
	}
	st := e.status()
	if st.State != "running" || st.Connections != 1 || len(st.Holds) != 0 {
		t.Errorf("afterwards the status is %+v", st)
	}
	e.expectAccounts(map[string]uint64{})
}

// malformed makes a request that cannot be carried out. answered says whether it must be answered, as HTTP must.
func malformed(random *rand.Rand) (request string, answered bool) {
	paths := []string{"/v1/pause", "/v1/resume", "/v1/notify", "/v1/shutdown", "/v1/wait", "/v1/status", "/v1/conns", "/v1/holds/h9", "/"}
	bodies := []string{
		"{", "null", "[]", `{"reason":1}`, `{"reason":"a","reason":"b"}`, `{"grace":"soon"}`, `{"now":"yes"}`, `{"text":"a\nb"}`, `{"text":""}`,
		`{"ttl":"-1s"}`, `{"mode":"gentle"}`, "{} {}", strings.Repeat("[", 5000), `{"unknown":true}`, "\x00\xff", strings.Repeat("x", 17<<10),
	}
	path, body := paths[random.IntN(len(paths))], bodies[random.IntN(len(bodies))]
	switch random.IntN(6) {
	case 0: // not HTTP
		noise := make([]byte, 1+random.IntN(300))
		for i := range noise {
			noise[i] = byte(random.Uint32())
		}
		return string(noise) + "\r\n\r\n", false
	case 1:
		return "BREW " + path + " HTTP/1.1\r\nHost: x\r\n\r\n", true
	case 2:
		return "GET " + path + "?" + strings.Repeat("y", 9<<10) + " HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("z", 9<<10) + "\r\n\r\n", false
	case 3:
		return "GET /v1/wait?state=asleep&connections=-1 HTTP/1.1\r\nHost: x\r\n\r\n", true
	case 4: // a body shorter than its Content-Length
		return "POST " + path + " HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n" + body[:min(len(body), 50)], false
	default: // the answer to one that is too large may be lost if the server closes before all of it has come
		return fmt.Sprintf("POST /v1/shutdown HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(body), body), len(body) < 16<<10
	}
}

// refuses sends a request to the control socket. It expects a status of 4xx or, unless the request must be answered,
// the end of the connection.
func (e *echod) refuses(request string, whole, answered bool) error {
	nc, err := net.Dial("unix", e.socket)
	if err != nil {
		return err
	}
	defer nc.Close()
	_ = nc.SetDeadline(time.Now().Add(patience))
	_, _ = io.WriteString(nc, request) // the server may close early
	if whole {
		_ = nc.(*net.UnixConn).CloseWrite()
	}
	answer, err := io.ReadAll(nc)
	refused := strings.HasPrefix(string(answer), "HTTP/1.1 4") || strings.HasPrefix(string(answer), "HTTP/1.0 4")
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errors.New("neither an answer nor the end of the connection")
	case !refused && (answered || len(answer) > 0):
		return fmt.Errorf("the answer is %.200q (%v)", answer, err)
	default:
		return nil
	}
}
