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
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"echod/server"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start serves. drain begins the drain, and returns when all clients have been told.
func start(t *testing.T, config *tls.Config) (addr net.Addr, srv *server.Server, drain func()) {
	t.Helper()
	srv, err := newServer(zaptest.NewLogger(t, zaptest.Level(zap.WarnLevel)))
	if err != nil {
		t.Fatal(err)
	}
	ln, err := server.Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- serve(ctx, srv, ln, config) }()
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
			addr, srv, drain := start(t, config)

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

// TestSlowMember runs in a bubble, where connections have no buffer: a member that does not read blocks its writer at
// once, and the time that it has passes in no time.
func TestSlowMember(t *testing.T) {
	message := strings.Repeat("x", 1000)

	// drop has a member dropped: ann reads each message before she sends the next one, and slow reads none.
	drop := func(t *testing.T) (srv *server.Server, slow client, end func()) {
		t.Helper()
		srv, err := newServer(nil)
		if err != nil {
			t.Fatal(err)
		}
		ln := make(pipeListener)
		served := make(chan error, 1)
		go func() { served <- srv.Serve(ln) }()
		slow = newClient(t, ln.dial(), "kitchen slow")
		slow.expect("* slow is here")
		ann := newClient(t, ln.dial(), "kitchen ann")
		ann.expect("* ann is here")
		synctest.Wait() // until slow's writer is blocked
		for range queueLength + 1 {
			ann.send(message)
			ann.expect("ann: " + message)
		}
		ann.expect("* slow has left")
		return srv, slow, func() {
			slow.close()
			ann.close()
			srv.StartDrain(server.DrainOptions{})
			if err := <-served; !errors.Is(err, server.ErrServerClosed) {
				t.Errorf("Serve: %v", err)
			}
			closed := srv.Closed()
			i := slices.IndexFunc(closed, func(c server.ClosedConn) bool { return c.Labels["nick"] == "slow" })
			if i < 0 || !errors.Is(closed[i].Err, errTooSlow) {
				t.Errorf("closed %+v, want slow with errTooSlow", closed)
			}
		}
	}

	t.Run("is told why it was dropped if it reads again", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			_, slow, end := drop(t)
			slow.expect("* ann is here")
			for range queueLength {
				slow.expect("ann: " + message)
			}
			slow.expect("* dropped: 256 messages behind")
			end()
		})
	})
	t.Run("is closed soon if it never reads", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			srv, _, end := drop(t)
			began := time.Now()
			awaitConns(t, srv, 1)
			if took := time.Since(began); took > lastWrite+time.Second {
				t.Errorf("took %v, want %v and a moment", took, lastWrite)
			}
			end()
		})
	})
}

// pipeListener is a listener in memory; see the synctest example.
type pipeListener chan net.Conn

func (ln pipeListener) dial() net.Conn {
	client, server := net.Pipe()
	ln <- server
	return client
}

func (ln pipeListener) Accept() (net.Conn, error) {
	if nc, ok := <-ln; ok {
		return nc, nil
	}
	return nil, net.ErrClosed
}

func (ln pipeListener) Close() error {
	close(ln)
	return nil
}

func (ln pipeListener) Addr() net.Addr { return &net.IPAddr{} }

func TestFirstLine(t *testing.T) {
	for _, line := range []string{"", "kitchen", " ann", "kitchen a\x07nn"} {
		addr, _, _ := start(t, nil)
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
