package integration

import (
	"fmt"
	"maps"
	"math"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"echod/control"

	"github.com/google/go-cmp/cmp"
)

// counted returns the figures that are not zero and that clients change.
func (f figures) counted() figures {
	counted := maps.Clone(f)
	for series, v := range counted {
		name, _, _ := strings.Cut(series, "{")
		switch {
		case v == 0, !strings.HasPrefix(series, "echod_"), strings.HasPrefix(name, "echod_connection_duration_seconds_"),
			name == "echod_build_info", name == "echod_accept_queue_limit", name == "echod_connections_limit",
			name == "echod_control_requests_total": // other tests check these
			delete(counted, series)
		}
	}
	return counted
}

// expectFigures waits until exactly these figures are counted: a client sees its bytes a moment before they are.
func (e *echod) expectFigures(want figures) {
	e.t.Helper()
	var diff string
	for end := time.Now().Add(patience); ; time.Sleep(pollEvery) {
		if diff = cmp.Diff(want, e.scrape().counted()); diff == "" {
			return
		}
		if time.Now().After(end) {
			e.t.Fatalf("figures (-want +got):\n%s", diff)
		}
	}
}

// with returns these figures and more.
func (f figures) with(more figures) figures {
	all := maps.Clone(f)
	maps.Copy(all, more)
	return all
}

func closedFor(reason string) string {
	return fmt.Sprintf("echod_connections_closed_total{reason=%q}", reason)
}

func openAs(phase string) string { return fmt.Sprintf("echod_connections{phase=%q}", phase) }

const (
	accepted    = "echod_connections_accepted_total"
	bytesIn     = `echod_bytes_total{direction="in"}`
	bytesOut    = `echod_bytes_total{direction="out"}`
	noticesSent = `echod_notices_total{result="sent"}`
)

// dialFrom connects from another loopback address.
func (e *echod) dialFrom(ip string) *peer {
	e.t.Helper()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}, Timeout: patience}
	nc, err := dialer.DialContext(e.t.Context(), "tcp", e.addr)
	check(e.t, err)
	e.t.Cleanup(func() { _ = nc.Close() })
	return &peer{peerConn: nc.(*net.TCPConn)}
}

func TestMetrics(t *testing.T) {
	t.Run("follow what clients do", testMetricsClients)
	t.Run("show connections that are closing", testMetricsClosing)
	t.Run("count timeouts", testMetricsTimeouts)
	t.Run("count signals", testMetricsSignals)
	t.Run("count control requests", testMetricsRequests)
	t.Run("are the same on the control socket", testMetricsSocket)
	t.Run("show limits and the process", testMetricsProcess)
}

