package load

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"echod/client"
)

// allFaults has faults of every kind, and of100 is what becomes of 100 messages.
var (
	allFaults = faults{
		3: drop, 4: drop, 10: duplicate, 20: corrupt, 21: corrupt, 30: swap, 40: misdeliver,
		50: noticeInside("NOTICE hello\n"), 60: drop, 70: corrupt, 71: duplicate, 72: swap, 80: noticeInside("NOTICE hello\n"),
	}
	of100 = Echoes{Sent: 100, Returned: 94, Reordered: 2, Duplicated: 2, Lost: 3, Corrupted: 3, Foreign: 1}
)

func times(e Echoes, n int64) Echoes {
	return Echoes{
		Sent: n * e.Sent, Returned: n * e.Returned, Late: n * e.Late, Reordered: n * e.Reordered, Duplicated: n * e.Duplicated,
		Lost: n * e.Lost, Corrupted: n * e.Corrupted, Foreign: n * e.Foreign,
	}
}

// inBubble runs a subtest with synthetic time.
func inBubble(t *testing.T, name string, f func(t *testing.T)) {
	t.Helper()
	t.Run(name, func(t *testing.T) { synctest.Test(t, f) })
}

func TestFaultsAreToldApart(t *testing.T) {
	inBubble(t, "in memory", func(t *testing.T) {
		r := runInMemory(t, Options{Dial: inMemory(t, allFaults.serve), Conns: 5, Stages: at(500, time.Second)})
		expect(t, "echoes", r.Echoes, times(of100, 5))
		expect(t, "notices", r.Notices, Notices{Messages: 10})
		expect(t, "connects", r.Connects, Connects{Tried: 5, Made: 5})
		expect(t, "ends", r.Ends, Ends{Left: 5})
		failures := strings.Join(r.Failures(Limits{}), "; ")
		for _, want := range []string{
			"15 messages lost", "15 messages corrupted", "10 messages duplicated",
			"10 messages out of order", "5 messages received on a connection",
		} {
			if !strings.Contains(failures, want) {
				t.Errorf("the failures lack %q: %s", want, failures)
			}
		}
	})
	var d net.Dialer
	path := filepath.Join(t.TempDir(), "s")
	serveOn(t, "unix", path, allFaults.serve)
	web := httptest.NewTLSServer(nil) // for its certificate
	defer web.Close()
	roots := x509.NewCertPool()
	roots.AddCert(web.Certificate())
	overTLS := serveTCP(t, func(conn net.Conn) {
		allFaults.serve(tls.Server(conn, &tls.Config{Certificates: web.TLS.Certificates}))
	})
	for name, opts := range map[string]Options{
		"over TCP":           {Address: serveTCP(t, allFaults.serve)},
		"over TLS":           {Address: "tls://" + overTLS, TLS: &tls.Config{RootCAs: roots}},
		"over a Unix socket": {Address: "unix://" + path},
		"over a net.Conn of Dial": {
			Address: serveTCP(t, allFaults.serve),
			Dial: func(ctx context.Context, address string) (net.Conn, error) {
				return d.DialContext(ctx, "tcp", address)
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			opts.Conns, opts.Stages, opts.Late, opts.Threads = 20, at(10000, 200*time.Millisecond), time.Hour, 3
			r := mustRun(t, opts)
			expect(t, "echoes", r.Echoes, times(of100, 20))
			if opts.Dial == nil {
				address, err := client.ParseAddress(opts.Address)
				if err != nil {
					t.Fatal(err)
				}
				expect(t, "addresses", r.Addresses, []TargetCount{{Address: address.Addr, Made: 20}})
			}
		})
	}
}

func TestHandshakes(t *testing.T) {
	web := httptest.NewTLSServer(nil) // for its certificate
	defer web.Close()
	roots := x509.NewCertPool()
	roots.AddCert(web.Certificate())
	config := &tls.Config{Certificates: web.TLS.Certificates}
	address := "tls://" + serveTCP(t, func(conn net.Conn) { faults{}.serve(tls.Server(conn, config)) })
	t.Run("are measured apart, and resume sessions", func(t *testing.T) {
		r := mustRun(t, Options{
			Address: address, TLS: &tls.Config{RootCAs: roots, ClientSessionCache: tls.NewLRUClientSessionCache(0)},
			Duration: 300 * time.Millisecond, Churn: 20 * time.Millisecond,
		})
		c := r.Connects
		if c.Resumed == 0 || c.Resumed >= c.Made || r.Handshake.Count != c.Made || c.NoHandshake != 0 || r.Handshake.Mean > r.Connect.Mean {
			t.Errorf("connects %+v, handshakes %+v, connects %+v", c, r.Handshake, r.Connect)
		}
	})
	for name, tt := range map[string]struct {
		opts Options
		text string
	}{
		"that fail are no losses":                {Options{Address: address}, "TLS handshake: failed to verify certificate"},
		"that are not over in time fail as well": {Options{Address: "tls://" + serveTCP(t, silent), Timeout: 50 * time.Millisecond}, "TLS handshake: connect timed out"},
	} {
		t.Run(name, func(t *testing.T) {
			tt.opts.Conns, tt.opts.Duration, tt.opts.NoReconnect = 3, 200*time.Millisecond, true
			r := mustRun(t, tt.opts)
			expect(t, "connects", r.Connects, Connects{Tried: 3, NoHandshake: 3})
			expect(t, "echoes", r.Echoes, Echoes{})
			if len(r.Errors) != 1 || !strings.HasPrefix(r.Errors[0], tt.text) {
				t.Errorf("errors %q, want one that begins with %q", r.Errors, tt.text)
			}
		})
	}
}

