package integration

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"echod/control"
)

// A network is two network namespaces, one for the server and one for its clients. Each has a TUN device, and
// goroutines of the test carry packets from one to the other, late. The kernel's own netem is not everywhere. A proxy
// would not do, because it cannot delay handshakes.
type network struct {
	server, client *namespace
	delay          time.Duration // each way
	lossPercent    int

	ackLost atomic.Bool   // packets of clients that are not SYNs are lost
	synAcks chan struct{} // one for each SYN-ACK that the server sends, while there is room
}

// A namespace is a network namespace with one TUN device.
type namespace struct {
	handle *os.File // /proc/thread-self/ns/net
	tun    *os.File
}

const serverIP, clientIP = "10.99.0.1", "10.99.0.2"

// newNetwork makes a network with this round-trip time. The end of the test removes it.
func newNetwork(t *testing.T, roundTrip time.Duration, lossPercent int) *network {
	t.Helper()
	ip := require(t, "ip")
	n := &network{delay: roundTrip / 2, lossPercent: lossPercent, synAcks: make(chan struct{}, 1024)}
	n.server, n.client = newNamespace(t, ip, serverIP), newNamespace(t, ip, clientIP)
	var relays sync.WaitGroup
	relays.Go(func() { n.relay(n.server.tun, n.client.tun, false) })
	relays.Go(func() { n.relay(n.client.tun, n.server.tun, true) })
	t.Cleanup(func() {
		for _, ns := range []*namespace{n.server, n.client} {
			_ = ns.tun.Close()
			_ = ns.handle.Close()
		}
		relays.Wait()
	})
	return n
}

func newNamespace(t *testing.T, ip, address string) *namespace {
	t.Helper()
	ns := new(namespace)
	var err error
	done := make(chan struct{})
	go func() { // without UnlockOSThread, the thread ends with the goroutine
		defer close(done)
		runtime.LockOSThread()
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return
		}
		if ns.handle, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return
		}
		if ns.tun, err = openTUN(); err != nil {
			return
		}
		for _, args := range []string{
			"link set lo up", "address add " + address + "/24 dev t0", "link set t0 txqueuelen 10000 up",
		} {
			var out []byte
			if out, err = exec.Command(ip, strings.Fields(args)...).CombinedOutput(); err != nil {
				err = fmt.Errorf("ip %s: %w: %s", args, err, out)
				return
			}
		}
	}()
	<-done
	if err != nil {
		missing(t, "network namespaces with TUN devices are not available: "+err.Error())
	}
	return ns
}

// openTUN creates the device t0 in the calling thread's namespace.
func openTUN() (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	ifr, err := unix.NewIfreq("t0")
	if err == nil {
		ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "tun"), nil
}

