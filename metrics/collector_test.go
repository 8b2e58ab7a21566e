package metrics

import (
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"echod/server"
)

// figures returns the lines of a scrape about the server, sorted.
func figures(text string) (lines []string) {
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "echod_") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	slices.Sort(lines)
	return lines
}

func TestCollector(t *testing.T) {
	t.Run("every figure of a status is in its series", testEveryFigure)
	t.Run("unknown and unfinished values are left out", testUnknownFigures)
	t.Run("two servers share a registry, told apart by a label", testTwoServers)
}

// testEveryFigure uses a different number for each figure, so that no two series can be confused.
func testEveryFigure(t *testing.T) {
	began := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	st := server.Status{
		State: server.StateStopped, Connections: 10, MaxConns: 11,
		Phases:   map[server.Phase]int{server.PhaseWaiting: 1, server.PhaseServing: 2, server.PhaseRejecting: 3, server.PhaseClosing: 4},
		Accepted: 12,
		BytesIn:  13, BytesOut: 14,
		Holds: []server.HoldInfo{{ID: "h1"}, {ID: "h2"}},
		Listeners: []server.ListenerInfo{
			{Address: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9999}, AcceptQueue: 15, AcceptQueueLimit: 16},
			{Address: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2), Port: 9999}, AcceptQueue: -1, AcceptQueueLimit: -1}, // unknown
		},
		NoticesSent: 17, NoticesFailed: 18, KeptByPredecessor: 20,
		Transitions: map[server.State]uint64{server.StateRunning: 19, server.StatePaused: 20, server.StateDraining: 21, server.StateStopped: 22},
		Drain:       &server.DrainInfo{Since: began, Ended: began.Add(1500 * time.Millisecond)},
		Closed:      make(map[server.Reason]uint64),
	}
	for i, why := range server.Reasons() {
		st.Closed[why] = uint64(100 + i)
	}
	m := New("1.2.3")
	m.registry.MustRegister(newCollector(func() server.Status { return st }, Options{}))
	for _, took := range []time.Duration{5 * time.Millisecond, 10 * time.Millisecond, 2 * time.Second, 8 * 24 * time.Hour} {
		m.OnClose(server.ClosedConn{Opened: began, Closed: began.Add(took)})
	}
	m.Signal("SIGHUP")
	m.Signal("SIGTERM")
	m.Signal("SIGTERM")
	m.Request("/v1/pause", "POST", 201)
	m.Request("", "other", 405)
	m.Request("", "other", 405)

	want := figures(`
echod_accept_queue_length{listener="127.0.0.1:9999"} 15
echod_accept_queue_limit{listener="127.0.0.1:9999"} 16
echod_build_info{version="1.2.3"} 1
echod_bytes_total{direction="in"} 13
echod_bytes_total{direction="out"} 14
echod_connection_duration_seconds_bucket{le="0.01"} 2
echod_connection_duration_seconds_bucket{le="0.1"} 2
echod_connection_duration_seconds_bucket{le="1"} 2
echod_connection_duration_seconds_bucket{le="10"} 3
echod_connection_duration_seconds_bucket{le="60"} 3
echod_connection_duration_seconds_bucket{le="600"} 3
echod_connection_duration_seconds_bucket{le="3600"} 3
echod_connection_duration_seconds_bucket{le="21600"} 3
echod_connection_duration_seconds_bucket{le="86400"} 3
echod_connection_duration_seconds_bucket{le="604800"} 3
echod_connection_duration_seconds_bucket{le="+Inf"} 4
echod_connection_duration_seconds_count 4
echod_connection_duration_seconds_sum 691202.015
echod_connections_accepted_total 12
echod_connections_closed_total{reason="client-closed"} 100
echod_connections_closed_total{reason="client-reset"} 101
echod_connections_closed_total{reason="client-left"} 102
echod_connections_closed_total{reason="handshake-failed"} 116
echod_connections_closed_total{reason="idle-timeout"} 103
echod_connections_closed_total{reason="stalled"} 104
echod_connections_closed_total{reason="handler-done"} 105
echod_connections_closed_total{reason="handler-error"} 106
echod_connections_closed_total{reason="handler-panic"} 107
echod_connections_closed_total{reason="killed"} 108
echod_connections_closed_total{reason="rejected-paused"} 109
echod_connections_closed_total{reason="rejected-limit"} 110
echod_connections_closed_total{reason="rejected-draining"} 111
echod_connections_closed_total{reason="rejected-unidentified"} 112
echod_connections_closed_total{reason="deadline"} 113
echod_connections_closed_total{reason="evicted"} 117
echod_connections_closed_total{reason="forced"} 114
echod_connections_closed_total{reason="lost"} 115
echod_connections_closed_total{reason="max-age"} 118
echod_connections_closed_total{reason="rejected-address-limit"} 119
echod_connections_closed_total{reason="rejected-rate"} 120
echod_connections_closed_total{reason="rejected-denied"} 121
echod_connections_limit 11
echod_connections_rejected_total{reason="address-limit"} 119
echod_connections_rejected_total{reason="denied"} 121
echod_connections_rejected_total{reason="rate"} 120
echod_connections_rejected_total{reason="draining"} 111
echod_connections_rejected_total{reason="limit"} 110
echod_connections_rejected_total{reason="paused"} 109
echod_connections_rejected_total{reason="unidentified"} 112
echod_connections{phase="waiting"} 1
echod_connections{phase="serving"} 2
echod_connections{phase="rejecting"} 3
echod_connections{phase="closing"} 4
echod_control_requests_total{code="201",method="POST",route="/v1/pause"} 1
echod_control_requests_total{code="405",method="other",route=""} 2
echod_drain_duration_seconds_bucket{le="0.1"} 0
echod_drain_duration_seconds_bucket{le="0.5"} 0
echod_drain_duration_seconds_bucket{le="1"} 0
echod_drain_duration_seconds_bucket{le="2"} 1
echod_drain_duration_seconds_bucket{le="5"} 1
echod_drain_duration_seconds_bucket{le="10"} 1
echod_drain_duration_seconds_bucket{le="30"} 1
echod_drain_duration_seconds_bucket{le="60"} 1
echod_drain_duration_seconds_bucket{le="120"} 1
echod_drain_duration_seconds_bucket{le="300"} 1
echod_drain_duration_seconds_bucket{le="900"} 1
echod_drain_duration_seconds_bucket{le="3600"} 1
echod_drain_duration_seconds_bucket{le="+Inf"} 1
echod_drain_duration_seconds_count 1
echod_drain_duration_seconds_sum 1.5
echod_holds 2
echod_notices_total{result="failed"} 18
echod_notices_total{result="sent"} 17
echod_predecessor_connections 20
echod_signals_total{signal="SIGHUP"} 1
echod_signals_total{signal="SIGTERM"} 2
echod_state_transitions_total{state="running"} 19
echod_state_transitions_total{state="paused"} 20
echod_state_transitions_total{state="draining"} 21
echod_state_transitions_total{state="stopped"} 22
echod_state{state="starting"} 0
echod_state{state="running"} 0
echod_state{state="paused"} 0
echod_state{state="draining"} 0
echod_state{state="stopped"} 1
`)
	if diff := cmp.Diff(want, figures(scrape(t, m))); diff != "" {
		t.Errorf("series (-want +got):\n%s", diff)
	}
}

