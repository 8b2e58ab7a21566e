// Command chat is a chat server with rooms. It shows a handler with two goroutines, consumers that are too slow,
// notices in the protocol's own words, and TLS. A member first sends a line with a room and a name, and then a line
// for each message:
//
//	go run ./chat -listen 127.0.0.1:7000
//	nc 127.0.0.1 7000
//	kitchen ann
//	hello
//
// With -cert and -key (PEM files) it speaks TLS: openssl s_client -quiet -connect 127.0.0.1:7000
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"log"
	"math"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"go.uber.org/zap"

	"echod/server"
)

func main() {
	address := flag.String("listen", "127.0.0.1:7000", "serve at this `address`")
	cert := flag.String("cert", "", "speak TLS with the certificate in this PEM `file`")
	key := flag.String("key", "", "the certificate's key is in this PEM `file`")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	logger, err := zap.NewDevelopment()
	if err != nil {
		log.Fatal(err)
	}
	var config *tls.Config
	if *cert != "" || *key != "" {
		pair, err := tls.LoadX509KeyPair(*cert, *key)
		if err != nil {
			log.Fatal(err)
		}
		config = &tls.Config{Certificates: []tls.Certificate{pair}}
	}
	srv, err := newServer(logger)
	if err != nil {
		log.Fatal(err)
	}
	ln, err := server.Listen(ctx, *address)
	if err != nil {
		log.Fatal(err)
	}
	if err := serve(ctx, srv, ln, config); err != nil {
		log.Fatal(err)
	}
}

func newServer(logger *zap.Logger) (*server.Server, error) {
	return server.New(&hub{}, server.Options{
		Logger:   logger,
		Notifier: server.NotifierFunc(notice),
		Limits:   server.Limits{AtLimit: server.LimitReject},
		Timeouts: server.Timeouts{Idle: time.Hour},
	})
}

// notice encodes the server's own messages. The handler writes whole lines only, so a notice is never in the middle
// of one.
func notice(n server.Notice) []byte {
	switch n.Kind {
	case server.NoticeDrain:
		return fmt.Appendf(nil, "* the server stops in %.0f s: %s\n", math.Ceil(n.Left.Seconds()), n.Reason)
	case server.NoticeReject:
		return []byte("* the server is full, or about to stop\n")
	case server.NoticeMessage:
		return fmt.Appendf(nil, "* %s\n", n.Text)
	}
	return nil
}

// serve serves ln until ctx ends, and then drains. A nil config means without TLS.
func serve(ctx context.Context, srv *server.Server, ln net.Listener, config *tls.Config) error {
	stop := context.AfterFunc(ctx, func() { srv.StartDrain(server.DrainOptions{}) })
	defer stop()
	err := srv.ServeListener(server.Listener{Listener: ln, TLSConfig: config})
	if !errors.Is(err, server.ErrServerClosed) {
		return err
	}
	return nil
}
