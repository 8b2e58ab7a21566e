package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spf13/pflag"
)

// serveTCP serves connections until the test ends.
func serveTCP(t *testing.T, serve func(net.Conn)) (address string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	t.Cleanup(func() {
		_ = ln.Close()
		all.Wait()
	})
	all.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer conn.Close()
				serve(conn)
			})
		}
	})
	return ln.Addr().String()
}

func echoes(conn net.Conn) { _, _ = io.Copy(conn, conn) }

// says returns a server that sends a text and reads to the end. It does not close first.
func says(text string) func(net.Conn) {
	return func(conn net.Conn) {
		_, _ = io.WriteString(conn, text)
		_, _ = io.Copy(io.Discard, conn)
	}
}

func newPinger(t *testing.T, address string) *pinger {
	t.Helper()
	p := &pinger{
		address: address, count: 1, size: 64, interval: secondsFlag(time.Millisecond), timeout: secondsFlag(10 * time.Second), out: io.Discard,
	}
	if err := p.check(); err != nil {
		t.Fatal(err)
	}
	return p
}

// A ping says what has happened, in words and as a result, and the exit status is that
// of ping(8).
func TestPingResults(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := ln.Addr().String()
	_ = ln.Close()
	for _, tt := range []struct {
		name, address  string
		result, reason string
		code           int
	}{
		{"an echo", serveTCP(t, echoes), "ok", "", 0},
		{"a paused server", serveTCP(t, says("PAUSED\n")), "paused", "server is paused", 1},
		{"a full server", serveTCP(t, says("BUSY\n")), "busy", "server is at its connection limit", 1},
		{
			"a server that drains", serveTCP(t, says("SHUTDOWN 0 SIGTERM\n")), "shutdown",
			"server is shutting down (SIGTERM)", 1,
		},
		{"no server", closed, "refused", "connection refused", 1},
		{
			"a server that hangs up", serveTCP(t, func(conn net.Conn) { _, _ = conn.Read(make([]byte, 64)) }),
			"closed", "server closed the connection", 1,
		},
		{"a server that resets", serveTCP(t, func(conn net.Conn) {
			_, _ = conn.Read(make([]byte, 64))
			_ = conn.(*net.TCPConn).SetLinger(0)
		}), "reset", "connection reset by peer", 1},
		{
			"another protocol", serveTCP(t, says("220 smtp ready\r\n")), "wrong-echo",
			`got "220 smtp ready\r\n" instead of the echo`, 1,
		},
		{
			"no echo in time", serveTCP(t, says("")), "no-echo",
			"connected, but no echo within 50ms: the server may be paused", 1,
		},
		{"a name without an address", "no.such.name.invalid:1", "dns", "no.such.name.invalid", 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPinger(t, tt.address)
			if tt.result == "no-echo" {
				p.timeout = secondsFlag(50 * time.Millisecond)
			}
			err := p.run(t.Context())
			got := p.results[0]
			if got.Result != tt.result || !strings.Contains(got.Error, tt.reason) ||
				(got.Error == "") != (tt.reason == "") {
				t.Errorf("%s, %q; want %s, %q", got.Result, got.Error, tt.result, tt.reason)
			}
			exit, _ := errors.AsType[*exitError](err)
			if code := 0; (exit == nil) != (tt.code == code) || exit != nil && exit.code != tt.code {
				t.Errorf("%v, want exit status %d", err, tt.code)
			}
			if err != nil && !strings.HasPrefix(err.Error(), "ping "+tt.address+": ") {
				t.Errorf("%q does not name the address", err)
			}
		})
	}
	t.Run("one echo of several is enough", func(t *testing.T) {
		var n sync.Mutex
		calls := 0
		p := newPinger(t, serveTCP(t, func(conn net.Conn) {
			n.Lock()
			calls++
			second := calls == 2
			n.Unlock()
			if second {
				echoes(conn)
			}
			_, _ = conn.Read(make([]byte, 64))
		}))
		p.count = 3
		if err := p.run(t.Context()); err != nil {
			t.Errorf("exit status %v, want 0", err)
		}
	})
}

