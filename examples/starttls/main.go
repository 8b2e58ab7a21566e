// Command starttls is a line protocol that changes to TLS in mid-connection, as SMTP, IMAP and LDAP do. It shows
// Conn.Wrap and Conn.SetNotifier: the server's notices are off until the client has TLS, and inside the TLS session
// afterwards. The commands are STARTTLS, ECHO text and QUIT.
//
//	go run ./starttls -listen 127.0.0.1:7000 -cert cert.pem -key key.pem
package main

import (
	"bufio"
	"context"
	"crypto/tls"
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

	"go.uber.org/zap"

	"echod/server"
)

func main() {
	address := flag.String("listen", "127.0.0.1:7000", "serve at this `address`")
	cert := flag.String("cert", "cert.pem", "the certificate is in this PEM `file`")
	key := flag.String("key", "key.pem", "the certificate's key is in this PEM `file`")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	logger, err := zap.NewDevelopment()
	if err != nil {
		log.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(*cert, *key)
	if err != nil {
		log.Fatal(err)
	}
	h := &handler{&tls.Config{Certificates: []tls.Certificate{pair}}}
	srv, err := server.New(h, server.Options{Logger: logger}) // no Notifier: silent
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

type handler struct{ config *tls.Config }

// ServeConn answers commands until the client leaves.
func (h *handler) ServeConn(ctx context.Context, c *server.Conn) error {
	r := bufio.NewReader(c)
	reply := "220 ready"
	for {
		if _, err := io.WriteString(c, reply+"\r\n"); err != nil {
			return err
		}
		if r.Buffered() == 0 {
			c.MarkIdle()
		}
		line, err := r.ReadSlice('\n')
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, server.ErrDraining):
			return nil
		case err != nil:
			return err
		}

		command, text, _ := strings.Cut(strings.TrimRight(string(line), "\r\n"), " ")
		_, secure := c.TLS()
		switch command = strings.ToUpper(command); {
		case command == "QUIT":
			_, err := io.WriteString(c, "221 bye\r\n")
			return err
		case command == "STARTTLS" && !secure:
			if err := h.startTLS(ctx, c, r); err != nil {
				return err
			}
			reply = "220 ready, over TLS"
		case command == "ECHO" && secure:
			reply = "250 " + text
		case command == "ECHO":
			reply = "530 STARTTLS first"
		default:
			reply = "502 no such command, or not now"
		}
	}
}

// startTLS changes to TLS.
func (h *handler) startTLS(ctx context.Context, c *server.Conn, r *bufio.Reader) error {
	// Bytes that came together with STARTTLS were sent in the clear. Used as commands of the TLS session, they would let
	// somebody in the middle speak for the client (CVE-2011-0411).
	if r.Buffered() > 0 {
		return errors.New("client sent more than STARTTLS in the clear")
	}
	if _, err := io.WriteString(c, "220 go ahead\r\n"); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := c.Wrap(ctx, server.TLS(h.config)); err != nil {
		return err
	}
	c.SetNotifier(server.NotifierFunc(notice)) // from now on clients can tell a notice from a reply
	return nil
}

// notice encodes the server's own messages. Replies are whole lines, so a notice is never in the middle of one.
func notice(n server.Notice) []byte {
	switch n.Kind {
	case server.NoticeDrain:
		return fmt.Appendf(nil, "421 closing: %s\r\n", n.Reason)
	case server.NoticeMessage:
		return fmt.Appendf(nil, "* %s\r\n", n.Text)
	}
	return nil
}
