// Command relisten is an echo server that changes its listeners while it serves. It reads its addresses from a file,
// one a line, and reads the file again on SIGHUP. It opens the listeners that are new and closes those that are gone,
// while their clients stay connected.
//
//	echo 127.0.0.1:7001 >addresses
//	go run ./relisten -addresses addresses
//	echo 127.0.0.1:7002 >addresses; pkill -HUP relisten
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"echod/server"
)

func main() {
	path := flag.String("addresses", "addresses", "read the addresses from this `file`")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	reload := make(chan os.Signal, 1)
	signal.Notify(reload, syscall.SIGHUP)
	logger, err := zap.NewDevelopment()
	if err != nil {
		log.Fatal(err)
	}
	srv, err := server.New(server.Echo, server.Options{Logger: logger, Notifier: server.DefaultLineNotifier()})
	if err != nil {
		log.Fatal(err)
	}
	ls := &listeners{srv: srv, path: *path, open: make(map[string]net.Listener)}
	if err := ls.serve(ctx, reload, logger); err != nil {
		log.Fatal(err)
	}
}

// listeners are the listeners of a server, as a file says.
type listeners struct {
	srv     *server.Server
	path    string
	open    map[string]net.Listener // by address
	serving errgroup.Group
}

// serve serves until ctx ends, and then drains.
func (ls *listeners) serve(ctx context.Context, reload <-chan os.Signal, logger *zap.Logger) error {
	if err := ls.update(ctx); err != nil {
		return errors.Join(err, ls.srv.Close(), ls.serving.Wait())
	}
	for {
		select {
		case <-reload:
			if err := ls.update(ctx); err != nil {
				logger.Error("addresses not updated", zap.Error(err))
			}
		case <-ctx.Done():
			ls.srv.StartDrain(server.DrainOptions{})
			return ls.serving.Wait()
		case <-ls.srv.Done(): // because the last listener failed
			return ls.serving.Wait()
		}
	}
}

// update opens and closes listeners until they are those that the file names. It opens before it closes, so that there
// is no instant without a listener, and a mistake in the file closes nothing.
func (ls *listeners) update(ctx context.Context) error {
	text, err := os.ReadFile(ls.path)
	if err != nil {
		return err
	}
	addresses := strings.Fields(string(text))
	if len(addresses) == 0 {
		return fmt.Errorf("%s names no address", ls.path)
	}

	for _, address := range addresses {
		if ls.open[address] != nil {
			continue
		}
		ln, err := server.Listen(ctx, address)
		if err != nil {
			return err
		}
		ls.open[address] = ln
		ls.serving.Go(func() error {
			err := ls.srv.ServeListener(server.Listener{Listener: ln})
			if errors.Is(err, net.ErrClosed) || errors.Is(err, server.ErrServerClosed) {
				return nil // by CloseListener, or drained
			}
			return err
		})
	}
	for address, ln := range ls.open {
		if slices.Contains(addresses, address) {
			continue
		}
		// CloseListener serves the clients in the accept queue, while ln.Close would reset them.
		if err := ls.srv.CloseListener(ln); err != nil {
			_ = ln.Close() // the listener has failed, or ServeListener has not begun yet
		}
		delete(ls.open, address)
	}
	return nil
}
