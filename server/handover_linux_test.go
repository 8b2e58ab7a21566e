package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// linkPair returns the two ends of a handover between servers.
func linkPair(t testing.TB) (predecessor, successor Link) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var links [2]Link
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "link")
		nc, err := net.FileConn(f)
		_ = f.Close()
		if err != nil {
			t.Fatal(err)
		}
		if links[i], err = NewUnixLink(nc.(*net.UnixConn)); err != nil {
			t.Fatal(err)
		}
	}
	return links[0], links[1]
}

// generation is a server that can hand over to the next one.
type generation struct {
	*Server
	served sync.WaitGroup
	link   func(Link) Link // changes the link to the next generation; nil does not
}

// midwayLink calls midway once the successor has what is sent ahead first.
type midwayLink struct {
	Link
	received int
	midway   func()
}

func (l *midwayLink) Receive() (message []byte, files []any, err error) {
	message, files, err = l.Link.Receive()
	if l.received++; l.received == 2 { // after its answer to the offer
		l.midway()
	}
	return message, files, err
}

// takeOver makes the next generation of g, which serves with h.
func (g *generation) takeOver(t testing.TB, h Handler, o Options) (*generation, HandoverReport) {
	t.Helper()
	near, far := linkPair(t)
	if g.link != nil {
		near = g.link(near)
	}
	next := &generation{}
	taken := make(chan error, 1)
	go func() {
		taken <- func() error {
			offer, err := ReceiveOffer(context.Background(), far)
			if err != nil {
				return err
			}
			next.Server, _ = newServer(t, h, o)
			if err := next.TakeOver(context.Background(), offer, offer.Listeners); err != nil {
				return err
			}
			for _, l := range offer.Listeners {
				next.served.Go(func() { _ = next.ServeListener(l) })
			}
			return nil
		}()
	}()
	report, err := g.HandOver(context.Background(), near, HandoverOptions{
		Program: "test", Kill: func() {}, FreezeTimeout: 20 * time.Second, SafePointTimeout: 10 * time.Second,
	})
	if takeErr := <-taken; err != nil || takeErr != nil {
		t.Fatalf("handing over: %v; taking over: %v", err, takeErr)
	}
	return next, report
}

