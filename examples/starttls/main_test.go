package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/http/httptest"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"go.uber.org/zap/zaptest"

	"echod/server"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestStartTLS(t *testing.T) {
	// A certificate, and a client that trusts it.
	https := httptest.NewTLSServer(nil)
	https.Close()
	config := &tls.Config{RootCAs: x509.NewCertPool(), ServerName: "example.com"}
	config.RootCAs.AddCert(https.Certificate())

	h := &handler{&tls.Config{Certificates: https.TLS.Certificates}}
	srv, err := server.New(h, server.Options{Logger: zaptest.NewLogger(t)})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := server.Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, signal := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- serve(ctx, srv, ln) }()

	plain := dial(t, ln.Addr())
	plain.expect("220 ready")
	secure := dial(t, ln.Addr())
	secure.expect("220 ready")

	t.Run("commands that need TLS are refused without it", func(t *testing.T) {
		plain.send("ECHO hello")
		plain.expect("530 STARTTLS first")
	})
	t.Run("QUIT ends the connection", func(t *testing.T) {
		c := dial(t, ln.Addr())
		c.expect("220 ready")
		c.send("QUIT")
		c.expect("221 bye")
		if rest, err := io.ReadAll(c.r); len(rest) > 0 || err != nil {
			t.Errorf("got %q, %v, want an end of stream", rest, err)
		}
	})
	t.Run("STARTTLS changes to TLS", func(t *testing.T) {
		secure.send("starttls")
		secure.expect("220 go ahead")
		tc := tls.Client(secure.Conn, config)
		if err := tc.HandshakeContext(t.Context()); err != nil {
			t.Fatal(err)
		}
		secure = client{t: t, Conn: tc, r: bufio.NewReader(tc)}
		secure.expect("220 ready, over TLS")
		secure.send("ECHO hello")
		secure.expect("250 hello")
		secure.send("STARTTLS")
		secure.expect("502 no such command, or not now")
	})
	t.Run("commands sent in the clear behind STARTTLS are not executed", func(t *testing.T) {
		c := dial(t, ln.Addr())
		c.expect("220 ready")
		c.send("STARTTLS\r\nECHO injected")
		if rest, err := io.ReadAll(c.r); len(rest) > 0 || err != nil {
			t.Errorf("got %q, %v, want an end of stream", rest, err)
		}
	})
	t.Run("a failed handshake ends the connection", func(t *testing.T) {
		c := dial(t, ln.Addr())
		c.expect("220 ready")
		c.send("STARTTLS")
		c.expect("220 go ahead")
		c.send("QUIT, for example, is no handshake")
		if _, err := io.ReadAll(c.r); err != nil {
			t.Errorf("%v, want an end of stream", err)
		}
	})
	t.Run("messages reach clients with TLS only", func(t *testing.T) {
		sent, failed, err := srv.Notify(t.Context(), "lunch")
		if sent != 1 || failed != 0 || err != nil {
			t.Errorf("sent %d, failed %d, %v; want 1, 0, nil", sent, failed, err)
		}
		secure.expect("* lunch")
		secure.send("ECHO hello")
		secure.expect("250 hello")
	})

	signal()
	t.Run("a drain tells clients with TLS, and ends both with a FIN", func(t *testing.T) {
		secure.expect("421 closing: shutdown")
		for name, c := range map[string]client{"plain": plain, "secure": secure} {
			if rest, err := io.ReadAll(c.r); len(rest) > 0 || err != nil {
				t.Errorf("%s: got %q, %v, want an end of stream", name, rest, err)
			}
		}
	})
	if err := <-served; err != nil {
		t.Errorf("serve: %v", err)
	}
	if report, _ := srv.Report(); report.Left != 2 {
		t.Errorf("%+v, want 2 clients that left before the deadline", report)
	}
}

type client struct {
	t *testing.T
	net.Conn
	r *bufio.Reader
}

func dial(t *testing.T, addr net.Addr) client {
	t.Helper()
	nc, err := net.Dial(addr.Network(), addr.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	return client{t, nc, bufio.NewReader(nc)}
}

func (c client) send(line string) {
	c.t.Helper()
	if _, err := io.WriteString(c, line+"\r\n"); err != nil {
		c.t.Fatal(err)
	}
}

func (c client) expect(want string) {
	c.t.Helper()
	line, err := c.r.ReadString('\n')
	if got := strings.TrimSuffix(line, "\r\n"); got != want {
		c.t.Fatalf("got %q (%v), want %q", got, err, want)
	}
}
