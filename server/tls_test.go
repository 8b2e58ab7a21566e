package server

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// tlsConfigs returns the configurations of a server at 127.0.0.1 and of a client that trusts it.
func tlsConfigs(t testing.TB) (forServer, forClient *tls.Config) {
	t.Helper()
	cert := newCertificate(t, "server", nil)
	roots := x509.NewCertPool()
	roots.AddCert(cert.Leaf)
	return &tls.Config{Certificates: []tls.Certificate{cert}}, &tls.Config{RootCAs: roots, ServerName: "127.0.0.1"}
}

// newCertificate makes a certificate for 127.0.0.1 and for name, signed by an issuer or, if that is nil, by itself.
func newCertificate(t testing.TB, name string, issuer *tls.Certificate) tls.Certificate {
	t.Helper()
	return signCertificate(t, name, time.Now().Add(time.Hour), issuer)
}

func signCertificate(t testing.TB, name string, notAfter time.Time, issuer *tls.Certificate) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: notAfter.Add(-90 * 24 * time.Hour), NotAfter: notAfter,
		IPAddresses: []net.IP{{127, 0, 0, 1}}, DNSNames: []string{name},
		IsCA: issuer == nil, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	parent, signer := template, any(key)
	if issuer != nil {
		parent, signer = issuer.Leaf, issuer.PrivateKey
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// writeCertificate writes a certificate and its key to two files in dir.
func writeCertificate(t testing.TB, dir string, cert tls.Certificate) (certFile, keyFile string) {
	t.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for file, block := range map[string]*pem.Block{
		certFile: {Type: "CERTIFICATE", Bytes: cert.Certificate[0]},
		keyFile:  {Type: "PRIVATE KEY", Bytes: key},
	} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return certFile, keyFile
}

// dialTLS connects a client, which performs the handshake with its first read or write.
func dialTLS(t testing.TB, addr net.Addr, config *tls.Config) *tls.Conn {
	t.Helper()
	return tls.Client(finConn{dialTCP(t, addr)}, config)
}

// finConn makes an error of a FIN, so that a TLS client sees io.EOF only after a close_notify.
type finConn struct{ *net.TCPConn }

var errFIN = errors.New("the connection ended without close_notify")

// Read reads from the connection.
func (c finConn) Read(p []byte) (int, error) {
	n, err := c.TCPConn.Read(p)
	if errors.Is(err, io.EOF) {
		err = errFIN
	}
	return n, err
}

// serveTLS starts a server that performs TLS handshakes, and returns what connects a client.
func serveTLS(t *testing.T, h Handler, o Options) (*Server, func() *tls.Conn) {
	t.Helper()
	forServer, forClient := tlsConfigs(t)
	ln := listen(t)
	s, _ := newServer(t, h, o)
	serveListener(t, s, Listener{Listener: ln, TLSConfig: forServer})
	return s, func() *tls.Conn { return dialTLS(t, ln.Addr(), forClient) }
}

func TestServeTLS(t *testing.T) {
	cert := newCertificate(t, "server", nil)
	roots := x509.NewCertPool()
	roots.AddCert(cert.Leaf)
	certFile, keyFile := writeCertificate(t, t.TempDir(), cert)
	config := &tls.Config{Certificates: []tls.Certificate{cert}}
	for name, tt := range map[string]struct {
		config            *tls.Config
		certFile, keyFile string
		want              string // in the error; empty if the server serves
	}{
		"takes the certificate from files":   {certFile: certFile, keyFile: keyFile},
		"takes it from Options":              {config: config},
		"prefers files":                      {config: &tls.Config{Certificates: make([]tls.Certificate, 1)}, certFile: certFile, keyFile: keyFile},
		"needs a certificate":                {want: "loading the certificate"},
		"names the file that does not exist": {certFile: "missing.pem", keyFile: keyFile, want: "missing.pem"},
		"refuses a key of another file's":    {certFile: keyFile, keyFile: keyFile, want: "PEM"},
	} {
		t.Run(name, func(t *testing.T) {
			s, _ := newServer(t, Echo, Options{TLSConfig: tt.config})
			ln := listen(t)
			served := make(chan error, 1)
			go func() { served <- s.ServeTLS(ln, tt.certFile, tt.keyFile) }()
			if tt.want != "" {
				wantErrText(t, "ServeTLS", <-served, tt.want)
				if _, err := net.Dial("tcp", ln.Addr().String()); err == nil {
					t.Error("ServeTLS left its listener open")
				}
				_ = s.Close()
				return
			}
			c := dialTLS(t, ln.Addr(), &tls.Config{RootCAs: roots, ServerName: "127.0.0.1"})
			send(t, c, "hello")
			receives(t, c, "hello")
			_ = s.Close()
			wantErr(t, "ServeTLS", <-served, ErrServerClosed)
		})
	}
	t.Run("refuses a listener whose configuration has no certificate", func(t *testing.T) {
		s, _ := newServer(t, Echo, Options{})
		wantErr(t, "ServeListener", s.ServeListener(Listener{Listener: listen(t), TLSConfig: new(tls.Config)}), errNoCertificate)
		_ = s.Close()
	})
	t.Run("ListenAndServe uses it for a tls address", func(t *testing.T) {
		s, _ := newServer(t, Echo, Options{TLSConfig: config})
		served := make(chan error, 1)
		go func() { served <- s.ListenAndServe("tls://127.0.0.1:0") }()
		_ = s.AwaitStatus(t.Context(), func(state State, _ int) bool { return state == StateRunning })
		listeners := s.Status().Listeners
		if len(listeners) != 1 || !listeners[0].TLS {
			t.Fatalf("listeners %+v, want one with TLS", listeners)
		}
		c := dialTLS(t, listeners[0].Address, &tls.Config{RootCAs: roots, ServerName: "127.0.0.1"})
		send(t, c, "hello")
		receives(t, c, "hello")
		_ = s.Close()
		wantErr(t, "ListenAndServe", <-served, ErrServerClosed)
	})
}

func TestTLSHandshakeFailure(t *testing.T) {
	authority, stranger := newCertificate(t, "authority", nil), newCertificate(t, "stranger", nil)
	clientCAs := x509.NewCertPool()
	clientCAs.AddCert(authority.Leaf)
	forServer, forClient := tlsConfigs(t)
	forServer.ClientCAs = clientCAs
	mutual := forServer.Clone()
	mutual.ClientAuth = tls.RequireAndVerifyClientCert
	forServer.MinVersion = tls.VersionTLS13
	withCert := func(cert tls.Certificate) *tls.Config {
		c := forClient.Clone()
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
		return c
	}
	handshake := func(config *tls.Config) func(*net.TCPConn) {
		return func(nc *net.TCPConn) {
			c := tls.Client(nc, config)
			if c.Handshake() == nil {
				_, _ = c.Read(make([]byte, 1)) // TLS 1.3: the server's alert comes after the client's end of the handshake
			}
		}
	}
	for name, tt := range map[string]struct {
		config *tls.Config
		client func(*net.TCPConn)
		want   HandshakeFailure
		text   string
	}{
		"plain text": {forServer, func(nc *net.TCPConn) { send(t, nc, "hello\n") }, HandshakeNotTLS, `began with "hello"`},
		"an old version": {
			forServer, handshake(&tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}), HandshakeIncompatible, "unsupported versions",
		},
		"a client that distrusts the server": {forServer, handshake(&tls.Config{ServerName: "127.0.0.1"}), HandshakeRefused, "bad certificate"},
		"no client certificate":              {mutual, handshake(forClient), HandshakeNoCertificate, "one is required"},
		"a stranger's client certificate":    {mutual, handshake(withCert(stranger)), HandshakeBadCertificate, "unknown authority"},
		"a client that leaves in the middle": {
			forServer, func(nc *net.TCPConn) {
				_ = tls.Client(readFails{nc}, forClient).Handshake()
				_ = nc.CloseWrite()
			}, HandshakeAborted, "closed the connection",
		},
		"a client that says nothing": {forServer, func(*net.TCPConn) {}, HandshakeTimeout, "in time"},
	} {
		t.Run(name, func(t *testing.T) {
			ln := listen(t)
			timeout := time.Minute
			if tt.want == HandshakeTimeout {
				timeout = 100 * time.Millisecond
			}
			s, logs := newServer(t, Echo, Options{Timeouts: Timeouts{Handshake: timeout}})
			serveListener(t, s, Listener{Listener: ln, TLSConfig: tt.config})
			nc := dialTCP(t, ln.Addr())
			tt.client(nc)
			awaitClosed(t, s, ReasonHandshakeFailed)
			entries := logs.FilterMessage("handshake failed").All()
			if len(entries) != 1 {
				t.Fatalf("%d log lines, want 1", len(entries))
			}
			fields := entries[0].ContextMap()
			wantEqual(t, "remote", fields["remote"], any(nc.LocalAddr().String()))
			if text := fields["error"].(string); !strings.Contains(text, tt.text) {
				t.Errorf("the log says %q, want %q", text, tt.text)
			}
			closed := s.Closed()[0]
			if failed, ok := errors.AsType[*HandshakeError](closed.Err); !ok || failed.Failure != tt.want {
				t.Errorf("error of the closed connection: %v, want %s", closed.Err, tt.want)
			}
			_ = nc.CloseWrite()
			_, _ = io.Copy(io.Discard, nc)
		})
	}
	t.Run("a health check is no failure", func(t *testing.T) {
		ln := listen(t)
		s, logs := newServer(t, Echo, Options{})
		serveListener(t, s, Listener{Listener: ln, TLSConfig: forServer})
		_ = dialTCP(t, ln.Addr()).Close()
		awaitClosed(t, s, ReasonClientClosed)
		wantEqual(t, "log lines", logs.FilterMessage("handshake failed").Len(), 0)
	})
}

