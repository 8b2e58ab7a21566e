package metrics

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"echod/server"
)

// obey is a handler that a client tells how to end; other lines it echoes.
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

// toTheEnd reads until the server has closed, however that ends.
func toTheEnd(nc net.Conn) { _, _ = io.Copy(io.Discard, nc) }

// A client for each of the reasons that an echo does not have, or that a daemon shows only when it is about to go. The others are
// played against the daemon itself, in package integration.
func TestReasonsAreWhatClientsAndHandlersDid(t *testing.T) {
	m := New("1.2.3")
	s, address := serveWith(t, m, server.HandlerFunc(obey), server.Options{})
	for _, command := range []string{"done\n", "done\n", "done\n", "error\n", "error\n", "panic\n"} {
		nc := client(t, address, "hello\n")
		if _, err := io.WriteString(nc, command); err != nil {
			t.Fatal(err)
		}
		toTheEnd(nc)
		_ = nc.Close()
	}
	awaitLines(t, m,
		`echod_connections_closed_total{reason="handler-done"} 3`, `echod_connections_closed_total{reason="handler-error"} 2`,
		`echod_connections_closed_total{reason="handler-panic"} 1`, `echod_connection_duration_seconds_count 6`)

	// Two stay to the end of a drain.
	for range 2 {
		client(t, address, "hello\n")
	}
	s.Drain(time.Hour, "x")
	awaitLines(t, m, `echod_notices_total{result="sent"} 2`, `echod_drain_duration_seconds_count 0`)
	s.Drain(time.Nanosecond, "y")
	<-s.Done()
	awaitLines(t, m,
		`echod_connections_closed_total{reason="deadline"} 2`, `echod_connections_closed_total{reason="forced"} 0`,
		`echod_connections_accepted_total 8`, `echod_drain_duration_seconds_count 1`)
	took := s.Status().Drain.Ended.Sub(s.Status().Drain.Since).Seconds()
	if got := value(t, m, "echod_drain_duration_seconds_sum"); got != took || took <= 0 {
		t.Errorf("the drain took %v s, and the metric says %v", took, got)
	}
}

func TestReasonOfAStopByForce(t *testing.T) {
	m := New("1.2.3")
	s, address := serve(t, m, server.Options{})
	client(t, address, "hello\n")
	_ = s.Close()
	awaitLines(t, m,
		`echod_connections_closed_total{reason="forced"} 1`, `echod_connections_closed_total{reason="deadline"} 0`,
		`echod_state_transitions_total{state="stopped"} 1`, `echod_drain_duration_seconds_count 1`)
}
