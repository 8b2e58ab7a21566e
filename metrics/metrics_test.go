package metrics

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"go.uber.org/goleak"

	"echod/server"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// scrape returns what Prometheus would read.
func scrape(t *testing.T, m *Metrics) string {
	t.Helper()
	w := httptest.NewRecorder()
	m.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", "/metrics", nil))
	if w.Code != 200 {
		t.Fatalf("status %d: %s", w.Code, w.Body)
	}
	return w.Body.String()
}

// patience bounds waits for what should happen at once.
const patience = 30 * time.Second

// awaitLines waits until a scrape has all the lines: a client sees its bytes a moment before they are counted.
func awaitLines(t *testing.T, m *Metrics, lines ...string) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		text := "\n" + scrape(t, m)
		missing := slices.DeleteFunc(slices.Clone(lines), func(line string) bool { return strings.Contains(text, "\n"+line+"\n") })
		if len(missing) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("missing: %q in\n%s", missing, strings.Join(figures(text), "\n"))
		}
	}
}

// value returns the value of a metric with one series.
func value(t *testing.T, m *Metrics, name string) float64 {
	t.Helper()
	_, after, _ := strings.Cut(scrape(t, m), "\n"+name+" ")
	text, _, _ := strings.Cut(after, "\n")
	v, err := strconv.ParseFloat(text, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return v
}

// serve runs an echo server that m watches.
func serve(t *testing.T, m *Metrics, opts server.Options) (*server.Server, net.Addr) {
	t.Helper()
	return serveWith(t, m, server.Echo, opts)
}

// serveWith runs a server that m watches.
func serveWith(t *testing.T, m *Metrics, h server.Handler, opts server.Options) (*server.Server, net.Addr) {
	t.Helper()
	opts.OnClose = m.OnClose
	if opts.Notifier == nil {
		opts.Notifier = server.DefaultLineNotifier()
	}
	s, err := server.New(h, opts)
	if err != nil {
		t.Fatal(err)
	}
	m.Watch(s)
	ln, err := server.Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(ln)
	}()
	t.Cleanup(func() {
		_ = s.Close()
		<-done
	})
	if err := s.AwaitStatus(t.Context(), func(state server.State, _ int) bool { return state == server.StateRunning }); err != nil {
		t.Fatal(err)
	}
	return s, ln.Addr()
}

