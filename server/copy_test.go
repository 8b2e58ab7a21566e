package server

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
)

// stream is a client's end of a connection.
type stream interface {
	net.Conn
	CloseWrite() error
}

// A path is one of the ways that bytes take through WriteTo.
type path struct {
	name string
	// serve starts a server. It returns it and a function that connects a client.
	serve func(t *testing.T, h Handler, o Options) (*Server, func() stream)
}

var paths = []path{
	{"TCP", func(t *testing.T, h Handler, o Options) (*Server, func() stream) {
		s, addr := serveTCP(t, h, o)
		return s, func() stream { return dialTCP(t, addr) }
	}},
	{"wrapped", func(t *testing.T, h Handler, o Options) (*Server, func() stream) {
		ln := listen(t)
		s, _ := newServer(t, h, o)
		serve(t, s, wrappingListener{ln})
		return s, func() stream { return dialTCP(t, ln.Addr()) }
	}},
	{"TLS", func(t *testing.T, h Handler, o Options) (*Server, func() stream) {
		forServer, forClient := tlsConfigs(t)
		ln := listen(t)
		s, _ := newServer(t, h, o)
		serveListener(t, s, Listener{Listener: ln, TLSConfig: forServer})
		return s, func() stream { return handshaken(t, dialTLS(t, ln.Addr(), forClient)) }
	}},
	{"tls.NewListener", func(t *testing.T, h Handler, o Options) (*Server, func() stream) {
		forServer, forClient := tlsConfigs(t)
		ln := listen(t)
		s, _ := newServer(t, h, o)
		serve(t, s, tls.NewListener(ln, forServer))
		return s, func() stream { return handshaken(t, dialTLS(t, ln.Addr(), forClient)) }
	}},
}

func handshaken(t *testing.T, c *tls.Conn) *tls.Conn {
	t.Helper()
	if err := c.Handshake(); err != nil {
		t.Error(err)
	}
	return c
}

// listenUnix listens on a Unix socket in a directory whose name is short enough for a socket.
// unixAddress is the address of a Unix socket at an absolute path.
func unixAddress(path string) string {
	path = filepath.ToSlash(path)
	if filepath.VolumeName(path) != "" {
		path = "/" + path
	}
	return "unix://" + path
}

// skipWithoutUnixSockets skips the test if err is that of Windows Sockets for an unknown address family: wine has no
// Unix sockets.
func skipWithoutUnixSockets(t testing.TB, err error) {
	t.Helper()
	const wsaEAFNOSUPPORT = syscall.Errno(10047)
	if errors.Is(err, wsaEAFNOSUPPORT) {
		t.Skip(err)
	}
}

func listenUnix(t testing.TB) net.Listener {
	t.Helper()
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	ln, err := Listen(t.Context(), unixAddress(filepath.Join(dir, "s")))
	skipWithoutUnixSockets(t, err)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln
}

// wrappingListener accepts connections that are wrapped in another type.
type wrappingListener struct{ net.Listener }

type wrappedConn struct{ *net.TCPConn }

func (l wrappingListener) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return wrappedConn{nc.(*net.TCPConn)}, nil
}

func init() {
	if runtime.GOOS == "windows" {
		return // Go offers no half-close for its Unix sockets
	}
	paths = append(paths, path{"Unix", func(t *testing.T, h Handler, o Options) (*Server, func() stream) {
		ln := listenUnix(t)
		s, _ := newServer(t, h, o)
		serve(t, s, ln)
		return s, func() stream { return dialTo(t, ln.Addr()).(*net.UnixConn) }
	}})
}

// onEachTransport runs f for each kind of socket that a promise holds for (G14).
func onEachTransport(t *testing.T, o Options, f func(t *testing.T, serve func(h Handler) (*Server, func() stream))) {
	t.Helper()
	for _, p := range paths {
		if slices.Contains([]string{"TCP", "TLS", "Unix"}, p.name) {
			t.Run("over "+p.name, func(t *testing.T) {
				f(t, func(h Handler) (*Server, func() stream) { return p.serve(t, h, o) })
			})
		}
	}
}

// onEachPath runs f for each path.
func onEachPath(t *testing.T, f func(t *testing.T, serve func(h Handler) (*Server, func() stream))) {
	t.Helper()
	onEachPathWith(t, Options{}, f)
}