func testUnknownFigures(t *testing.T) {
	st := server.Status{State: server.StateDraining, Drain: &server.DrainInfo{Since: time.Now()}} // no limit
	m := New("1.2.3")
	m.registry.MustRegister(newCollector(func() server.Status { return st }, Options{}))
	text := scrape(t, m)
	if strings.Contains(text, "echod_connections_limit ") {
		t.Error("there is a series for the limit on connections, and no limit")
	}
	if !strings.Contains(text, "\nechod_drain_duration_seconds_count 0\n") {
		t.Error("a drain in progress counts as over")
	}
}

func testTwoServers(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	for name, conns := range map[string]uint64{"a": 1, "b": 2} {
		opts := Options{Labels: prometheus.Labels{"server": name}}
		registry.MustRegister(
			newCollector(func() server.Status { return server.Status{Accepted: conns} }, opts),
			NewDurations(opts))
	}
	w := httptest.NewRecorder()
	promhttp.HandlerFor(registry, promhttp.HandlerOpts{}).ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", "/", http.NoBody))
	for _, line := range []string{
		`echod_connections_accepted_total{server="a"} 1`, `echod_connections_accepted_total{server="b"} 2`,
		`echod_connection_duration_seconds_count{server="a"} 0`, `echod_connection_duration_seconds_count{server="b"} 0`,
	} {
		if !slices.Contains(figures(w.Body.String()), line) {
			t.Errorf("missing: %s", line)
		}
	}
}