// readFails sends what a TLS client sends first, and then gives up.
type readFails struct{ net.Conn }

// Read fails.
func (readFails) Read([]byte) (int, error) { return 0, io.ErrClosedPipe }

// awaitClosed waits until one connection was closed, and checks why.
func awaitClosed(t *testing.T, s *Server, want Reason) {
	t.Helper()
	_ = s.state.Await(t.Context(), func(st *state) bool { return st.accepted > 0 && st.conns.len() == 0 })
	wantClosed(t, s, map[Reason]uint64{want: 1})
}

func TestTLS(t *testing.T) {
	t.Run("a PROXY header comes first and names the client", func(t *testing.T) {
		forServer, forClient := tlsConfigs(t)
		ln := listen(t)
		s, logs := newServer(t, Echo, Options{})
		serveListener(t, s, Listener{Listener: ln, WrapConn: addressLine, TLSConfig: forServer})
		nc := dialTCP(t, ln.Addr())
		send(t, nc, "203.0.113.1\n")
		c := tls.Client(nc, forClient)
		send(t, c, "hello")
		receives(t, c, "hello")
		for info := range s.Conns() {
			wantEqual(t, "remote", info.Remote.String(), "203.0.113.1:7")
		}
		plain := dialTCP(t, ln.Addr())
		send(t, plain, "203.0.113.2\nplain text")
		_, _ = io.Copy(io.Discard, plain)
		entries := logs.FilterMessage("handshake failed").All()
		if len(entries) != 1 {
			t.Fatalf("%d log lines, want 1", len(entries))
		}
		wantEqual(t, "remote", entries[0].ContextMap()["remote"], any("203.0.113.2:7"))
	})

	t.Run("the server still sends after the client's close_notify", func(t *testing.T) {
		answer := bytes.Repeat([]byte("answer\n"), 100_000)
		_, dial := serveTLS(t, HandlerFunc(func(_ context.Context, c *Conn) error {
			if _, err := io.Copy(io.Discard, c); err != nil {
				return err
			}
			_, err := c.Write(answer)
			return err
		}), Options{})
		c := dial()
		send(t, c, "question")
		_ = c.CloseWrite()
		receivesAll(t, c, string(answer))
	})

	t.Run("a rejection is told inside TLS", func(t *testing.T) {
		s, dial := serveTLS(t, Echo, Options{})
		if _, err := s.Pause(PauseOptions{Mode: PauseReject}); err != nil {
			t.Fatal(err)
		}
		receivesAll(t, dial(), "PAUSED\n")
	})

	// crypto/tls gives its close_notify five seconds. The window of the fake connection is shut to the last byte.
	t.Run("a client that never reads is closed in time", func(t *testing.T) {
		const grace = 100 * time.Millisecond
		forServer, forClient := tlsConfigs(t)
		ln := newFakeListener()
		s, _ := newServer(t, untilWriteFails, Options{})
		serveListener(t, s, Listener{Listener: ln, TLSConfig: forServer})
		nc, err := ln.dialFrom("198.51.100.1")
		if err != nil {
			t.Fatal(err)
		}
		if err := tls.Client(nc, forClient).Handshake(); err != nil {
			t.Fatal(err)
		}
		if _, took := drainIn(s, grace, "x"); took > grace+budget {
			t.Errorf("drain took %v, want at most the grace period of %v and %v", took, grace, budget)
		}
	})

	t.Run("a handler can start it in the middle", func(t *testing.T) {
		forServer, forClient := tlsConfigs(t)
		s, addr := serveTCP(t, HandlerFunc(func(ctx context.Context, c *Conn) error {
			if _, err := io.ReadFull(c, make([]byte, len("STARTTLS"))); err != nil {
				return err
			}
			if err := c.Wrap(ctx, TLS(forServer)); err != nil {
				return err
			}
			return Echo.ServeConn(ctx, c)
		}), Options{})
		nc := dialTCP(t, addr)
		send(t, nc, "STARTTLS")
		c := tls.Client(finConn{nc}, forClient)
		send(t, c, "hello\n")
		receives(t, c, "hello\n")
		s.StartDrain(DrainOptions{Grace: time.Minute, Reason: "x"})
		receives(t, c, "SHUTDOWN 60 x\n")
		_ = c.CloseWrite()
		receivesAll(t, c, "")
		<-s.Done()
		wantClosed(t, s, map[Reason]uint64{ReasonClientLeft: 1})
	})

	t.Run("a slow reader is not stalled", func(t *testing.T) {
		const stall = 500 * time.Millisecond
		size := 0
		s, dial := serveTLS(t, HandlerFunc(func(_ context.Context, c *Conn) error {
			for range 12 {
				n, err := c.Write(make([]byte, 1<<20))
				if size += n; err != nil {
					return err
				}
			}
			return nil
		}), Options{Timeouts: Timeouts{Stall: stall}})
		c := dial()
		got := 0
		for p := make([]byte, 256<<10); ; {
			n, err := io.ReadFull(c, p)
			got += n
			if err != nil {
				break
			}
			time.Sleep(50 * time.Millisecond) // about 5 MiB/s: much longer than the timeout for all, and much shorter for a step
		}
		awaitConns(t, s, 0)
		wantClosed(t, s, map[Reason]uint64{ReasonHandlerDone: 1})
		wantEqual(t, "bytes", got, size)
	})
}

