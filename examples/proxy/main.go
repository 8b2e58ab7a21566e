// Command proxy passes TCP connections on to an upstream server. A half-close of either side reaches the other one.
// During a drain, sessions continue until they end or the grace period is over.
//
//	go run ./proxy -listen 127.0.0.1:7000 -upstream 127.0.0.1:80
package main

import (
	"context"
	"errors"
	"flag"
	"io"
	"log"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"echod/server"
)

func main() {
	address := flag.String("listen", "127.0.0.1:7000", "serve at this `address`")
	upstream := flag.String("upstream", "127.0.0.1:80", "pass connections on to this `address`")
	grace := flag.Duration("grace", 30*time.Second, "how long sessions may go on after a signal")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	logger, err := zap.NewDevelopment()
	if err != nil {
		log.Fatal(err)
	}
	srv, err := server.New(proxy{upstream: *upstream}, server.Options{
		Logger: logger,
		Drain:  server.DrainOptions{Grace: *grace},
	})
	if err != nil {
		log.Fatal(err)
	}
	ln, err := server.Listen(ctx, *address)
	if err != nil {
		log.Fatal(err)
	}
	if err := serve(ctx, srv, ln); err != nil {
		log.Fatal(err)
	}
}

// serve serves ln until ctx ends, and then drains.
func serve(ctx context.Context, srv *server.Server, ln net.Listener) error {
	stop := context.AfterFunc(ctx, func() { srv.StartDrain(server.DrainOptions{}) })
	defer stop()
	if err := srv.Serve(ln); !errors.Is(err, server.ErrServerClosed) {
		return err
	}
	return nil
}

type proxy struct{ upstream string }

// ServeConn connects to the upstream server and copies in both directions until both have ended.
func (p proxy) ServeConn(ctx context.Context, c *server.Conn) error {
	dialer := net.Dialer{Timeout: 10 * time.Second}
	nc, err := dialer.DialContext(ctx, "tcp", p.upstream)
	if err != nil {
		return err // it names the address; the client gets an end of stream
	}
	upstream := nc.(*net.TCPConn)
	defer upstream.Close()

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return pipe(upstream, c) })
	g.Go(func() error { return pipe(c, upstream) })
	// If one direction fails, or the server ends the connection, end the other one too.
	stop := context.AfterFunc(ctx, func() {
		_ = upstream.Close()
		_ = c.Close()
	})
	defer stop()
	return g.Wait()
}

// pipe copies from src to dst until src ends, and then ends dst.
func pipe(dst halfCloser, src io.Reader) error {
	if _, err := io.Copy(dst, src); err != nil {
		return err
	}
	return dst.CloseWrite()
}

type halfCloser interface {
	io.Writer
	CloseWrite() error
}
