// Embed is a program that embeds the library. Its handler misbehaves on request: a line "panic" panics, a line
// "ignore" ignores the context for ever. It echoes every other line.
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"flag"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/oklog/run"
	"go.uber.org/zap"

	"echod/control"
	"echod/server"
)

func main() {
	listen := flag.String("listen", "", "address to serve on")
	socket := flag.String("control", "", "path of the control socket")
	grace := flag.Duration("grace", time.Second, "time that clients have")
	silent := flag.Bool("silent", false, "leave Options.Notifier unset")
	cert := flag.String("tls-cert", "", "file of the certificate, for an address tls://…")
	key := flag.String("tls-key", "", "file of its key")
	flag.Parse()

	config := zap.NewProductionConfig()
	config.Sampling = nil
	config.EncoderConfig.TimeKey = ""
	log := zap.Must(config.Build())
	ctx := context.Background()
	opts := server.Options{Logger: log, Drain: server.DrainOptions{Grace: *grace}}
	if !*silent {
		opts.Notifier = server.DefaultLineNotifier()
	}
	srv, err := server.New(server.HandlerFunc(misbehave), opts)
	exitOn(log, err)
	address, overTLS := strings.CutPrefix(*listen, "tls://")
	ln, err := server.Listen(ctx, address)
	exitOn(log, err)
	listener := server.Listener{Listener: ln}
	if overTLS {
		pair, err := tls.LoadX509KeyPair(*cert, *key)
		exitOn(log, err)
		listener.TLSConfig = &tls.Config{Certificates: []tls.Certificate{pair}}
	}
	cs, err := control.Listen(ctx, *socket, control.SocketOptions{Mode: 0o600})
	exitOn(log, err)
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGTERM)

	var g run.Group
	g.Add(control.ServerActor(srv, listener))
	g.Add(control.NewSignals(srv, signals, log, os.Stderr).Actor())
	g.Add(control.New(srv, control.Options{Logger: log}).Actor(cs))
	exitOn(log, g.Run())
}

func exitOn(log *zap.Logger, err error) {
	if err != nil {
		log.Fatal("ending", zap.Error(err))
	}
}

func misbehave(_ context.Context, c *server.Conn) error {
	lines := bufio.NewReader(c)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			return err
		}
		switch line {
		case "panic\n":
			panic("as asked")
		case "ignore\n":
			select {}
		}
		if _, err := c.Write([]byte(line)); err != nil {
			return err
		}
	}
}