// A write that timed out corrupts a session (crypto/tls), so nothing of the server's may meet the handler's deadline.
func TestG14TheHandlersWriteDeadlineHurtsNoNotice(t *testing.T) {
	const deadline = time.Second // of each write of the handler
	clients := unlessRace(1000)
	s, dial := serveTLS(t, HandlerFunc(func(_ context.Context, c *Conn) error {
		for p := make([]byte, 64); ; {
			n, err := c.Read(p)
			if n > 0 {
				if err := errors.Join(c.SetWriteDeadline(time.Now().Add(deadline)), writeAll(c, p[:n])); err != nil {
					return err
				}
			}
			if err != nil {
				return ignoreEOF(err)
			}
		}
	}), Options{})
	conns := make([]*tls.Conn, clients)
	for i := range conns {
		conns[i] = dial()
		send(t, conns[i], "hello\n")
		receives(t, conns[i], "hello\n")
	}
	time.Sleep(deadline) // all deadlines have passed
	if sent, failed, err := s.Notify(t.Context(), "news"); sent != clients || failed != 0 || err != nil {
		t.Errorf("Notify: %d sent, %d failed, %v; want %d sent", sent, failed, err, clients)
	}
	s.StartDrain(DrainOptions{Grace: time.Minute, Reason: "x"})
	for _, c := range conns {
		receives(t, c, "NOTICE news\nSHUTDOWN ")
		send(t, c, "last words\n")
		_ = c.CloseWrite()
		rest, err := io.ReadAll(c)
		if err != nil || !strings.HasSuffix(string(rest), "x\nlast words\n") {
			t.Errorf("client received %q, %v", rest, err)
		}
		_ = c.Close()
	}
	<-s.Done()
	wantClosed(t, s, map[Reason]uint64{ReasonClientLeft: uint64(clients)})
}

