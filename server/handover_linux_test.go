package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

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
}

// takeOver makes the next generation of g, which serves with h.
func (g *generation) takeOver(t testing.TB, h Handler, o Options) (*generation, HandoverReport) {
	t.Helper()
	near, far := linkPair(t)
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
	const clients, handovers = 10, 20
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
		if len(report.Behind) > 0 {
			t.Fatalf("handover %d: connections stayed behind: %v", i, report.Behind)
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

// streamUntil sends random bytes in pieces of all sizes until stop is closed, at most half a megabyte ahead of their echo,
// and checks that the same come back.
func streamUntil(t *testing.T, c *net.TCPConn, stop <-chan struct{}, seed uint64) {
	_ = c.SetDeadline(time.Time{})
	random := rand.New(rand.NewPCG(seed, 1))
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
			for i := range p {
				p[i] = byte(random.Uint32())
			}
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