// testMetricsClients has clients of every kind, and compares all figures after each of them.
func testMetricsClients(t *testing.T) {
	t.Parallel()
	e := start(t, "--http", "0", "--grace", "1h", "--max-conns-per-ip", "3", "--proxy-protocol", "127.0.0.2")
	const echo = 6.0 // bytes of a served client
	now := figures{`echod_state{state="running"}`: 1, `echod_state_transitions_total{state="running"}`: 1}
	e.expectFigures(now)

	stays, leaves := e.served(), e.served()
	now = now.with(figures{accepted: 2, openAs("serving"): 2, bytesIn: 2 * echo, bytesOut: 2 * echo})
	e.expectFigures(now)

	check(t, leaves.leave())
	now = now.with(figures{openAs("serving"): 1, closedFor("client-closed"): 1})
	e.expectFigures(now)

	check(t, e.served().vanish())
	now = now.with(figures{accepted: 3, closedFor("client-reset"): 1, bytesIn: 3 * echo, bytesOut: 3 * echo})
	e.expectFigures(now)

	second, third := e.served(), e.served()
	check(t, e.dial().expectRest("BUSY\n"))
	now = now.with(figures{
		accepted: 6, openAs("serving"): 3, closedFor("rejected-address-limit"): 1,
		`echod_connections_rejected_total{reason="address-limit"}`: 1,
		bytesIn: 5 * echo, bytesOut: 5*echo + 5,
	})
	// A rejected client counts as open until it has closed its side, or for a moment.
	e.expectFigures(now)

	_, err := e.control.Kill(within(t, patience), 4)
	check(t, err)
	check(t, second.expectRest(""))
	check(t, third.leave())
	now = now.with(figures{openAs("serving"): 1, closedFor("killed"): 1, closedFor("client-closed"): 2})
	e.expectFigures(now)

	// A trusted proxy that sends no PROXY header: first nothing, then something else.
	proxy := e.dialFrom("127.0.0.2")
	e.expectFigures(now.with(figures{accepted: 7, openAs("waiting"): 1}))
	check(t, proxy.send("no PROXY header\n"))
	now = now.with(figures{
		accepted: 7, closedFor("rejected-unidentified"): 1, `echod_connections_rejected_total{reason="unidentified"}`: 1,
	})
	e.expectFigures(now)

	// A pause with two holds and two clients in the accept queue, then one of mode reject.
	e.pause(control.PauseRequest{})
	e.pause(control.PauseRequest{})
	waiting := []*peer{e.dial(), e.dial()}
	now = now.with(figures{`echod_state_transitions_total{state="paused"}`: 1})
	paused := figures{`echod_state{state="paused"}`: 1, `echod_holds`: 2, fmt.Sprintf(`echod_accept_queue_length{listener=%q}`, e.addr): 2}
	delete(now, `echod_state{state="running"}`)
	e.expectFigures(now.with(paused))
	_, err = e.control.ResumeAll(within(t, patience))
	check(t, err)
	for _, p := range waiting {
		check(t, p.echo("hello\n"))
		check(t, p.leave())
	}
	now = now.with(figures{
		`echod_state_transitions_total{state="running"}`: 2, accepted: 9, closedFor("client-closed"): 4,
		bytesIn: 7 * echo, bytesOut: 7*echo + 5,
	})
	e.expectFigures(now.with(figures{`echod_state{state="running"}`: 1}))
	e.pause(control.PauseRequest{Mode: "reject"})
	check(t, e.dial().expectRest("PAUSED\n"))
	now = now.with(figures{
		`echod_state_transitions_total{state="paused"}`: 2, accepted: 10, closedFor("rejected-paused"): 1,
		`echod_connections_rejected_total{reason="paused"}`: 1, bytesOut: 7*echo + 12,
	})
	e.expectFigures(now.with(figures{`echod_state{state="paused"}`: 1, `echod_holds`: 1}))

	// A notice, then a drain with HUP, HUP and TERM, and the last client leaves.
	_, err = e.control.Notify(within(t, patience), "hello")
	check(t, err)
	check(t, stays.expect("NOTICE hello\n"))
	e.signal(syscall.SIGHUP)
	check(t, stays.expect("SHUTDOWN 3600 SIGHUP\n"))
	e.awaitLog("signal received", "signal", "SIGHUP")
	e.signal(syscall.SIGHUP)
	e.awaitNth(2, "signal received", "signal", "SIGHUP")
	e.signal(syscall.SIGTERM)
	e.expectFigures(now.with(figures{
		`echod_state{state="draining"}`: 1, `echod_state_transitions_total{state="draining"}`: 1, noticesSent: 2,
		`echod_signals_total{signal="SIGHUP"}`: 2, `echod_signals_total{signal="SIGTERM"}`: 1,
		bytesOut: 7*echo + 12 + float64(len("NOTICE hello\nSHUTDOWN 3600 SIGHUP\n")),
	}))

	e.expectDurations(9)
	check(t, stays.leave())
	e.wait(0)
}

