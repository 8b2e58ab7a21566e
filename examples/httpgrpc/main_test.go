package main

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap/zaptest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"echod/server"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fixture is a server and its clients.
type fixture struct {
	srv   *server.Server
	url   string
	http  *http.Client
	grpc  grpc_health_v1.HealthClient
	drain func() // begins the drain, and returns when it has begun
}

func start(t *testing.T, h http.Handler, grace time.Duration) fixture {
	t.Helper()
	srv, err := server.New(nil, server.Options{
		Logger: zaptest.NewLogger(t),
		Drain:  server.DrainOptions{Grace: grace},
	})
	if err != nil {
		t.Fatal(err)
	}
	var listeners []net.Listener
	for range 2 {
		ln, err := server.Listen(t.Context(), "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		listeners = append(listeners, ln)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- serve(ctx, srv, listeners[0], listeners[1], h) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})

	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	cc, err := grpc.NewClient(listeners[1].Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cc.Close(); err != nil {
			t.Error(err)
		}
	})
	return fixture{
		srv:  srv,
		url:  "http://" + listeners[0].Addr().String(),
		http: &http.Client{Transport: transport},
		grpc: grpc_health_v1.NewHealthClient(cc),
		drain: func() {
			cancel()
			<-srv.Draining()
		},
	}
}

func (f fixture) get(t *testing.T) (string, *http.Response, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, f.url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := f.http.Do(req)
	if err != nil {
		return "", nil, err
	}
	body, err := io.ReadAll(resp.Body)
	return string(body), resp, errors.Join(err, resp.Body.Close())
}

// send sends a request on a new connection.
func (f fixture) send(t *testing.T, request string) net.Conn {
	t.Helper()
	nc, err := net.Dial("tcp", strings.TrimPrefix(f.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	if _, err := io.WriteString(nc, request); err != nil {
		t.Fatal(err)
	}
	return nc
}

func TestServe(t *testing.T) {
	f := start(t, http.HandlerFunc(hello), 0)

	for range 2 { // the second one on the same connection
		body, _, err := f.get(t)
		if err != nil {
			t.Fatal(err)
		}
		remotes := make(map[string]bool)
		for c := range f.srv.Conns() {
			remotes["hello, "+c.Remote.String()+"\n"] = true
		}
		if len(remotes) != 1 || !remotes[body] {
			t.Errorf("got %q, want one of %v", body, remotes)
		}
	}
	answer, err := f.grpc.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	if got := answer.GetStatus(); got != grpc_health_v1.HealthCheckResponse_SERVING || err != nil {
		t.Errorf("got %v, %v", got, err)
	}
	if n := f.srv.Status().Connections; n != 2 {
		t.Errorf("%d connections, want one of each protocol", n)
	}
}

func TestDrain(t *testing.T) {
	t.Run("requests in progress are answered, and every client leaves", func(t *testing.T) {
		begun, release := make(chan struct{}), make(chan struct{})
		f := start(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			close(begun)
			<-release
			hello(w, r)
		}), time.Minute)

		idle := f.send(t, "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n")
		if resp, err := http.ReadResponse(bufio.NewReader(idle), nil); err != nil || resp.Close {
			t.Fatalf("got %+v, %v, want a keep-alive answer", resp, err)
		}
		ctx, leave := context.WithCancel(t.Context())
		defer leave()
		watch, err := f.grpc.Watch(ctx, &grpc_health_v1.HealthCheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if got, err := watch.Recv(); got.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
			t.Fatalf("got %v, %v", got, err)
		}
		answered := make(chan error, 1)
		go func() {
			body, resp, err := f.get(t)
			if err == nil && (!strings.HasPrefix(body, "hello") || !resp.Close) {
				err = errors.New("got " + body + ", want hello and Connection: close")
			}
			answered <- err
		}()
		<-begun

		f.drain()
		if rest, err := io.ReadAll(idle); len(rest) > 0 || err != nil {
			t.Errorf("idle client: got %q, %v, want an end of stream", rest, err)
		}
		if got, err := watch.Recv(); got.GetStatus() != grpc_health_v1.HealthCheckResponse_NOT_SERVING {
			t.Errorf("got %v, %v", got, err)
		}
		close(release)
		if err := <-answered; err != nil {
			t.Error(err)
		}
		leave()
		<-f.srv.Done()
		if report, _ := f.srv.Report(); report.Left != 3 {
			t.Errorf("%+v, want 3 connections that ended by themselves", report)
		}
	})
	t.Run("clients in the accept queue are answered", func(t *testing.T) {
		f := start(t, http.HandlerFunc(hello), time.Minute)
		if _, err := f.srv.Pause(server.PauseOptions{}); err != nil {
			t.Fatal(err)
		}
		queued := f.send(t, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		f.drain()
		r := bufio.NewReader(queued)
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		if body, err := io.ReadAll(resp.Body); resp.StatusCode != http.StatusOK || err != nil {
			t.Errorf("got %s, %q, %v", resp.Status, body, err)
		}
		if rest, err := io.ReadAll(r); len(rest) > 0 || err != nil {
			t.Errorf("got %q, %v, want an end of stream", rest, err)
		}
	})
	t.Run("requests in progress are ended at the deadline", func(t *testing.T) {
		begun := make(chan struct{})
		f := start(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			close(begun)
			<-r.Context().Done()
			w.WriteHeader(http.StatusServiceUnavailable)
		}), time.Millisecond)
		watch, err := f.grpc.Watch(t.Context(), &grpc_health_v1.HealthCheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := watch.Recv(); err != nil {
			t.Fatal(err)
		}
		answered := make(chan error, 1)
		go func() {
			_, resp, err := f.get(t)
			if err == nil && resp.StatusCode != http.StatusServiceUnavailable {
				err = errors.New("got " + resp.Status)
			}
			answered <- err
		}()
		<-begun

		f.drain()
		if err := <-answered; err != nil {
			t.Errorf("%v, want the handler's answer", err)
		}
		for err == nil {
			_, err = watch.Recv()
		}
		if status.Code(err) != codes.Unavailable {
			t.Errorf("got %v, want code Unavailable", err)
		}
		<-f.srv.Done()
		if report, _ := f.srv.Report(); report.AtDeadline != 2 || report.Stuck != 0 {
			t.Errorf("%+v, want 2 connections closed at the deadline", report)
		}
	})
}
