package control

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/oklog/run"

	"echod/server"
)

func TestProbeFindsThePlaneAlive(t *testing.T) {
	r := newRig(t, server.Options{})
	var mu sync.Mutex
	seen := 0
	r.plane.onRequest = func(string, string, int) {
		mu.Lock()
		defer mu.Unlock()
		seen++
	}
	if err := os.Chmod(r.socket, 0); err != nil { // as a socket of systemd's may be, for root aside
		t.Fatal(err)
	}
	errs := make([]error, 8)
	var probes sync.WaitGroup
	for i := range errs {
		probes.Go(func() {
			for n := 0; n < 50 && errs[i] == nil; n++ {
				errs[i] = r.plane.Probe(within(t, patience))
			}
		})
	}
	probes.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Error(err)
	}
	if err := os.Chmod(r.socket, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := r.client.Status(t.Context()); err != nil {
		t.Errorf("a caller after that: %v", err)
	}
	mu.Lock()
	defer mu.Unlock()
	wantEqual(t, "requests told of", seen, 1) // the caller's: probes are nobody's
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), d, errors.New("it took too long"))
	t.Cleanup(cancel)
	return ctx
}

func TestProbeNeedsNoPlaceAmongTheCallers(t *testing.T) {
	r := newRig(t, server.Options{})
	for range MaxCallers + 1 {
		conn := r.rawConn(t)
		if _, err := fmt.Fprint(conn, "GET /v1/status HTTP/1.1\r\nHost: echod\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
	}
	for r.plane.listeners[0].count() < MaxCallers {
		time.Sleep(time.Millisecond)
	}
	for range 3 {
		if err := r.plane.Probe(within(t, patience)); err != nil {
			t.Error(err)
		}
	}
}

// deafListener does not come back from Accept, whatever its deadline is.
type deafListener struct {
	net.Listener
	entered chan struct{}
}

func (l deafListener) Accept() (net.Conn, error) {
	close(l.entered)
	return l.Listener.Accept()
}

func (l deafListener) SetDeadline(time.Time) error { return nil }

func TestProbeFindsAPlaneThatAcceptsNobody(t *testing.T) {
	srv, err := server.New(server.Echo, server.Options{})
	if err != nil {
		t.Fatal(err)
	}
	plane := New(srv, Options{})
	const unserved = "probing the control plane: it is not served"
	if err := plane.Probe(t.Context()); err == nil || err.Error() != unserved {
		t.Errorf("before it is served: %v, want %s", err, unserved)
	}
	ln := deafListener{newPipeListener(), make(chan struct{})}
	var g run.Group
	g.Add(ServerActor(srv))
	g.Add(plane.Actor(ln))
	ended := make(chan error, 1)
	go func() { ended <- g.Run() }()
	<-ln.entered
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		if err := plane.Probe(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("the probe says %v, want that time ran out", err)
		}
		cancel()
	}
	_ = srv.Close()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestProbeFindsAPlaneThatDoesNotAnswer(t *testing.T) {
	r := newRig(t, server.Options{})
	held, release := make(chan struct{}), make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	var holding sync.WaitGroup
	holding.Go(func() { // holds the books, without which there is no status
		_ = r.srv.AwaitStatus(ctx, func(server.State, int) bool {
			close(held)
			<-release
			return true
		})
	})
	<-held
	probed, stop := context.WithTimeout(t.Context(), 20*time.Millisecond)
	if err := r.plane.Probe(probed); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the probe says %v, want that time ran out", err)
	}
	stop()
	close(release)
	holding.Wait()
	cancel()
	if err := r.plane.Probe(within(t, patience)); err != nil {
		t.Errorf("after that: %v", err)
	}
}

// Those who would keep a connection open do not keep probes out, and those who read nothing only for a while.
func TestCallersWhoStayDoNotKeepProbesOut(t *testing.T) {
	endless := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		for chunk := make([]byte, 1<<16); ; {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	})
	for path, patience := range map[string]time.Duration{"/readyz": 0, "/metrics": 0} {
		t.Run(path, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ln := newPipeListener()
				newBubble(t, server.Options{}, func(r *rig) actor {
					return pair(NewWeb(r.srv, Options{Metrics: endless}).Actor(ln))
				})
				call := func(path string) *bufio.Reader {
					nc, err := ln.Dial(t.Context())
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() { _ = nc.Close() })
					go func() { _, _ = fmt.Fprintf(nc, "GET %s HTTP/1.1\r\nHost: echod\r\n\r\n", path) }()
					return bufio.NewReader(nc)
				}
				for range MaxCallers {
					if lines := call(path); path == "/readyz" {
						if _, err := http.ReadResponse(lines, nil); err != nil { // and then says nothing more
							t.Fatal(err)
						}
					}
				}
				began := time.Now()
				answer, err := http.ReadResponse(call("/livez"), nil)
				if err != nil {
					t.Fatal(err)
				}
				wantEqual(t, "status", answer.StatusCode, http.StatusOK)
				wantEqual(t, "time until the answer", time.Since(began), patience)
			})
		})
	}
}