func TestPingInterrupted(t *testing.T) {
	interrupted := &exitError{130, errors.New("interrupted")}
	t.Run("before the first ping is done, it ends with the signal's status", func(t *testing.T) {
		for _, count := range []int{1, 3} {
			ctx, cancel := context.WithCancelCause(t.Context())
			p := newPinger(t, serveTCP(t, func(conn net.Conn) {
				cancel(interrupted)
				_, _ = io.Copy(io.Discard, conn)
			}))
			p.count = count
			if err := p.run(ctx); !errors.Is(err, interrupted) {
				t.Errorf("--count %d: %v, want %v", count, err, interrupted)
			}
		}
	})
	t.Run("after an echo, it is a success", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		p := newPinger(t, serveTCP(t, func(conn net.Conn) {
			echoes(conn)
			cancel(interrupted)
		}))
		p.count = 0
		if err := p.run(ctx); err != nil || len(p.results) == 0 {
			t.Errorf("%v after %d pings", err, len(p.results))
		}
	})
}

func TestPingSummary(t *testing.T) {
	summary := func(p *pinger) string {
		var out strings.Builder
		p.out = &out
		if err := p.summarize(3 * time.Second); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	var results []pingResult
	for _, ms := range []float64{2, 4, 4, 4, 5, 5, 7, 9} {
		results = append(results, pingResult{Result: pingOK, Connect: new(0.001), Echo: new(ms / 1e3)})
	}
	t.Run("minimum, mean, maximum and deviation are in their places", func(t *testing.T) {
		failed := slices.Repeat([]pingResult{{Result: "paused", Connect: new(5.0), err: io.EOF}}, 1991)
		p := &pinger{
			address: "there",
			results: append(append(failed, pingResult{Result: "refused", err: io.EOF}), results...),
		}
		const want = `
--- there echod ping statistics ---
2000 sent, 8 returned, 99.6% lost, 1991 paused, 1 refused, time 3s
connect min/avg/max/mdev = 1.000/1.000/1.000/0.000 ms
   echo min/avg/max/mdev = 2.000/5.000/9.000/2.000 ms
`
		if got := summary(p); got != want {
			t.Errorf("got %s\nwant %s", got, want)
		}
	})
	t.Run("a loss of nearly everything is not a total loss", func(t *testing.T) {
		for returned, want := range map[int]string{
			1: " 99.9% lost", 0: " 100% lost", 2000: " 0% lost",
			1999: " 0.05% lost",
		} {
			p := &pinger{}
			for i := range 2000 {
				r := pingResult{Result: "busy"}
				if i < returned {
					r = results[0]
				}
				p.results = append(p.results, r)
			}
			if got := summary(p); !strings.Contains(got, want) {
				t.Errorf("%d returned: %s, want%s", returned, got, want)
			}
		}
	})
}

// --json prints an object for each ping and one for the summary.
func TestPingJSON(t *testing.T) {
	var out strings.Builder
	p := newPinger(t, serveTCP(t, echoes))
	_, port, err := net.SplitHostPort(p.address)
	if err != nil {
		t.Fatal(err)
	}
	p.address = "localhost:" + port
	p.count, p.json, p.out = 2, true, &out
	if err := errors.Join(p.check(), p.run(t.Context())); err != nil {
		t.Fatal(err)
	}
	dec := json.NewDecoder(strings.NewReader(out.String()))
	for seq := 1; seq <= 2; seq++ {
		var r pingResult
		if err := dec.Decode(&r); err != nil {
			t.Fatal(err)
		}
		if r.Type != "ping" || r.Seq != seq || r.Result != "ok" || r.Remote != "127.0.0.1:"+port ||
			r.Bytes != 64 {
			t.Errorf("%+v", r)
		}
		if r.DNS == nil || r.Connect == nil || r.Echo == nil || *r.DNS <= 0 || *r.Connect <= 0 || *r.Echo <= 0 {
			t.Errorf("ping %d lacks a time: %+v", seq, r)
		}
	}
	var s pingSummary
	if err := dec.Decode(&s); err != nil {
		t.Fatal(err)
	}
	if s.Type != "summary" || s.Sent != 2 || s.Returned != 2 || s.Results["ok"] != 2 || s.DNS == nil ||
		s.Echo == nil || s.Echo.Min > s.Echo.Max {
		t.Errorf("%+v", s)
	}
	if dec.More() {
		t.Errorf("more than two pings and a summary:\n%s", out.String())
	}
}

// The time of a step does not include that of another, and pings begin at the interval.
func TestPingTimes(t *testing.T) {
	slow := serveTCP(t, func(conn net.Conn) {
		m := make([]byte, 64)
		for {
			if _, err := io.ReadFull(conn, m); err != nil {
				return
			}
			time.Sleep(50 * time.Millisecond) // the time to be measured
			_, _ = conn.Write(m)
		}
	})
	p := newPinger(t, slow)
	p.count, p.interval = 2, secondsFlag(200*time.Millisecond)
	began := time.Now()
	if err := p.run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took < 250*time.Millisecond {
		t.Errorf("two pings took %v, although the second begins after 200 ms and takes 50", took)
	}
	for _, r := range p.results {
		if *r.Echo < 0.05 || *r.Connect >= *r.Echo || r.DNS != nil {
			t.Errorf("dns %v, connect %v, echo %v s: want no DNS, and 50 ms for the echo", r.DNS,
				*r.Connect, *r.Echo)
		}
	}
}

// A tls:// server is verified, with the certificates of --tls-ca.
func TestPingTLS(t *testing.T) {
	web := httptest.NewTLSServer(nil) // for its certificate
	defer web.Close()
	address := "tls://" + serveTCP(t, func(conn net.Conn) {
		echoes(tls.Server(conn, &tls.Config{Certificates: web.TLS.Certificates}))
	})
	cacert := filepath.Join(t.TempDir(), "ca.pem")
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: web.Certificate().Raw})
	if err := os.WriteFile(cacert, text, 0o600); err != nil {
		t.Fatal(err)
	}
	p := newPinger(t, address)
	p.tlsFlags.ca = cacert
	if err := p.run(t.Context()); err != nil {
		t.Errorf("with the certificate: %v", err)
	}
	p = newPinger(t, address)
	if err := p.run(t.Context()); err == nil || p.results[0].Result != "error" || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("without the certificate: %v, %+v", err, p.results)
	}
}