func onEachPathWith(t *testing.T, o Options, f func(t *testing.T, serve func(h Handler) (*Server, func() stream))) {
	t.Helper()
	for _, p := range paths {
		t.Run(p.name, func(t *testing.T) {
			f(t, func(h Handler) (*Server, func() stream) { return p.serve(t, h, o) })
		})
	}
}

// randomBytes returns n random bytes, without newlines if newlines is false.
func randomBytes(rng *rand.Rand, n int, newlines bool) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(rng.Uint32())
		if !newlines && p[i] == '\n' {
			p[i] = 0
		}
	}
	return p
}

// writeInPieces sends data in writes of random sizes, and half-closes.
func writeInPieces(c stream, data []byte, rng *rand.Rand, most int) {
	for len(data) > 0 {
		n, err := c.Write(data[:min(len(data), 1+rng.IntN(most))])
		if err != nil {
			return // the reader of the echo sees it
		}
		data = data[n:]
	}
	_ = c.CloseWrite()
}

func TestEcho(t *testing.T) {
	t.Run("G1 it is byte for byte what was sent", func(t *testing.T) {
		onEachPath(t, func(t *testing.T, serve func(Handler) (*Server, func() stream)) {
			s, dial := serve(Echo)
			rng := rand.New(rand.NewPCG(1, 2))
			small := buffers[smallBuffer].bytes
			var all sync.WaitGroup
			for _, size := range []int{0, 1, 2, small - 1, small, small + 1, 1<<20 + 7} {
				for _, newlines := range []bool{true, false} {
					data, c, cuts := randomBytes(rng, size, newlines), dial(), rng.Uint64()
					all.Go(func() { writeInPieces(c, data, rand.New(rand.NewPCG(cuts, 0)), 3*small) })
					all.Go(func() {
						got, err := io.ReadAll(c)
						if err != nil {
							t.Error(err)
						}
						wantBytes(t, fmt.Sprintf("echo of %d bytes, newlines: %t", size, newlines), got, data)
						_ = c.Close()
					})
				}
			}
			all.Wait()
			awaitConns(t, s, 0)
			if st := s.Status(); st.BytesIn != st.BytesOut || st.Closed[ReasonClientClosed] != st.Accepted {
				t.Errorf("status %+v, want as many bytes out as in, and all closed by their clients", st)
			}
		})
	})

	// A FIN right behind data arrives in the same event of the poller.
	t.Run("a FIN behind data is not missed", func(t *testing.T) {
		onEachPath(t, func(t *testing.T, serve func(Handler) (*Server, func() stream)) {
			_, dial := serve(Echo)
			var clients sync.WaitGroup
			defer clients.Wait()
			for range 100 {
				nc := dial()
				clients.Go(func() {
					sent := randomBytes(rand.New(rand.NewPCG(rand.Uint64(), 0)), 1+rand.IntN(9000), true)
					if _, err := nc.Write(sent); err != nil {
						t.Error(err)
					}
					if err := nc.CloseWrite(); err != nil {
						t.Error(err)
					}
					got, err := io.ReadAll(nc)
					if err != nil {
						t.Error(err)
					}
					wantBytes(t, "echo", got, sent)
				})
			}
		})
	})

	// The echo waits in the middle of its writes, with buffers of every size.
	t.Run("nothing is lost when the client reads late", func(t *testing.T) {
		onEachPath(t, func(t *testing.T, serve func(Handler) (*Server, func() stream)) {
			s, dial := serve(Echo)
			nc := dial()
			if c, ok := nc.(*net.TCPConn); ok {
				_ = c.SetReadBuffer(32 << 10) // makes for many short writes
			}
			sent := make([]byte, 4<<20)
			for i := range sent {
				sent[i] = byte(i ^ i>>8 ^ i>>16)
			}
			var writing sync.WaitGroup
			defer writing.Wait()
			writing.Go(func() {
				for rest, size := sent, 1; len(rest) > 0; size = size*7%(1<<20) + 1 {
					n, err := nc.Write(rest[:min(size, len(rest))])
					if err != nil {
						t.Error(err)
						return
					}
					rest = rest[n:]
				}
				_ = nc.CloseWrite()
			})
			got, err := io.ReadAll(nc)
			if err != nil {
				t.Error(err)
			}
			wantBytes(t, "echo", got, sent)
			_ = nc.Close()
			awaitConns(t, s, 0)
			closed := s.Closed()[0]
			wantEqual(t, "bytes in and out", [2]uint64{closed.BytesIn, closed.BytesOut}, [2]uint64{uint64(len(sent)), uint64(len(sent))})
		})
	})

	t.Run("each message counts as activity", func(t *testing.T) {
		onEachPath(t, func(t *testing.T, serve func(Handler) (*Server, func() stream)) {
			s, dial := serve(Echo)
			c := dial()
			for range 3 {
				echoed(t, c, "x")
				var before time.Time
				for _, conn := range s.openConns() {
					before = s.timeAt(conn.lastActive.Load())
				}
				asked := time.Now()
				echoed(t, c, "x")
				for _, conn := range s.openConns() {
					if active := s.timeAt(conn.lastActive.Load()); active.Before(asked) {
						t.Errorf("an echo that was asked for %v after the last one did not count", asked.Sub(before))
					}
				}
			}
		})
	})

	t.Run("the end of a connection is noticed under a flood", func(t *testing.T) {
		onEachPath(t, func(t *testing.T, serve func(Handler) (*Server, func() stream)) {
			ended := make(chan error, 1)
			s, dial := serve(HandlerFunc(func(_ context.Context, c *Conn) error {
				_, err := io.Copy(c, c)
				ended <- err
				return err
			}))
			nc := dial()
			var flood sync.WaitGroup
			defer flood.Wait()
			defer nc.Close()
			flood.Go(func() {
				for block := make([]byte, 1<<10); ; {
					if _, err := nc.Write(block); err != nil {
						return
					}
				}
			})
			flood.Go(func() { _, _ = io.Copy(io.Discard, nc) })
			awaitConns(t, s, 1)
			_ = s.state.Await(t.Context(), func(st *state) bool { return st.admitted == 1 })
			if err := s.Kill(1); err != nil {
				t.Fatal(err)
			}
			wantErr(t, "echo", next(t, ended), ErrKilled)
		})
	})

	// The whole process is counted. The runtime allocates something now and then. Under the race detector a sync.Pool
	// loses a quarter of what is put back.
	for _, size := range []int{64, buffers[smallBuffer].bytes, buffers[mediumBuffer].bytes} {
		t.Run(fmt.Sprintf("of %d bytes allocates nothing", size), func(t *testing.T) {
			_, addr := serveTCP(t, Echo, Options{})
			nc := dialTCP(t, addr)
			message, echo := make([]byte, size), make([]byte, size)
			roundTrips := func(n int) {
				for range n {
					if _, err := nc.Write(message); err != nil {
						t.Fatal(err)
					}
					if _, err := io.ReadFull(nc, echo); err != nil {
						t.Fatal(err)
					}
				}
			}
			const n = 1000
			most := uint64(n / 20)
			if isRace() {
				most = 3 * n // of up to four reads a message
			}
			roundTrips(100) // what is made once, such as a buffer
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			roundTrips(n)
			runtime.ReadMemStats(&after)
			if made := after.Mallocs - before.Mallocs; made > most {
				t.Errorf("%d echoes made %d allocations, want at most %d", n, made, most)
			}
		})
	}
}