func TestOpenModel(t *testing.T) {
	inBubble(t, "messages are sent when they are due", func(t *testing.T) {
		start := time.Now()
		var sent []time.Duration
		server := func(conn net.Conn) {
			defer conn.Close()
			m := make([]byte, 64)
			for {
				if _, err := io.ReadFull(conn, m); err != nil {
					return
				}
				sent = append(sent, time.Since(start))
				_, _ = conn.Write(m)
			}
		}
		r := runInMemory(t, Options{Dial: inMemory(t, server), Conns: 1, Stages: at(4, 2*time.Second)})
		want := []time.Duration{}
		for i := range time.Duration(8) {
			want = append(want, i*250*time.Millisecond)
		}
		expect(t, "times of sending", sent, want)
		expect(t, "echoes", r.Echoes, Echoes{Sent: 8, Returned: 8})
	})
	inBubble(t, "there are exactly as many as the rate says", func(t *testing.T) {
		for rate, want := range map[float64]int64{1: 1, 7: 4, 4999: 2500, 6000: 3000, 12345.6: 6173} {
			r := runInMemory(t,
				Options{Dial: inMemory(t, faults{}.serve), Conns: 7, Stages: at(rate, 500*time.Millisecond)})
			expect(t, "echoes", r.Echoes, Echoes{Sent: want, Returned: want})
		}
	})
	inBubble(t, "stages follow one another", func(t *testing.T) {
		r := runInMemory(t, Options{Dial: inMemory(t, faults{}.serve), Conns: 3, Stages: []Stage{
			{100, time.Second}, {0, time.Second}, {500, time.Second}, {10.5, time.Second}, {
				0,
				500 * time.Millisecond,
			},
		}})
		expect(t, "echoes", r.Echoes, Echoes{Sent: 611, Returned: 611})
		for at, want := range map[int]float64{5: 100, 15: 0, 25: 500, 42: 0} {
			if p := r.Series[at]; p.Offered != want || math.Abs(p.PerSecond-want) > 21 {
				t.Errorf("after %v s: %v/s offered and %v/s returned, want %v", p.At, p.Offered,
					p.PerSecond, want)
			}
		}
		if r.Planned != 4.5 || math.Abs(r.Rate-610.5/4.5) > 1e-9 {
			t.Errorf("planned %v s with a mean of %v/s, want 4.5 s and 135.67", r.Planned, r.Rate)
		}
	})
	inBubble(t, "a late message makes those behind it late", func(t *testing.T) {
		// A message every 100 ms. The tenth takes 1.55 s: it is late, and so are those due up to 0.5 s after it.
		server := faults{10: delay(1550 * time.Millisecond)}
		r := runInMemory(t, Options{Dial: inMemory(t, server.serve), Stages: at(10, 4*time.Second)})
		expect(t, "echoes", r.Echoes, Echoes{Sent: 40, Returned: 40, Late: 6})
		if r.Echo.Max < 1.54 || r.Echo.Max > 1.56 || r.Echo.P50 > 0.001 {
			t.Errorf("median %v s and max %v s, want 0 and 1.55", r.Echo.P50, r.Echo.Max)
		}
		expect(t, "failures", r.Failures(Limits{}), []string(nil))
		if f := r.Failures(Limits{P99: new(time.Second)}); len(f) != 1 ||
			!strings.Contains(f[0], "p99 of echoes is 1.55") {
			t.Errorf("failures %q, want the p99", f)
		}
	})
	inBubble(t, "what cannot be sent counts from when it was due", func(t *testing.T) {
		r := runInMemory(t, Options{
			Dial:   inMemory(t, faults{0: delay(time.Second)}.serve),
			Stages: at(100, 2*time.Second), Pipeline: 1, Late: time.Hour,
		})
		expect(t, "echoes", r.Echoes, Echoes{Sent: 200, Returned: 200})
		// half of them waited, for up to a second
		if r.Echo.P90 < 0.5 || r.Echo.P50 > 0.2 || r.Echo.Max < 0.99 {
			t.Errorf("latencies %+v", r.Echo)
		}
	})
	inBubble(t, "a ramp opens one connection after the other", func(t *testing.T) {
		r := runInMemory(t, Options{
			Dial: inMemory(t, faults{}.serve), Conns: 4,
			Stages: at(40, 6*time.Second), Ramp: 4 * time.Second,
		})
		// Ten a second on each, for 6, 5, 4 and 3 s.
		expect(t, "echoes", r.Echoes, Echoes{Sent: 180, Returned: 180})
		for at, want := range map[int]int64{5: 1, 25: 3, 45: 4} {
			if p := r.Series[at]; p.Open != want || p.Offered != 10*float64(want) {
				t.Errorf("after %v s: %d open, %v/s offered, want %d and %v", p.At, p.Open, p.Offered, want,
					10*want)
			}
		}
	})
	inBubble(t, "late messages in flight are bounded", func(t *testing.T) {
		for size, most := range map[int]int64{
			64: maxLate/64 + 100, 10_000: maxLate/10_000 + 100,
			100_000: 200,
		} {
			r := runInMemory(t, Options{
				Dial: inMemory(t, silent), Stages: at(20_000,
					5*time.Second), Sizes: FixedSize(size), Pipeline: 100, Late: 10 * time.Millisecond,
			})
			if e := r.Echoes; e.Sent > most || e.Sent < most/2 || e.Lost != e.Sent ||
				e.Sent+e.Unsent != 100_000 {
				t.Errorf("%d bytes: %+v, want up to %d sent", size, e, most)
			}
		}
	})
}

