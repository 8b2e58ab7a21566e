package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"echod/server"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start serves. drain begins the drain, and returns when all clients have been told.
func start(t *testing.T, h *hub, config *tls.Config) (addr net.Addr, srv *server.Server, drain func()) {
	t.Helper()
	srv, err := newServer(h, config, zaptest.NewLogger(t, zaptest.Level(zap.WarnLevel)))
	if err != nil {
		t.Fatal(err)
	}
	ln, err := server.Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- serve(ctx, srv, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return ln.Addr(), srv, func() {
		cancel()
		<-srv.Draining()
	}
}

// awaitConns waits until n connections are open.
func awaitConns(t *testing.T, srv *server.Server, n int) {
	t.Helper()
	if err := srv.AwaitStatus(t.Context(), func(_ server.State, open int) bool { return open == n }); err != nil {
		t.Fatal(err)
	}
}

func TestChat(t *testing.T) {
	// A certificate, and a client that trusts it.
	https := httptest.NewTLSServer(nil)
	https.Close()
	serverConfig := &tls.Config{Certificates: https.TLS.Certificates}
	clientConfig := &tls.Config{RootCAs: x509.NewCertPool(), ServerName: "example.com"}
	clientConfig.RootCAs.AddCert(https.Certificate())

	for name, secure := range map[string]bool{"plain": false, "over TLS": true} {
		t.Run(name, func(t *testing.T) {
			var config *tls.Config
			join := func(addr net.Addr, hello string) client {
				return newClient(t, dial(t, addr), hello)
			}
			if secure {
				config = serverConfig
				join = func(addr net.Addr, hello string) client {
					return newClient(t, tls.Client(dial(t, addr), clientConfig), hello)
				}
			}
			addr, srv, drain := start(t, &hub{}, config)

			ann := join(addr, "kitchen ann")
			ann.expect("* ann is here")
			bob := join(addr, "kitchen bob")
			ann.expect("* bob is here")
			bob.expect("* bob is here")
			eve := join(addr, "cellar eve")
			eve.expect("* eve is here")

			ann.send("hello")
			ann.expect("ann: hello")
			bob.expect("ann: hello")
			bob.send("\x1b[2J")
			bob.expect("* ") // the server's words say what is wrong
			bob.send("bye")
			bob.expect("bob: bye")
			ann.expect("bob: bye")
			bob.close()
			ann.expect("* bob has left")
			awaitConns(t, srv, 2)

			drain()
			for _, c := range []client{ann, eve} {
				c.expect("* the server stops in 5 s: shutdown")
			}
			ann.send("still here")
			ann.expect("ann: still here")
			for _, c := range []client{ann, eve} {
				c.closeWrite()
				if rest, err := io.ReadAll(c.r); len(rest) > 0 || err != nil {
					t.Errorf("got %q, %v, want an end of stream", rest, err)
				}
			}
			<-srv.Done()
			if report, _ := srv.Report(); report.Left != 2 || report.Notified != 2 {
				t.Errorf("%+v, want 2 notified and left", report)
			}
		})
	}
}

func TestSlowMember(t *testing.T) {
	fill := strings.Repeat("x", 1000)

	for _, test := range []struct {
		name      string
		lastWrite time.Duration
		reads     bool
	}{
		{"one that reads again is told why it was dropped", time.Minute, true},
		{"one that never reads delays nobody", time.Millisecond, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			addr, srv, _ := start(t, &hub{lastWrite: test.lastWrite}, nil)
			slow := newClient(t, dial(t, addr), "kitchen slow")
			slow.expect("* slow is here")
			ann := newClient(t, dial(t, addr), "kitchen ann")
			ann.expect("* ann is here")

			// ann reads each message before she sends the next one. slow reads none: they fill the kernel's buffers, and
			// then its queue.
			sent := 0
			for left := false; !left; sent++ {
				ann.send(fill)
				line := ann.readLine()
				if left = line == "* slow has left"; left {
					line = ann.readLine()
				}
				if line != "ann: "+fill {
					t.Fatalf("after %d messages: got %q", sent, line)
				}
			}

			if test.reads {
				all, err := io.ReadAll(slow.r)
				if err != nil {
					t.Fatal(err)
				}
				if !strings.HasSuffix(string(all), "\n* dropped: 64 messages behind\n") {
					t.Errorf("got %q at the end, want the reason", all[max(0, len(all)-100):])
				}
				if n := strings.Count(string(all), "ann: "); n >= sent || n <= queueLength {
					t.Errorf("got %d messages of %d, want those that were queued", n, sent)
				}
			}
			slow.close()
			awaitConns(t, srv, 1)
			closed := srv.Closed()[0]
			if !errors.Is(closed.Err, errTooSlow) || closed.Labels["nick"] != "slow" {
				t.Errorf("closed %+v, want slow with errTooSlow", closed)
			}
		})
	}
}

func TestFirstLine(t *testing.T) {
	for _, line := range []string{"", "kitchen", " ann", "kitchen a\x07nn"} {
		addr, _, _ := start(t, &hub{}, nil)
		c := newClient(t, dial(t, addr), line)
		c.expect("* ")
		if rest, err := io.ReadAll(c.r); len(rest) > 0 || err != nil {
			t.Errorf("%q: got %q, %v, want an end of stream", line, rest, err)
		}
	}
}

type client struct {
	t *testing.T
	net.Conn
	r *bufio.Reader
}

func dial(t *testing.T, addr net.Addr) net.Conn {
	t.Helper()
	nc, err := net.Dial(addr.Network(), addr.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	return nc
}

func newClient(t *testing.T, nc net.Conn, hello string) client {
	t.Helper()
	c := client{t, nc, bufio.NewReader(nc)}
	c.send(hello)
	return c
}

func (c client) send(line string) {
	c.t.Helper()
	if _, err := io.WriteString(c, line+"\n"); err != nil {
		c.t.Fatal(err)
	}
}

func (c client) readLine() string {
	c.t.Helper()
	line, err := c.r.ReadString('\n')
	if err != nil {
		c.t.Fatalf("got %q, %v", line, err)
	}
	return strings.TrimSuffix(line, "\n")
}

// expect reads a line that is want, or begins with "* " if that is all that is wanted.
func (c client) expect(want string) {
	c.t.Helper()
	if got := c.readLine(); got != want && (want != "* " || !strings.HasPrefix(got, want)) {
		c.t.Fatalf("got %q, want %q", got, want)
	}
}

func (c client) close() {
	c.t.Helper()
	if err := c.Close(); err != nil {
		c.t.Fatal(err)
	}
}

func (c client) closeWrite() {
	c.t.Helper()
	if err := c.Conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		c.t.Fatal(err)
	}
}