// isRace reports whether the race detector is on.
func isRace() bool {
	info, _ := debug.ReadBuildInfo()
	return slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

type brokenWriter struct{ err error }

func (w brokenWriter) Write(p []byte) (int, error) { return len(p) / 2, w.err }

type lyingWriter struct{}

func (lyingWriter) Write(p []byte) (int, error) { return len(p) + 1, nil }

type panickingWriter struct{}

func (panickingWriter) Write([]byte) (int, error) { panic("no") }

func TestWriteTo(t *testing.T) {
	t.Run("another writer gets everything, and it is counted", func(t *testing.T) {
		onEachPath(t, func(t *testing.T, serve func(Handler) (*Server, func() stream)) {
			type result struct {
				n    int64
				err  error
				text string
			}
			results := make(chan result, 1)
			_, dial := serve(HandlerFunc(func(_ context.Context, c *Conn) error {
				var sink bytes.Buffer
				n, err := c.WriteTo(struct{ io.Writer }{&sink})
				results <- result{n, err, sink.String()}
				return err
			}))
			nc := dial()
			send(t, nc, "one two")
			_ = nc.CloseWrite()
			if got, want := next(t, results), (result{7, nil, "one two"}); got != want {
				t.Errorf("WriteTo: %+v, want %+v", got, want)
			}
		})
	})

	boom := errors.New("boom")
	for want, w := range map[error]io.Writer{
		boom: brokenWriter{boom}, io.ErrShortWrite: brokenWriter{},
	} {
		t.Run("the writer's error is returned: "+want.Error(), func(t *testing.T) {
			onEachPath(t, func(t *testing.T, serve func(Handler) (*Server, func() stream)) {
				errs := make(chan error, 1)
				counts := make(chan int64, 1)
				_, dial := serve(HandlerFunc(func(_ context.Context, c *Conn) error {
					n, err := c.WriteTo(w)
					counts <- n
					errs <- err
					return nil
				}))
				send(t, dial(), "four")
				if n, err := next(t, counts), next(t, errs); n != 2 || !errors.Is(err, want) {
					t.Errorf("WriteTo = %d, %v; want 2, %v", n, err, want)
				}
			})
		})
	}

	for _, w := range []io.Writer{brokenWriter{boom}, lyingWriter{}, panickingWriter{}} {
		t.Run(fmt.Sprintf("the buffer is given back after a %T", w), func(t *testing.T) {
			onEachPath(t, func(t *testing.T, serve func(Handler) (*Server, func() stream)) {
				s, dial := serve(HandlerFunc(func(_ context.Context, c *Conn) error {
					cp := &copier{src: c, dst: w, size: largeBuffer}
					if raw := rawConn(c.nc); raw != nil {
						_, err := cp.copyRaw(raw)
						return err
					}
					_, err := cp.copyBuffered()
					return err
				}))
				c := dial()
				send(t, c, "four")
				_, _ = io.ReadAll(c)
				_ = c.Close()
				awaitConns(t, s, 0)
				wantEqual(t, "large buffers in use", buffers[largeBuffer].inUse.Load(), int32(0))
			})
		})
	}
}

func TestBuffers(t *testing.T) {
	t.Run("grow and shrink with the reads", func(t *testing.T) {
		for _, step := range []struct {
			size        bufferSize
			n           int
			smallBefore bool
			want        bufferSize
			small       bool
		}{
			{smallBuffer, 1, false, smallBuffer, false},
			{smallBuffer, 4 << 10, false, mediumBuffer, false},
			{mediumBuffer, 4 << 10, true, mediumBuffer, false},
			{mediumBuffer, 4<<10 - 1, false, mediumBuffer, true}, // may be the end of a message of 7 KiB
			{mediumBuffer, 4<<10 - 1, true, smallBuffer, false},
			{mediumBuffer, 64 << 10, true, largeBuffer, false},
			{largeBuffer, 64 << 10, false, largeBuffer, false},
			{largeBuffer, 64<<10 - 1, true, mediumBuffer, false},
			{largeBuffer, 512 << 10, false, largeBuffer, false},
		} {
			if got, small := step.size.next(step.n, step.smallBefore); got != step.want || small != step.small {
				t.Errorf("size %d after %d bytes, small before: %t: %d, small: %t; want %d, %t",
					step.size, step.n, step.smallBefore, got, small, step.want, step.small)
			}
		}
	})

	// The counts are the test's own, because no test that runs in parallel with it echoes in bulk.
	t.Run("large ones are bounded", func(t *testing.T) {
		var taken []*buffer
		for range buffers[largeBuffer].most {
			taken = append(taken, getBuffer(largeBuffer))
		}
		more := getBuffer(largeBuffer)
		if more.size != mediumBuffer || len(more.bytes) != 64<<10 {
			t.Errorf("beyond the bound there was one of size %d, want the next smaller", more.size)
		}
		more.put()
		for _, b := range taken {
			wantEqual(t, "size within the bound", b.size, largeBuffer)
			b.put()
		}
		wantEqual(t, "large buffers in use", buffers[largeBuffer].inUse.Load(), int32(0))
		wantEqual(t, "medium buffers in use", buffers[mediumBuffer].inUse.Load(), int32(0))
	})
}
