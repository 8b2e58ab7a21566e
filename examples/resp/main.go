// Command resp is a small Redis: a server of the RESP protocol with PING, ECHO, SET, GET and DEL, pipelined or not. It
// shows how a request/response protocol is drained. A command that comes during the drain gets an error reply, clients
// that are idle are closed, and the server itself adds no byte to the stream.
//
//	go run ./resp -listen 127.0.0.1:6379
//	redis-cli set greeting hello
package main

import (
	"bufio"
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

	"echod/server"
)

func main() {
	address := flag.String("listen", "127.0.0.1:6379", "serve at this `address`")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	logger, err := zap.NewDevelopment()
	if err != nil {
		log.Fatal(err)
	}
	srv, err := server.New(&store{lastCall: 200 * time.Millisecond}, server.Options{Logger: logger})
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

// ServeConn answers commands until the client leaves.
func (st *store) ServeConn(_ context.Context, c *server.Conn) error {
	w := bufio.NewWriter(c)
	r := bufio.NewReader(flushingReader{c, w})
	for last := false; ; {
		if r.Buffered() == 0 { // the end of a pipeline
			if last {
				return w.Flush()
			}
			c.MarkIdle()
		}
		args, err := readCommand(r)
		switch {
		case errors.Is(err, server.ErrDraining):
			// The client is idle, but a command may be on its way. Answering it is better than resetting the client.
			if err := c.SetReadDeadline(time.Now().Add(st.lastCall)); err != nil {
				return err
			}
			continue
		case errors.Is(err, io.EOF), errors.Is(err, os.ErrDeadlineExceeded):
			return nil
		case errors.Is(err, errProtocol):
			writeError(w, err.Error())
			return errors.Join(err, w.Flush())
		case err != nil:
			return err
		}
		select {
		case <-c.Draining():
			writeError(w, "ERR server is shutting down")
			last = true // but answer the rest of the pipeline
		default:
			st.command(w, args)
		}
	}
}

// flushingReader sends the replies that are pending before it waits for more commands.
type flushingReader struct {
	io.Reader
	w *bufio.Writer
}

func (r flushingReader) Read(p []byte) (int, error) {
	if err := r.w.Flush(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}
