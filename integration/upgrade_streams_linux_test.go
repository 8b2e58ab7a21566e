package integration

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"echod/control"
)

// TestG12UpgradesInARow upgrades the real program again and again, at random moments, under clients of all kinds. Every
// stream is compared byte for byte, and every connection is accounted for. In the end, the last process has no more
// memory, files and goroutines than the second.
func TestG12UpgradesInARow(t *testing.T) {
	t.Run("three", func(t *testing.T) {
		slow(t)
		testUpgradesInARow(t, 3)
	})
	t.Run("fifty", func(t *testing.T) {
		long(t)
		testUpgradesInARow(t, 50)
	})
}

func testUpgradesInARow(t *testing.T, upgrades int) {
	dir := t.TempDir()
	roots := certificate(t, dir, "server")
	path := filepath.Join(shortDir(t), "echo")
	e, _ := upgradable(t, "--listen", "unix://"+path, "--listen", "tls://127.0.0.1:0",
		"--tls-cert", filepath.Join(dir, "cert.pem"), "--tls-key", filepath.Join(dir, "key.pem"),
		"--proxy-protocol", proxyAddress, "--max-conns-per-ip", strconv.Itoa(addressLimit), "--stall-timeout", "0",
		"--grace", "20s", "--upgrade-keep", "1s", "--http", "127.0.0.1:0", "--pprof")
	u := &upgradeRun{e: e, web: e.web(), unixPath: path, roots: roots, ended: make(map[string]uint64)}
	for _, ln := range e.status().Listeners {
		switch {
		case ln.TLS:
			u.tlsAddr = ln.Address
		case ln.Address != path:
			u.tcpAddr = ln.Address
		}
	}
	u.round(t, 1)
	before := u.usage(t)
	u.round(t, upgrades)
	var after resourceUsage
	poll(t, "as few files and goroutines as after the first upgrade", func() bool {
		after = u.usage(t)
		return after.files <= before.files && after.goroutines <= before.goroutines
	})
	t.Logf("%d connections, %d MiB, %d rolled back; after one upgrade %+v, after all %+v", u.opened, u.sent.Load()>>20, u.rolledBack, before, after)
	const slack = 3 << 20 // bytes of a heap of about 6 MiB; the list of closed connections grows to 1,024
	if after.heap > before.heap+slack {
		t.Errorf("the heap has %d bytes, and had %d", after.heap, before.heap)
	}
	e.signal(syscall.SIGTERM)
	e.wait(0)
}

const (
	proxyAddress   = "127.0.0.2" // its clients send a PROXY header
	limitedAddress = "127.0.0.3" // has as many connections as are allowed
	addressLimit   = 3

	pausedNotice  = "PAUSED\n"
	upgradeNotice = "\nSHUTDOWN 20 upgrade\n" // to clients that stay behind; their last byte is no newline
)

// upgradeRun has the clients of a server that is upgraded, and counts their connections.
type upgradeRun struct {
	e                *echod
	web              string // address of --http
	tcpAddr, tlsAddr string
	unixPath         string
	roots            *x509.CertPool
	last             control.Status
	done, rolledBack int // upgrades

	stop    chan struct{} // closed at the end of a round
	clients sync.WaitGroup
	sent    atomic.Uint64 // bytes

	mu     sync.Mutex
	opened uint64
	ended  map[string]uint64 // by the reason that the server should count
	errs   []error
}

