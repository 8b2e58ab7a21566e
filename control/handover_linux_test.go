package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"echod/server"
)

// TestHandedOver asks a server whose successor has taken over, as a request does that comes in the moment of an upgrade. Its
// own figures are only those of connections that stayed, so counters would go back.
func TestHandedOver(t *testing.T) {
	r := newRig(t, server.Options{})
	defer handOver(t, r.srv)()

	for _, path := range []string{"/v1/status", "/v1/conns", "/v1/conns/closed"} {
		if status, body := asked(t, r.plane, http.MethodGet, path); status != http.StatusServiceUnavailable {
			t.Errorf("%s: %d %s", path, status, body)
		}
	}
	web := NewWeb(r.srv, Options{})
	if status, body := asked(t, web, http.MethodGet, "/"); status != http.StatusServiceUnavailable {
		t.Errorf("/: %d %s", status, body)
	}
	for _, path := range []string{"/livez", "/readyz"} { // a probe that came too early must not restart the service
		if status, body := asked(t, web, http.MethodGet, path); status != http.StatusOK {
			t.Errorf("%s: %d %s", path, status, body)
		}
	}
}

// TestHandedOverMeanwhile hands a server over while a request is answered, after its figures were collected. The caller
// may have seen later ones of the successor.
func TestHandedOverMeanwhile(t *testing.T) {
	r := newRig(t, server.Options{})
	var stop func()
	plane := New(r.srv, Options{Metrics: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		figures := fmt.Sprint(r.srv.Status().Accepted)
		stop = handOver(t, r.srv)
		w.Header().Set("Content-Encoding", "none")
		_, _ = io.WriteString(w, figures)
	})})
	status, body := asked(t, plane, http.MethodGet, "/metrics")
	defer stop()
	if status != http.StatusServiceUnavailable || !strings.Contains(body, ProblemUpgraded) {
		t.Errorf("/metrics during an upgrade: %d %q, want %d and the problem", status, body, http.StatusServiceUnavailable)
	}
}

// TestFigures checks which paths answer only with figures of the process that serves.
func TestFigures(t *testing.T) {
	r := newRig(t, server.Options{})
	p := New(r.srv, Options{Metrics: http.NotFoundHandler()})
	web := NewWeb(r.srv, Options{Metrics: http.NotFoundHandler(), Debug: http.NotFoundHandler()})
	var got []string
	for _, route := range slices.Concat(p.routes, web.routes) {
		if route.method == http.MethodGet && showsFigures(route.pattern) {
			got = append(got, route.pattern)
		}
	}
	slices.Sort(got)
	want := []string{"/metrics", "/v1/clients", "/v1/conns", "/v1/conns/closed", "/v1/settings", "/v1/status", "/{$}"}
	if got = slices.Compact(got); !slices.Equal(got, want) {
		t.Errorf("figures are at %v, want %v", got, want)
	}
}

// handOver hands srv over to another server in this process, and returns a function that stops that.
func handOver(t *testing.T, srv *server.Server) (stop func()) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var links [2]server.Link
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "link")
		nc, err := net.FileConn(f)
		_ = f.Close()
		if err != nil {
			t.Fatal(err)
		}
		if links[i], err = server.NewUnixLink(nc.(*net.UnixConn)); err != nil {
			t.Fatal(err)
		}
	}
	next, err := server.New(server.Echo, server.Options{})
	if err != nil {
		t.Fatal(err)
	}
	taken := make(chan error, 1)
	go func() {
		offer, err := server.ReceiveOffer(context.Background(), links[1])
		if err == nil {
			err = next.TakeOver(context.Background(), offer, offer.Listeners)
		}
		taken <- err
	}()
	_, err = srv.HandOver(t.Context(), links[0], server.HandoverOptions{Kill: func() {}})
	if err := errors.Join(err, <-taken); err != nil {
		t.Fatal(err)
	}
	return func() { _ = next.Close() }
}