// A server that takes 200 messages a second is offered 500: the throughput is what it
// takes, over the time that it took.
func TestThroughputIsOverTheTimeItTook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := runInMemory(t, Options{
			Dial:   inMemory(t, slow(5*time.Millisecond)),
			Stages: at(500, 4*time.Second), Late: time.Hour, DrainWait: time.Minute,
		})
		expect(t, "echoes", r.Echoes, Echoes{Sent: 2000, Returned: 2000})
		// what waits to be written does not need another one
		expect(t, "connects", r.Connects, Connects{Tried: 1, Made: 1})
		if math.Abs(r.PerSecond-200) > 2 || r.OfferedPerSecond != 500 || math.Abs(r.Took-10) > 0.1 ||
			r.Lasted != 4 {
			t.Errorf("%v echoes/s of %v offered, sent for %v s, took %v s; want 200 of 500, 4 and 10",
				r.PerSecond, r.OfferedPerSecond, r.Lasted, r.Took)
		}
		last := r.Series[len(r.Series)-1]
		if last.At < 9.8 || math.Abs(last.Max-r.Echo.Max) > 0.05*r.Echo.Max {
			t.Errorf("the series ends at %v s with a maximum of %v s, want 10 s and %v s", last.At,
				last.Max, r.Echo.Max)
		}
	})
}

func TestClosedModel(t *testing.T) {
	inBubble(t, "each connection waits for its echoes", func(t *testing.T) {
		server := func(conn net.Conn) {
			defer conn.Close()
			for {
				m := make([]byte, 640)
				n, err := conn.Read(m)
				if err != nil {
					return
				}
				time.Sleep(100 * time.Millisecond)
				_, _ = conn.Write(m[:n])
			}
		}
		r := runInMemory(t, Options{
			Dial: inMemory(t, server), Conns: 3, Pipeline: 2,
			Duration: 1050 * time.Millisecond,
		})
		if r.Echoes.Sent != 3*2*11 || r.Echoes.Returned != r.Echoes.Sent || r.Rate != 0 ||
			r.OfferedPerSecond != 0 {
			t.Errorf("%+v: want 2 in flight on each of 3 connections, 11 times", r.Echoes)
		}
	})
	inBubble(t, "a think time passes between an echo and the next message", func(t *testing.T) {
		r := runInMemory(t, Options{
			Dial: inMemory(t, slow(time.Millisecond)), Conns: 3,
			Think: Range{100 * time.Millisecond, 100 * time.Millisecond}, Duration: 1050 * time.Millisecond,
		})
		if r.Echoes.Sent != 3*11 || r.Echoes.Returned != r.Echoes.Sent || r.Think != "100ms" {
			t.Errorf("%+v, think time %q: want 11 on each of 3 connections, 100ms", r.Echoes, r.Think)
		}
	})
	inBubble(t, "think times are drawn from the range", func(t *testing.T) {
		var sent []time.Time
		server := func(conn net.Conn) {
			defer conn.Close()
			for m := make([]byte, 64); ; {
				if _, err := io.ReadFull(conn, m); err != nil {
					return
				}
				sent = append(sent, time.Now())
				time.Sleep(time.Millisecond)
				_, _ = conn.Write(m)
			}
		}
		runInMemory(t, Options{
			Dial:  inMemory(t, server),
			Think: Range{50 * time.Millisecond, 150 * time.Millisecond}, Duration: 100 * time.Second,
		})
		if len(sent) < 800 || len(sent) > 1200 {
			t.Errorf("%d messages in 100 s, want about 1000", len(sent))
		}
		for i := range sent[1:] {
			if gap := sent[i+1].Sub(sent[i]); gap < 50*time.Millisecond || gap > 155*time.Millisecond {
				t.Fatalf("thought for %v, want 50 to 150 ms", gap)
			}
		}
	})
	inBubble(t, "a late message holds up no others", func(t *testing.T) {
		server := faults{0: drop, 1: delay(1500 * time.Millisecond), 2: hangUp}
		r := runInMemory(t, Options{
			Dial: inMemory(t, server.serve), Duration: 2500 * time.Millisecond,
			NoReconnect: true,
		})
		if e := r.Echoes; e.Sent < 3 || e.Lost != e.Sent-1 || e.Late != 1 {
			t.Errorf("%+v", e)
		}
	})
	inBubble(t, "sizes are mixed", func(t *testing.T) {
		sizes, _ := ParseSizes("64:90,1000-2000:10")
		var read int
		server := func(conn net.Conn) {
			defer conn.Close()
			for m := make([]byte, 4096); ; {
				n, err := conn.Read(m)
				if err != nil {
					return
				}
				read += n
				_, _ = conn.Write(m[:n])
			}
		}
		r := runInMemory(t, Options{Dial: inMemory(t, server), Sizes: sizes, Stages: at(1000, 2*time.Second)})
		expect(t, "echoes", r.Echoes, Echoes{Sent: 2000, Returned: 2000})
		if mean := read / 2000; mean < 170 || mean > 250 || r.Size != 208 || r.Sizes != sizes.String() {
			t.Errorf("mean size %d, reported %d and %q, want about 208", mean, r.Size, r.Sizes)
		}
	})
	t.Run("a large message is written as there is room", func(t *testing.T) {
		r := mustRun(t, Options{
			Address: serveTCP(t, faults{}.serve), Sizes: FixedSize(16 << 20),
			Duration: 300 * time.Millisecond, Late: time.Hour,
		})
		if e := r.Echoes; e.Sent == 0 || e.Returned != e.Sent {
			t.Errorf("%+v", e)
		}
	})
}