func writeAll(c *Conn, p []byte) error {
	_, err := c.Write(p)
	return err
}

func ignoreEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func TestG14StreamingTLSClientsGetEveryByteBackAtADrain(t *testing.T) {
	clients := unlessRace(200)
	const notice = "!told!"
	s, dial := serveTLS(t, Echo, Options{Notifier: NotifierFunc(func(Notice) []byte { return []byte(notice) })})
	var all, streaming sync.WaitGroup
	streaming.Add(clients)
	conns := make([]*tls.Conn, clients)
	for i := range conns { // before any of them streams, or the handshakes take long
		conns[i] = dial()
		if err := conns[i].Handshake(); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range conns {
		_ = c.NetConn().(finConn).SetReadBuffer(32 << 10) // so that little is in flight
		_ = c.NetConn().(finConn).SetWriteBuffer(32 << 10)
		all.Go(func() { streamUntilTold(t, c, notice, streaming.Done) })
	}
	streaming.Wait()
	s.StartDrain(DrainOptions{Grace: time.Minute, Reason: "x"})
	all.Wait()
	<-s.Done()
	wantClosed(t, s, map[Reason]uint64{ReasonClientLeft: uint64(clients)})
}

// streamUntilTold sends digits until notice comes back in between, and checks that all of them come back. It calls
// begun when the first have.
func streamUntilTold(t *testing.T, c *tls.Conn, notice string, begun func()) {
	told := make(chan struct{})
	var sent int
	var writer sync.WaitGroup
	chunk := []byte(strings.Repeat("0123456789", 700))
	writer.Go(func() {
		defer func() { _ = c.CloseWrite() }()
		for {
			select {
			case <-told:
				return
			default:
			}
			n, err := c.Write(chunk)
			if sent += n; err != nil {
				return
			}
		}
	})
	var echoed []byte
	var err error
	for p := make([]byte, 32<<10); err == nil; {
		var n int
		n, err = c.Read(p)
		if len(echoed) == 0 {
			begun()
		}
		before := max(0, len(echoed)-len(notice))
		echoed = append(echoed, p[:n]...)
		if bytes.Contains(echoed[before:], []byte(notice)) {
			echoed = bytes.Replace(echoed, []byte(notice), nil, 1)
			close(told)
		}
	}
	writer.Wait()
	want := bytes.Repeat(chunk, sent/len(chunk))
	if !errors.Is(err, io.EOF) || !bytes.Equal(echoed, want) {
		t.Errorf("of %d bytes %d came back, %v; want all, and a close_notify", len(want), len(echoed), err)
	}
	_ = c.Close()
}

func TestG14SlowTLSHandshakesDelayNobody(t *testing.T) {
	const slow, most = 300, 500 * time.Millisecond
	forServer, forClient := tlsConfigs(t)
	s, _ := newServer(t, Echo, Options{})
	ln := listen(t)
	serveListener(t, s, Listener{Listener: ln, TLSConfig: forServer})
	for range slow {
		newSlowClient(t, ln.Addr(), forClient)
	}
	awaitConns(t, s, slow)
	began := time.Now()
	c := dialTLS(t, ln.Addr(), forClient)
	send(t, c, "hello")
	receives(t, c, "hello")
	took := time.Since(began)
	t.Logf("served after %v", took)
	if took > most {
		t.Errorf("a client was served after %v, want at most %v", took, most)
	}
}

// Slow clients take no place, so a good one is served although there are more of them than places. One address has no more
// handshakes than it may have connections.
func TestG14SlowTLSHandshakesAtALimit(t *testing.T) {
	forServer, forClient := tlsConfigs(t)
	for name, tt := range map[string]struct {
		limits Limits
		open   int // of the slow clients
	}{
		"places of the server":    {Limits{MaxConns: 2}, 8},
		"connections of a client": {Limits{MaxConnsPerIP: 4}, 4},
	} {
		t.Run(name, func(t *testing.T) {
			s, _ := newServer(t, Echo, Options{Limits: tt.limits})
			ln := listen(t)
			serveListener(t, s, Listener{Listener: ln, TLSConfig: forServer})
			for range 8 {
				newSlowClient(t, ln.Addr(), forClient)
			}
			awaitConns(t, s, tt.open)
			c := dialTLS(t, ln.Addr(), forClient)
			send(t, c, "hello")
			receives(t, c, "hello")
		})
	}
}

// slowClient is a TLS client that has sent half of its first message. It continues when complete is closed.
type slowClient struct {
	*tls.Conn
	complete chan struct{}
}

func newSlowClient(t *testing.T, addr net.Addr, config *tls.Config) slowClient {
	t.Helper()
	half := &halfWriter{finConn: finConn{dialTCP(t, addr)}, begun: make(chan struct{}), complete: make(chan struct{})}
	c := slowClient{tls.Client(half, config), half.complete}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = c.Handshake()
	}()
	<-half.begun
	t.Cleanup(func() {
		_ = half.Close()
		select {
		case <-half.complete:
		default:
			close(half.complete)
		}
		<-ended
	})
	return c
}

