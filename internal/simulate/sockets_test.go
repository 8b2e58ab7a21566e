//go:build unix

package simulate

import (
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"echod/server"
)

// socketShape is the shape of histories on loopback, where time passes, and where the server uses descriptors.
var socketShape = shape{
	clients: 20, horizon: 2 * time.Second, scale: 200 * time.Millisecond, timeouts: 500 * time.Millisecond, bulk: 4 << 20,
	upgrades: true, sockets: true,
}

// sockets is the platform on loopback.
type sockets struct {
	w             *world
	echo, service net.Addr

	mu   sync.Mutex
	dead map[*generation]bool
}

func newSockets(w *world) *sockets { return &sockets{w: w, dead: make(map[*generation]bool)} }

func (s *sockets) open(g *generation) (err error) {
	for _, ln := range []*net.Listener{&g.echo, &g.service} {
		if *ln, err = server.Listen(context.Background(), "127.0.0.1:0"); err != nil {
			return err
		}
	}
	s.echo, s.service = g.echo.Addr(), g.service.Addr()
	return s.openControl(g)
}

func (s *sockets) openControl(g *generation) (err error) {
	g.control, err = net.Listen("tcp", "127.0.0.1:0")
	return err
}

// localPort is the next port that a client binds. Its address must be known before the server sees it.
var localPort atomic.Uint32

func (s *sockets) dial(c *clientPlan) (clientConn, error) {
	to := s.echo
	if c.Service {
		to = s.service
	}
	for range 100 {
		from := &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(2+c.Address)), Port: 20000 + int(localPort.Add(1)%10000)}
		s.w.register(from, c.ID)
		d := net.Dialer{LocalAddr: from, Timeout: 20 * time.Second}
		nc, err := d.Dial("tcp", to.String())
		if errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.EADDRNOTAVAIL) {
			continue
		}
		if err != nil {
			return nil, err
		}
		tcp := nc.(*net.TCPConn)
		_ = tcp.SetReadBuffer(c.Window)
		return socketConn{tcp}, nil
	}
	return nil, errors.New("no free port")
}

type socketConn struct{ *net.TCPConn }

// Reset closes the connection with an RST.
func (c socketConn) Reset() {
	_ = c.SetLinger(0)
	_ = c.Close()
}

func (s *sockets) dialControl(g *generation) (net.Conn, error) {
	return net.DialTimeout("tcp", g.control.Addr().String(), 10*time.Second)
}

func (s *sockets) links(_, to *generation, fault linkFault) (near, far server.Link, err error) {
	if err := s.openControl(to); err != nil {
		return nil, nil, err
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return nil, nil, err
	}
	var ends [2]*faultyLink
	state := new(atomic.Int32)
	for i, fd := range fds {
		unix.CloseOnExec(fd)
		f := os.NewFile(uintptr(fd), "link")
		nc, err := net.FileConn(f)
		_ = f.Close()
		if err != nil {
			return nil, nil, err
		}
		link, err := server.NewUnixLink(nc.(*net.UnixConn))
		if err != nil {
			return nil, nil, err
		}
		ends[i] = &faultyLink{Link: link, state: state}
		if fault.Successor == (i == 1) {
			ends[i].fault = fault
		}
	}
	return ends[0], ends[1], nil
}

func (s *sockets) kill(g *generation) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dead[g] = true
}

func (s *sockets) isDead(g *generation) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dead[g]
}

// faultyLink is a link that breaks or stalls at a message.
type faultyLink struct {
	server.Link
	fault linkFault
	count atomic.Int32
	state *atomic.Int32 // 1: the commit was sent; 2: it was acknowledged
}

func (l *faultyLink) step() error {
	if int(l.count.Add(1)) != l.fault.At || l.state.Load() == 2 {
		return nil
	}
	switch l.fault.Do {
	case "break", "die":
		_ = l.Close()
		return errLinkBroken
	case "delay":
		time.Sleep(200 * time.Millisecond)
	default:
		time.Sleep(time.Second) // longer than a freeze
	}
	return nil
}

func (l *faultyLink) Send(message []byte, files []any) error {
	if err := l.step(); err != nil {
		return err
	}
	if isCommit(message) {
		l.state.Store(1)
	} else {
		l.state.CompareAndSwap(1, 2)
	}
	return l.Link.Send(message, files)
}

func (l *faultyLink) Receive() ([]byte, []any, error) {
	if err := l.step(); err != nil {
		return nil, nil, err
	}
	return l.Link.Receive()
}

// runOnSockets runs a history on loopback.
func runOnSockets(h *history) *world {
	w := newWorld(h, socketShape)
	w.platform = newSockets(w)
	w.run()
	return w
}

// TestSockets runs new seeds on loopback, in real time: 24 seeds take about 15 seconds.
func TestSockets(t *testing.T) {
	if *socketSeeds == 0 && *socketSeed == 0 {
		t.Skip("-sockets=0")
	}
	simulate(t, runOnSockets, socketShape, *socketSeed, *socketSeeds, 24)
}
