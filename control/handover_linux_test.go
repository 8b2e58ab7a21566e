package control

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"echod/server"
)

// TestHandedOver asks a server whose successor has taken over, as a request does that comes in the moment of an upgrade. Its
// own figures are only those of connections that stayed, so counters would go back.
func TestHandedOver(t *testing.T) {
	r := newRig(t, server.Options{})
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
	_, err = r.srv.HandOver(t.Context(), links[0], server.HandoverOptions{Kill: func() {}})
	if err := errors.Join(err, <-taken); err != nil {
		t.Fatal(err)
	}
	defer next.Close()

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