// halfWriter writes half of what it is given first, and the rest when complete is closed.
type halfWriter struct {
	finConn
	begun, complete chan struct{}
	once            sync.Once
}

// Write writes p.
func (w *halfWriter) Write(p []byte) (n int, err error) {
	w.once.Do(func() {
		n, err = w.finConn.Write(p[:len(p)/2])
		close(w.begun)
		<-w.complete
	})
	if err != nil {
		return n, err
	}
	m, err := w.finConn.Write(p[n:])
	return n + m, err
}

func TestG14TLSClientsInTheQueueAndInTheirHandshakeAreToldOfADrain(t *testing.T) {
	const queued, unfinished = 50, 20
	forServer, forClient := tlsConfigs(t)
	ln := listen(t)
	s, _ := newServer(t, Echo, Options{})
	serveListener(t, s, Listener{Listener: ln, TLSConfig: forServer})
	var slow []slowClient
	for range unfinished {
		slow = append(slow, newSlowClient(t, ln.Addr(), forClient))
	}
	awaitConns(t, s, unfinished)
	if _, err := s.Pause(PauseOptions{}); err != nil {
		t.Fatal(err)
	}
	var clients []*tls.Conn
	for range queued {
		clients = append(clients, dialTLS(t, ln.Addr(), forClient))
	}
	s.StartDrain(DrainOptions{Grace: time.Minute, Reason: "x"})
	<-s.Draining()
	for _, c := range slow {
		close(c.complete)
		clients = append(clients, c.Conn)
	}
	for _, c := range clients {
		receives(t, c, "SHUTDOWN ")
		send(t, c, "last words")
		_ = c.CloseWrite()
		if rest, err := io.ReadAll(c); err != nil || !strings.HasSuffix(string(rest), " x\nlast words") {
			t.Errorf("client received %q, %v", rest, err)
		}
		_ = c.Close()
	}
	<-s.Done()
	wantClosed(t, s, map[Reason]uint64{ReasonClientLeft: queued + unfinished})
}

// emulated is the environment variable that says, with 1, that the tests run on an emulator.
const emulated = "ECHOD_TEST_EMULATED"

// unlessRace returns n, or a tenth of it where cryptography takes long: under the race detector, and on an emulator.
func unlessRace(n int) int {
	if isRace() || os.Getenv(emulated) == "1" {
		return n / 10
	}
	return n
}