func TestNotices(t *testing.T) {
	inBubble(t, "a client that is told to leave does, and another connection takes its place",
		func(t *testing.T) {
			draining := faults{5: noticeInside("SHUTDOWN 5 SIGTERM\n")}
			r := runInMemory(t, Options{
				Dial:  inMemory(t, draining.serve, draining.serve, nil, faults{}.serve),
				Conns: 2, Stages: at(100, 2*time.Second),
			})
			expect(t, "echoes", r.Echoes, Echoes{Sent: 200, Returned: 200})
			expect(t, "connects", r.Connects, Connects{Tried: 5, Made: 4, Refused: 1})
			expect(t, "notices", r.Notices, Notices{Shutdown: 2, Heeded: 2})
			expect(t, "ends", r.Ends, Ends{Left: 2, Noticed: 2})
			if r.Reconnects != 2 || r.Outage.Clients != 2 || r.Outage.Max <= 0 || r.Outage.Max > 0.4 {
				t.Errorf("%d reconnects, outage %+v", r.Reconnects, r.Outage)
			}
			if f := r.Failures(Limits{Refused: new(int64(0)), Outage: new(time.Nanosecond)}); len(f) != 2 {
				t.Errorf("failures %q, want the refused connect and the outage", f)
			}
		})
	inBubble(t, "it waits for what is in flight before it half-closes", func(t *testing.T) {
		first := faults{5: noticeBefore("SHUTDOWN 5 SIGTERM\n")}
		r := runInMemory(t, Options{
			Dial:   inMemory(t, first.serve, faults{}.serve),
			Stages: at(10, 2*time.Second),
		})
		expect(t, "echoes", r.Echoes, Echoes{Sent: 20, Returned: 20})
		expect(t, "notices", r.Notices, Notices{Shutdown: 1, Heeded: 1})
	})
	inBubble(t, "a client that ignores notices goes on until the server closes", func(t *testing.T) {
		closes := func(conn net.Conn) {
			s := faults{5: noticeInside("SHUTDOWN 5 SIGTERM\n"), 50: func(*faultyConn, []byte) { _ = conn.Close() }}
			s.serve(conn)
		}
		r := runInMemory(t, Options{
			Dial: inMemory(t, closes, faults{}.serve), Stages: at(100, time.Second), IgnoreNotices: true,
		})
		expect(t, "notices", r.Notices, Notices{Shutdown: 1})
		expect(t, "ends", r.Ends, Ends{Left: 1, Closed: 1})
		expect(t, "echoes", r.Echoes, Echoes{Sent: 100, Returned: 99, Lost: 1})
	})
	t.Run("a connection that is reset after a notice was not left in order", func(t *testing.T) {
		resets := func(conn net.Conn) {
			defer conn.Close()
			_, _ = io.WriteString(conn, "SHUTDOWN 5 SIGTERM\n")
			_, _ = io.Copy(conn, conn)
			_ = conn.(*net.TCPConn).SetLinger(0)
		}
		r := mustRun(t, Options{Address: serveTCP(t, resets), Stages: at(100, 100*time.Millisecond)})
		if r.Notices.Shutdown == 0 || r.Notices.Heeded != 0 || r.Ends.Noticed != r.Connects.Made {
			t.Errorf("notices %+v, ends %+v", r.Notices, r.Ends)
		}
	})
	inBubble(t, "a client that is turned away has lost nothing", func(t *testing.T) {
		for _, word := range []string{"PAUSED\n", "BUSY\n", "SHUTDOWN 0 SIGTERM\n"} {
			turnsAway := func(conn net.Conn) {
				_, _ = conn.Write([]byte(word))
				_ = conn.(pipe).CloseWrite()
				silent(conn)
			}
			r := runInMemory(t,
				Options{Dial: inMemory(t, turnsAway, turnsAway, faults{}.serve), Stages: at(10, 2*time.Second)})
			expect(t, word+"connects", r.Connects, Connects{Tried: 3, Made: 3, TurnedAway: 2})
			if e := r.Echoes; e.Returned != 20 || e.Lost != 0 || e.Sent != e.Returned+e.TurnedAway ||
				e.TurnedAway == 0 {
				t.Errorf("%q: %+v", word, e)
			}
			if r.Reconnects != 0 {
				t.Errorf("%q: %d reconnects of a client that had not been connected", word, r.Reconnects)
			}
			expect(t, "failures", r.Failures(Limits{}), []string(nil))
		}
	})
	inBubble(t, "a client that was given time and loses something has lost it", func(t *testing.T) {
		server := func(conn net.Conn) {
			_, _ = io.ReadFull(conn, make([]byte, DefaultSize))
			_, _ = io.WriteString(conn, "SHUTDOWN 5 SIGTERM\n")
			_ = conn.Close()
		}
		r := runInMemory(t, Options{Dial: inMemory(t, server, faults{}.serve), Stages: at(10, 2*time.Second)})
		expect(t, "echoes", r.Echoes, Echoes{Sent: 20, Returned: 19, Lost: 1})
		expect(t, "connects", r.Connects, Connects{Tried: 2, Made: 2})
	})
}

