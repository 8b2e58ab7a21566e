package server

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"
)

// Tests over the loopback: what the kernel's TCP makes of what the server does.

// serveTCP starts a server on the loopback.
func serveTCP(t testing.TB, h Handler, o Options) (*Server, net.Addr) {
	t.Helper()
	ln := listen(t)
	s, _ := newServer(t, h, o)
	serve(t, s, ln)
	return s, ln.Addr()
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	ln, err := Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln
}

// dialTCP connects a client that hangs for half a minute at the most.
func dialTCP(t testing.TB, addr net.Addr) *net.TCPConn {
	t.Helper()
	nc, err := net.Dial("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	_ = nc.SetDeadline(time.Now().Add(30 * time.Second))
	return nc.(*net.TCPConn)
}

func send(t *testing.T, w io.Writer, text string) {
	t.Helper()
	if _, err := io.WriteString(w, text); err != nil {
		t.Fatalf("send %q: %v", text, err)
	}
}

// receives checks that want is what the client gets next.
func receives(t *testing.T, r io.Reader, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(r, got); err != nil || string(got) != want {
		t.Errorf("client received %q, %v; want %q", got[:n], err, want)
	}
}

// receivesAll checks that want and a clean end of stream is what the client gets.
func receivesAll(t *testing.T, r io.Reader, want string) {
	t.Helper()
	if got, err := io.ReadAll(r); err != nil || string(got) != want {
		t.Errorf("client received %q, %v; want %q and a clean end of stream", got, err, want)
	}
}

// awaitConns waits until so many connections are open.
func awaitConns(t *testing.T, s *Server, n int) {
	t.Helper()
	if err := s.AwaitStatus(t.Context(), func(_ State, open int) bool { return open == n }); err != nil {
		t.Fatal(err)
	}
}

func TestG1EchoIsByteForByte(t *testing.T) {
	s, addr := serveTCP(t, Echo, Options{})
	rng := rand.New(rand.NewPCG(1, 2))
	var all sync.WaitGroup
	for _, size := range []int{0, 1, 2, buffers[smallBuffer].bytes - 1, buffers[smallBuffer].bytes, buffers[smallBuffer].bytes + 1, 1<<20 + 7} {
		for _, newlines := range []bool{true, false} {
			data := randomBytes(rng, size, newlines)
			c := dialTCP(t, addr)
			cuts := rng.Uint64()
			all.Go(func() { writeInPieces(c, data, rand.New(rand.NewPCG(cuts, 0))) })
			all.Go(func() {
				if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, data) {
					t.Errorf("of %d bytes (newlines: %t) %d came back, %v, equal up to byte %d",
						size, newlines, len(got), err, commonPrefix(got, data))
				}
			})
		}
	}
	all.Wait()
	awaitConns(t, s, 0)
	if st := s.Status(); st.BytesIn != st.BytesOut || st.Closed[ReasonClientClosed] != st.Accepted {
		t.Errorf("status %+v, want as many bytes out as in, and all closed by their clients", st)
	}
}

// randomBytes returns n bytes, of any value or of any but a newline.
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

// writeInPieces sends data in writes of random sizes, and ends the stream.
func writeInPieces(c *net.TCPConn, data []byte, rng *rand.Rand) {
	for len(data) > 0 {
		n := min(len(data), 1+rng.IntN(3*buffers[smallBuffer].bytes))
		if _, err := c.Write(data[:n]); err != nil {
			return // who reads will see it
		}
		data = data[n:]
	}
	_ = c.CloseWrite()
}

func commonPrefix(a, b []byte) int {
	n := 0
	for n < min(len(a), len(b)) && a[n] == b[n] {
		n++
	}
	return n
}

// The handler reads nothing, so that there is unread input when the server closes: a reset, if it did
// not linger.
func TestG6WhoStaysToTheDeadlineSeesACleanEndAndNoReset(t *testing.T) {
	s, addr := serveTCP(t, untilDone, Options{})
	var stayers []*net.TCPConn
	for range 20 {
		c := dialTCP(t, addr)
		send(t, c, "never read")
		stayers = append(stayers, c)
	}
	awaitConns(t, s, len(stayers))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for _, c := range stayers {
			receivesAll(t, c, "SHUTDOWN 1 x\n")
		}
	}()
	rep, _ := shutdownIn(t, s, 100*time.Millisecond, "x")
	<-ended
	wantEqual(t, "closed at the deadline", rep.AtDeadline, len(stayers))
}

// More than the client's window is under way when the server closes, and there is unread input: a reset
// would throw it away.
func TestG5AnAnswerThatIsUnderWaySurvivesTheClose(t *testing.T) {
	answer := bytes.Repeat([]byte("answer\n"), 40_000)
	s, addr := serveTCP(t, HandlerFunc(func(_ context.Context, c *Conn) error {
		_, err := c.Write(answer)
		return err
	}), Options{})
	for range 5 {
		c := dialTCP(t, addr)
		_ = c.SetReadBuffer(32 << 10)
		send(t, c, "never read")
		got, err := io.ReadAll(c)
		if err != nil || !bytes.Equal(got, answer) {
			t.Errorf("client received %d bytes of %d, %v", len(got), len(answer), err)
		}
		_ = c.Close()
	}
	awaitConns(t, s, 0)
}

func TestG6FloodersThatNeverReadCannotProlongTheDrain(t *testing.T) {
	const grace, flooders = 300 * time.Millisecond, 8
	s, addr := serveTCP(t, Echo, Options{})
	var all sync.WaitGroup
	for range flooders {
		c := dialTCP(t, addr)
		all.Go(func() {
			p := make([]byte, 64<<10)
			for {
				if _, err := c.Write(p); err != nil {
					return
				}
			}
		})
	}
	awaitConns(t, s, flooders)
	rep, took := shutdownIn(t, s, grace, "x")
	if took < grace || took > grace+budget {
		t.Errorf("drain took %v, want the grace of %v and at most %v more", took, grace, budget)
	}
	if rep.AtDeadline != flooders || rep.Stuck != 0 {
		t.Errorf("report %+v, want all closed at the deadline", rep)
	}
	all.Wait()
}

func TestG4OverTheLoopbackOneThatDoesNotReadDelaysNobodysNotice(t *testing.T) {
	s, addr := serveTCP(t, Echo, Options{})
	deaf := dialTCP(t, addr)
	var flood sync.WaitGroup
	flood.Go(func() {
		for {
			if _, err := deaf.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	})
	others := make([]*net.TCPConn, 50)
	for i := range others {
		others[i] = dialTCP(t, addr)
		send(t, others[i], "x")
		receives(t, others[i], "x")
	}
	s.StartDrain(DrainOptions{Grace: time.Minute, Reason: "x"})
	began := time.Now()
	for _, c := range others {
		receives(t, c, "\nSHUTDOWN 60 x\n")
		_ = c.CloseWrite()
		receivesAll(t, c, "")
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("the others were told after %v", took)
	}
	_ = s.Close()
	flood.Wait()
}

func TestResetOverTheLoopbackCountsAsSuch(t *testing.T) {
	s, addr := serveTCP(t, Echo, Options{})
	c := dialTCP(t, addr)
	send(t, c, "x")
	receives(t, c, "x")
	_ = c.SetLinger(0)
	_ = c.Close()
	awaitConns(t, s, 0)
	wantClosed(t, s, map[Reason]uint64{ReasonClientReset: 1})
}
