package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// TestHandoverRefused: what is not handed over, and why. In each case the server continues to serve.
func TestHandoverRefused(t *testing.T) {
	t.Run("a second handover at a time", testHandoverTwice)
	t.Run("another format", testHandoverFormat)
	t.Run("handler state that is too large", testHandoverLargeState)
	t.Run("more state than fits into a message", testHandoverLargeStates)
	t.Run("a successor that may open fewer files", testHandoverFewFiles)
	t.Run("a listener without a descriptor", testHandoverNoDescriptor)
	t.Run("a client that is ended before it was admitted", testHandoverEndedWaiting)
	t.Run("a handshake in progress, unlike one that is over", testHandoverHandshake)
}

// rolledBack hands over to a successor that fails, and checks that nothing has changed.
func (g *generation) rolledBack(t *testing.T, why string, link Link, o HandoverOptions) {
	t.Helper()
	// A client can have its echo before the write returns.
	await(t, "the echoes to be counted", func() bool { return g.Status().BytesIn == g.Status().BytesOut })
	before := g.Status()
	if o.Kill == nil {
		o.Kill = func() {}
	}
	_, err := g.HandOver(t.Context(), link, o)
	wantErrText(t, "handing over", err, why)
	after := g.Status()
	wantEqual(t, "status after the rollback", after, before)
}

