package load

import (
	"errors"
	"net"
	"sync"
	"time"
)

// errWouldBlock says that a socket has nothing to read, or no room to write.
var errWouldBlock = errors.New("would block")

// A socket is a connection as a worker uses it. No method blocks.
type socket interface {
	// read also returns how long ago the last byte arrived, as far as the system tells.
	read(p []byte) (n int, ago time.Duration, err error)
	write(p []byte) (int, error)
	// awaitRoom says whether the poller is to report when there is room to write.
	awaitRoom(on bool) error
	closeWrite() error
	close()
}

// A poller waits for the sockets of one worker. Only wake may be called by others.
type poller interface {
	// add takes over a connection.
	add(conn net.Conn, u *user) (socket, error)
	// wait returns the users whose sockets can be read or written or have ended. It
	// returns when there are any, when wake is called, and at the latest after the
	// timeout. The slice is valid until the next call.
	wait(timeout time.Duration) ([]*user, error)
	// wake ends the present wait, or the next one.
	wake()
	// close frees the poller. Its sockets have been closed.
	close()
}

// A pace is the rhythm of the schedule. A poller may delay what happens between two
// ticks to the later one. Zero means that there is none.
type pace struct {
	began time.Time
	every time.Duration
}

// chunk is how much a connSocket reads at once, in bytes.
const chunk = 64 << 10

// A connPoller serves any [net.Conn], on any system. Each connection has two
// goroutines: one reads, one writes.
type connPoller struct {
	readyUsers chan *user
	woken      chan struct{}
	batch      []*user
	conns      sync.WaitGroup
}

func newConnPoller() *connPoller {
	return &connPoller{readyUsers: make(chan *user), woken: make(chan struct{}, 1)}
}

func (p *connPoller) add(conn net.Conn, u *user) (socket, error) {
	s := &connSocket{
		poller: p, conn: conn, user: u, out: make(chan []byte, 1), closed: make(chan struct{}),
		consumed: make(chan struct{}, 1),
	}
	p.conns.Go(s.readLoop)
	p.conns.Go(s.writeLoop)
	return s, nil
}

func (p *connPoller) wait(timeout time.Duration) ([]*user, error) {
	p.batch = p.batch[:0]
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case u := <-p.readyUsers:
		p.batch = append(p.batch, u)
	case <-p.woken:
	case <-timer.C:
	}
	for len(p.batch) < 256 {
		select {
		case u := <-p.readyUsers:
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

func (p *connPoller) close() { p.conns.Wait() }

// A connSocket is a net.Conn with its two goroutines.
type connSocket struct {
	poller *connPoller
	conn   net.Conn
	user   *user

	out      chan []byte // to be written; nil means half-close
	closed   chan struct{}
	consumed chan struct{} // the worker has taken what was read

	mu        sync.Mutex // guards what follows
	in        []byte     // read and not yet taken
	arrivedAt time.Time  // when it was
	readErr   error      // after it
	writing   bool       // something is in out, or being written
}

// reportReady tells the worker that there is something for it.
func (s *connSocket) reportReady() {
	select {
	case s.poller.readyUsers <- s.user:
	case <-s.closed:
	}
}

// readLoop reads to the end. It reads again when the worker has taken everything.
func (s *connSocket) readLoop() {
	buf := make([]byte, chunk)
	for {
		n, err := s.conn.Read(buf)
		s.mu.Lock()
		s.in, s.arrivedAt, s.readErr = buf[:n], time.Now(), err
		s.mu.Unlock()
		s.reportReady()
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

// writeLoop writes what it is given until the socket is closed.
func (s *connSocket) writeLoop() {
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
				return // the next read says why
			}
			s.mu.Lock()
			s.writing = false
			s.mu.Unlock()
			s.reportReady()
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
		ago = time.Since(s.arrivedAt)
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

// awaitRoom has nothing to do: the end of each write is reported.
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
