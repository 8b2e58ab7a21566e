package integration

import (
	"fmt"
	"maps"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestFiguresOfSignals(t *testing.T) {
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

// Whoever asks, whatever they ask for, and whatever they get.
func TestFiguresOfControlRequests(t *testing.T) {
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
		{"PATCH", e.socket, "/v1/status", "/v1/status", 405},
		{"GET", e.web(), "/nowhere", "", 404},
	} {
		code, body := ask(t, r.method, r.on, r.path)
		if code != r.code {
			t.Errorf("%s %s answers %d %q, want %d", r.method, r.path, code, body, r.code)
		}
		method := r.method
		if method == "PATCH" {
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
		t.Errorf("the requests counted are not those made (-want +got):\n%s", diff)
	}
}

func TestFiguresAreOnTheControlSocketToo(t *testing.T) {
	t.Parallel()
	e := start(t, "--http", "0")
	check(t, e.served().leave())
	e.expectFigures(figures{
		`echod_state{state="running"}`: 1, `echod_state_transitions_total{state="running"}`: 1, accepted: 1,
		closedFor("client-closed"): 1, bytesIn: 6, bytesOut: 6,
	})
	status, text := ask(t, http.MethodGet, e.socket, "/metrics")
	if diff := cmp.Diff(e.scrape().counted(), figuresOf(t, text).counted()); status != http.StatusOK || diff != "" {
		t.Errorf("status %d, and other figures than with --http (-http +control):\n%s", status, diff)
	}
}

// What is not the clients' doing: limits, and the process as the system has it.
func TestFiguresOfLimitsAndTheProcess(t *testing.T) {
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
	if _, ok := got["process_cpu_seconds_total"]; !ok { // which may have been too little to be counted
		t.Error("there is no process_cpu_seconds_total")
	}
	limited := start(t, "--http", "0", "--max-conns", "7")
	if n := limited.scrape()["echod_connections_limit"]; n != 7 {
		t.Errorf("with --max-conns 7 the limit is %v", n)
	}
}
