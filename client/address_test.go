package client

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestParseAddress(t *testing.T) {
	for address, want := range map[string]Address{
		"example.org:9999":       {Network: "tcp", Addr: "example.org:9999"},
		"tcp://example.org:9999": {Network: "tcp", Addr: "example.org:9999"},
		"tls://[::1]:9999":       {Network: "tcp", Addr: "[::1]:9999", TLS: true},
		":9999":                  {Network: "tcp", Addr: ":9999"},
		"localhost:http":         {Network: "tcp", Addr: "localhost:http"},
		"unix:///run/echod.sock": {Network: "unix", Addr: "/run/echod.sock"},
		"unix:///run/a b:c":      {Network: "unix", Addr: "/run/a b:c"},
	} {
		if got, err := ParseAddress(address); err != nil || got != want {
			t.Errorf("ParseAddress(%q) = %+v, %v, want %+v", address, got, err, want)
		}
	}
	withDrive := Address{Network: "unix", Addr: "/C:/run/echod.sock"}
	if runtime.GOOS == "windows" {
		withDrive.Addr = "C:/run/echod.sock"
	}
	if got, err := ParseAddress("unix:///C:/run/echod.sock"); err != nil || got != withDrive {
		t.Errorf("ParseAddress of a path with a drive = %+v, %v, want %+v", got, err, withDrive)
	}
	for address, problem := range map[string]string{
		"":                   "missing port in address",
		"example.org":        "missing port in address",
		"example.org:":       "missing port in address",
		"tls://example.org":  "missing port in address",
		"::1:9999":           "too many colons in address",
		"example.org:99999":  `invalid port "99999"`,
		"example.org:nosuch": `invalid port "nosuch"`,
		"tcp://127.0.0.1:9/": `invalid port "9/"`,
		"http://example.org": `unknown scheme "http"`,
		"://example.org:1":   `unknown scheme ""`,
		"unix://":            "the path of a Unix socket must be absolute",
		"unix:///":           "the path of a Unix socket must be absolute",
		"unix://echod.sock":  "the path of a Unix socket must be absolute",
	} {
		_, err := ParseAddress(address)
		want := problem + "; want host:port, tcp://host:port, tls://host:port or unix:///path"
		if got, ok := errors.AsType[*net.AddrError](err); !ok || got.Err != want || got.Addr != address {
			t.Errorf("ParseAddress(%q): %v, want %s", address, err, problem)
		}
	}
}

func TestDialAddress(t *testing.T) {
	t.Run("a malformed address is named and not retried", func(t *testing.T) {
		const want = "address example.org: missing port in address; " + addressForms
		_, err := Dial(t.Context(), "example.org", Options{Reconnect: &Backoff{}})
		if err == nil || err.Error() != want {
			t.Errorf("Dial: %v, want %s", err, want)
		}
		opts := StreamOptions{Reconnect: &Backoff{}}
		o := collect(t, Stream(t.Context(), "example.org", numbered(3), opts))
		if o.err == nil || o.err.Error() != want {
			t.Errorf("Stream: %v, want %s", o.err, want)
		}
	})
	t.Run("an empty host is the local host", func(t *testing.T) {
		address, config := listenTLS(t, nil, echoes)
		mustEcho(t, connect(t, strings.Replace(address, "127.0.0.1", "", 1), Options{TLSConfig: config}), "hello\n")
		if config.ServerName != "" {
			t.Errorf("the caller's ServerName was changed to %q", config.ServerName)
		}
	})
}

// TestTransports proves the basic operations on each kind of connection.
func TestTransports(t *testing.T) {
	for _, tr := range transports {
		t.Run(tr.name, func(t *testing.T) {
			t.Run("Echo returns more data than all buffers hold", func(t *testing.T) {
				address, config := tr.listen(t, echoes)
				c := connect(t, address, Options{TLSConfig: config})
				msg := bytes.Repeat(append(bytes.Repeat([]byte("x"), 1023), '\n'), 16<<10) // 16 MiB
				if got, err := c.Echo(t.Context(), msg); err != nil || !bytes.Equal(got, msg) {
					t.Errorf("%d of %d bytes came back, error: %v", len(got), len(msg), err)
				}
			})
			t.Run("half-close ends the server's input and not its output", func(t *testing.T) {
				address, config := tr.listen(t, func(conn net.Conn) {
					all, err := io.ReadAll(conn)
					if err != nil {
						t.Errorf("the server reads: %v, want EOF", err)
					}
					_, _ = conn.Write(all)
				})
				c := connect(t, address, Options{TLSConfig: config})
				if err := c.Send(t.Context(), []byte("abc")); err != nil {
					t.Fatal(err)
				}
				for range 2 {
					if err := c.CloseWrite(); err != nil {
						t.Errorf("CloseWrite: %v", err)
					}
				}
				if err := c.Send(t.Context(), []byte("x")); !errors.Is(err, errHalfClosed) {
					t.Errorf("Send: %v, want %v", err, errHalfClosed)
				}
				if n := c.Outstanding(); n != 3 {
					t.Errorf("outstanding = %d, want 3", n)
				}
				if got, err := receiveN(t, c, 4); got != "abc" || !errors.Is(err, io.EOF) {
					t.Errorf("received %q, %v, want abc and EOF", got, err)
				}
			})
			t.Run("Echo reconnects after a shutdown", func(t *testing.T) {
				address, config := tr.listen(t, answers(6, "hel\nSHUTDOWN 5 SIGTERM\n"), says("BUSY\n"), echoes)
				var notices []string
				c := connect(t, address, Options{
					TLSConfig: config, Reconnect: &Backoff{Min: time.Millisecond},
					OnNotice: func(n Notice) { notices = append(notices, n.String()) },
				})
				mustEcho(t, c, "hello\n")
				if got := strings.Join(notices, ", "); got != "SHUTDOWN 5 SIGTERM, BUSY" {
					t.Errorf("notices: %s", got)
				}
			})
			t.Run("Stream reconnects and loses nothing", func(t *testing.T) {
				address, config := tr.listen(t, announces(30), dies(3), echoes)
				collect(t, Stream(t.Context(), address, numbered(1000), StreamOptions{
					TLSConfig: config, Conns: 3, Reconnect: &Backoff{Min: time.Millisecond},
				})).wantAll(t, 1000)
			})
			t.Run("the context interrupts Receive, and the connection stays usable", func(t *testing.T) {
				address, config := tr.listen(t, echoes)
				c := connect(t, address, Options{TLSConfig: config})
				ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
				defer cancel()
				if _, err := c.Receive(ctx, make([]byte, 1)); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("Receive: %v, want the end of the context", err)
				}
				mustEcho(t, c, "hello\n")
			})
		})
	}
}

