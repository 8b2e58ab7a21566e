//go:build unix

package integration

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"echod/control"

	"github.com/google/go-cmp/cmp"
)

// web returns the address of --http.
func (e *echod) web() string {
	e.t.Helper()
	return e.awaitLog("http open").str("address")
}

// ask makes a request on a new connection: over TCP, over TLS if address begins with tls://, or over a Unix
// socket if address is a path.
func ask(t testing.TB, method, address, path string) (status int, body string) {
	t.Helper()
	network, scheme := "tcp", "http://"
	if strings.HasPrefix(address, "/") {
		network = "unix"
	}
	address, overTLS := strings.CutPrefix(address, "tls://")
	if overTLS {
		scheme = "https://"
	}
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: true}, // TestTLSHealth verifies it
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, address)
		},
	}}
	req, err := http.NewRequestWithContext(within(t, patience), method, scheme+"echod"+path, http.NoBody)
	check(t, err)
	resp, err := client.Do(req)
	check(t, err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	check(t, err)
	return resp.StatusCode, string(text)
}

// expectWeb checks the status of an answer and a part of its body.
func (e *echod) expectWeb(path string, status int, part string) {
	e.t.Helper()
	got, body := ask(e.t, http.MethodGet, e.web(), path)
	if got != status || !strings.Contains(body, part) {
		e.t.Errorf("%s answers %d %q, want %d and %q in it", path, got, body, status, part)
	}
}

func TestHTTP(t *testing.T) {
	t.Run("probes follow the state", testProbesState)
	t.Run("a drain delay serves new clients and is not ready", testProbesDelay)
	t.Run("at the limit, a server that rejects is not ready", testProbesFull)
	t.Run("no request changes the server", testHTTPReadOnly)
	t.Run("only known host names are answered", testHTTPHosts)
	t.Run("pprof needs --pprof", testHTTPPprof)
	t.Run("bad addresses are usage errors", testHTTPAddresses)
	t.Run("promtool accepts the metrics and the alert rules", testPromtool)
}

func testProbesState(t *testing.T) {
	t.Parallel()
	e := start(t, "--http", "0", "--grace", "20s")
	if host, _, err := net.SplitHostPort(e.web()); err != nil || host != "127.0.0.1" {
		t.Errorf("--http with a port alone is on %s (%v), want 127.0.0.1", e.web(), err)
	}
	p := e.served()
	e.expectWeb("/livez", 200, "running")
	e.expectWeb("/readyz", 200, "ready")
	e.pause(control.PauseRequest{Reason: "backup"})
	e.expectWeb("/livez", 200, "paused")
	e.expectWeb("/readyz", 503, `"backup"`)
	_, err := e.control.Resume(within(t, patience))
	check(t, err)
	e.expectWeb("/readyz", 200, "ready")
	e.signal(syscall.SIGTERM)
	check(t, p.expect("SHUTDOWN 20 SIGTERM\n"))
	e.expectWeb("/livez", 200, "draining")
	e.expectWeb("/readyz", 503, "draining (SIGTERM)")
	check(t, p.leave())
	e.wait(0)
}

// testProbesDelay: during the delay a load balancer sees that the server is not ready, and its clients are still
// served.
func testProbesDelay(t *testing.T) {
	t.Parallel()
	const delay, grace = 2 * time.Second, 20 * time.Second
	e := start(t, "--http", "0", "--drain-delay", delay.String(), "--grace", grace.String())
	old := e.served()
	began := e.signal(syscall.SIGTERM)
	e.awaitLog("draining: accepting until the delay is over")
	e.expectWeb("/livez", 200, "draining")
	e.expectWeb("/readyz", 503, "draining (SIGTERM)")
	late := e.dial()
	check(t, late.echo("late\n"))
	check(t, old.echo("still here\n"))
	if got := e.ctl("status"); !regexp.MustCompile(`\naccepting +for another [\d.]+m?s\n`).MatchString(got.stdout) {
		t.Errorf("ctl status does not say for how long clients are accepted: %+v", got)
	}
	drain := e.status().Drain
	if drain == nil || drain.AcceptingUntil == nil {
		t.Fatalf("the status lacks accepting_until: %+v", drain)
	}
	if got := drain.AcceptingUntil.Sub(drain.Since); got != delay {
		t.Errorf("clients are accepted for %v, want %v", got, delay)
	}
	if got := drain.Deadline.Sub(*drain.AcceptingUntil); got.Round(time.Second) != grace {
		t.Errorf("the grace after the delay is %v, want %v", got, grace)
	}
	for _, p := range []*peer{old, late} {
		check(t, p.expect("SHUTDOWN 20 SIGTERM\n"))
		if waited := time.Since(began); waited < delay {
			t.Errorf("clients were told after %v, before the delay was over", waited)
		}
		check(t, p.leave())
	}
	e.wait(0)
	if p, err := connectSoon(e.addr); err == nil {
		_ = p.Close()
		t.Error("a client is served after the end")
	}
}

// figures maps the series of a scrape to their values.
type figures map[string]float64

func figuresOf(t testing.TB, text string) figures {
	t.Helper()
	all := make(figures)
	for line := range strings.Lines(text) {
		if series, value, ok := strings.Cut(strings.TrimSpace(line), " "); ok && series != "#" {
			v, err := strconv.ParseFloat(value, 64)
			check(t, err)
			all[series] = v
		}
	}
	return all
}

// scrape returns the metrics.
func (e *echod) scrape() figures {
	e.t.Helper()
	status, text := ask(e.t, http.MethodGet, e.web(), "/metrics")
	if status != http.StatusOK {
		e.t.Fatalf("/metrics: %d", status)
	}
	return figuresOf(e.t, text)
}