// round upgrades n times under clients of all kinds, lets them leave, and compares the server's counters with theirs.
func (u *upgradeRun) round(t *testing.T, n int) {
	t.Helper()
	u.stop = make(chan struct{})
	end := sync.OnceFunc(func() {
		close(u.stop)
		u.clients.Wait()
	})
	defer end()
	for i, kind := range []struct {
		name  string
		count int
		life  func(u *upgradeRun, address string, r *rand.Rand) error
	}{
		{"64 MiB", 3, func(u *upgradeRun, address string, r *rand.Rand) error {
			return u.exchange(u.tcp(address, 0), manner{total: 64 << 20, piece: 256 << 10, read: 256 << 10}, r)
		}},
		{"one byte at a time", 4, func(u *upgradeRun, address string, r *rand.Rand) error {
			return u.exchange(u.tcp(address, 0), manner{total: 3000, piece: 1, read: 100, pause: time.Millisecond}, r)
		}},
		{"tiny window", 4, func(u *upgradeRun, address string, r *rand.Rand) error {
			return u.exchange(u.tcp(address, 2<<10), manner{total: 256 << 10, piece: 10_000, read: 1000}, r)
		}},
		{"half-closed", 4, func(u *upgradeRun, address string, r *rand.Rand) error {
			return u.exchange(u.tcp(address, 0), manner{total: 1 + r.IntN(2<<20), piece: 64 << 10, read: 64 << 10, reads: u.after(r, 2*time.Second)}, r)
		}},
		{"shut window", 4, func(u *upgradeRun, address string, r *rand.Rand) error {
			return u.exchange(u.tcp(address, 0), manner{total: 16 << 20, piece: 64 << 10, read: 64 << 10, reads: u.after(r, 3*time.Second)}, r)
		}},
		{"sends only", 2, func(u *upgradeRun, address string, r *rand.Rand) error {
			return u.exchange(u.tcp(address, 0), manner{total: 16 << 20, piece: 64 << 10, read: 64 << 10, reads: u.stop}, r)
		}},
		{"comes and goes", 3, func(u *upgradeRun, address string, r *rand.Rand) error {
			return u.exchange(u.tcp(address, 0), manner{total: 100, piece: 100, read: 100}, r)
		}},
		{"Unix socket", 3, func(u *upgradeRun, _ string, r *rand.Rand) error {
			return u.exchange(u.connected(connectOver("unix", u.unixPath, patience)), manner{total: 4 << 20, piece: 32 << 10, read: 32 << 10, pause: time.Millisecond}, r)
		}},
		{"TLS", 4, func(u *upgradeRun, address string, r *rand.Rand) error {
			return u.exchange(u.connected(u.dial(address, u.tlsAddr, 0)), manner{total: 1 << 30, piece: 10_000, read: 10_000, pause: time.Millisecond, told: true}, r)
		}},
		{"PROXY header", 4, func(u *upgradeRun, address string, r *rand.Rand) error {
			p := u.tcp(proxyAddress, 0)
			if p != nil {
				header := "PROXY TCP4 " + address + " 192.0.2.9 7 9\r\n"
				half := r.IntN(len(header))
				if err := p.send(header[:half]); err != nil {
					return err
				}
				<-u.after(r, 100*time.Millisecond)
				if err := p.send(header[half:]); err != nil {
					return err
				}
			}
			return u.exchange(p, manner{total: 1 << 20, piece: 10_000, read: 10_000, pause: time.Millisecond, told: true}, r)
		}},
	} {
		for k := range kind.count {
			address := fmt.Sprintf("127.1.%d.%d", i, k)
			u.clients.Go(func() {
				r := rand.New(rand.NewPCG(rand.Uint64(), 0))
				for !u.stopped() {
					if err := kind.life(u, address, r); err != nil {
						u.fail(fmt.Errorf("client %s, %s: %w", address, kind.name, err))
						return
					}
				}
			})
		}
	}
	holders := make([]*peer, addressLimit)
	for i := range holders {
		holders[i] = u.tcp(limitedAddress, 0)
	}
	for range n {
		time.Sleep(time.Duration(rand.IntN(300)) * time.Millisecond) // a random moment of the streams
		if rand.IntN(2) == 0 {
			u.upgradeDuringPause(t)
		} else {
			u.upgrade(t)
			u.checkLimit(t, holders)
		}
		if t.Failed() || u.failed() {
			break
		}
	}
	for _, p := range holders {
		u.leaves(t, p, "client-closed")
	}
	end()
	for _, err := range u.errs {
		t.Error(err)
	}
	if t.Failed() {
		t.FailNow()
	}
	poll(t, "every connection and every predecessor to end", func() bool {
		st := u.e.status()
		return st.Connections == 0 && st.Predecessor == nil
	})
	st := u.e.status()
	if st.Accepted != u.opened || !maps.Equal(st.Closed, u.ended) {
		t.Errorf("the server counts %d accepted, and closed %v; the clients %d and %v", st.Accepted, st.Closed, u.opened, u.ended)
	}
}

// upgrade upgrades once. An upgrade that takes too long on a busy machine is rolled back, and then repeated.
func (u *upgradeRun) upgrade(t *testing.T) {
	t.Helper()
	answer, err := u.e.control.Upgrade(within(t, patience), 0)
	if err != nil && strings.Contains(err.Error(), "timeout") {
		u.rolledBack++
		t.Logf("rolled back: %v", err)
		check(t, balanced(u.e.status()))
		answer, err = u.e.control.Upgrade(within(t, patience), 0)
	}
	check(t, err)
	u.done++
	t.Logf("upgrade %d: %+v", u.done, answer)
	for why := range answer.Behind {
		if why != "stream on top of the socket" && why != "handshake" && why != "closing" {
			t.Errorf("upgrade %d: left behind: %v", u.done, answer.Behind)
		}
	}
	if n := u.e.awaitNth(u.done, "took over").num("connections"); n != answer.HandedOver {
		t.Errorf("upgrade %d: the predecessor counts %d connections that it handed over, and the successor %d", u.done, answer.HandedOver, n)
	}
	st := u.e.status()
	check(t, balanced(st))
	if st.Accepted < u.last.Accepted || st.BytesIn < u.last.BytesIn || st.BytesOut < u.last.BytesOut {
		t.Errorf("upgrade %d: a counter went back: %+v, before %+v", u.done, st, u.last)
	}
	u.last = st
}

