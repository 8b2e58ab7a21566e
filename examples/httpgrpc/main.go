// Command httpgrpc runs net/http and gRPC on top of one server. Its limits, pauses, connection table and drain then
// cover all protocols of the process. The adapter in handoff.go passes connections on, and works for every library that
// serves a net.Listener.
//
//	go run ./httpgrpc -http 127.0.0.1:8080 -grpc 127.0.0.1:8081
//	curl http://127.0.0.1:8080/
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"echod/server"
)

func main() {
	httpAddress := flag.String("http", "127.0.0.1:8080", "serve HTTP at this `address`")
	grpcAddress := flag.String("grpc", "127.0.0.1:8081", "serve gRPC at this `address`")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	logger, err := zap.NewDevelopment()
	if err != nil {
		log.Fatal(err)
	}
	srv, err := server.New(nil, server.Options{Logger: logger}) // each listener has its own handler
	if err != nil {
		log.Fatal(err)
	}
	httpListener, err := server.Listen(ctx, *httpAddress)
	if err != nil {
		log.Fatal(err)
	}
	grpcListener, err := server.Listen(ctx, *grpcAddress)
	if err != nil {
		log.Fatal(err)
	}
	if err := serve(ctx, srv, httpListener, grpcListener, http.HandlerFunc(hello)); err != nil {
		log.Fatal(err)
	}
}

func hello(w http.ResponseWriter, r *http.Request) {
	_, _ = fmt.Fprintf(w, "hello, %s\n", r.RemoteAddr)
}

// serve serves HTTP and gRPC until ctx ends, and then drains both together.
func serve(ctx context.Context, srv *server.Server, httpListener, grpcListener net.Listener, h http.Handler) error {
	httpServer := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second}
	grpcServer := grpc.NewServer()
	healthServer := health.NewServer()
	grpc_health_v1.RegisterHealthServer(grpcServer, healthServer)

	httpConns, grpcConns := newHandoff(httpListener.Addr()), newHandoff(grpcListener.Addr())
	g, ctx := errgroup.WithContext(ctx) // if one of these fails, the others are drained
	g.Go(func() error {
		return ended(srv.ServeListener(server.Listener{Listener: httpListener, Handler: httpConns}))
	})
	g.Go(func() error {
		return ended(srv.ServeListener(server.Listener{Listener: grpcListener, Handler: grpcConns}))
	})
	g.Go(func() error { return ended(httpServer.Serve(httpConns)) })
	g.Go(func() error { return ended(grpcServer.Serve(grpcConns)) })
	g.Go(func() error {
		<-ctx.Done()
		srv.StartDrain(server.DrainOptions{})
		<-srv.Draining()
		// The server accepts no more. Both protocols now end idle connections, and the others after their last answer.
		// http.Server.Shutdown would do the same, but leave connections that were accepted last without an answer.
		httpServer.SetKeepAlivesEnabled(false)
		healthServer.Shutdown()
		grpcServer.GracefulStop()
		<-srv.Done()
		return httpServer.Close()
	})
	return g.Wait()
}

// ended returns nil instead of the error that says that a server was stopped.
func ended(err error) error {
	for _, stopped := range []error{server.ErrServerClosed, http.ErrServerClosed, grpc.ErrServerStopped} {
		if errors.Is(err, stopped) {
			return nil
		}
	}
	return err
}