// testHTTPReadOnly tries everything there that the control socket can do.
func testHTTPReadOnly(t *testing.T) {
	t.Parallel()
	e := start(t, "--http", "0")
	p := e.served()
	var before control.Status
	poll(t, "the echo in the status", func() bool { // it is counted once the client may have read it
		before = e.status()
		return before.BytesOut > 0
	})
	methods := []string{http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete}
	for _, path := range []string{
		"/", "/livez", "/readyz", "/metrics", "/v1/status", "/v1/pause", "/v1/resume", "/v1/shutdown", "/v1/notify",
		"/v1/conns?all=true", "/v1/conns/1", "/v1/holds/h1", "/debug/pprof/", "/debug/pprof/profile",
	} {
		for _, method := range methods {
			status, body := ask(t, method, e.web(), path)
			if status != http.StatusNotFound && status != http.StatusMethodNotAllowed {
				t.Errorf("%s %s answers %d %q", method, path, status, body)
			}
		}
	}
	for _, path := range []string{"/v1/conns", "/v1/conns/closed", "/v1/events", "/v1/wait?state=paused", "/debug/pprof/"} {
		e.expectWeb(path, http.StatusNotFound, "")
	}
	after := e.status()
	before.UptimeSeconds, after.UptimeSeconds = 0, 0
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("the status has changed (-before +after):\n%s", diff)
	}
	check(t, p.echo("still here\n"))
}

func testHTTPPprof(t *testing.T) {
	t.Parallel()
	e := start(t, "--http", "0", "--pprof")
	e.expectWeb("/debug/pprof/goroutine?debug=1", 200, "goroutine profile")
	got := run(t, commandOf(built(t, echodBinary), "--pprof"))
	if got.code != 2 || !strings.Contains(got.stderr, "--http") {
		t.Errorf("--pprof alone: exit code %d, %q; want 2 and --http in the message", got.code, got.stderr)
	}
}

func testHTTPAddresses(t *testing.T) {
	t.Parallel()
	for _, wrong := range []string{"127.0.0.1", "70000", "0.0.0.0:70000", ":", "127.0.0.1:http", "::1"} {
		got := run(t, commandOf(built(t, echodBinary), "--listen", "127.0.0.1:0", "--control", "off", "--http", wrong))
		if got.code != 2 || !strings.Contains(got.stderr, fmt.Sprintf("--http %q: want a port such as 9090", wrong)) {
			t.Errorf("--http %s: exit code %d, %q; want 2 and what it wants", wrong, got.code, got.stderr)
		}
	}
}

func testProbesFull(t *testing.T) {
	t.Parallel()
	e := start(t, "--http", "0", "--max-conns", "1", "--at-limit", "reject")
	p := e.served()
	e.expectWeb("/readyz", 503, "full")
	e.expectWeb("/livez", 200, "running")
	check(t, e.dial().expectRest("BUSY\n"))
	check(t, p.leave())
	e.awaitOpen(0)
	e.expectWeb("/readyz", 200, "ready")
}

func testPromtool(t *testing.T) {
	t.Parallel()
	promtool := require(t, "promtool")
	e := start(t, "--http", "0")
	p := e.served()
	check(t, p.leave())
	e.pause(control.PauseRequest{})
	_, text := ask(t, http.MethodGet, e.web(), "/metrics")
	cmd := commandOf(promtool, "check", "metrics")
	cmd.Stdin = strings.NewReader(text)
	if got := run(t, cmd); got.code != 0 || got.stdout+got.stderr != "" {
		t.Errorf("exit code %d:\n%s%s", got.code, got.stdout, got.stderr)
	}
	for _, argv := range [][]string{
		{promtool, "check", "rules", "../packaging/prometheus/alerts.yml"},
		{promtool, "test", "rules", "../packaging/prometheus/alerts_test.yml"},
	} {
		if got := run(t, commandOf(argv...)); got.code != 0 {
			t.Errorf("%s: exit code %d:\n%s%s", strings.Join(argv[1:], " "), got.code, got.stdout, got.stderr)
		}
	}
}

func testHTTPHosts(t *testing.T) {
	t.Parallel()
	e := start(t, "--http", "0", "--http-host", "echod.example,other.example", "--pprof")
	status := func(host, path string) int {
		req, err := http.NewRequestWithContext(within(t, patience), http.MethodGet, "http://"+e.web()+path, http.NoBody)
		check(t, err)
		req.Host = host
		resp, err := http.DefaultTransport.RoundTrip(req)
		check(t, err)
		_ = resp.Body.Close()
		return resp.StatusCode
	}
	for host, want := range map[string]int{
		e.web(): 200, "localhost": 200, "echod.example:9090": 200, "other.example": 200, "evil.example": 421, "127.0.0.1.evil.example": 421,
	} {
		for _, path := range []string{"/v1/status", "/metrics", "/debug/pprof/goroutine"} {
			if got := status(host, path); got != want {
				t.Errorf("%s with Host %s: %d, want %d", path, host, got, want)
			}
		}
		if got := status(host, "/livez"); got != 200 {
			t.Errorf("/livez with Host %s: %d, want 200", host, got)
		}
	}
	got := run(t, commandOf(built(t, echodBinary), "--http-host", "echod.example"))
	if got.code != 2 || !strings.Contains(got.stderr, "--http-host: needs --http") {
		t.Errorf("--http-host alone: exit code %d, %q; want 2 and what it needs", got.code, got.stderr)
	}
}