func TestTLS(t *testing.T) {
	t.Run("an untrusted certificate is refused and not retried", func(t *testing.T) {
		address, _ := listenTLS(t, nil, echoes)
		_, err := Dial(t.Context(), address, Options{Reconnect: &Backoff{}})
		_, ok := errors.AsType[*tls.CertificateVerificationError](err)
		if !ok || !strings.HasPrefix(err.Error(), "connect to "+address+": ") {
			t.Errorf("Dial: %v, want a certificate error that names the address", err)
		}
		o := collect(t, Stream(t.Context(), address, numbered(3), StreamOptions{Reconnect: &Backoff{}}))
		if _, ok := errors.AsType[*tls.CertificateVerificationError](o.err); !ok {
			t.Errorf("Stream: %v, want a certificate error", o.err)
		}
	})
	t.Run("ServerName replaces the host of the address", func(t *testing.T) {
		address, config := listenTLS(t, nil, echoes)
		config.ServerName = "localhost"
		mustEcho(t, connect(t, address, Options{TLSConfig: config}), "hello\n")
		config.ServerName = "example.org"
		_, err := Dial(t.Context(), address, Options{TLSConfig: config})
		if err == nil || !strings.Contains(err.Error(), "example.org") {
			t.Errorf("Dial: %v, want an error about example.org", err)
		}
	})
	t.Run("a missing client certificate is named", func(t *testing.T) {
		requireCert := func(c *tls.Config) { c.ClientAuth = tls.RequireAnyClientCert }
		address, config := listenTLS(t, requireCert, echoes)
		c := connect(t, address, Options{TLSConfig: config})
		_, err := c.Echo(t.Context(), []byte("x"))
		if err == nil || !strings.Contains(err.Error(), "certificate required") {
			t.Errorf("Echo: %v, want certificate required", err)
		}
	})
	t.Run("the end of the context during a handshake returns its cause", func(t *testing.T) {
		errLate := errors.New("too late")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Millisecond, errLate)
		defer cancel()
		if _, err := Dial(ctx, "tls://"+listen(t, hangs(t)), Options{}); !errors.Is(err, errLate) {
			t.Errorf("Dial: %v, want %v", err, errLate)
		}
	})
	t.Run("Stream gives up a handshake after the stall timeout", func(t *testing.T) {
		address := "tls://" + listen(t, hangs(t))
		opts := StreamOptions{Conns: 1, StallTimeout: time.Millisecond}
		o := collect(t, Stream(t.Context(), address, numbered(3), opts))
		if !errors.Is(o.err, errDialTimeout) {
			t.Errorf("Stream: %v, want %v", o.err, errDialTimeout)
		}
	})
	t.Run("an interrupted Send breaks the sending side and says so", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			cert, roots := certificate(t)
			dial := pipes(t, func(conn net.Conn) {
				config := &tls.Config{Certificates: []tls.Certificate{cert}, SessionTicketsDisabled: true}
				_ = tls.Server(conn, config).Handshake()
				hangs(t)(conn)
			})
			c := connect(t, "memory", Options{Dial: func(ctx context.Context, address string) (net.Conn, error) {
				conn, err := dial(ctx, address)
				tlsConn := tls.Client(conn, &tls.Config{RootCAs: roots, ServerName: "localhost"})
				return tlsConn, cmp.Or(err, tlsConn.HandshakeContext(ctx))
			}})
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if err := c.Send(ctx, []byte("x")); !errors.Is(err, context.DeadlineExceeded) {
				t.Fatalf("Send: %v, want the end of the context", err)
			}
			for _, err := range []error{c.Send(t.Context(), []byte("x")), c.CloseWrite()} {
				if !errors.Is(err, errTLSBroken) {
					t.Errorf("after it: %v, want %v", err, errTLSBroken)
				}
			}
			start := time.Now()
			if err := c.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
			if took := time.Since(start); took != 0 {
				t.Errorf("Close took %v, want no time", took)
			}
		})
	})
	t.Run("Close after the server has gone returns nil", func(t *testing.T) {
		address, config := listenTLS(t, nil, func(conn net.Conn) {
			_ = conn.(*tls.Conn).Handshake()
			_ = conn.(*tls.Conn).NetConn().(*net.TCPConn).SetLinger(0)
			_ = conn.(*tls.Conn).NetConn().Close()
		})
		c := connect(t, address, Options{TLSConfig: config}) // which checks Close
		if _, err := c.Receive(t.Context(), make([]byte, 1)); err == nil {
			t.Error("Receive returned no error")
		}
	})
}
