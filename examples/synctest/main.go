// Command synctest is an egg timer: a client sends a duration such as 3m, and is sent a line when it has passed. The
// example is its test: hours pass in no time under testing/synctest, over connections in memory (pipe_test.go).
//
//	go run ./synctest -listen 127.0.0.1:7000
//	nc 127.0.0.1 7000
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"echod/server"
)

func main() {
	address := flag.String("listen", "127.0.0.1:7000", "serve at this `address`")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	srv, err := server.New(server.HandlerFunc(timer), server.Options{})
	if err != nil {
		log.Fatal(err)
	}
	ln, err := server.Listen(ctx, *address)
	if err != nil {
		log.Fatal(err)
	}
	log.Print("listening on ", ln.Addr())
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

// patience is how long a client may take to send a duration.
const patience = time.Minute

// timer times eggs until the client leaves. A drain ends it, also while an egg boils.
func timer(ctx context.Context, c *server.Conn) error {
	r := bufio.NewReader(c)
	for {
		if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		if r.Buffered() == 0 {
			c.MarkIdle()
		}
		line, err := r.ReadSlice('\n')
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, server.ErrDraining):
			return nil
		case errors.Is(err, os.ErrDeadlineExceeded):
			_, err := io.WriteString(c, "no duration in a minute: bye\n")
			return err
		case err != nil:
			return err
		}

		reply := "ready\n"
		if d, err := time.ParseDuration(strings.TrimSpace(string(line))); err != nil {
			reply = fmt.Sprintf("%v\n", err)
		} else {
			select {
			case <-time.After(d):
			case <-c.Draining():
				_, err := io.WriteString(c, "not ready, but the server stops\n")
				return err
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		if _, err := io.WriteString(c, reply); err != nil {
			return err
		}
	}
}
