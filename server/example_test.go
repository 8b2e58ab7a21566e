package server_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"echod/server"
)

// upper answers each line in upper case. Between two lines it is idle, so that its clients leave as soon as a drain
// begins.
var upper = server.HandlerFunc(func(_ context.Context, c *server.Conn) error {
	in := bufio.NewReader(c)
	for {
		if in.Buffered() == 0 {
			c.MarkIdle()
		}
		line, err := in.ReadString('\n')
		if errors.Is(err, server.ErrDraining) || errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := io.WriteString(c, strings.ToUpper(line)); err != nil {
			return err
		}
	}
})

// A server for a line protocol. A drain ends the connections of idle clients at once.
func Example() {
	upper := server.HandlerFunc(func(_ context.Context, c *server.Conn) error {
		in := bufio.NewReader(c)
		for {
			if in.Buffered() == 0 {
				c.MarkIdle() // between two requests: a drain may interrupt the next Read
			}
			line, err := in.ReadString('\n')
			if errors.Is(err, server.ErrDraining) || errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
			if _, err := io.WriteString(c, strings.ToUpper(line)); err != nil {
				return err
			}
		}
	})
	srv, err := server.New(upper, server.Options{Limits: server.Limits{MaxConnsPerIP: 10}})
	if err != nil {
		log.Fatal(err)
	}
	ln, err := server.Listen(context.Background(), "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()

	client, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	if _, err := io.WriteString(client, "hello\n"); err != nil {
		log.Fatal(err)
	}
	answers := bufio.NewReader(client)
	answer, err := answers.ReadString('\n')
	if err != nil {
		log.Fatal(err)
	}
	fmt.Print(answer)

	srv.StartDrain(server.DrainOptions{Grace: time.Minute})
	_, err = answers.ReadByte()
	fmt.Println(err)
	_ = client.Close()
	fmt.Println(<-served)
	// Output:
	// HELLO
	// EOF
	// server closed
}

func ExampleServer_Shutdown() {
	srv, addr := start(server.Echo, server.Options{Notifier: server.DefaultLineNotifier()})

	client, err := net.Dial("tcp", addr.String())
	if err != nil {
		log.Fatal(err)
	}
	left := make(chan struct{})
	go func() { // a client that leaves when it is told to
		defer close(left)
		notice, _ := bufio.NewReader(client).ReadString('\n')
		fmt.Print("client: ", notice)
		_ = client.Close()
	}()
	awaitClient(srv)

	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	err = srv.Shutdown(ctx) // nil: no client was cut off
	<-left
	report, _ := srv.Report()
	fmt.Printf("%v: %d told, %d left by themselves, %d closed at the deadline\n",
		err, report.Notified, report.Left, report.AtDeadline)
	// Output:
	// client: SHUTDOWN 30 shutdown
	// <nil>: 1 told, 1 left by themselves, 0 closed at the deadline
}

func ExampleServer_WhilePaused() {
	srv, _ := start(server.Echo, server.Options{})
	defer srv.Close()

	err := srv.WhilePaused(context.Background(), "backup", func(ctx context.Context) error {
		fmt.Println("during the backup:", srv.Status().State)
		return ctx.Err() // ctx ends if an operator resumes the server meanwhile
	})
	fmt.Println("after the backup:", srv.Status().State, err)
	// Output:
	// during the backup: paused
	// after the backup: running <nil>
}

// A handler that says goodbye at a drain, and does not wait for its client to leave.
func ExampleConn_Draining() {
	clock := server.HandlerFunc(func(ctx context.Context, c *server.Conn) error {
		tick := time.NewTicker(time.Minute)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				if _, err := io.WriteString(c, "tick\n"); err != nil {
					return err
				}
			case <-c.Draining():
				_, err := fmt.Fprintf(c, "the clock stops: %s\n", c.DrainReason())
				return err
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	})
	srv, addr := start(clock, server.Options{})
	client, err := net.Dial("tcp", addr.String())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	awaitClient(srv)

	srv.StartDrain(server.DrainOptions{Grace: 10 * time.Second, Reason: "upgrade"})
	all, err := io.ReadAll(client)
	fmt.Printf("%s%v\n", all, err)
	_ = client.Close()
	<-srv.Done()
	// Output:
	// the clock stops: upgrade
	// <nil>
}

// STARTTLS: a client asks for TLS in the middle of the connection. The server's own notices follow the protocol: they
// are lines before the handshake and after it, and wait while it is in progress.
func ExampleConn_Wrap() {
	forServer, forClient := selfSigned()
	mail := server.HandlerFunc(func(ctx context.Context, c *server.Conn) error {
		in := bufio.NewReader(c)
		line, err := in.ReadString('\n')
		if err != nil {
			return err
		}
		if line != "STARTTLS\n" || in.Buffered() > 0 { // what came with the command is not protected by TLS
			return fmt.Errorf("unexpected command %q", line)
		}
		err = c.Wrap(ctx, func(ctx context.Context, nc net.Conn) (net.Conn, error) {
			if _, err := io.WriteString(nc, "go ahead\n"); err != nil { // here, so that no notice comes between
				return nil, err
			}
			session := tls.Server(nc, forServer)
			return session, session.HandshakeContext(ctx)
		})
		if err != nil {
			return err
		}
		if state, ok := c.TLS(); ok {
			err = c.SetLabel("tls", tls.VersionName(state.Version)) // shown in logs and listings
		}
		return errors.Join(err, server.Echo.ServeConn(ctx, c))
	})
	srv, addr := start(mail, server.Options{Notifier: server.DefaultLineNotifier()})
	defer srv.Close()

	client, err := net.Dial("tcp", addr.String())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	if _, err := io.WriteString(client, "STARTTLS\n"); err != nil {
		log.Fatal(err)
	}
	answer, err := bufio.NewReader(client).ReadString('\n')
	if err != nil {
		log.Fatal(err)
	}
	fmt.Print(answer)
	secure := tls.Client(client, forClient)
	if _, err := io.WriteString(secure, "a secret\n"); err != nil {
		log.Fatal(err)
	}
	lines := bufio.NewReader(secure)
	for _, next := range []func(){
		func() { srv.StartDrain(server.DrainOptions{Grace: time.Minute, Reason: "upgrade"}) },
		func() {},
	} {
		line, err := lines.ReadString('\n')
		if err != nil {
			log.Fatal(err)
		}
		fmt.Print(line)
		next()
	}
	// Output:
	// go ahead
	// a secret
	// SHUTDOWN 60 upgrade
}

// A handler can be tested in a bubble of testing/synctest, where time passes at once: with net.Pipe, the server, its
// timeouts and its drain work without a network.
func Example_synctest() {
	t := exampleT // the parameter of the Test function
	synctest.Test(t, func(t *testing.T) {
		ln := newPipeListener()
		srv, err := server.New(upper, server.Options{Timeouts: server.Timeouts{Idle: time.Hour}})
		if err != nil {
			t.Fatal(err)
		}
		go srv.Serve(ln)

		client := ln.dial()
		if _, err := io.WriteString(client, "hello\n"); err != nil {
			t.Fatal(err)
		}
		answer, err := bufio.NewReader(client).ReadString('\n')
		if answer != "HELLO\n" || err != nil {
			t.Errorf("answer %q, %v", answer, err)
		}
		time.Sleep(2 * time.Hour) // takes no time
		if got := srv.Closed()[0].Reason; got != server.ReasonIdleTimeout {
			t.Errorf("the idle client was closed as %v", got)
		}

		stubborn := ln.dial() // never reads and never leaves
		if _, err := io.WriteString(stubborn, "hel"); err != nil {
			t.Fatal(err)
		}
		report := srv.Drain(server.DrainOptions{Grace: time.Minute})
		if report.AtDeadline != 1 {
			t.Errorf("report %+v, want one closed at the deadline", report)
		}
	})
}

var exampleT *testing.T

func TestExampleSynctest(t *testing.T) {
	exampleT = t
	Example_synctest()
}

// pipeListener is a listener for net.Pipe.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (l *pipeListener) dial() net.Conn {
	server, client := net.Pipe()
	l.conns <- server
	return client
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case nc := <-l.conns:
		return nc, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error   { close(l.closed); return nil }
func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "pipe"} }