func TestConnections(t *testing.T) {
	inBubble(t, "what is in flight when the server hangs up is lost", func(t *testing.T) {
		r := runInMemory(t, Options{
			Dial:   inMemory(t, faults{10: hangUp}.serve, faults{}.serve),
			Stages: at(100, time.Second),
		})
		expect(t, "echoes", r.Echoes, Echoes{Sent: 100, Returned: 99, Lost: 1})
		expect(t, "ends", r.Ends, Ends{Left: 1, Closed: 1})
		expect(t, "reconnects", r.Reconnects, int64(1))
		expect(t, "failures", r.Failures(Limits{Lost: new(int64(1))}), []string(nil))
		if f := r.Failures(Limits{Lost: new(int64(1)), Disconnects: new(int64(0))}); len(f) != 1 {
			t.Errorf("failures %q, want the disconnect", f)
		}
	})
	inBubble(t, "a loss shows in the series", func(t *testing.T) {
		r := runInMemory(t, Options{
			Dial:   inMemory(t, faults{55: hangUp}.serve, faults{}.serve),
			Stages: at(100, time.Second),
		})
		for _, p := range r.Series {
			if want := p.At == 0.5; (p.Lost == 1) != want || (p.Disconnects == 1) != want {
				t.Errorf("after %v s: %d lost, %d disconnects", p.At, p.Lost, p.Disconnects)
			}
		}
	})
	inBubble(t, "churn replaces connections and loses nothing", func(t *testing.T) {
		r := runInMemory(t, Options{
			Dial: inMemory(t, faults{}.serve), Conns: 3,
			Stages: at(300, 3*time.Second), Churn: 100 * time.Millisecond,
		})
		expect(t, "echoes", r.Echoes, Echoes{Sent: 900, Returned: 900})
		if r.Ends.Left != r.Connects.Made || r.Reconnects != r.Connects.Made-3 || r.Connects.Made < 45 ||
			r.Connects.Made > 180 {
			t.Errorf("connects %+v, ends %+v, reconnects %d", r.Connects, r.Ends, r.Reconnects)
		}
		expect(t, "outage", r.Outage, Outage{})
	})
	inBubble(t, "churn does not wait for lost messages", func(t *testing.T) {
		dropsLast := faults{20: swallow}
		r := runInMemory(t, Options{
			Dial:   inMemory(t, dropsLast.serve, faults{}.serve),
			Stages: at(20, 10*time.Second), Churn: 2 * time.Second, Late: 500 * time.Millisecond,
		})
		if e := r.Echoes; e.Sent != 200 || e.Lost == 0 || e.Lost != e.Sent-e.Returned {
			t.Errorf("%+v", e)
		}
		if r.Ends.Left != r.Connects.Made || r.Echo.Max > 2.5 { // the longest churn, not DrainWait
			t.Errorf("ends %+v of %d connections, max %v s", r.Ends, r.Connects.Made, r.Echo.Max)
		}
	})
	inBubble(t, "without reconnects, what is due after the end is not sent", func(t *testing.T) {
		r := runInMemory(t, Options{
			Dial:   inMemory(t, faults{49: hangUp}.serve),
			Stages: at(100, time.Second), NoReconnect: true,
		})
		expect(t, "echoes", r.Echoes, Echoes{Sent: 50, Returned: 49, Lost: 1, Unsent: 50})
		expect(t, "connects", r.Connects, Connects{Tried: 1, Made: 1})
		if r.Outage.Max < 0.5 || r.Outage.Max > 0.52 {
			t.Errorf("outage %+v, want half a second, to the end", r.Outage)
		}
	})
	inBubble(t, "without reconnects, a refused connect is the last", func(t *testing.T) {
		r := runInMemory(t, Options{Dial: inMemory(t, nil), Duration: time.Second, NoReconnect: true})
		expect(t, "connects", r.Connects, Connects{Tried: 1, Refused: 1})
	})
	inBubble(t, "without any server there is no reconnect, and the run fails", func(t *testing.T) {
		r := runInMemory(t, Options{Dial: inMemory(t, nil), Stages: at(10, time.Second), Conns: 8})
		// The run may end in the middle of a connect, which has then timed out.
		if c := r.Connects; r.Echoes.Unsent != 10 || c.Refused < 8 || c.Tried != c.Refused+c.TimedOut ||
			r.Reconnects != 0 {
			t.Errorf("%+v, %+v, %d reconnects", r.Echoes, r.Connects, r.Reconnects)
		}
		if f := r.Failures(Limits{}); len(f) != 2 {
			t.Errorf("failures %q", f)
		}
		expect(t, "error", r.Errors[0], "connect: connection refused")
	})
	inBubble(t, "the wait before a reconnect grows while there is no echo", func(t *testing.T) {
		r := runInMemory(t, Options{Dial: inMemory(t, nil), Duration: time.Minute, DrainWait: time.Second})
		if n := r.Connects.Tried; n < 30 || n > 120 { // one a second at the end, and not twenty
			t.Errorf("%d connects in a minute, want about 65", n)
		}
	})
	inBubble(t, "the wait before a reconnect is short again after an echo", func(t *testing.T) {
		r := runInMemory(t, Options{Dial: inMemory(t, faults{1: hangUp}.serve), Stages: at(100, time.Minute)})
		if n := r.Reconnects; n < 500 { // each after at most 100 ms, and not 2 s
			t.Errorf("%d reconnects in a minute, want about 1000", n)
		}
	})
	inBubble(t, "a connect that never ends has timed out", func(t *testing.T) {
		hole := func(ctx context.Context, _ string) (net.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		r := runInMemory(t, Options{Dial: hole, Duration: 2 * time.Second, Timeout: time.Minute})
		expect(t, "connects", r.Connects, Connects{Tried: 1, TimedOut: 1})
		expect(t, "outage", r.Outage, Outage{Clients: 1, Median: 2, Max: 2})
		if f := r.Failures(Limits{Refused: new(int64(0)), Outage: new(time.Second)}); len(f) != 3 {
			t.Errorf("failures %q, want no echo and both limits", f)
		}
	})
	inBubble(t, "a connection that comes after the end of the run is closed", func(t *testing.T) {
		near, far := pipes()
		late := func(ctx context.Context, _ string) (net.Conn, error) {
			<-ctx.Done()
			time.Sleep(time.Minute) // longer than the run waits for anything else
			return near, nil
		}
		runInMemory(t, Options{Dial: late, Duration: time.Second, Timeout: time.Hour})
		if _, err := far.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("the connection is still open: %v", err)
		}
	})
	t.Run("a connection that is reset or not ended was not left in order", func(t *testing.T) {
		resets := func(conn net.Conn) {
			defer conn.Close()
			_, _ = io.Copy(conn, conn)
			_ = conn.(*net.TCPConn).SetLinger(0)
		}
		stays := make(chan struct{})
		defer close(stays)
		noEnd := func(conn net.Conn) {
			defer conn.Close()
			_, _ = io.Copy(conn, conn)
			<-stays
		}
		for name, tt := range map[string]struct {
			server func(net.Conn)
			want   Ends
			err    string
		}{
			"reset":  {resets, Ends{Reset: 3}, "read: connection reset by peer"},
			"no end": {noEnd, Ends{Failed: 3}, errNoEnd.Error()},
		} {
			r := mustRun(t, Options{
				Address: serveTCP(t, tt.server), Conns: 3,
				Stages: at(100, 100*time.Millisecond), DrainWait: 300 * time.Millisecond,
			})
			expect(t, name+", ends", r.Ends, tt.want)
			expect(t, name+", errors", r.Errors, []string{tt.err})
		}
	})
}

