package load

import (
	"net"
	"sync"
	"time"
)

// chunk is how much a connection reads at once, in bytes.
const chunk = 64 << 10

// A connPoller serves any [net.Conn], on any system, by two goroutines for each: one
// reads, one writes.
type connPoller struct {
	ready chan *user // those that have something for the loop
	woken chan struct{}
	batch []*user
	all   sync.WaitGroup
}

func newConnPoller() *connPoller {
	return &connPoller{ready: make(chan *user), woken: make(chan struct{}, 1)}
}

func (p *connPoller) add(conn net.Conn, u *user) (socket, error) {
	s := &connSocket{poller: p, conn: conn, user: u, out: make(chan []byte, 1), closed: make(chan struct{}), consumed: make(chan struct{}, 1)}
	p.all.Go(s.readAll)
	p.all.Go(s.writeAll)
	return s, nil
}

func (p *connPoller) wait(timeout time.Duration) ([]*user, error) {
	p.batch = p.batch[:0]
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case u := <-p.ready:
		p.batch = append(p.batch, u)
	case <-p.woken:
	case <-timer.C:
	}
	for len(p.batch) < 256 {
		select {
		case u := <-p.ready:
			p.batch = append(p.batch, u)
			continue
		default:
		}
		break
	}
	return p.batch, nil
}

func (p *connPoller) wake() {
	select {
	case p.woken <- struct{}{}:
	default:
	}
}

func (p *connPoller) close() { p.all.Wait() }

// A connSocket is a net.Conn with its two goroutines.
type connSocket struct {
	poller *connPoller
	conn   net.Conn
	user   *user

	out      chan []byte // what is to be written; nil: half-close
	closed   chan struct{}
	consumed chan struct{} // what was read has been taken

	mu      sync.Mutex // guards what follows
	in      []byte     // what was read and is not yet taken
	came    time.Time  // when it was
	readErr error      // after it
	writing bool       // something is in out, or being written
}

// tell says to the loop that there is something for it.
func (s *connSocket) tell() {
	select {
	case s.poller.ready <- s.user:
	case <-s.closed:
	}
}

// readAll reads until the end, each time when the loop has taken what there was.
func (s *connSocket) readAll() {
	buf := make([]byte, chunk)
	for {
		n, err := s.conn.Read(buf)
		s.mu.Lock()
		s.in, s.came, s.readErr = buf[:n], time.Now(), err
		s.mu.Unlock()
		s.tell()
		if err != nil {
			return
		}
		select {
		case <-s.consumed:
		case <-s.closed:
			return
		}
	}
}

// writeAll writes what it is given until the socket is closed.
func (s *connSocket) writeAll() {
	for {
		select {
		case p := <-s.out:
			if p == nil {
				if half, ok := s.conn.(interface{ CloseWrite() error }); ok {
					_ = half.CloseWrite()
				} else {
					_ = s.conn.Close()
				}
				return
			}
			if _, err := s.conn.Write(p); err != nil {
				return // which reading tells better
			}
			s.mu.Lock()
			s.writing = false
			s.mu.Unlock()
			s.tell()
		case <-s.closed:
			return
		}
	}
}

func (s *connSocket) read(p []byte) (n int, ago time.Duration, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case len(s.in) > 0:
		n = copy(p, s.in)
		ago = time.Since(s.came)
		if s.in = s.in[n:]; len(s.in) == 0 && s.readErr == nil {
			s.consumed <- struct{}{}
		}
		return n, ago, nil
	case s.readErr != nil:
		return 0, 0, s.readErr
	}
	return 0, 0, errWouldBlock
}

func (s *connSocket) write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.writing {
		return 0, errWouldBlock
	}
	s.writing = true
	s.out <- append([]byte(nil), p...)
	return len(p), nil
}

// awaitRoom has nothing to do: the end of each write is told.
func (s *connSocket) awaitRoom(bool) error { return nil }

func (s *connSocket) closeWrite() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.writing {
		return errWouldBlock
	}
	s.writing = true
	s.out <- nil
	return nil
}

func (s *connSocket) close() {
	close(s.closed)
	_ = s.conn.Close()
}