// upgradeDuringPause upgrades while clients wait in the accept queue.
func (u *upgradeRun) upgradeDuringPause(t *testing.T) {
	t.Helper()
	ctx := within(t, patience)
	hold, err := u.e.control.Pause(ctx, control.PauseRequest{Reason: "test"})
	check(t, err)
	var queued []*peer
	for i := range 5 {
		p := u.tcp(fmt.Sprintf("127.2.0.%d", i), 0)
		check(t, p.send("queued\n"))
		queued = append(queued, p)
	}
	u.upgrade(t)
	st := u.e.status()
	if st.State != "paused" || len(st.Holds) != 1 || st.Holds[0].ID != hold.ID {
		t.Errorf("upgrade %d: state %s, holds %+v, want the hold %s", u.done, st.State, st.Holds, hold.ID)
	}
	_, err = u.e.control.ReleaseHold(ctx, hold.ID)
	check(t, err)
	for _, p := range queued {
		check(t, p.expect("queued\n"))
		u.leaves(t, p, "client-closed")
	}
}

// checkLimit checks that the address of holders cannot have a further connection until one ends.
func (u *upgradeRun) checkLimit(t *testing.T, holders []*peer) {
	t.Helper()
	for _, p := range holders {
		check(t, p.SetDeadline(time.Now().Add(patience)))
		check(t, p.echo("still here\n"))
	}
	busy := u.tcp(limitedAddress, 0)
	check(t, busy.expectRest("BUSY\n"))
	u.count("rejected-address-limit")
	u.leaves(t, holders[0], "client-closed")
	poll(t, "a free place", func() bool {
		holders[0] = u.tcp(limitedAddress, 0)
		served := holders[0].echo("next\n") == nil
		if !served {
			u.count("rejected-address-limit")
			_ = holders[0].Close()
		}
		return served
	})
}

// leaves lets p leave, and counts it.
func (u *upgradeRun) leaves(t *testing.T, p *peer, why string) {
	t.Helper()
	check(t, p.SetDeadline(time.Now().Add(patience)))
	check(t, p.leave())
	check(t, p.Close())
	u.count(why)
}

// tcp connects from an address, with a receive buffer of that many bytes. It returns nil once a client has failed.
func (u *upgradeRun) tcp(from string, buffer int) *peer {
	return u.connected(u.dial(from, u.tcpAddr, buffer))
}

func (u *upgradeRun) dial(from, to string, buffer int) (*peer, error) {
	d := net.Dialer{Timeout: patience, LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	if buffer > 0 {
		d.Control = func(_, _ string, c syscall.RawConn) (err error) {
			return errors.Join(c.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, buffer)
			}), err)
		}
	}
	nc, err := d.Dial("tcp", to)
	if err != nil {
		return nil, err
	}
	if to == u.tlsAddr {
		return newPeer(overTLS(nc.(*net.TCPConn), u.roots))
	}
	return newPeer(nc.(peerConn))
}

func (u *upgradeRun) connected(p *peer, err error) *peer {
	if err != nil {
		u.fail(err)
		return nil
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.opened++
	return p
}

func (u *upgradeRun) count(why string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.ended[why]++
}

func (u *upgradeRun) fail(err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.errs = append(u.errs, err)
}

func (u *upgradeRun) failed() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return len(u.errs) > 0
}

func (u *upgradeRun) stopped() bool {
	select {
	case <-u.stop:
		return true
	default:
		return false
	}
}

// after returns a channel that is closed after a random time, or when the round ends.
func (u *upgradeRun) after(r *rand.Rand, most time.Duration) <-chan struct{} {
	over := make(chan struct{})
	u.clients.Go(func() {
		defer close(over)
		select {
		case <-u.stop:
		case <-time.After(rand.N(most)):
		}
	})
	return over
}

// A manner is how a client sends and reads.
type manner struct {
	total int             // bytes to send, or fewer when the round ends
	piece int             // bytes of a write at most
	pause time.Duration   // after each write
	read  int             // bytes of a read at most
	reads <-chan struct{} // it reads nothing until this is closed
	told  bool            // the connection may stay behind; then the client is told to leave
}

// pattern is what clients send, again and again from some offset on. It has no newline, so that a notice differs.
var pattern = sync.OnceValue(func() []byte {
	p := make([]byte, 4194301) // a prime number
	random := rand.NewChaCha8([32]byte{})
	_, _ = random.Read(p) // never fails
	for i, b := range p {
		if b == '\n' {
			p[i] = '.'
		}
	}
	return p
})