func TestOutages(t *testing.T) {
	inBubble(t, "a stall is an outage", func(t *testing.T) {
		for _, tt := range []struct {
			what   string
			server faults
			want   float64 // seconds
		}{
			{"stalls for 2.5 s", faults{10: delay(2500 * time.Millisecond)}, 2.5},
			{"never answers", faults{0: swallow}, 5},
			{"is slow, but not late", faults{10: delay(900 * time.Millisecond)}, 0},
			{"loses one of many", faults{10: drop}, 0},
		} {
			r := runInMemory(t, Options{Dial: inMemory(t, tt.server.serve), Stages: at(10, 5*time.Second)})
			if got := r.Outage.Max; got < tt.want-0.01 || got > tt.want+0.01 {
				t.Errorf("a server that %s: %v s without service, want %v", tt.what, got, tt.want)
			}
		}
	})
	inBubble(t, "late echoes that keep coming are service", func(t *testing.T) {
		r := runInMemory(t, Options{
			Dial:   inMemory(t, lagging(1500*time.Millisecond)),
			Stages: at(10, 10*time.Second),
		})
		expect(t, "echoes", r.Echoes, Echoes{Sent: 100, Returned: 100, Late: 100})
		if got := r.Outage.Max; got < 1.4 || got > 1.6 { // until the first has come
			t.Errorf("%v s without service, want 1.5", got)
		}
	})
	inBubble(t, "an outage begins with the notice, and later echoes on that connection do not end it",
		func(t *testing.T) {
			draining := faults{5: func(s *faultyConn, m []byte) {
				s.send([]byte("SHUTDOWN 5 SIGTERM\n"))
				time.Sleep(200 * time.Millisecond)
				s.send(m)
				_, _ = io.Copy(io.Discard, s.lines)
				time.Sleep(300 * time.Millisecond)
				s.over = true
			}}
			r := runInMemory(t, Options{
				Dial:   inMemory(t, draining.serve, faults{}.serve),
				Stages: at(10, 3*time.Second),
			})
			expect(t, "echoes", r.Echoes, Echoes{Sent: 30, Returned: 30})
			if got := r.Outage.Max; got < 0.5 || got > 0.7 { // including the wait before it connects
				t.Errorf("%v s without service, want 0.5 to 0.7", got)
			}
		})
	t.Run("a delay of the load generator is not an outage", func(t *testing.T) {
		u := connectedUser(full{}, Options{Stages: at(10, time.Second), Pipeline: 100})
		u.resend = []time.Duration{time.Second} // due then, and sent at 3 s
		u.makeMessages(3 * time.Second)
		u.checkLate(3*time.Second + 10*time.Millisecond)
		if u.out {
			t.Errorf("an outage since %v", u.began)
		}
	})
	t.Run("the median is that of all clients", func(t *testing.T) {
		r := &run{opts: Options{}.withDefaults(), began: time.Now(), step: window}
		r.schedule = newSchedule(&r.opts)
		r.latencies = newLatencyLog(nil, r.began)
		w := &worker{run: r, tally: newTally()}
		for _, total := range []time.Duration{9 * time.Second, 0, 2 * time.Second} {
			w.users = append(w.users, &user{outageClock: outageClock{total: total}})
		}
		expect(t, "outage", r.report([]*worker{w}).Outage, Outage{Clients: 2, Median: 2, Max: 9})
	})
}

// slow echoes one message of 64 bytes after the other, and takes a while for each.
func slow(takes time.Duration) func(net.Conn) {
	return func(conn net.Conn) {
		defer conn.Close()
		for m := make([]byte, 64); ; {
			if _, err := io.ReadFull(conn, m); err != nil {
				return
			}
			time.Sleep(takes)
			_, _ = conn.Write(m)
		}
	}
}

// lagging echoes everything with a constant delay.
func lagging(by time.Duration) func(net.Conn) {
	return func(conn net.Conn) {
		type piece struct {
			data []byte
			due  time.Time
		}
		pieces := make(chan piece, 1000)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for p := range pieces {
				time.Sleep(time.Until(p.due))
				_, _ = conn.Write(p.data)
			}
		}()
		for {
			data := make([]byte, 640)
			n, err := conn.Read(data)
			if err != nil {
				break
			}
			pieces <- piece{data[:n], time.Now().Add(by)}
		}
		close(pieces)
		<-done
		_ = conn.Close()
	}
}

