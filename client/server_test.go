package client

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"io"
	"math/big"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	// More checks than rapid's default, because each takes microseconds. The
	// command line is parsed later and can override this.
	if err := cmp.Or(flag.Set("rapid.checks", "3000"), flag.Set("rapid.nofailfile", "true")); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

// within returns a context that ends a call that hangs, long before the time limit of the package.
func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

var errRefused = errors.New("connection refused")

// A behaviour is how a scripted server treats one connection. The server closes
// the connection when it returns.
type behaviour func(net.Conn)

// echoes echoes everything until the client half-closes.
func echoes(conn net.Conn) { _, _ = io.Copy(conn, struct{ io.Reader }{conn}) }

// says sends text at once, half-closes, and waits until the client closes.
func says(text string) behaviour {
	return func(conn net.Conn) {
		_, _ = io.WriteString(conn, text)
		halfClose(conn)
		_, _ = io.Copy(io.Discard, conn)
	}
}

// answers reads n bytes, sends text, and closes at once.
func answers(n int, text string) behaviour {
	return func(conn net.Conn) {
		_, _ = io.CopyN(io.Discard, conn, int64(n))
		_, _ = io.WriteString(conn, text)
	}
}

// hangs neither reads nor writes until the test ends.
func hangs(t *testing.T) behaviour {
	return func(net.Conn) { <-t.Context().Done() }
}

func halfClose(conn net.Conn) {
	if c, ok := conn.(interface{ CloseWrite() error }); ok {
		_ = c.CloseWrite()
	}
}

// listen serves TCP on the loopback interface and returns the address. Connection
// n gets behaviour n of script, and the last one after that.
func listen(t testing.TB, script ...behaviour) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serve(t, l, script...)
	return l.Addr().String()
}

// serve is listen on a given listener.
func serve(t testing.TB, l net.Listener, script ...behaviour) {
	var wg sync.WaitGroup
	t.Cleanup(func() {
		_ = l.Close()
		wg.Wait()
	})
	wg.Go(func() {
		for i := 0; ; i++ {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				script[min(i, len(script)-1)](conn)
			})
		}
	})
}

// A transport is a way to reach a server. Its listen is like the function listen,
// and returns the TLS configuration that the client needs.
type transport struct {
	name   string
	listen func(t *testing.T, script ...behaviour) (address string, config *tls.Config)
}

var transports = []transport{
	{"tcp", func(t *testing.T, script ...behaviour) (string, *tls.Config) {
		return "tcp://" + listen(t, script...), nil
	}},
	{"tls", func(t *testing.T, script ...behaviour) (string, *tls.Config) {
		return listenTLS(t, nil, script...)
	}},
	{"unix", func(t *testing.T, script ...behaviour) (string, *tls.Config) {
		path := filepath.Join(t.TempDir(), "echo.sock")
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Skip(err) // not supported, or the path of the temporary directory is too long
		}
		serve(t, l, script...)
		if path = filepath.ToSlash(path); filepath.VolumeName(path) != "" {
			path = "/" + path
		}
		return "unix://" + path, nil
	}},
}

// listenTLS serves TLS with a certificate made for the test. adjust, if not nil,
// changes the server's configuration.
func listenTLS(t *testing.T, adjust func(*tls.Config), script ...behaviour) (address string, config *tls.Config) {
	t.Helper()
	cert, roots := certificate(t)
	serverConfig := &tls.Config{Certificates: []tls.Certificate{cert}}
	if adjust != nil {
		adjust(serverConfig)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", serverConfig)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, l, script...)
	return "tls://" + l.Addr().String(), &tls.Config{RootCAs: roots}
}

// certificate makes a self-signed certificate for 127.0.0.1 and localhost, and a
// pool of roots that trusts it.
func certificate(t *testing.T) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		DNSNames:     []string{"localhost"},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(cert)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, roots
}

// pipes returns a dial function whose connections are in memory. Connection n gets
// behaviour n of script. Dialing is refused where that is nil, and after the last.
// It is safe for concurrent use.
func pipes(t *testing.T, script ...behaviour) DialFunc {
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	var mu sync.Mutex
	return func(context.Context, string) (net.Conn, error) {
		mu.Lock()
		defer mu.Unlock()
		if len(script) == 0 {
			return nil, errRefused
		}
		next := script[0]
		script = script[1:]
		if next == nil {
			return nil, errRefused
		}
		near, far := net.Pipe()
		wg.Go(func() {
			defer far.Close()
			next(far)
		})
		return near, nil
	}
}

// connect dials, and closes the client when the test ends.
func connect(t *testing.T, address string, opts Options) *Client {
	t.Helper()
	c, err := Dial(t.Context(), address, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return c
}

// mustEcho fails the test unless msg comes back.
func mustEcho(t *testing.T, c *Client, msg string) {
	t.Helper()
	got, err := c.Echo(t.Context(), []byte(msg))
	if err != nil || string(got) != msg {
		t.Fatalf("Echo(%q) = %q, %v", msg, got, err)
	}
}

// receiveN receives n bytes.
func receiveN(t *testing.T, c *Client, n int) (string, error) {
	t.Helper()
	buf := make([]byte, n)
	for got := 0; got < n; {
		m, err := c.Receive(t.Context(), buf[got:])
		got += m
		if err != nil {
			return string(buf[:got]), err
		}
	}
	return string(buf), nil
}

// wantNotice fails the test unless err is a *NoticeError with that notice.
func wantNotice(t *testing.T, err error, want string) {
	t.Helper()
	got, ok := errors.AsType[*NoticeError](err)
	if !ok || got.Notice.String() != want {
		t.Errorf("error = %v, want a NoticeError with %q", err, want)
	}
}