// exchange sends, compares what comes back, and leaves.
func (u *upgradeRun) exchange(p *peer, m manner, r *rand.Rand) error {
	if p == nil {
		return errors.New("could not connect")
	}
	defer p.Close()
	if err := p.SetDeadline(time.Now().Add(10 * time.Minute)); err != nil {
		return err
	}
	begin := r.IntN(len(pattern()))
	told := make(chan struct{})
	sent, written := 0, make(chan error, 1)
	go func() {
		random := rand.New(rand.NewPCG(uint64(begin), 1))
		written <- func() error {
			for next := begin; sent < m.total && !u.stopped(); {
				select {
				case <-told:
					return p.CloseWrite()
				default:
				}
				piece := pattern()[next:min(len(pattern()), next+1+random.IntN(m.piece))]
				piece = piece[:min(len(piece), m.total-sent)]
				n, err := p.peerConn.Write(piece)
				sent += n
				if err != nil {
					return fmt.Errorf("after sending %d bytes: %w", sent, err)
				}
				next = (next + n) % len(pattern())
				time.Sleep(m.pause)
			}
			return p.CloseWrite()
		}()
	}()
	if m.reads != nil {
		<-m.reads
	}
	received, why, readErr := u.compare(p, m, begin, told)
	if readErr != nil {
		_ = p.Close() // ends the write
	}
	if err := errors.Join(readErr, <-written); err != nil {
		return err
	}
	if received != sent && why != "rejected-paused" {
		return fmt.Errorf("received %d bytes of %d", received, sent)
	}
	u.sent.Add(uint64(received))
	u.count(why)
	return nil
}

// compare reads to the end of the stream, and compares it with the pattern. It closes told when it finds a notice. why is
// how the server should count the end of the connection.
func (u *upgradeRun) compare(p *peer, m manner, begin int, told chan struct{}) (received int, why string, err error) {
	block := make([]byte, m.read+len(upgradeNotice))
	why = "client-closed"
	for want := pattern()[begin:]; ; {
		n, err := p.peerConn.Read(block[:m.read])
		for got := block[:n]; len(got) > 0; {
			length := min(len(got), len(want))
			if i := bytes.IndexByte(got[:length], '\n'); i >= 0 {
				length = i
			}
			if !bytes.Equal(got[:length], want[:length]) {
				if m.told && received == 0 && string(got) == pausedNotice {
					close(told)
					return 0, "rejected-paused", nil // its handshake had stayed behind during a pause
				}
				return received, why, fmt.Errorf("after %d bytes, what comes back differs", received)
			}
			received += length
			if want = want[length:]; len(want) == 0 {
				want = pattern()
			}
			if got = got[length:]; len(got) == 0 || got[0] != '\n' {
				continue
			}
			if missing := len(upgradeNotice) - len(got); missing > 0 {
				more, err := io.ReadFull(p.peerConn, block[n:n+missing])
				if got = block[n-len(got) : n+more]; err != nil {
					return received, why, fmt.Errorf("after %d bytes, in %q: %w", received, got, err)
				}
			}
			if !m.told || why != "client-closed" || !bytes.HasPrefix(got, []byte(upgradeNotice)) {
				return received, why, fmt.Errorf("after %d bytes: %.100q", received, got)
			}
			got = got[len(upgradeNotice):]
			why = "client-left"
			close(told)
		}
		if err == io.EOF {
			return received, why, nil
		}
		if err != nil {
			return received, why, fmt.Errorf("after %d bytes: %w", received, err)
		}
	}
}

// resourceUsage is what a process uses.
type resourceUsage struct{ files, goroutines, heap, resident int }

// usage asks the process that serves.
func (u *upgradeRun) usage(t *testing.T) (r resourceUsage) {
	t.Helper()
	if code, _ := ask(t, "GET", u.web, "/debug/pprof/heap?gc=1"); code != 200 {
		t.Fatalf("collecting garbage: %d", code)
	}
	_, page := ask(t, "GET", u.web, "/metrics")
	for name, to := range map[string]*int{
		"process_open_fds": &r.files, "go_goroutines": &r.goroutines, "go_memstats_heap_alloc_bytes": &r.heap,
		"process_resident_memory_bytes": &r.resident,
	} {
		_, rest, found := strings.Cut(page, "\n"+name+" ")
		value, _, _ := strings.Cut(rest, "\n")
		f, err := strconv.ParseFloat(value, 64)
		if !found || err != nil {
			t.Fatalf("no %s in the metrics: %v", name, err)
		}
		*to = int(f)
	}
	return r
}