func TestEndOfRun(t *testing.T) {
	inBubble(t, "a cancelled run ends in order, with its report", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel(errors.New("enough")) })
		shown := 0
		r, err := Run(ctx, Options{
			Address: "in memory", Dial: inMemory(t, faults{}.serve), Stages: at(10, time.Hour),
			OnProgress: func(Progress) { shown++ },
		})
		if err != nil {
			t.Fatal(err)
		}
		if e := r.Echoes; e.Sent < 10 || e.Sent > 11 || e.Returned != e.Sent { // one is due at that very moment
			t.Errorf("%+v", e)
		}
		if r.Lasted < 0.99 || r.Lasted > 1.02 || shown < 4 {
			t.Errorf("lasted %v s, %d progress reports", r.Lasted, shown)
		}
	})
	inBubble(t, "SkipDrain ends the wait for what is in flight", func(t *testing.T) {
		skip := make(chan struct{})
		time.AfterFunc(2*time.Second, func() { close(skip) })
		began := time.Now()
		r := runInMemory(t, Options{
			Dial: inMemory(t, silent), Stages: at(10, time.Second),
			DrainWait: time.Hour, SkipDrain: skip,
		})
		expect(t, "echoes", r.Echoes, Echoes{Sent: 10, Lost: 10})
		if took := time.Since(began); took > 2100*time.Millisecond {
			t.Errorf("took %v, want 2 s", took)
		}
	})
	inBubble(t, "what has not come after DrainWait is lost", func(t *testing.T) {
		began := time.Now()
		r := runInMemory(t, Options{
			Dial: inMemory(t, silent), Stages: at(10, time.Second),
			DrainWait: 3 * time.Second,
		})
		expect(t, "echoes", r.Echoes, Echoes{Sent: 10, Lost: 10})
		if took := time.Since(began); took > 4100*time.Millisecond {
			t.Errorf("took %v, want 4 s", took)
		}
	})
}

// Faults of this machine are not blamed on the server.
func TestOwnLimits(t *testing.T) {
	inBubble(t, "a run that is out of files ends and says which limit it is", func(t *testing.T) {
		full := func(context.Context, string) (net.Conn, error) {
			return nil, &net.OpError{Op: "dial", Err: os.NewSyscallError("socket", syscall.EMFILE)}
		}
		_, err := Run(t.Context(),
			Options{Address: "in memory", Dial: full, Conns: 7, Duration: time.Hour, Threads: 2})
		if err == nil || !strings.Contains(err.Error(), "7 connections: raise the limit (ulimit -n)") {
			t.Errorf("error %v", err)
		}
	})
	inBubble(t, "connects without a local port are counted apart", func(t *testing.T) {
		echo := inMemory(t, faults{5: hangUp}.serve)
		n := 0
		noPort := func(ctx context.Context, address string) (net.Conn, error) {
			if n++; n > 1 {
				return nil, &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.EADDRNOTAVAIL)}
			}
			return echo(ctx, address)
		}
		r := runInMemory(t, Options{Dial: noPort, Stages: at(10, 2*time.Second)})
		// The run may end in the middle of a connect, which has then timed out.
		if c := r.Connects; c.NoPort < 5 || c.Tried != c.Made+c.NoPort+c.TimedOut || c.Missed() > 1 {
			t.Errorf("connects %+v", c)
		}
		if f := strings.Join(r.Failures(Limits{Refused: new(int64(1))}), "; "); !strings.Contains(f,
			"ran out of local ports, which is not the server's fault") || strings.Contains(f, "turned away") {
			t.Errorf("failures %q", f)
		}
	})
	inBubble(t, "a first connect without an address is a failure", func(t *testing.T) {
		dial := func(context.Context, string) (net.Conn, error) {
			return nil, &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.EADDRNOTAVAIL)}
		}
		r := runInMemory(t, Options{Dial: dial, Duration: time.Second, NoReconnect: true})
		expect(t, "connects", r.Connects, Connects{Tried: 1, Failed: 1})
	})
	t.Run("the poller may need one more file than the connection", func(t *testing.T) {
		u := connectedUser(nil, Options{})
		u.worker.poll = fullPoller{}
		near, _ := pipes()
		u.connected(dialed{user: u, conn: near}, 0)
		if !outOfFiles(u.worker.failed) {
			t.Errorf("the worker continues: %v", u.worker.failed)
		}
	})
}

// A fullPoller has no room for another file.
type fullPoller struct{ poller }

func (fullPoller) add(net.Conn, *user) (socket, error) {
	return nil, os.NewSyscallError("fcntl", syscall.EMFILE)
}

func TestSeveralAddresses(t *testing.T) {
	t.Run("connections are spread, and pass over an address that refuses", func(t *testing.T) {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		down := ln.Addr().String()
		_ = ln.Close()
		r := &run{}
		for _, address := range []string{serveTCP(t, faults{}.serve), serveTCP(t, faults{}.serve), down} {
			r.targets = append(r.targets, &target{network: "tcp", address: address})
		}
		for n := range 6 {
			d, err := r.dial(t.Context(), n)
			if err != nil {
				t.Fatal(err)
			}
			_ = d.conn.Close()
		}
		// the third one passes its connects to the first
		for i, want := range []TargetCount{{Made: 4}, {Made: 2}, {Failed: 2}} {
			if got := r.targets[i]; got.made.Load() != want.Made || got.failed.Load() != want.Failed {
				t.Errorf("address %d: %d made and %d failed, want %d and %d", i, got.made.Load(),
					got.failed.Load(), want.Made, want.Failed)
			}
		}
	})
	t.Run("one that hangs leaves time for the others", func(t *testing.T) {
		hangs := &target{network: "tcp", address: serveTCP(t, silent), tls: &tls.Config{ServerName: "x"}}
		r := &run{targets: []*target{hangs, {network: "tcp", address: serveTCP(t, silent)}}}
		ctx, cancel := context.WithTimeoutCause(t.Context(), 2*time.Second, errDialTimeout)
		defer cancel()
		d, err := r.dial(ctx, 0)
		if err != nil {
			t.Fatal(err)
		}
		_ = d.conn.Close()
	})
}