// A program that logs with log/slog gives the server a zap logger on top of its handler.
func Example_slog() {
	handler := slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{ReplaceAttr: withoutTime})
	srv, err := server.New(server.Echo, server.Options{Logger: zap.New(slogCore{handler})})
	if err != nil {
		log.Fatal(err)
	}
	hold, err := srv.Pause(server.PauseOptions{Reason: "backup"})
	if err != nil {
		log.Fatal(err)
	}
	hold.Release()
	// Output:
	// level=INFO msg=paused hold=h1 mode=hold reason=backup
	// level=INFO msg="hold released" cause="the hold was released" hold=h1 holds_left=0 mode=hold reason=backup
}

func withoutTime(_ []string, a slog.Attr) slog.Attr {
	if a.Key == slog.TimeKey {
		return slog.Attr{}
	}
	return a
}

// slogCore is a zapcore.Core that writes to a slog.Handler.
type slogCore struct{ handler slog.Handler }

func slogLevel(l zapcore.Level) slog.Level { return slog.Level(4 * l) } // both count from info, in steps of 1 and 4

func slogAttrs(fields []zapcore.Field) (attrs []slog.Attr) {
	encoded := zapcore.NewMapObjectEncoder()
	for _, f := range fields {
		f.AddTo(encoded)
	}
	for _, key := range slices.Sorted(maps.Keys(encoded.Fields)) {
		attrs = append(attrs, slog.Any(key, encoded.Fields[key]))
	}
	return attrs
}

func (c slogCore) Enabled(l zapcore.Level) bool {
	return c.handler.Enabled(context.Background(), slogLevel(l))
}

func (c slogCore) With(fields []zapcore.Field) zapcore.Core {
	return slogCore{c.handler.WithAttrs(slogAttrs(fields))}
}

func (c slogCore) Check(e zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return checked.AddCore(e, c)
	}
	return checked
}

func (c slogCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	record := slog.NewRecord(e.Time, slogLevel(e.Level), e.Message, 0)
	record.AddAttrs(slogAttrs(fields)...)
	return c.handler.Handle(context.Background(), record)
}

func (slogCore) Sync() error { return nil }

// start serves h on loopback.
func start(h server.Handler, o server.Options) (*server.Server, net.Addr) {
	srv, err := server.New(h, o)
	if err != nil {
		log.Fatal(err)
	}
	ln, err := server.Listen(context.Background(), "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	go srv.Serve(ln)
	awaitRunning(srv)
	return srv, ln.Addr()
}

func awaitRunning(srv *server.Server) {
	_ = srv.AwaitStatus(context.Background(), func(state server.State, _ int) bool { return state == server.StateRunning })
}

func awaitClient(srv *server.Server) {
	_ = srv.AwaitStatus(context.Background(), func(_ server.State, connections int) bool { return connections == 1 })
}

// selfSigned returns the TLS configurations of a server and of a client that trusts it.
func selfSigned() (forServer, forClient *tls.Config) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		log.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"mail.test"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		log.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		log.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(cert)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
		&tls.Config{RootCAs: roots, ServerName: "mail.test"}
}