func firstGeneration(t testing.TB, h Handler, o Options) (*generation, net.Addr) {
	t.Helper()
	ln, err := Listen(context.Background(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := &generation{}
	g.Server, _ = newServer(t, h, o)
	g.served.Go(func() { _ = g.Serve(ln) })
	_ = g.AwaitStatus(context.Background(), func(st State, _ int) bool { return st == StateRunning })
	return g, ln.Addr()
}

func TestG12Handover(t *testing.T) {
	t.Run("streams continue byte for byte", testHandoverStreams)
	t.Run("half-closed clients and full windows are handed over", testHandoverHalfClosed)
	t.Run("holds, queue and counters are handed over", testHandoverPaused)
	t.Run("counters, ids, lines and times to live continue", testHandoverContinues)
	t.Run("connections that cannot be resumed stay behind and are counted", testHandoverBehind)
	t.Run("a successor that fails at any step changes nothing", testHandoverRollback)
	t.Run("a notice that waits for its client is handed over", testHandoverNotice)
	t.Run("a pause at the commit is not placed on the predecessor", testHandoverPauseAtCommit)
	t.Run("an eviction is handed over", testHandoverEviction)
	t.Run("the successor tells a client whose window is full", testHandoverShut)
	t.Run("changed settings are handed over, also twice", testHandoverSettings)
	t.Run("a subscriber with an old id misses no event", testHandoverEvents)
}

func testHandoverSettings(t *testing.T) {
	g, _ := firstGeneration(t, Echo, Options{Limits: Limits{MaxConns: 100}})
	want := set(t, g.Server, "max-conns=7", "idle-timeout=1h", "deny=192.0.2.0/24")
	for range 2 {
		next, _ := g.takeOver(t, Echo, Options{Limits: Limits{MaxConns: 100}})
		g.served.Wait()
		g = next
		wantEqual(t, "settings changed", g.Status().Settings, want)
	}
	set(t, g.Server, "max-conns=100", "idle-timeout=0s", "deny=")
	next, _ := g.takeOver(t, Echo, Options{Limits: Limits{MaxConns: 100}})
	g.served.Wait()
	wantEqual(t, "settings changed once undone", len(next.Status().Settings), 0)
	next.restoreSettings([]handoverSetting{{"later", "1"}, {"max-conns", "many"}, {"max-conns", "1000000000"}})
	wantEqual(t, "max-conns, lowered to what files allow", next.activeSettings().limits.MaxConns, Limits{}.withDefaults(zap.NewNop()).MaxConns)
	_ = next.Close()
	next.served.Wait()
}

// testHandoverEvents: a subscriber that comes after two handovers gets all events, as the one who was always there.
func testHandoverEvents(t *testing.T) {
	g, addr := firstGeneration(t, Echo, Options{Limits: Limits{MaxConns: 100}})
	first := g.Subscribe()
	var want []Event
	follow := func(sub *Subscription) (last uint64) {
		for e := range sub.Events(t.Context()) {
			want = append(want, e)
			if e.Type == EventUpgraded {
				return e.ID
			}
		}
		t.Fatal("the subscription ended without an event of type upgraded")
		return 0
	}
	some := func() {
		c := dialTCP(t, addr)
		echoed(t, c, "hello\n")
		_ = c.Close()
		awaitConns(t, g.Server, 0)
		h, err := g.Pause(PauseOptions{Reason: "backup", By: Caller{UID: 7, PID: 9}})
		if err != nil {
			t.Fatal(err)
		}
		h.Release()
		set(t, g.Server, "idle-timeout=1h")
		set(t, g.Server, "idle-timeout=0s")
	}
	some()
	for range 2 {
		g.link = func(l Link) Link { return &midwayLink{Link: l, midway: some} }
		next, _ := g.takeOver(t, Echo, Options{Limits: Limits{MaxConns: 100}})
		last := follow(first)
		g.served.Wait()
		g, first = next, next.SubscribeAfter(last)
		some()
	}
	_ = g.Close()
	g.served.Wait()
	for e := range first.Events(t.Context()) {
		want = append(want, e)
	}

	late := g.SubscribeAfter(want[0].ID)
	got := slices.Collect(late.Events(t.Context()))
	wantEqual(t, "number of events", len(got), len(want)-1)
	for i, e := range got {
		wantEqual(t, "event", described(t, e), described(t, want[i+1]))
	}
	for i := range want {
		wantEqual(t, "id", want[i].ID, want[0].ID+uint64(i))
	}
}

// described is an event without the time of an upgrade, which both processes tell.
func described(t *testing.T, e Event) string {
	t.Helper()
	if e.Type == EventUpgraded {
		e.Time = time.Time{}
	}
	return string(recordEvents([]Event{e})[0])
}

// testHandoverEviction: some clients are told before the handover and the others after it, each once. All have their
// grace period, and are closed by the successor.
func testHandoverEviction(t *testing.T) {
	const n, spread, grace = 20, 400 * time.Millisecond, 600 * time.Millisecond
	o := Options{Drain: DrainOptions{Grace: time.Hour}}
	g, addr := firstGeneration(t, Echo, o)
	var clients []*net.TCPConn
	for range n {
		c := dialTCP(t, addr)
		echoed(t, c, "x\n")
		clients = append(clients, c)
	}
	began := time.Now()
	if _, err := g.Pause(PauseOptions{Reason: "m", Evict: true, Spread: spread, Grace: grace}); err != nil {
		t.Fatal(err)
	}
	await(t, "the first notice", func() bool { return g.Status().Told > 0 })
	next, _ := g.takeOver(t, Echo, o)
	<-g.Done()
	g.served.Wait()
	t.Logf("%d of %d were told %v after the beginning", next.Status().Told, n, time.Since(began))
	for _, c := range clients {
		receivesAll(t, c, "SHUTDOWN 1 m\n")
		_ = c.Close()
	}
	awaitConns(t, next.Server, 0)
	if took := time.Since(began); took < grace {
		t.Errorf("the last was closed after %v", took)
	}
	wantClosed(t, next.Server, map[Reason]uint64{ReasonEvicted: n})
	wantEqual(t, "notices sent", next.Status().NoticesSent, uint64(n))
	wantState(t, next.Server, StatePaused, 0)
	_ = next.Close()
	next.served.Wait()
}

func testHandoverStreams(t *testing.T) {
	const clients, handovers = 10, 6
	g, addr := firstGeneration(t, Echo, Options{})
	var streams sync.WaitGroup
	stop := make(chan struct{})
	for i := range clients {
		c := dialTCP(t, addr)
		streams.Go(func() { streamUntil(t, c, stop, uint64(i)) })
	}
	var worst time.Duration
	for i := range handovers {
		time.Sleep(time.Duration(rand.IntN(50)) * time.Millisecond) // a random moment of the streams
		next, report := g.takeOver(t, Echo, Options{})
		worst = max(worst, report.Frozen)
		if len(report.Kept) > 0 {
			t.Fatalf("handover %d: connections stayed behind: %v", i, report.Kept)
		}
		<-g.Done()
		g.served.Wait()
		if st := g.Status(); st.Accepted != 0 || st.Connections != 0 {
			t.Errorf("the predecessor counts %d accepted and %d open", st.Accepted, st.Connections)
		}
		g = next
		if st := g.Status(); st.Accepted != clients || st.Connections != clients {
			t.Errorf("the successor counts %d accepted and %d open, want %d", st.Accepted, st.Connections, clients)
		}
	}
	close(stop)
	streams.Wait()
	t.Logf("longest freeze %v", worst)
	_ = g.Close()
	g.served.Wait()
}

// streamUntil sends random bytes in pieces of all sizes until stop is closed, at most half a megabyte ahead of their
// echo, and checks that the same come back.
func streamUntil(t *testing.T, c *net.TCPConn, stop <-chan struct{}, seed uint64) {
	_ = c.SetDeadline(time.Time{})
	content := rand.NewChaCha8([32]byte{byte(seed)})
	random := rand.New(content)
	const ahead = 512 << 10
	var echoed atomic.Int64
	progress := make(chan struct{}, 1)
	want := sha256.New()
	sent := make(chan int64, 1)
	go func() {
		var n int64
		defer func() { sent <- n }()
		for {
			select {
			case <-stop:
				_ = c.CloseWrite()
				return
			default:
			}
			if n-echoed.Load() > ahead {
				<-progress
				continue
			}
			p := make([]byte, 1+random.IntN(1<<(1+random.IntN(18))))
			_, _ = content.Read(p) // never fails
			if _, err := c.Write(p); err != nil {
				t.Errorf("client %d: %v", seed, err)
				return
			}
			want.Write(p)
			n += int64(len(p))
		}
	}()
	got := sha256.New()
	var readErr error
	for buf := make([]byte, 64<<10); readErr == nil; {
		var n int
		n, readErr = c.Read(buf)
		got.Write(buf[:n])
		echoed.Add(int64(n))
		select {
		case progress <- struct{}{}:
		default:
		}
	}
	if n := <-sent; readErr != io.EOF || echoed.Load() != n || !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		t.Errorf("client %d got %d bytes back of %d, then %v; the same bytes: %t", seed, echoed.Load(), n, readErr,
			bytes.Equal(got.Sum(nil), want.Sum(nil)))
	}
}

// testHandoverHalfClosed: the client has sent megabytes, ended its stream, and reads nothing until after the handover.
func testHandoverHalfClosed(t *testing.T) {
	g, addr := firstGeneration(t, Echo, Options{})
	c := dialTCP(t, addr)
	want := make([]byte, 16<<20)                  // more than socket buffers take
	_, _ = rand.NewChaCha8([32]byte{}).Read(want) // never fails
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(want)
		sent <- errors.Join(err, c.CloseWrite())
	}()
	_ = g.state.Await(t.Context(), func(*state) bool { return true })
	next, report := g.takeOver(t, Echo, Options{})
	if report.HandedOver != 1 {
		t.Fatalf("handed over %d connections, behind %v", report.HandedOver, report.Kept)
	}
	next, _ = next.takeOver(t, Echo, Options{}) // in the middle of the rest
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %d bytes, error %v, the same: %t", len(got), err, bytes.Equal(got, want))
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
	_ = c.Close()
	awaitConns(t, next.Server, 0)
	wantClosed(t, next.Server, map[Reason]uint64{ReasonClientClosed: 1})
	_ = next.Close()
	next.served.Wait()
}

