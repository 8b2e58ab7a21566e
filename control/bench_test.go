package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"echod/server"
)

// BenchmarkListing measures GET /v1/conns without the socket.
func BenchmarkListing(b *testing.B) {
	for _, n := range []int{1000, 15_000} {
		b.Run(fmt.Sprintf("conns=%d", n), func(b *testing.B) {
			plane := New(serveCrowd(b, n), Options{})
			request := httptest.NewRequestWithContext(b.Context(), http.MethodGet, "/v1/conns", nil)
			recorded := httptest.NewRecorder()
			plane.ServeHTTP(recorded, request)
			if listed := bytes.Count(recorded.Body.Bytes(), []byte(`"state":"serving"`)); recorded.Code != http.StatusOK || listed != n {
				b.Fatalf("the answer is %d with %d connections, want %d", recorded.Code, listed, n)
			}
			answer := discardedAnswer{http.Header{}}
			b.ReportAllocs()
			for b.Loop() {
				plane.ServeHTTP(answer, request)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/conn")
			b.ReportMetric(float64(recorded.Body.Len())/float64(n), "B/conn")
		})
	}
}

// serveCrowd serves n connections in memory.
func serveCrowd(b *testing.B, n int) *server.Server {
	b.Helper()
	core, warnings := observer.New(zap.WarnLevel)
	idle := server.HandlerFunc(func(ctx context.Context, _ *server.Conn) error {
		<-ctx.Done()
		return nil
	})
	srv, err := server.New(idle, server.Options{Limits: server.Limits{MaxConns: n}, Logger: zap.New(core)})
	if err != nil {
		b.Fatal(err)
	}
	if fewer := warnings.All(); len(fewer) > 0 {
		b.Skip(fewer[0].Message)
	}
	ln := newPipeListener()
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	b.Cleanup(func() {
		_ = srv.Close()
		if err := <-served; !errors.Is(err, server.ErrServerClosed) {
			b.Errorf("Serve: %v", err)
		}
	})
	for i := range n {
		served, _ := net.Pipe()
		ln.queue <- namedConn{
			Conn:   served,
			local:  &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 9999},
			remote: &net.TCPAddr{IP: net.IPv4(198, 51, 100, 1), Port: 10_000 + i},
		}
	}
	ctx, cancel := context.WithTimeout(b.Context(), patience)
	defer cancel()
	if err := srv.AwaitStatus(ctx, func(_ server.State, open int) bool { return open == n }); err != nil {
		b.Fatal(err)
	}
	return srv
}

// namedConn is a connection with TCP addresses.
type namedConn struct {
	net.Conn
	local, remote net.Addr
}

func (c namedConn) LocalAddr() net.Addr  { return c.local }
func (c namedConn) RemoteAddr() net.Addr { return c.remote }

// discardedAnswer is an http.ResponseWriter that discards the answer.
type discardedAnswer struct{ header http.Header }

func (a discardedAnswer) Header() http.Header       { return a.header }
func (discardedAnswer) WriteHeader(int)             {}
func (discardedAnswer) Write(p []byte) (int, error) { return len(p), nil }
