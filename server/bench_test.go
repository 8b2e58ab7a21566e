package server

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"math"
	"net"
	"sync"
	"testing"
	"time"
)

// The cost of a connection must not depend on how many others are open. Compare ns/conn between the sizes, or ns/op
// where the operation concerns one connection.

// BenchmarkEcho is one round trip over loopback, including the client's share.
func BenchmarkEcho(b *testing.B) {
	for _, size := range []struct {
		name  string
		bytes int
	}{{"64B", 64}, {"64KiB", 64 << 10}, {"1MiB", 1 << 20}} {
		b.Run("size="+size.name, func(b *testing.B) {
			_, address := serveTCP(b, Echo, Options{})
			nc := dialTCP(b, address)
			_ = nc.SetDeadline(time.Time{}) // -benchtime may be long
			write := writer(b, nc, make([]byte, size.bytes))
			echo := make([]byte, size.bytes)
			b.SetBytes(int64(size.bytes))
			b.ReportAllocs()
			for b.Loop() {
				write()
				if _, err := io.ReadFull(nc, echo); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// writer returns a function that writes message. A goroutine writes a message that socket buffers may not hold, because
// otherwise client and server would wait for each other.
func writer(b *testing.B, nc net.Conn, message []byte) (write func()) {
	b.Helper()
	now := func() {
		if _, err := nc.Write(message); err != nil {
			b.Error(err)
			_ = nc.Close() // ends the wait for the echo
		}
	}
	if len(message) <= 64<<10 {
		return now
	}
	due := make(chan struct{})
	var writing sync.WaitGroup
	writing.Go(func() {
		for range due {
			now()
		}
	})
	b.Cleanup(func() {
		close(due)
		writing.Wait()
	})
	return func() { due <- struct{}{} }
}

// BenchmarkTLSConnection is a connection over TLS: handshake, one echo, and the end, including the client's share. The
// other server is crypto/tls with a goroutine for each connection.
func BenchmarkTLSConnection(b *testing.B) {
	forServer, forClient := tlsConfigs(b)
	forClient.CurvePreferences = []tls.CurveID{tls.X25519}
	for name, serve := range map[string]func(*testing.B, net.Listener){
		"server": func(b *testing.B, ln net.Listener) {
			s, _ := newServer(b, Echo, Options{QuietConns: true})
			serveListener(b, s, Listener{Listener: ln, TLSConfig: forServer})
		},
		"crypto-tls": func(_ *testing.B, ln net.Listener) {
			go func() {
				for {
					nc, err := ln.Accept()
					if err != nil {
						return
					}
					go func() {
						c := tls.Server(nc, forServer)
						_, _ = io.Copy(c, c)
						_ = c.Close()
					}()
				}
			}()
		},
	} {
		b.Run(name, func(b *testing.B) {
			ln := listen(b)
			serve(b, ln)
			echo := make([]byte, 64)
			b.ReportAllocs()
			for b.Loop() {
				nc, err := net.Dial("tcp", ln.Addr().String())
				if err != nil {
					b.Fatal(err)
				}
				c := tls.Client(nc, forClient)
				if _, err := c.Write(echo); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(c, echo); err != nil {
					b.Fatal(err)
				}
				_ = c.Close()
			}
		})
	}
}

// BenchmarkAdmitRelease is what the server does for a connection: it adds it to the table, admits it, serves and
// closes it on a goroutine, and counts it. System calls, the handler and the log are left out.
func BenchmarkAdmitRelease(b *testing.B) {
	nothing := HandlerFunc(func(context.Context, *Conn) error { return nil })
	forEachCrowd(b, []int{0, 15_000}, func(b *testing.B, n int) {
		closed := make(chan struct{})
		s := newCrowd(b, n, nothing, Options{OnClose: func(ClosedConn) { closed <- struct{}{} }})
		a, nc := &acceptor{srv: s, handler: nothing}, newAbsentConn()
		b.ReportAllocs()
		for b.Loop() {
			a.submitAccepted(nc)
			<-closed
		}
		if err := s.state.Await(b.Context(), func(st *state) bool { return st.tasks == 0 }); err != nil {
			b.Fatal(err)
		}
		if st := s.Status(); st.Connections != n || st.Closed[ReasonHandlerDone] != uint64(b.N) {
			b.Errorf("%d are open and %v closed, want %d and %d", st.Connections, st.Closed, n, b.N)
		}
	})
}

// BenchmarkNotice is Notify to all clients, including system calls.
func BenchmarkNotice(b *testing.B) {
	forEachCrowd(b, []int{1000, 15_000}, func(b *testing.B, n int) {
		s := newCrowd(b, n, Echo, Options{})
		shareClient(b, s)
		b.ReportAllocs()
		for b.Loop() {
			if sent, failed, err := s.Notify(b.Context(), "hello"); sent != n || err != nil {
				b.Fatalf("%d sent, %d failed, %v", sent, failed, err)
			}
		}
		reportPerConn(b, n)
	})
}

// BenchmarkDrainNotice is the notice to all clients when a drain begins, including system calls.
func BenchmarkDrainNotice(b *testing.B) {
	forEachCrowd(b, []int{1000, 15_000}, func(b *testing.B, n int) {
		s := newCrowd(b, n, Echo, Options{})
		shareClient(b, s)
		s.state.With(func(st *state) {
			st.drain = &drain{deadline: time.Now().Add(time.Hour), cause: &drainCause{reason: "SIGTERM", closed: ReasonDeadline}}
		})
		b.ReportAllocs()
		for b.Loop() {
			s.startNotices()
			s.awaitFor(time.Minute, (*state).noticesDone)
			b.StopTimer()
			s.state.With(func(st *state) {
				for _, c := range st.conns.all() {
					c.told = false
				}
				st.told = 0
			})
			b.StartTimer()
		}
		reportPerConn(b, n)
		if told := s.Status().Drain.Notified; told != n*b.N {
			b.Errorf("%d were notified, want %d times %d", told, b.N, n)
		}
	})
}

// BenchmarkListing ranges over all connections.
func BenchmarkListing(b *testing.B) {
	forEachCrowd(b, []int{1000, 15_000}, func(b *testing.B, n int) {
		s := newCrowd(b, n, Echo, Options{})
		listed := 0
		b.ReportAllocs()
		for b.Loop() {
			for range s.Conns() {
				listed++
			}
		}
		reportPerConn(b, n)
		if listed != n*b.N {
			b.Errorf("%d were listed, want %d times %d", listed, b.N, n)
		}
	})
}

// BenchmarkSnapshot is how long a listing, a status or a sweep holds the lock.
func BenchmarkSnapshot(b *testing.B) {
	forEachCrowd(b, []int{1000, 15_000}, func(b *testing.B, n int) {
		s := newCrowd(b, n, Echo, Options{})
		b.ReportAllocs()
		for b.Loop() {
			if got := len(s.openConns()); got != n {
				b.Fatalf("%d in the snapshot, want %d", got, n)
			}
		}
		reportPerConn(b, n)
	})
}

// BenchmarkSweep is one sweep over connections that are idle, but not for too long.
func BenchmarkSweep(b *testing.B) {
	forEachCrowd(b, []int{1000, 15_000}, func(b *testing.B, n int) {
		s := newCrowd(b, n, Echo, Options{Timeouts: Timeouts{Idle: 24 * time.Hour, Stall: 24 * time.Hour}})
		sw := newSweeper(s)
		b.ReportAllocs()
		for b.Loop() {
			sw.sweep(time.Now())
		}
		reportPerConn(b, n)
		for _, c := range s.openConns() {
			if c.closeReason() != 0 {
				b.Fatalf("connection %d was ended as %v", c.id, c.closeReason())
			}
		}
	})
}

// forEachCrowd runs f for each number of connections.
func forEachCrowd(b *testing.B, sizes []int, f func(b *testing.B, n int)) {
	b.Helper()
	for _, n := range sizes {
		b.Run(fmt.Sprintf("conns=%d", n), func(b *testing.B) { f(b, n) })
	}
}

// newCrowd makes a server with n admitted connections. They have no files, because many processes may have 1,024 only,
// and no goroutines. Nothing that is measured uses either.
func newCrowd(b *testing.B, n int, h Handler, o Options) *Server {
	b.Helper()
	o.Notifier = DefaultLineNotifier()
	s, err := New(h, o)
	if err != nil {
		b.Fatal(err)
	}
	s.activeSettings().limits.MaxConns = math.MaxInt // regardless of the limit on open files
	a := &acceptor{srv: s, handler: h}
	for range n {
		c := newConn(a, newAbsentConn())
		var d decision
		s.state.With(func(st *state) {
			st.addConn(c)
			d, _ = s.admit(st, c, 0)
			st.tasks-- // it has no goroutine
		})
		if d != admit {
			b.Fatalf("connection %d: decision %d, want admit", c.id, d)
		}
	}
	return s
}

// shareClient gives all connections of s one client, which reads everything.
func shareClient(b *testing.B, s *Server) {
	b.Helper()
	ln, err := Listen(b.Context(), "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer ln.Close()
	client := dialTCP(b, ln.Addr())
	_ = client.SetDeadline(time.Time{})
	served, err := ln.Accept()
	if err != nil {
		b.Fatal(err)
	}
	var reading sync.WaitGroup
	reading.Go(func() { _, _ = io.Copy(io.Discard, client) })
	b.Cleanup(func() {
		_ = served.Close()
		reading.Wait()
	})
	for _, c := range s.openConns() {
		c.nc = served
	}
}

// reportPerConn reports the share of each of n connections in an operation.
func reportPerConn(b *testing.B, n int) {
	b.Helper()
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/conn")
}

// absentConn is the served end of a connection whose client has left. It costs nothing.
type absentConn struct{ local, remote net.Addr }

func newAbsentConn() net.Conn {
	return absentConn{fakeAddr("192.0.2.1", 9999), fakeAddr("198.51.100.1", 40_000)}
}

func (absentConn) Read([]byte) (int, error)         { return 0, io.EOF }
func (absentConn) Write(p []byte) (int, error)      { return len(p), nil }
func (absentConn) CloseWrite() error                { return nil }
func (absentConn) Close() error                     { return nil }
func (c absentConn) LocalAddr() net.Addr            { return c.local }
func (c absentConn) RemoteAddr() net.Addr           { return c.remote }
func (absentConn) SetDeadline(time.Time) error      { return nil }
func (absentConn) SetReadDeadline(time.Time) error  { return nil }
func (absentConn) SetWriteDeadline(time.Time) error { return nil }