// do calls f with the calling thread in the namespace. Sockets that f opens, and processes that it starts, belong to
// the namespace.
func (ns *namespace) do(f func()) error {
	runtime.LockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer home.Close()
	if err := unix.Setns(int(ns.handle.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer func() {
		if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil { // or the thread ends with the goroutine
			runtime.UnlockOSThread()
		}
	}()
	f()
	return nil
}

// relay carries packets from one device to another until the first is closed.
func (n *network) relay(from, to *os.File, fromClient bool) {
	type packet struct {
		due  time.Time
		data []byte
	}
	onTheWay := make(chan packet, 1<<16)
	var delivery sync.WaitGroup
	defer delivery.Wait()
	defer close(onTheWay)
	delivery.Go(func() {
		for p := range onTheWay {
			time.Sleep(time.Until(p.due)) // the time that the packet travels
			_, _ = to.Write(p.data)
		}
	})
	random := rand.New(rand.NewPCG(1, 2))
	block := make([]byte, 64<<10)
	for {
		size, err := from.Read(block)
		if err != nil {
			return
		}
		flags, ok := tcpFlags(block[:size])
		switch {
		case !ok: // IPv6 neighbours, for example
			continue
		case fromClient && flags&flagSYN == 0 && n.ackLost.Load():
			continue
		case random.IntN(100) < n.lossPercent:
			continue
		}
		if flags&(flagSYN|flagACK) == flagSYN|flagACK {
			select {
			case n.synAcks <- struct{}{}:
			default:
			}
		}
		onTheWay <- packet{time.Now().Add(n.delay), append([]byte(nil), block[:size]...)}
	}
}

const (
	flagSYN = 0x02
	flagACK = 0x10
)

// tcpFlags returns the flags of a TCP segment in an IPv4 packet.
func tcpFlags(packet []byte) (flags byte, ok bool) {
	if len(packet) < 20 || packet[0]>>4 != 4 || packet[9] != unix.IPPROTO_TCP {
		return 0, false
	}
	tcp := packet[4*int(packet[0]&15):]
	if len(tcp) < 20 {
		return 0, false
	}
	return tcp[13], true
}

// start starts a server in the server's namespace.
func (n *network) start(t *testing.T, flags ...string) *echod {
	t.Helper()
	var e *echod
	check(t, n.server.do(func() { e = start(t, append(flags, "--listen", serverIP+":0")...) }))
	return e
}

// startOver is start for clients that come over a transport; connectWithin connects them from their namespace.
func (n *network) startOver(t *testing.T, over transport, flags ...string) *echod {
	t.Helper()
	e := over.startWith(t, func(flags ...string) (e *echod) {
		for i, flag := range flags {
			flags[i] = strings.Replace(flag, "127.0.0.1:", serverIP+":", 1)
		}
		check(t, n.server.do(func() { e = start(t, flags...) }))
		return e
	}, flags...)
	connect := e.connectWithin
	e.connectWithin = func(timeout time.Duration) (p *peer, err error) {
		failed := n.client.do(func() { p, err = connect(timeout) })
		return p, errors.Join(failed, err)
	}
	return e
}

// connect connects a peer from the clients' namespace.
func (n *network) connect(addr string, timeout time.Duration) (p *peer, err error) {
	failed := n.client.do(func() {
		var nc net.Conn
		if nc, err = net.DialTimeout("tcp", addr, timeout); err == nil {
			p = &peer{peerConn: nc.(*net.TCPConn), in: bufio.NewReader(nc)}
			err = p.SetDeadline(time.Now().Add(patience))
		}
	})
	return p, errors.Join(failed, err)
}

// signalAt sends SIGTERM to e once the server has sent count SYN-ACKs. Afterwards it closes sent.
func (n *network) signalAt(e *echod, count int) (sent chan struct{}) {
	sent = make(chan struct{})
	overdue := time.After(patience)
	go func() {
		defer close(sent)
		for range count {
			select {
			case <-n.synAcks:
			case <-overdue:
			}
		}
		_ = e.cmd.Process.Signal(syscall.SIGTERM)
	}()
	return sent
}

// farRoundTrip is the round trip time of a client far away.
const farRoundTrip = 200 * time.Millisecond

func TestG15PromisesHoldOverANetwork(t *testing.T) {
	t.Parallel()
	t.Run("clients whose handshakes are in progress are told", func(t *testing.T) {
		overSome(t, []transport{transportTCP, transportTLS}, testDrainTellsHandshakesInProgress)
	})

	t.Run("the signal at the first connect that succeeds is a drain", func(t *testing.T) {
		t.Parallel()
		n := newNetwork(t, farRoundTrip, 0)
		starts := 4
		if slowToo() {
			starts = 20
		}
		for i := range starts {
			addr := netip.AddrPortFrom(netip.MustParseAddr(serverIP), uint16(7001+i)).String()
			socket := shortDir(t) + "/c"
			cmd := exec.Command(built(t, echodBinary), "serve", "--log-format", "json", "--listen", addr, "--control", socket)
			var e *echod
			check(t, n.server.do(func() { e = spawn(t, cmd, socket) }))
			var p *peer
			poll(t, "the first connect that succeeds", func() (ok bool) {
				var err error
				p, err = n.connect(addr, patience)
				return err == nil
			})
			e.signal(syscall.SIGTERM)
			if err := p.expectToldAndEnd(); err != nil {
				t.Errorf("start %d: %v", i, err)
			}
			_ = p.Close()
			e.wait(0)
			if _, err := os.Lstat(socket); err == nil {
				t.Errorf("start %d left its control socket behind", i)
			}
		}
	})

	for _, c := range []struct {
		name string
		loss int
	}{{"a drain of fifty clients loses no byte", 0}, {"nor does it with 5 percent of packets lost", 5}} {
		t.Run(c.name, func(t *testing.T) {
			if c.loss > 0 {
				slow(t)
			}
			overSome(t, []transport{transportTCP, transportTLS}, func(t *testing.T, over transport) {
				testDrainOverANetwork(t, over, c.loss)
			})
		})
	}

	// The kernel completes only as many handshakes as the accept queue has room for. The other clients believe that they
	// are connected, and their connections appear as the queue is emptied. Without SYN cookies, because the kernel
	// remembers nothing of clients that it has sent one.
	t.Run("clients of an accept queue that overflows are told or refused", func(t *testing.T) {
		t.Parallel()
		n := newNetwork(t, farRoundTrip, 0)
		var err error
		check(t, n.server.do(func() {
			err = errors.Join(os.WriteFile("/proc/sys/net/core/somaxconn", []byte("16"), 0),
				os.WriteFile("/proc/sys/net/ipv4/tcp_syncookies", []byte("0"), 0))
		}))
		check(t, err)
		e := n.start(t, "--grace", "20s")
		e.pause(control.PauseRequest{})
		const clients, queue = 60, 17
		var told, refused atomic.Int32
		overflowed := n.signalAt(e, queue+5)
		each(t, clients, func(i int) error {
			p, err := n.connect(e.addr, patience)
			if errors.Is(err, syscall.ECONNREFUSED) {
				refused.Add(1)
				return nil
			}
			if err != nil {
				return err
			}
			defer p.Close()
			told.Add(1)
			return p.expectToldAndEnd()
		})
		<-overflowed
		t.Logf("%d told, %d refused", told.Load(), refused.Load())
		e.wait(0)
	})

	// While the server waits for a handshake, clients that connect get no answer. So it waits three seconds at most, and
	// not beyond the deadline.
	half := func(t *testing.T, grace time.Duration) (n *network, e *echod) {
		n = newNetwork(t, farRoundTrip, 0)
		e = n.start(t, "--grace", grace.String())
		stays, err := n.connect(e.addr, patience)
		check(t, err)
		t.Cleanup(func() { _ = stays.Close() })
		check(t, stays.echo("hello\n"))
		n.ackLost.Store(true)
		half, err := n.connect(e.addr, patience)
		check(t, err)
		t.Cleanup(func() { _ = half.Close() })
		return n, e
	}
	t.Run("clients are refused though a handshake never completes", func(t *testing.T) {
		t.Parallel()
		n, e := half(t, time.Hour)
		e.signal(syscall.SIGTERM)
		e.awaitLog("draining")
		late, err := n.connect(e.addr, patience)
		if err == nil {
			_ = late.Close()
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("connecting during the drain: %v, want a refusal", err)
		}
		e.expectState("draining")
	})
	t.Run("the server stops in time though a handshake never completes", func(t *testing.T) {
		t.Parallel()
		const grace = 100 * time.Millisecond
		_, e := half(t, grace)
		begun := e.signal(syscall.SIGTERM)
		e.wait(0)
		if took := e.gone.Sub(begun); took > exitLimit(grace) {
			t.Errorf("the process exited after %s, want at most %s", took, exitLimit(grace))
		}
	})
}

func testDrainTellsHandshakesInProgress(t *testing.T, over transport) {
	t.Parallel()
	n := newNetwork(t, farRoundTrip, 0)
	e := n.startOver(t, over, "--grace", "20s")
	const clients = 20
	var connected atomic.Int32
	signalled := n.signalAt(e, clients/2) // no client has seen its SYN-ACK by then
	each(t, 2*clients, func(i int) error {
		if i >= clients { // these come once the drain has begun
			<-signalled
		}
		p, err := e.connectWithin(patience)
		if errors.Is(err, syscall.ECONNREFUSED) { // its SYN came too late
			return nil
		}
		if err != nil {
			return err
		}
		defer p.Close()
		connected.Add(1)
		return p.expectToldAndEnd()
	})
	e.wait(0)
	sum, told := e.awaitLog("drained"), int(connected.Load())
	if sum.num("notified") != told || sum.num("left_by_themselves") != told || told < clients/2 {
		t.Errorf("%d clients were connected; the summary is %s", told, sum.text)
	}
}

func testDrainOverANetwork(t *testing.T, over transport, loss int) {
	t.Parallel()
	n := newNetwork(t, farRoundTrip, loss)
	e := n.startOver(t, over, "--grace", "25s")
	const clients, warm = 50, 16 << 10
	streams := make([]*stream, clients)
	each(t, clients, func(i int) error {
		p, err := e.connectWithin(patience)
		streams[i] = &stream{
			peer: p, seed: uint64(i), notice: []byte("SHUTDOWN 25 SIGTERM\n"),
			told: make(chan struct{}), progress: make(chan struct{}, 1),
		}
		return err
	})
	var ready, signalled sync.WaitGroup
	ready.Add(clients)
	signalled.Go(func() {
		ready.Wait()
		_ = e.cmd.Process.Signal(syscall.SIGTERM)
	})
	each(t, clients, func(i int) error {
		defer streams[i].Close()
		return streams[i].run(warm, ready.Done)
	})
	signalled.Wait()
	e.wait(0)
	if sum := e.awaitLog("drained"); sum.num("notified") != clients || sum.num("left_by_themselves") != clients {
		t.Errorf("the summary is %s", sum.text)
	}
}

// A client that has vanished acknowledges nothing. One notice that waits for it is enough to find out.
func TestStallTimeoutVanishedClient(t *testing.T) {
	t.Parallel()
	n := newNetwork(t, 2*time.Millisecond, 0)
	e := n.start(t, "--stall-timeout", "1s")
	vanished, err := n.connect(e.addr, patience)
	check(t, err)
	defer vanished.Close()
	check(t, vanished.echo("hello\n"))
	n.ackLost.Store(true)
	sent := time.Now()
	if got, err := e.control.Notify(within(t, patience), "hello"); err != nil || got.Sent != 1 {
		t.Fatalf("notify: %+v, %v", got, err)
	}
	e.awaitOpen(0)
	if took := time.Since(sent); took < time.Second || took > 3*time.Second {
		t.Errorf("closed after %s", took)
	}
	e.expectAccounts(map[string]uint64{"stalled": 1})
}

// TestNothingStaysInFinWait1 ends the connections of clients that do not read. What waits for them would stay in the
// kernel for minutes after the server has closed them.
func TestNothingStaysInFinWait1(t *testing.T) {
	t.Parallel()
	slow(t)
	const clients, most = 3, 10 * time.Second // the bound that the server sets
	const closing = 1300 * time.Millisecond   // at most: the flush and the linger
	for name, c := range map[string]struct {
		end    func(t *testing.T, e *echod)
		leaves bool // the kernel continues the connections after the server has closed them
	}{
		"of killed clients": {func(t *testing.T, e *echod) {
			conns, err := e.control.Conns(within(t, patience), -1, control.ConnFilter{})
			check(t, err)
			for _, c := range conns.Connections {
				_, err := e.control.Kill(within(t, patience), c.ID)
				check(t, err)
			}
			e.awaitOpen(0)
		}, true},
		"of clients that a drain closes": {func(_ *testing.T, e *echod) {
			e.signal(syscall.SIGTERM)
			e.wait(0)
		}, true},
		"of clients that are closed by force": {func(_ *testing.T, e *echod) {
			e.signal(syscall.SIGTERM)
			e.awaitLog("draining")
			e.signal(syscall.SIGTERM)
			e.wait(128 + int(syscall.SIGTERM))
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNetwork(t, 2*time.Millisecond, 0)
			e := n.start(t, "--grace", "100ms", "--stall-timeout", "0s")
			each(t, clients, func(int) error {
				p, err := n.connect(e.addr, patience)
				if err != nil {
					return err
				}
				t.Cleanup(func() { _ = p.Close() })
				err = p.SetWriteDeadline(time.Now().Add(500 * time.Millisecond)) // until both directions are full
				p.flood()
				return err
			})
			e.awaitBlocked(clients)
			began := time.Now()
			c.end(t, e)
			left := n.inFinWait1(t)
			if c.leaves != (left > 0) {
				t.Errorf("%d connections in FIN-WAIT-1 right after the close", left)
			}
			poll(t, "the end of FIN-WAIT-1", func() bool { return n.inFinWait1(t) == 0 })
			if took := time.Since(began); took > closing+most+time.Second {
				t.Errorf("connections stayed in FIN-WAIT-1 for %s", took)
			}
		})
	}
}

// inFinWait1 counts the server's connections in state FIN-WAIT-1, which is 4.
func (n *network) inFinWait1(t *testing.T) (count int) {
	t.Helper()
	var table []byte
	var err error
	check(t, n.server.do(func() { table, err = os.ReadFile("/proc/thread-self/net/tcp") }))
	check(t, err)
	for line := range strings.Lines(string(table)) {
		if fields := strings.Fields(line); len(fields) > 3 && fields[3] == "04" {
			count++
		}
	}
	return count
}