// expectDurations compares the histogram of n closed connections with their list.
func (e *echod) expectDurations(n int) {
	e.t.Helper()
	list, err := e.control.Closed(within(e.t, patience), -1)
	check(e.t, err)
	if len(list.Connections) != n {
		e.t.Fatalf("%d connections in the list of closed ones, want %d", len(list.Connections), n)
	}
	got := e.scrape()
	const name = "echod_connection_duration_seconds_"
	sum, buckets := 0.0, 0
	for _, c := range list.Connections {
		sum += c.DurationSeconds
	}
	if have := got[name+"sum"]; sum <= 0 || math.Abs(have-sum) > 1e-6 {
		e.t.Errorf("the sum of durations is %v, want %v", have, sum)
	}
	if have := got[name+"count"]; int(have) != n {
		e.t.Errorf("%v durations, want %d", have, n)
	}
	for series, have := range got {
		le, ok := strings.CutPrefix(series, name+`bucket{le="`)
		if !ok {
			continue
		}
		bound, err := strconv.ParseFloat(strings.TrimSuffix(le, `"}`), 64) // +Inf too
		check(e.t, err)
		want := 0
		for _, c := range list.Connections {
			if c.DurationSeconds <= bound {
				want++
			}
		}
		if buckets++; int(have) != want {
			e.t.Errorf("%s is %v, want %d", series, have, want)
		}
	}
	if buckets == 0 {
		e.t.Error("no buckets")
	}
}

// testMetricsClosing makes connections until a scrape sees one closing: it does for less than half a second.
func testMetricsClosing(t *testing.T) {
	t.Parallel()
	e := start(t, "--http", "0", "--max-conns-per-ip", "1")
	e.served()
	poll(t, "a connection that is closing", func() bool {
		check(t, e.dial().expect("BUSY\n")) // it does not close its side
		got := e.scrape()
		return got[openAs("closing")] > 0 && got[openAs("serving")] == 1
	})
}

func testMetricsTimeouts(t *testing.T) {
	t.Parallel()
	began := figures{`echod_state{state="running"}`: 1, `echod_state_transitions_total{state="running"}`: 1, accepted: 1}
	t.Run("idle", func(t *testing.T) {
		t.Parallel()
		e := start(t, "--http", "0", "--idle-timeout", "1s")
		check(t, e.served().expectRest(""))
		e.expectFigures(began.with(figures{closedFor("idle-timeout"): 1, bytesIn: 6, bytesOut: 6}))
	})
	t.Run("stalled", func(t *testing.T) {
		t.Parallel()
		e := start(t, "--http", "0", "--stall-timeout", "3s")
		p := e.dial()
		var flood sync.WaitGroup
		flood.Go(p.flood)
		defer flood.Wait()
		defer p.Close()
		for seen := e.scrape()[bytesOut]; ; { // until no more bytes move
			time.Sleep(10 * pollEvery)
			now := e.scrape()[bytesOut]
			if now > 0 && now == seen {
				break
			}
			seen = now
		}
		_, err := e.control.Notify(within(t, patience), "hello")
		check(t, err)
		e.awaitOpen(0)
		got := e.scrape()
		if got[bytesIn] < got[bytesOut] || got[bytesOut] == 0 {
			t.Errorf("%v bytes in, %v out", got[bytesIn], got[bytesOut])
		}
		e.expectFigures(began.with(figures{
			closedFor("stalled"): 1, `echod_notices_total{result="failed"}`: 1, bytesIn: got[bytesIn], bytesOut: got[bytesOut],
		}))
	})
}

func testMetricsSignals(t *testing.T) {
	t.Parallel()
	for name, sig := range map[string]syscall.Signal{"SIGINT": syscall.SIGINT, "SIGQUIT": syscall.SIGQUIT} {
		e := start(t, "--http", "0", "--grace", "1h")
		p := e.served()
		e.signal(sig)
		check(t, p.expect("SHUTDOWN 3600 "+name+"\n"))
		got := e.scrape()
		for _, other := range []string{"SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM"} {
			want := 0.0
			if other == name {
				want = 1
			}
			if n := got[fmt.Sprintf("echod_signals_total{signal=%q}", other)]; n != want {
				t.Errorf("after %s, %s was received %v times, want %v", name, other, n, want)
			}
		}
		check(t, p.leave())
		e.wait(0)
	}
}