func TestOptionsValidate(t *testing.T) {
	for name, o := range map[string]Options{
		"no address":               {},
		"no port":                  {Address: "a"},
		"empty port":               {Address: "a:"},
		"no brackets":              {Address: "::1"},
		"unknown scheme":           {Address: "http://a:1"},
		"too small":                {Address: "a:1", Sizes: FixedSize(MinSize - 1)},
		"too large":                {Address: "a:1", Sizes: FixedSize(MaxSize + 1)},
		"negative rate":            {Address: "a:1", Stages: at(-1, 1)},
		"no rate":                  {Address: "a:1", Stages: at(0, 1)},
		"rate not a number":        {Address: "a:1", Stages: at(math.NaN(), 1)},
		"infinite rate":            {Address: "a:1", Stages: at(math.Inf(1), 1)},
		"stage without time":       {Address: "a:1", Stages: at(1, 0)},
		"negative connections":     {Address: "a:1", Conns: -1},
		"negative duration":        {Address: "a:1", Duration: -1},
		"negative think time":      {Address: "a:1", Think: Range{-1, 1}},
		"think time with a rate":   {Address: "a:1", Think: Range{1, 1}, Stages: at(1, 1)},
		"think time with pipeline": {Address: "a:1", Think: Range{1, 1}, Pipeline: 2},
	} {
		if _, err := Run(t.Context(), o); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestParseStages(t *testing.T) {
	got, err := ParseStages("100:30s,0:1m,2.5:1h")
	if err != nil {
		t.Fatal(err)
	}
	expect(t, "stages", got, []Stage{{100, 30 * time.Second}, {0, time.Minute}, {2.5, time.Hour}})
	for _, text := range []string{"", "100", "100:", ":30s", "x:30s", "100:30", "100:30s,"} {
		if got, err := ParseStages(text); err == nil {
			t.Errorf("%q is accepted as %v", text, got)
		}
	}
}

// The schedule finds the first message of a user by bisection. It is the first one that
// is due after the user starts.
func TestScheduleFirstMessage(t *testing.T) {
	opts := Options{
		Conns: 7, Ramp: 3 * time.Second,
		Stages: []Stage{{100, time.Second}, {0, time.Second}, {50, 2 * time.Second}},
	}.withDefaults()
	s := newSchedule(&opts)
	for user := range opts.Conns {
		want := int64(0)
		for s.due(user, want) < s.starts(user) {
			want++
		}
		if got := s.firstMessage(user); got != want {
			t.Errorf("user %d starts with message %d, want %d", user, got, want)
		}
	}
}

// connectedUser returns a user with a connection.
func connectedUser(s socket, opts Options) *user {
	opts = opts.withDefaults()
	r := &run{opts: opts, began: time.Now(), padding: newPadding(opts.Sizes.Max())}
	r.schedule = newSchedule(&r.opts)
	w := &worker{run: r, tally: newTally(), in: make([]byte, bufferSize), out: make([]byte, bufferSize)}
	u := &user{worker: w, phase: active, wakeAt: never, socket: s}
	u.check = newChecker(origin{1, 1}, r.padding, opts.Sizes, opts.Late, w.tally, u.onNotice)
	return u
}

// full is a socket that accepts no data.
type full struct{ socket }

func (full) write([]byte) (int, error) { return 0, errWouldBlock }
func (full) awaitRoom(bool) error      { return nil }

// An echoSocket echoes everything. Each read takes a while.
type echoSocket struct {
	takes  time.Duration
	echoes []byte
}

func (s *echoSocket) read(p []byte) (int, time.Duration, error) {
	time.Sleep(s.takes)
	n := copy(p, s.echoes)
	s.echoes = s.echoes[n:]
	return n, 0, nil
}

func (s *echoSocket) write(p []byte) (int, error) {
	s.echoes = append(s.echoes, p...)
	return len(p), nil
}

func (s *echoSocket) awaitRoom(bool) error { return nil }
func (s *echoSocket) closeWrite() error    { return nil }
func (s *echoSocket) close()               {}

func TestConnSocket(t *testing.T) {
	inBubble(t, "what was read says how long ago it arrived", func(t *testing.T) {
		near, far := pipes()
		p := newConnPoller()
		s, err := p.add(near, &user{})
		if err != nil {
			t.Fatal(err)
		}
		defer p.close()
		defer s.close()
		_, _ = far.Write([]byte("hello"))
		time.Sleep(10 * time.Millisecond)
		buf := make([]byte, 10)
		if n, ago, err := s.read(buf); string(buf[:n]) != "hello" || ago != 10*time.Millisecond || err != nil {
			t.Errorf("read %q, %v ago, %v; want hello, 10 ms ago", buf[:n], ago, err)
		}
	})
}

func TestUser(t *testing.T) {
	inBubble(t, "latency ends when a message is read, not when the worker woke up", func(t *testing.T) {
		u := connectedUser(&echoSocket{takes: 10 * time.Millisecond}, Options{})
		u.send(0)
		u.ready()
		if got := time.Duration(u.worker.tally.second.echo.Max()); got < 10*time.Millisecond {
			t.Errorf("latency %v, want 10 ms", got)
		}
	})
	t.Run("it sends as much as the connection takes", func(t *testing.T) {
		s := &echoSocket{}
		u := connectedUser(s, Options{Sizes: FixedSize(10_000), Pipeline: 100})
		u.send(0)
		if len(s.echoes) != 1_000_000 {
			t.Errorf("%d bytes were written, want 1000000", len(s.echoes))
		}
	})
	t.Run("users do not all come back together", func(t *testing.T) {
		waits := make(map[time.Duration]bool)
		for range 100 {
			u := connectedUser(nil, Options{})
			u.attempts = 1
			u.reconnectLater(0)
			if u.wakeAt < 0 || u.wakeAt > 200*time.Millisecond {
				t.Errorf("waits for %v, want up to 200 ms the second time", u.wakeAt)
			}
			waits[u.wakeAt] = true
		}
		if len(waits) < 50 {
			t.Errorf("100 users come back at only %d times", len(waits))
		}
	})
}
