// Command minimal is a complete server in one file: it sends back each line in upper case. It shows how a program
// without a run group stops gracefully: signal.NotifyContext ends a context, and Shutdown gives the clients ten
// seconds.
//
//	go run ./minimal -listen 127.0.0.1:7777
//	nc 127.0.0.1 7777
package main

import (
	"bufio"
	"bytes"
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

	"echod/server"
)

func main() {
	address := flag.String("listen", "127.0.0.1:7777", "serve at this `address`")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	ln, err := server.Listen(ctx, *address)
	if err != nil {
		log.Fatal(err)
	}
	log.Print("listening on ", ln.Addr())
	if err := run(ctx, ln); err != nil {
		log.Fatal(err)
	}
}

// run serves ln until ctx ends, and then shuts down.
func run(ctx context.Context, ln net.Listener) error {
	srv, err := server.New(server.HandlerFunc(shout), server.Options{})
	if err != nil {
		return err
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()

	select {
	case err := <-served: // it cannot accept any more
		return err
	case <-ctx.Done():
	}
	deadline, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return srv.Shutdown(deadline)
}

// shout sends back each line in upper case. MarkIdle lets a shutdown close clients that are silent between two lines;
// the others have until the deadline.
func shout(_ context.Context, c *server.Conn) error {
	r := bufio.NewReader(c)
	for {
		if r.Buffered() == 0 {
			c.MarkIdle()
		}
		line, err := r.ReadSlice('\n')
		if _, err := c.Write(bytes.ToUpper(line)); err != nil {
			return err
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, server.ErrDraining):
			return nil
		case err != nil:
			return err
		}
	}
}