func testMetricsRequests(t *testing.T) {
	t.Parallel()
	e := start(t, "--http", "0")
	e.expectFigures(figures{`echod_state{state="running"}`: 1, `echod_state_transitions_total{state="running"}`: 1})
	want := make(figures)
	for _, r := range []struct {
		method, on, path, route string
		code                    int
	}{
		{"GET", e.socket, "/v1/status", "/v1/status", 200},
		{"GET", e.web(), "/v1/status", "/v1/status", 200},
		{"GET", e.socket, "/v1/conns", "/v1/conns", 200},
		{"DELETE", e.socket, "/v1/conns/4711", "/v1/conns/*", 404},
		{"POST", e.socket, "/v1/pause", "/v1/pause", 201},
		{"GET", e.web(), "/readyz", "/readyz", 503},
		{"POST", e.socket, "/v1/resume", "/v1/resume", 200},
		{"GET", e.web(), "/readyz", "/readyz", 200},
		{"GET", e.web(), "/livez", "/livez", 200},
		{"POST", e.web(), "/livez", "/livez", 405},
		{"PUT", e.socket, "/v1/status", "/v1/status", 405},
		{"GET", e.web(), "/nowhere", "", 404},
	} {
		code, body := ask(t, r.method, r.on, r.path)
		if code != r.code {
			t.Errorf("%s %s answers %d %q, want %d", r.method, r.path, code, body, r.code)
		}
		method := r.method
		if method == "PUT" {
			method = "other"
		}
		want[fmt.Sprintf("echod_control_requests_total{code=\"%d\",method=%q,route=%q}", r.code, method, r.route)]++
	}
	var diff string
	for end := time.Now().Add(patience); ; time.Sleep(pollEvery) {
		got := e.scrape()
		maps.DeleteFunc(got, func(series string, _ float64) bool {
			return !strings.HasPrefix(series, "echod_control_requests_total") || strings.Contains(series, `route="/metrics"`)
		})
		if diff = cmp.Diff(want, got); diff == "" || time.Now().After(end) {
			break
		}
	}
	if diff != "" {
		t.Errorf("requests (-want +got):\n%s", diff)
	}
}

func testMetricsSocket(t *testing.T) {
	t.Parallel()
	e := start(t, "--http", "0")
	check(t, e.served().leave())
	e.expectFigures(figures{
		`echod_state{state="running"}`: 1, `echod_state_transitions_total{state="running"}`: 1, accepted: 1,
		closedFor("client-closed"): 1, bytesIn: 6, bytesOut: 6,
	})
	status, text := ask(t, http.MethodGet, e.socket, "/metrics")
	if diff := cmp.Diff(e.scrape().counted(), figuresOf(t, text).counted()); status != http.StatusOK || diff != "" {
		t.Errorf("status %d, figures (-http +control):\n%s", status, diff)
	}
}

func testMetricsProcess(t *testing.T) {
	t.Parallel()
	e := startAs(t, []string{require(t, "prlimit"), "--nofile=500:500"}, "--http", "0")
	got := e.scrape()
	backlog, err := strconv.ParseFloat(strings.TrimSpace(readFile(t, "/proc/sys/net/core/somaxconn")), 64)
	check(t, err)
	for series, want := range map[string]float64{
		"process_max_fds":         500,
		"echod_connections_limit": 500 - 160,
		fmt.Sprintf("echod_accept_queue_limit{listener=%q}", e.addr): backlog,
	} {
		if got[series] != want || want == 0 {
			t.Errorf("%s is %v, want %v", series, got[series], want)
		}
	}
	for _, series := range []string{
		"process_open_fds", "process_resident_memory_bytes", "process_start_time_seconds",
		"go_goroutines", "go_memstats_heap_inuse_bytes",
	} {
		if got[series] <= 0 {
			t.Errorf("%s is %v", series, got[series])
		}
	}
	if _, ok := got["process_cpu_seconds_total"]; !ok { // it may be too little to count
		t.Error("process_cpu_seconds_total is missing")
	}
	limited := start(t, "--http", "0", "--max-conns", "7")
	if n := limited.scrape()["echod_connections_limit"]; n != 7 {
		t.Errorf("with --max-conns 7 the limit is %v", n)
	}
}