// -4 and -6 choose the family. A name that has none of it fails.
func TestPingFamily(t *testing.T) {
	address := serveTCP(t, echoes)
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	p := newPinger(t, "localhost:"+port)
	p.ipv4 = true
	if err := p.run(t.Context()); err != nil || p.results[0].Remote != address {
		t.Errorf("-4: %v, %+v", err, p.results)
	}
	p = newPinger(t, address)
	p.ipv6 = true
	if err := p.run(t.Context()); err == nil || p.results[0].Result != "dns" {
		t.Errorf("-6 with an IPv4 address: %v, %+v", err, p.results)
	}
}

// As in ping(8), a number without a unit is in seconds.
func TestPingSeconds(t *testing.T) {
	var s secondsFlag
	f := pflag.NewFlagSet("ping", pflag.ContinueOnError)
	f.VarP(&s, "interval", "i", "")
	for text, want := range map[string]time.Duration{
		"2": 2 * time.Second, "0.2": 200 * time.Millisecond,
		".5": 500 * time.Millisecond, "300ms": 300 * time.Millisecond, "1m": time.Minute,
	} {
		if err := f.Parse([]string{"-i", text}); err != nil || time.Duration(s) != want {
			t.Errorf("-i %s: %v, %v; want %v", text, time.Duration(s), err, want)
		}
	}
	for _, text := range []string{"x", "", "NaN", "1e99", "5 s"} {
		if err := s.Set(text); err == nil {
			t.Errorf("%q is accepted as %v", text, time.Duration(s))
		}
	}
}