// client connects and exchanges text.
func client(t *testing.T, address net.Addr, text string) *net.TCPConn {
	t.Helper()
	nc, err := net.Dial("tcp", address.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	if _, err := io.WriteString(nc, text); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(nc, make([]byte, len(text))); err != nil {
		t.Fatal(err)
	}
	return nc.(*net.TCPConn)
}

func TestMetrics(t *testing.T) {
	t.Run("count what clients do", testClients)
	t.Run("have a close reason for each way that a handler ends", testCloseReasons)
	t.Run("have the reason of a stop by force", testForced)
	t.Run("follow Prometheus's conventions", testConventions)
}

func testClients(t *testing.T) {
	m := New("1.2.3")
	s, address := serve(t, m, server.Options{Limits: server.Limits{MaxConns: 9, MaxConnsPerIP: 2}})
	awaitLines(t, m, `echod_build_info{version="1.2.3"} 1`, `echod_state{state="running"} 1`, `echod_state{state="paused"} 0`,
		`echod_connections{phase="serving"} 0`, `echod_connections_limit 9`, `echod_connections_closed_total{reason="killed"} 0`)

	stays, leaves := client(t, address, "hello"), client(t, address, "hi")
	busy, err := net.Dial("tcp", address.String()) // the third from this address
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(busy); string(got) != "BUSY\n" || err != nil {
		t.Errorf("the third client got %q, %v", got, err)
	}
	_ = busy.Close()
	_ = leaves.CloseWrite()
	if _, err := io.ReadAll(leaves); err != nil {
		t.Error(err)
	}
	if err := s.AwaitStatus(t.Context(), func(_ server.State, open int) bool { return open == 1 }); err != nil {
		t.Fatal(err)
	}
	awaitLines(t, m,
		`echod_connections_accepted_total 3`, `echod_connections{phase="serving"} 1`,
		`echod_connections_closed_total{reason="client-closed"} 1`, `echod_connections_closed_total{reason="rejected-address-limit"} 1`,
		`echod_connections_rejected_total{reason="address-limit"} 1`, `echod_connections_rejected_total{reason="paused"} 0`,
		`echod_bytes_total{direction="in"} 7`, `echod_bytes_total{direction="out"} 12`)

	if _, _, err := s.Notify(t.Context(), "hello"); err != nil {
		t.Fatal(err)
	}
	h, err := s.Pause(server.PauseOptions{})
	if err != nil {
		t.Fatal(err)
	}
	awaitLines(t, m, `echod_notices_total{result="sent"} 1`, `echod_notices_total{result="failed"} 0`, `echod_holds 1`,
		`echod_state{state="paused"} 1`, `echod_state_transitions_total{state="paused"} 1`, `echod_state_transitions_total{state="running"} 1`,
		`echod_accept_queue_length{listener="`+address.String()+`"} 0`)
	h.Release()

	m.Signal("SIGTERM")
	m.Request("/v1/status", "GET", 200)
	m.Request("/v1/status", "GET", 200)
	m.LogDropped("sampling", 3)
	s.StartDrain(server.DrainOptions{Grace: time.Hour, Reason: "x"})
	awaitLines(t, m, `echod_notices_total{result="sent"} 2`, `echod_state{state="draining"} 1`)
	_ = stays.CloseWrite()
	<-s.Done()
	awaitLines(t, m,
		`echod_signals_total{signal="SIGTERM"} 1`, `echod_control_requests_total{code="200",method="GET",route="/v1/status"} 2`,
		`echod_log_entries_dropped_total{cause="sampling"} 3`,
		`echod_state{state="stopped"} 1`, `echod_state_transitions_total{state="draining"} 1`,
		`echod_connections_closed_total{reason="client-left"} 1`, `echod_connection_duration_seconds_count 3`)
}

func testConventions(t *testing.T) {
	m := New("1.2.3")
	serve(t, m, server.Options{})
	m.Signal("SIGTERM")
	m.Request("/v1/status", "GET", 200)
	m.LogDropped("sampling", 1)
	problems, err := promlint.New(strings.NewReader(scrape(t, m))).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

// obey is a handler that ends as the client says, and echoes other lines.
func obey(_ context.Context, c *server.Conn) error {
	lines := bufio.NewReader(c)
	for {
		line, err := lines.ReadString('\n')
		switch {
		case err != nil:
			return err
		case line == "done\n":
			return nil
		case line == "error\n":
			return errors.New("as asked")
		case line == "panic\n":
			panic("as asked")
		}
		if _, err := io.WriteString(c, line); err != nil {
			return err
		}
	}
}

// testCloseReasons covers the reasons that an echo does not have, or that a daemon has only when it is about to exit.
// Package integration covers the others.
func testCloseReasons(t *testing.T) {
	m := New("1.2.3")
	s, address := serveWith(t, m, server.HandlerFunc(obey), server.Options{})
	for _, command := range []string{"done\n", "done\n", "done\n", "error\n", "error\n", "panic\n"} {
		nc := client(t, address, "hello\n")
		if _, err := io.WriteString(nc, command); err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, nc) // until the server closes
		_ = nc.Close()
	}
	awaitLines(t, m,
		`echod_connections_closed_total{reason="handler-done"} 3`, `echod_connections_closed_total{reason="handler-error"} 2`,
		`echod_connections_closed_total{reason="handler-panic"} 1`, `echod_connection_duration_seconds_count 6`)

	// Two stay until the deadline of a drain.
	for range 2 {
		client(t, address, "hello\n")
	}
	s.StartDrain(server.DrainOptions{Grace: time.Hour, Reason: "x"})
	awaitLines(t, m, `echod_notices_total{result="sent"} 2`, `echod_drain_duration_seconds_count 0`)
	s.StartDrain(server.DrainOptions{Grace: time.Nanosecond, Reason: "y"})
	<-s.Done()
	awaitLines(t, m,
		`echod_connections_closed_total{reason="deadline"} 2`, `echod_connections_closed_total{reason="forced"} 0`,
		`echod_connections_accepted_total 8`, `echod_drain_duration_seconds_count 1`)
	took := s.Status().Drain.Ended.Sub(s.Status().Drain.Since).Seconds()
	if got := value(t, m, "echod_drain_duration_seconds_sum"); got != took || took <= 0 {
		t.Errorf("the drain took %v s, and the metric says %v", took, got)
	}
}

func testForced(t *testing.T) {
	m := New("1.2.3")
	s, address := serve(t, m, server.Options{})
	client(t, address, "hello\n")
	_ = s.Close()
	awaitLines(t, m,
		`echod_connections_closed_total{reason="forced"} 1`, `echod_connections_closed_total{reason="deadline"} 0`,
		`echod_state_transitions_total{state="stopped"} 1`, `echod_drain_duration_seconds_count 1`)
}
