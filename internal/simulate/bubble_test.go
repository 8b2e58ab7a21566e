package simulate

import (
	"net"

	"echod/server"
)

// bubble is the platform in a synctest bubble: the in-memory network.
type bubble struct {
	w       *world
	net     *network
	clients *process
	queues  [2]*acceptQueue // of the echo and of the service
}

func newBubble(w *world) *bubble {
	n := newNetwork(w.h.Seed, w.h.Network)
	return &bubble{w: w, net: n, clients: n.process("clients")}
}

const (
	echoPort = 7 + iota
	servicePort
	controlPort
)

func (b *bubble) open(g *generation) error {
	b.net.mu.Lock()
	defer b.net.mu.Unlock()
	g.proc = b.net.process(g.name)
	echo, service := b.net.listen(echoPort, g.proc), b.net.listen(servicePort, g.proc)
	echo.injectFaults, service.injectFaults = true, true
	b.queues = [2]*acceptQueue{echo.acceptQueue, service.acceptQueue}
	g.echo, g.service, g.control = echo, service, b.net.listen(controlPort, g.proc)
	return nil
}

func (b *bubble) dial(c *clientPlan) (clientConn, error) {
	from := &net.TCPAddr{IP: net.IPv4(198, 51, 100, byte(1+c.Address)), Port: 10000 + c.ID}
	b.w.register(from, c.ID)
	q := b.queues[0]
	if c.Service {
		q = b.queues[1]
	}
	h, err := q.dial(from, c.Window, c.Delay, b.clients)
	if err != nil {
		return nil, err
	}
	return h, nil
}

func (b *bubble) dialControl(g *generation) (net.Conn, error) {
	from := &net.TCPAddr{IP: net.IPv4(203, 0, 113, 1), Port: 20000}
	h, err := g.control.(*listener).dial(from, 64<<10, 0, b.clients)
	if err != nil {
		return nil, err
	}
	return h, nil
}

func (b *bubble) links(from, to *generation, fault linkFault) (near, far server.Link, err error) {
	b.net.mu.Lock()
	to.proc = b.net.process(to.name)
	to.control = b.net.listen(controlPort, to.proc)
	b.net.mu.Unlock()
	n, f := b.net.links(from.proc, to.proc, fault)
	return n, f, nil
}

func (b *bubble) kill(g *generation) { g.proc.kill() }

func (b *bubble) isDead(g *generation) bool { return g.proc.isDead() }
