package server

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"
)

// Tests over the loopback: what the kernel's TCP makes of what the server does.

// serveTCP starts a server on the loopback.
func serveTCP(t *testing.T, h Handler, o Options) (*Server, net.Addr) {
	t.Helper()
	ln := listen(t)
	s, _ := newServer(t, h, o)
	serve(t, s, ln)
	return s, ln.Addr()
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	ln, err := Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln
}

// dialTCP connects a client that hangs for half a minute at the most.
func dialTCP(t *testing.T, addr net.Addr) *net.TCPConn {
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
	for _, size := range []int{0, 1, 2, echoBuffer - 1, echoBuffer, echoBuffer + 1, 1<<20 + 7} {
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
	if st := s.Status(); st.BytesIn != st.BytesOut || st.Closed[ClientClosed] != st.Accepted {
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
		n := min(len(data), 1+rng.IntN(3*echoBuffer))
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

func TestG5WhoStopsWhenToldGetsEveryByteAndACleanEnd(t *testing.T) {
	const clients = 200
	s, addr := serveTCP(t, Echo, Options{})
	var warm, all sync.WaitGroup
	warm.Add(clients)
	rng := rand.New(rand.NewPCG(1, 2))
	data := [][]byte{randomBytes(rng, 1<<20, true), randomBytes(rng, 1<<20, false)}
	streamers := make([]*streamer, clients)
	for i := range streamers {
		streamers[i] = newStreamer(dialTCP(t, addr))
	}
	for i, c := range streamers {
		rng := rand.New(rand.NewPCG(uint64(i), 0))
		all.Go(func() { c.stream(rng, data[i%2]) })
		all.Go(func() { c.receive(t, &warm) })
	}
	warm.Wait()
	rep, took := shutdownIn(t, s, 20*time.Second, "upgrade")
	all.Wait()
	if rep.Notified != clients || rep.NoticeFailed != 0 || rep.Left != clients || took > 19*time.Second {
		t.Errorf("after %v: %+v, want %d notified, and all of them left by themselves", took, rep, clients)
	}
	wantClosed(t, s, map[Reason]uint64{ClientLeft: clients})
}

// streamer sends pieces of random bytes until it is told of the drain.
type streamer struct {
	*net.TCPConn
	told chan struct{}
	// flight holds a token for each piece on its way: more would fill megabytes of the kernel's buffers.
	flight chan struct{}
	sent   []byte // for the receiving goroutine, once streamed is closed
	// streamed is closed when the stream has ended.
	streamed chan struct{}
}

func newStreamer(c *net.TCPConn) *streamer {
	return &streamer{TCPConn: c, told: make(chan struct{}), flight: make(chan struct{}, 30), streamed: make(chan struct{})}
}

func (c *streamer) stream(rng *rand.Rand, data []byte) {
	defer close(c.streamed)
	defer c.CloseWrite()
	for {
		select {
		case <-c.told:
			return
		case c.flight <- struct{}{}:
		}
		at := rng.IntN(len(data) - streamPiece)
		n, err := c.Write(data[at : at+streamPiece])
		c.sent = append(c.sent, data[at:at+n]...)
		if err != nil {
			return
		}
	}
}

// streamPiece is of no size that buffers have.
const streamPiece = 1021

// receive checks that what comes back is what was sent, with one notice in it, on a line of its own.
func (c *streamer) receive(t *testing.T, warm *sync.WaitGroup) {
	notice := []byte("SHUTDOWN 20 upgrade\n")
	var got []byte
	isWarm, told, landed := false, false, 0
	buf := make([]byte, 16<<10)
	for {
		n, err := c.Read(buf)
		from := max(0, len(got)-len(notice))
		got = append(got, buf[:n]...)
		for ; (landed+1)*streamPiece <= len(got); landed++ {
			select {
			case <-c.flight:
			default: // it was the notice that made it a whole piece
			}
		}
		if !isWarm && (len(got) > 20_000 || err != nil) {
			isWarm = true
			warm.Done()
		}
		if !told && (bytes.Contains(got[from:], notice) || err != nil) {
			told = true
			close(c.told)
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Errorf("client received %d bytes and then: %v", len(got), err)
			return
		}
	}
	before, after, found := bytes.Cut(got, notice)
	if !found {
		t.Errorf("client was not told")
		return
	}
	if len(before) > 0 && before[len(before)-1] != '\n' {
		t.Errorf("the notice does not stand on a line of its own: it follows %q", before[max(0, len(before)-10):])
	}
	<-c.streamed
	ownNewline := bytes.TrimSuffix(before, []byte("\n"))
	if !bytes.Equal(append(bytes.Clone(before), after...), c.sent) && !bytes.Equal(append(bytes.Clone(ownNewline), after...), c.sent) {
		t.Errorf("of %d bytes sent %d came back around the notice, equal up to byte %d",
			len(c.sent), len(before)+len(after), commonPrefix(before, c.sent))
	}
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
	wantEqual(t, "closed at the deadline", rep.Deadline, len(stayers))
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
	if rep.Deadline != flooders || rep.Stuck != 0 {
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
	s.Drain(time.Minute, "x")
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
	wantClosed(t, s, map[Reason]uint64{ClientReset: 1})
}