func testHandoverPaused(t *testing.T) {
	g, addr := firstGeneration(t, Echo, Options{})
	old := dialTCP(t, addr)
	send(t, old, "x")
	receives(t, old, "x")
	if _, err := g.Pause(PauseOptions{Reason: "backup", TTL: time.Hour, By: Caller{UID: 7, PID: 9}}); err != nil {
		t.Fatal(err)
	}
	queued := dialTCP(t, addr)
	send(t, queued, "queued")
	before := g.Status()
	next, _ := g.takeOver(t, Echo, Options{})
	after := next.Status()
	wantEqual(t, "state", after.State, StatePaused)
	wantEqual(t, "counters", []any{after.Accepted, after.BytesIn, after.Connections}, []any{before.Accepted, before.BytesIn, before.Connections})
	if len(after.Holds) != 1 || after.Holds[0].Reason != "backup" || after.Holds[0].By != (Caller{UID: 7, PID: 9}) || after.Holds[0].Expires.IsZero() {
		t.Errorf("holds %+v", after.Holds)
	}
	if err := next.ReleaseHold(after.Holds[0].ID, Caller{}); err != nil {
		t.Error(err)
	}
	receives(t, queued, "queued")
	h, err := next.Pause(PauseOptions{})
	if err != nil || h.ID() != "h2" {
		t.Errorf("the next hold is %q, %v; want h2", h.ID(), err)
	}
	h.Release()
	for info := range next.Conns() {
		if info.Remote.String() == queued.LocalAddr().String() && info.ID != 2 {
			t.Errorf("the queued client has the id %d, want 2", info.ID)
		}
	}
	_ = next.Close()
	next.served.Wait()
}