func testHandoverTwice(t *testing.T) {
	g, _ := firstGeneration(t, Echo, Options{})
	near, far := linkPair(t)
	defer far.Close()
	first := make(chan error, 1)
	go func() {
		_, err := g.HandOver(t.Context(), near, HandoverOptions{Kill: func() {}})
		first <- err
	}()
	if _, err := ReceiveOffer(t.Context(), far); err != nil { // it waits for an answer now
		t.Fatal(err)
	}
	second, other := linkPair(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, err := g.HandOver(ctx, second, HandoverOptions{Kill: func() {}})
	wantErr(t, "a second handover", err, ErrHandoverInProgress)
	if _, _, err := other.Receive(); !errors.Is(err, io.EOF) {
		t.Errorf("the link of the refused handover: %v, want its end", err)
	}
	_ = far.Close()
	wantErrText(t, "the first handover", <-first, "waiting until the successor is ready")
	g.ends(t, Echo)
}

// ends hands over once more, which must succeed, and closes the servers.
func (g *generation) ends(t *testing.T, h Handler) {
	t.Helper()
	next, _ := g.takeOver(t, h, Options{})
	_ = g.Close()
	g.served.Wait()
	_ = next.Close()
	next.served.Wait()
}

func testHandoverFormat(t *testing.T) {
	near, far := linkPair(t)
	offer, _ := json.Marshal(handoverMessage{Type: msgOffer, Format: handoverFormat + 1, Program: "echod 9"})
	if err := near.Send(offer, nil); err != nil {
		t.Fatal(err)
	}
	_, err := ReceiveOffer(t.Context(), far)
	wantErr(t, "receiving an offer of another format", err, ErrHandoverFormat)
	if err != nil {
		wantErrText(t, "receiving it", err, "echod 9")
	}
	_ = near.SetDeadline(time.Now().Add(10 * time.Second))
	answer, _, err := near.Receive()
	if err != nil || !bytes.Contains(answer, []byte(ErrHandoverFormat.Error())) {
		t.Errorf("the predecessor is told %q, %v; want why", answer, err)
	}
	_ = near.Close()

	g, addr := firstGeneration(t, Echo, Options{})
	c := dialTCP(t, addr)
	echoed(t, c, "before")
	near, far = linkPair(t)
	go func() {
		offer, err := ReceiveOffer(context.Background(), far)
		if err == nil {
			closeFiles([]any{offer.Listeners[0].Listener})
			offer.Refuse(ErrHandoverFormat)
		}
	}()
	g.rolledBack(t, ErrHandoverFormat.Error(), near, HandoverOptions{})
	echoed(t, c, "after")
	_ = c.Close()
	g.ends(t, Echo)
}

// sized is a Resumer with that many bytes of state.
type sized int

func (n sized) ServeConn(ctx context.Context, c *Conn) error { return n.ResumeConn(ctx, c, nil) }

func (n sized) ResumeConn(_ context.Context, c *Conn, _ []byte) error {
	for p := make([]byte, 100); ; {
		c.MarkIdle()
		switch k, err := c.Read(p); {
		case errors.Is(err, ErrHandover):
			return Handover(make([]byte, n))
		case errors.Is(err, ErrDraining): // until the client leaves
		case err != nil:
			return err
		default:
			if _, err := c.Write(p[:k]); err != nil {
				return err
			}
		}
	}
}

func testHandoverLargeState(t *testing.T) {
	for _, n := range []int{maxHandlerState, maxHandlerState + 1} {
		g, addr := firstGeneration(t, sized(n), Options{})
		c := dialTCP(t, addr)
		echoed(t, c, "before\n")
		next, report := g.takeOver(t, sized(n), Options{})
		want := map[string]int{}
		if n > maxHandlerState {
			want["handler state is too large"] = 1
			receives(t, c, "SHUTDOWN 5 upgrade\n") // it is drained
		}
		wantEqual(t, fmt.Sprintf("behind with a state of %d bytes", n), report.Kept, want)
		echoed(t, c, "after\n")
		_ = c.Close()
		g.served.Wait()
		awaitConns(t, next.Server, 0)
		wantBalanced(t, next.Status())
		_ = next.Close()
		next.served.Wait()
	}
}

func testHandoverLargeStates(t *testing.T) {
	if os.Getenv("ECHOD_TEST_SLOW") != "1" {
		t.Skip("slow: ECHOD_TEST_SLOW=1 runs it")
	}
	const fit, more = maxTotalState / maxHandlerState, 3
	g, addr := firstGeneration(t, sized(maxHandlerState), Options{})
	var clients []*net.TCPConn
	for range fit + more {
		c := dialTCP(t, addr)
		echoed(t, c, "x\n")
		clients = append(clients, c)
	}
	next, report := g.takeOver(t, sized(maxHandlerState), Options{})
	wantEqual(t, "handed over", report.HandedOver, fit)
	wantEqual(t, "behind", report.Kept, map[string]int{"handler state is too large": more})
	for _, c := range clients {
		_ = c.Close()
	}
	g.served.Wait()
	awaitConns(t, next.Server, 0)
	wantBalanced(t, next.Status())
	_ = next.Close()
	next.served.Wait()
}

// maxFilesEnv is the limit of open files of a successor.
const maxFilesEnv = "ECHOD_TEST_MAX_FILES"

func testHandoverFewFiles(t *testing.T) {
	g, addr := firstGeneration(t, Echo, Options{})
	var clients []*net.TCPConn
	for range 100 {
		c := dialTCP(t, addr)
		echoed(t, c, "before\n")
		clients = append(clients, c)
	}
	t.Setenv(maxFilesEnv, "50")
	process, link := startRole(t, "successor", "", "")
	kill := func() {
		_ = process.Process.Kill()
		_ = process.Wait()
	}
	g.rolledBack(t, "limit on open files", link, HandoverOptions{Kill: kill})
	kill()
	for _, c := range clients {
		echoed(t, c, "after\n")
		_ = c.Close()
	}
	awaitConns(t, g.Server, 0)
	g.ends(t, Echo)
}

func testHandoverNoDescriptor(t *testing.T) {
	g, _ := firstGeneration(t, Echo, Options{})
	near, far := linkPair(t)
	defer far.Close()
	extra := map[string]net.Listener{"admin": newFakeListener()}
	g.rolledBack(t, "listener admin has no descriptor", near, HandoverOptions{Extra: extra})
	g.ends(t, Echo)
}

// testHandoverEndedWaiting: the client counts as open in the successor until the predecessor has closed it.
func testHandoverEndedWaiting(t *testing.T) {
	g, addr := firstGeneration(t, Echo, Options{WrapConn: readHello})
	c := dialTCP(t, addr)
	await(t, "the handshake", func() bool { return g.Status().Connections == 1 })
	if _, err := g.Pause(PauseOptions{}); err != nil {
		t.Fatal(err)
	}
	send(t, c, "hello\n")
	await(t, "the client to wait", func() bool { return g.handshakes() == 0 })
	var ended *Conn
	g.state.With(func(st *state) {
		st.frozen = true // or it would be closed at once
		ended = st.conns.get(1)
	})
	ended.end(ReasonKilled, ErrKilled) // as Kill does if the freeze begins in the middle of it
	next, report := g.takeOver(t, Echo, Options{WrapConn: readHello})
	wantEqual(t, "behind", report.Kept, map[string]int{"closing": 1})
	wantBalanced(t, next.Status())
	receivesAll(t, c, "")
	_ = c.Close()
	g.served.Wait()
	awaitConns(t, next.Server, 0)
	wantClosed(t, next.Server, map[Reason]uint64{ReasonKilled: 1})
	wantBalanced(t, next.Status())
	_ = next.Close()
	next.served.Wait()
}

// readHello is a WrapConn that reads a line.
func readHello(_ context.Context, nc net.Conn) (net.Conn, error) {
	line := make([]byte, len("hello\n"))
	_, err := io.ReadFull(nc, line)
	return nc, err
}

func (g *generation) handshakes() (n int) {
	g.state.With(func(st *state) { n = len(st.handshakes) })
	return n
}

func testHandoverHandshake(t *testing.T) {
	g, addr := firstGeneration(t, Echo, Options{WrapConn: readHello})
	waits, silent := dialTCP(t, addr), dialTCP(t, addr)
	await(t, "both", func() bool { return g.handshakes() == 2 })
	if _, err := g.Pause(PauseOptions{}); err != nil {
		t.Fatal(err)
	}
	send(t, waits, "hello\n")
	await(t, "the first handshake to end", func() bool { return g.handshakes() == 1 })
	next, report := g.takeOver(t, Echo, Options{WrapConn: readHello})
	wantEqual(t, "handed over", report.HandedOver, 1)
	wantEqual(t, "behind", report.Kept, map[string]int{"handshake": 1})
	send(t, silent, "hello\n")
	receivesAll(t, silent, "PAUSED\n") // not served by a process that does not know when the pause ends
	_ = silent.Close()
	g.served.Wait()
	events := next.Subscribe()
	if _, err := next.Resume(Caller{}); err != nil {
		t.Fatal(err)
	}
	echoed(t, waits, "served\n")
	late := dialTCP(t, addr)
	send(t, late, "hello\n")
	echoed(t, late, "served too\n")
	for e := range events.Events(t.Context()) {
		if e.Type == EventOpened {
			wantEqual(t, "the first connection that opens after the handover", e.Conn.ID, uint64(3))
			break
		}
	}
	events.Close()
	wantClosed(t, next.Server, map[Reason]uint64{ReasonRejectedPaused: 1})
	wantBalanced(t, next.Status())
	_ = next.Close()
	next.served.Wait()
}

// scriptedLink plays a predecessor that sends these messages, each with one connection.
type scriptedLink struct {
	messages [][]byte
	far      []net.Conn
}

func (l *scriptedLink) Receive() ([]byte, []any, error) {
	if len(l.messages) == 0 {
		return nil, nil, io.EOF
	}
	message := l.messages[0]
	l.messages = l.messages[1:]
	near, far := net.Pipe()
	l.far = append(l.far, far)
	return message, []any{near}, nil
}

func (l *scriptedLink) Send([]byte, []any) error    { return nil }
func (l *scriptedLink) Carries(any) bool            { return true }
func (l *scriptedLink) SetDeadline(time.Time) error { return nil }
func (l *scriptedLink) Close() error                { return nil }

// FuzzTakeOver sends a successor messages that no predecessor sends. It takes over or returns an error; it does not panic,
// and it closes each connection that it was sent.
func FuzzTakeOver(f *testing.F) {
	record := handoverConn{ID: 1, Opened: time.Unix(1, 0), Active: time.Unix(2, 0)}
	message := func(m handoverMessage, records ...[]byte) []byte {
		p, _ := json.Marshal(m)
		return append(append(p, '\n'), bytes.Join(records, nil)...)
	}
	separator := []byte("\n\n")
	conns := message(handoverMessage{Type: msgConns}, appendRecord(nil, record.append(nil)))
	final := message(handoverMessage{
		Type: msgFinal, Count: 1, Accepted: 3, LastID: 3, Kept: []handoverKept{{ID: 2}},
		Closed: map[string]uint64{"killed": 1}, Holds: []HoldInfo{{ID: "h1", Expires: time.Unix(1, 0)}},
		Settings: []handoverSetting{{"max-conns", "1"}},
	})
	ended := message(handoverMessage{Type: msgEnded, Ends: []handoverEnd{{ID: 2, Reason: "killed"}}})
	f.Add(bytes.Join([][]byte{conns, final, message(handoverMessage{Type: msgCommit}), ended}, separator))
	f.Add(bytes.Join([][]byte{message(handoverMessage{Type: msgHoldConns, HoldIDs: []string{"h1"}}), final, conns}, separator))
	f.Fuzz(func(t *testing.T, p []byte) {
		s, err := New(Echo, Options{Logger: zap.NewNop()})
		if err != nil {
			t.Fatal(err)
		}
		link := &scriptedLink{messages: bytes.Split(p, separator)}
		ln := newFakeListener()
		offer := &Offer{Listeners: []Listener{{Listener: ln}}, link: link}
		if err := s.TakeOver(t.Context(), offer, offer.Listeners); err == nil {
			go func() { _ = s.ServeListener(offer.Listeners[0]) }()
		}
		_ = s.Close()
		for _, far := range link.far {
			_ = far.SetReadDeadline(time.Now().Add(10 * time.Second))
			if _, err := io.Copy(io.Discard, far); err != nil {
				t.Errorf("a connection stayed open: %v", err)
			}
			_ = far.Close()
		}
	})
}

// limitFiles lowers the limit of open files of a successor in a process of its own, as the environment says.
func limitFiles() {
	var n uint64
	if _, err := fmt.Sscan(os.Getenv(maxFilesEnv), &n); err == nil {
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: n})
	}
}
