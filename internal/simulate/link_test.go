package simulate

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"time"
)

// memoryLink is one end of an in-memory server.Link. It passes further handles of the same endpoints, as a Unix socket
// passes descriptors.
type memoryLink struct {
	net    *network
	owner  *process
	in     *mailbox
	out    *mailbox
	limit  timeLimit
	closed bool

	count int // messages that were sent or received
	state *commit
	fault linkFault // for this side, if At is not 0
}

// commit is the progress of a handover. Both ends of the link share it. Faults stop once it is acknowledged: between
// processes the link then breaks only if the owner crashes, which loses its connections with or without an upgrade.
type commit struct{ sent, acknowledged bool }

// mailbox is one direction of a link.
type mailbox struct {
	cond  *sync.Cond
	mail  []mail
	ended bool // nothing more will come
}

type mail struct {
	message []byte
	files   []closer // handles in transit
	at      time.Time
}

var errLinkBroken = errors.New("the link broke")

func (n *network) links(predecessor, successor *process, fault linkFault) (near, far *memoryLink) {
	a, b := &mailbox{cond: sync.NewCond(&n.mu)}, &mailbox{cond: sync.NewCond(&n.mu)}
	state := new(commit)
	near = &memoryLink{net: n, owner: predecessor, in: a, out: b, state: state}
	far = &memoryLink{net: n, owner: successor, in: b, out: a, state: state}
	if fault.Successor {
		far.fault = fault
	} else {
		near.fault = fault
	}
	predecessor.own(near)
	successor.own(far)
	return near, far
}

// step counts a message, and reports how the fault affects it. The caller holds the network's lock.
func (l *memoryLink) step() (delay time.Duration, err error) {
	l.count++
	if l.fault.At != l.count || l.state.acknowledged {
		return 0, nil
	}
	switch l.fault.Do {
	case "break":
		l.close()
		return 0, errLinkBroken
	case "die":
		l.owner.die()
		l.close()
		return 0, net.ErrClosed
	case "delay":
		return 200 * time.Millisecond, nil
	default:
		return 4 * time.Second, nil // longer than a freeze, and shorter than the wait for the commit
	}
}

func (l *memoryLink) Send(message []byte, files []any) error {
	l.net.mu.Lock()
	defer l.net.mu.Unlock()
	switch {
	case l.closed:
		return net.ErrClosed
	case l.limit.passed():
		return os.ErrDeadlineExceeded
	case l.out.ended:
		return io.ErrClosedPipe
	}
	m := mail{message: slices.Clone(message)}
	for _, f := range files {
		switch f := f.(type) {
		case *handle:
			if f.closed {
				l.discard(m)
				return net.ErrClosed
			}
			m.files = append(m.files, f.open(l.owner))
		case *listener:
			if f.closed {
				l.discard(m)
				return net.ErrClosed
			}
			m.files = append(m.files, f.acceptQueue.open(l.owner))
		}
	}
	delay, err := l.step()
	if err != nil {
		l.discard(m)
		return err
	}
	if isCommit(message) {
		l.state.sent = true
	} else if l.state.sent {
		l.state.acknowledged = true
	}
	m.at = time.Now().Add(delay)
	l.out.mail = append(l.out.mail, m)
	if delay > 0 {
		time.AfterFunc(delay, func() {
			l.net.mu.Lock()
			defer l.net.mu.Unlock()
			l.out.cond.Broadcast()
		})
	}
	l.out.cond.Broadcast()
	return nil
}

func isCommit(message []byte) bool { return bytes.HasPrefix(message, []byte(`{"type":"commit"`)) }

// discard closes the handles in a message that nobody will receive.
func (l *memoryLink) discard(m mail) {
	for _, f := range m.files {
		f.close()
	}
}

func (l *memoryLink) Receive() ([]byte, []any, error) {
	l.net.mu.Lock()
	defer l.net.mu.Unlock()
	for {
		switch {
		case l.closed:
			return nil, nil, net.ErrClosed
		case l.limit.passed():
			return nil, nil, os.ErrDeadlineExceeded
		case len(l.in.mail) > 0 && !l.in.mail[0].at.After(time.Now()):
			delay, err := l.step()
			if err != nil {
				return nil, nil, err
			}
			if delay > 0 {
				l.in.mail[0].at = time.Now().Add(delay)
				time.AfterFunc(delay, func() {
					l.net.mu.Lock()
					defer l.net.mu.Unlock()
					l.in.cond.Broadcast()
				})
				continue
			}
			m := l.in.mail[0]
			l.in.mail = l.in.mail[1:]
			var files []any
			for _, f := range m.files {
				f.(interface{ moveTo(p *process) }).moveTo(l.owner)
				files = append(files, f)
			}
			return m.message, files, nil
		case len(l.in.mail) == 0 && l.in.ended:
			return nil, nil, io.EOF
		}
		l.in.cond.Wait()
	}
}

func (l *memoryLink) Carries(file any) bool {
	switch file.(type) {
	case *handle, *listener:
		return true
	}
	return false
}

func (l *memoryLink) SetDeadline(t time.Time) error {
	l.net.mu.Lock()
	defer l.net.mu.Unlock()
	l.limit.set(t, l.in.cond)
	return nil
}

func (l *memoryLink) Close() error {
	l.net.mu.Lock()
	defer l.net.mu.Unlock()
	l.close()
	return nil
}

func (l *memoryLink) close() {
	if l.closed {
		return
	}
	l.closed = true
	l.limit.stop()
	l.owner.remove(l)
	for _, m := range l.in.mail {
		l.discard(m)
	}
	l.in.mail = nil
	l.in.ended, l.out.ended = true, true
	l.in.cond.Broadcast()
	l.out.cond.Broadcast()
}

// moveTo makes another process the owner of a handle, as receiving a descriptor does.
func (h *handle) moveTo(p *process) {
	h.owner.remove(h)
	h.owner = p
	p.add(h)
}

func (l *listener) moveTo(p *process) {
	l.owner.remove(l)
	l.owner = p
	p.add(l)
}

// own adds c to the process. Unlike add it takes the network's lock.
func (p *process) own(c closer) {
	p.net.mu.Lock()
	defer p.net.mu.Unlock()
	p.add(c)
}