func testHandoverContinues(t *testing.T) {
	g, addr := firstGeneration(t, Echo, Options{})
	gone, stays, between := dialTCP(t, addr), dialTCP(t, addr), dialTCP(t, addr)
	echoed(t, gone, "a client that has gone\n")
	_ = gone.Close()
	awaitConns(t, g.Server, 2)
	echoed(t, stays, "in the middle of a line")
	echoed(t, between, "between two lines\n")
	if _, err := g.Pause(PauseOptions{Reason: "backup", TTL: 300 * time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	before := g.Status()
	next, _ := g.takeOver(t, Echo, Options{})
	after := next.Status()
	wantEqual(t, "bytes", []uint64{after.BytesIn, after.BytesOut}, []uint64{before.BytesIn, before.BytesOut})
	wantEqual(t, "closed", after.Closed, before.Closed)

	late := dialTCP(t, addr)
	echoed(t, late, "served when the hold has ended\n")
	wantState(t, next.Server, StateRunning, 3)
	var ids []uint64
	for info := range next.Conns() {
		ids = append(ids, info.ID)
	}
	wantEqual(t, "ids", ids, []uint64{2, 3, 4})
	if sent, failed, err := next.Notify(t.Context(), "x"); sent != 3 || failed != 0 || err != nil {
		t.Errorf("notified %d, failed %d, %v", sent, failed, err)
	}
	receives(t, stays, "\nNOTICE x\n")
	receives(t, between, "NOTICE x\n")
	receives(t, late, "NOTICE x\n")
	_ = next.Close()
	next.served.Wait()
}

func testHandoverBehind(t *testing.T) {
	g, addr := firstGeneration(t, plainEcho, Options{})
	c := dialTCP(t, addr)
	send(t, c, "x")
	receives(t, c, "x")
	for g.Status().BytesOut == 0 { // the client can have it before the write returns
		runtime.Gosched()
	}
	next, report := g.takeOver(t, plainEcho, Options{})
	wantEqual(t, "behind", report.Kept, map[string]int{"handler cannot be resumed": 1})
	st := next.Status()
	if st.Connections != 1 || st.KeptByPredecessor != 1 || st.Accepted != 1 {
		t.Errorf("the successor counts %d open, %d of them behind, %d accepted", st.Connections, st.KeptByPredecessor, st.Accepted)
	}
	if st.BytesIn != 1 || st.BytesOut != 1 { // counters never go back
		t.Errorf("the successor counts %d bytes in and %d out, of a connection that had 1 and 1", st.BytesIn, st.BytesOut)
	}
	receives(t, c, "\nSHUTDOWN 5 upgrade\n")
	send(t, c, "y")
	receives(t, c, "y")
	_ = c.CloseWrite()
	receivesAll(t, c, "")
	awaitConns(t, next.Server, 0)
	wantClosed(t, next.Server, map[Reason]uint64{ReasonClientLeft: 1})
	st = next.Status()
	wantEqual(t, "bytes in", st.BytesIn, uint64(len("xy")))
	wantEqual(t, "bytes out", st.BytesOut, uint64(len("x"+"\nSHUTDOWN 5 upgrade\n"+"y")))
	_ = next.Close()
	next.served.Wait()
	g.served.Wait()
}

func testHandoverPauseAtCommit(t *testing.T) {
	g, _ := firstGeneration(t, Echo, Options{})
	near, far := linkPair(t)
	next := &generation{}
	taken := make(chan error, 1)
	go func() {
		offer, err := ReceiveOffer(context.Background(), far)
		if err == nil {
			next.Server, _ = newServer(t, Echo, Options{})
			err = next.TakeOver(context.Background(), offer, offer.Listeners)
		}
		if err == nil {
			next.served.Go(func() { _ = next.ServeListener(offer.Listeners[0]) })
		}
		taken <- err
	}()
	paused := make(chan error, 1)
	_, err := g.HandOver(context.Background(), near, HandoverOptions{
		Kill:          func() {},
		FreezeTimeout: 20 * time.Second,
		Committed: func() {
			go func() {
				_, err := g.Pause(PauseOptions{})
				paused <- err
			}()
			select { // it has to wait; without that it would return at once
			case err := <-paused:
				paused <- err
			case <-time.After(50 * time.Millisecond):
			}
		},
	})
	if err := errors.Join(err, <-taken); err != nil {
		t.Fatal(err)
	}
	if err := <-paused; !errors.Is(err, ErrHandedOver) {
		t.Errorf("a pause of a server that was handed over: %v, want ErrHandedOver", err)
	}
	g.served.Wait()
	_ = next.Close()
	next.served.Wait()
}

// failingLink fails after so many messages were received.
type failingLink struct {
	Link
	left int
}

func (l *failingLink) Receive() ([]byte, []any, error) {
	if l.left--; l.left < 0 {
		return nil, nil, errors.New("the test ends the link")
	}
	return l.Link.Receive()
}

func testHandoverRollback(t *testing.T) {
	g, addr := firstGeneration(t, Echo, Options{})
	c := dialTCP(t, addr)
	send(t, c, "before")
	receives(t, c, "before")
	for step := range 5 { // the successor receives the offer, the history, the connections, the final state and the commit
		near, far := linkPair(t)
		failed := make(chan error, 1)
		successor, _ := newServer(t, Echo, Options{})
		go func() {
			failed <- func() error {
				offer, err := ReceiveOffer(context.Background(), &failingLink{far, step})
				if err != nil {
					_ = far.Close()
					return err
				}
				return successor.TakeOver(context.Background(), offer, offer.Listeners)
			}()
		}()
		var killed atomic.Bool
		_, err := g.HandOver(context.Background(), near, HandoverOptions{Kill: func() { killed.Store(true) }})
		if err == nil {
			t.Fatalf("step %d: the handover succeeded", step)
		}
		if err := <-failed; err == nil {
			t.Errorf("step %d: taking over succeeded", step)
		}
		if killed.Load() != (step == 4) {
			t.Errorf("step %d: the successor was killed: %t; want that only once the commit was sent", step, killed.Load())
		}
		text := fmt.Sprintf("after step %d", step)
		send(t, c, text)
		receives(t, c, text)
		late := dialTCP(t, addr)
		send(t, late, text)
		receives(t, late, text)
		_ = late.Close()
		h, err := g.Pause(PauseOptions{})
		if err != nil {
			t.Fatal(err)
		}
		h.Release()
	}
	next, report := g.takeOver(t, Echo, Options{})
	if report.HandedOver == 0 {
		t.Error("after the failures nothing was handed over")
	}
	send(t, c, "end")
	receives(t, c, "end")
	_ = next.Close()
	next.served.Wait()
}

// testHandoverNotice: a message is posted to a client whose window is full. The successor sends what is left of it.
func testHandoverNotice(t *testing.T) {
	const size = 16 << 20
	g, addr := firstGeneration(t, Echo, Options{Notifier: NotifierFunc(func(n Notice) []byte {
		if n.Kind == NoticeMessage {
			return bytes.Repeat([]byte("m"), size) // more than socket buffers take
		}
		return nil
	})})
	c := dialTCP(t, addr)
	send(t, c, "x")
	receives(t, c, "x")
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _, _ = g.Notify(context.Background(), "hello")
	}()
	<-done // it waits a second for the client, which does not read
	next, report := g.takeOver(t, Echo, Options{})
	if report.HandedOver != 1 {
		t.Fatalf("handed over %d connections, behind %v", report.HandedOver, report.Kept)
	}
	send(t, c, "y")
	_ = c.CloseWrite()
	got, err := io.ReadAll(c)
	if err != nil || len(got) != size+1 || got[len(got)-1] != 'y' || bytes.Count(got, []byte("m")) != size {
		t.Errorf("read %d bytes, error %v; want the whole message and then the echo", len(got), err)
	}
	_ = next.Close()
	next.served.Wait()
}

// testHandoverShut: the echo has read what it cannot write, which is its state. The successor writes that, and then the
// notice of its drain.
func testHandoverShut(t *testing.T) {
	g, addr := firstGeneration(t, Echo, Options{})
	c := dialTCP(t, addr)
	want := bytes.Repeat([]byte("x"), 32<<20) // more than the socket buffers take
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(want)
		sent <- err
	}()
	await(t, "the echo to wait for its client", func() bool {
		for info := range g.Conns() {
			return info.BytesIn > info.BytesOut
		}
		return false
	})
	next, report := g.takeOver(t, Echo, Options{})
	if report.HandedOver != 1 {
		t.Fatalf("handed over %d connections, behind %v", report.HandedOver, report.Kept)
	}
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
		t.Errorf("reading the echo: %v", err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
	next.StartDrain(DrainOptions{Grace: time.Minute, Reason: "stop"})
	receives(t, c, "\nSHUTDOWN 60 stop\n")
	_ = c.CloseWrite()
	receivesAll(t, c, "")
	_ = next.Close()
	next.served.Wait()
}
