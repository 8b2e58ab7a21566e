package main

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// pattern is what clients send, each from its own offset. It has no newlines and no capitals, so that a notice is never
// mistaken for an echo. Its length is prime, so that bytes that are lost, repeated or moved do not match.
var pattern = func() []byte {
	rng := rand.New(rand.NewPCG(1, 2))
	p := make([]byte, 1_048_573)
	for i := range p {
		p[i] = 'a' + byte(rng.IntN(26))
	}
	return p
}()

// piece returns at most n bytes of the endless repetition of pattern.
func piece(offset, n int64) []byte {
	at := offset % int64(len(pattern))
	return pattern[at:min(at+n, int64(len(pattern)))]
}

// A transport connects to the server, directly or through a proxy with network faults.
type transport struct {
	name    string
	dial    func() (net.Conn, error)
	proxied bool // has no half-close
	slow    bool // takes so long that little may be on its way when a drain begins, or the grace period is too short
}

// A session is one connection of a well-behaved client. It sends, checks every byte that comes back, stops when a notice
// says so, and reads to the end.
type session struct {
	nc     net.Conn
	from   transport
	offset int64 // in pattern
	began  time.Time
	window int64

	sent, got atomic.Int64
	moved     chan struct{} // signals that got has grown
	told      chan struct{} // closed at a notice that ends the connection
	tell      sync.Once

	// Of the reader; valid when it has ended.
	notices []string
	corrupt string
	readErr error
	local   string
}

func newSession(nc net.Conn, from transport, rng *rand.Rand) *session {
	s := &session{
		nc: nc, from: from, began: time.Now(), offset: rng.Int64N(int64(len(pattern))), window: 512 << 10,
		moved: make(chan struct{}, 1), told: make(chan struct{}), local: nc.LocalAddr().String(),
	}
	if from.proxied {
		s.window = 32 << 10
	}
	if from.slow {
		s.window = 8 << 10
	}
	return s
}

// read checks what arrives, until the end of the stream. If pace is not 0, it reads at most that many bytes a second,
// until a notice tells it to leave.
func (s *session) read(pace int) {
	buf := make([]byte, 64<<10)
	var line []byte
	inLine := false
	for {
		part := buf
		if pace > 0 {
			select {
			case <-s.told:
				pace = 0
			case <-time.After(50 * time.Millisecond):
				part = buf[:min(len(buf), max(1, pace/20))]
			}
		}
		_ = s.nc.SetReadDeadline(time.Now().Add(busyTimeout))
		n, err := s.nc.Read(part)
		for p := part[:n]; len(p) > 0; {
			if inLine {
				if p[0] == '\n' {
					s.notice(string(line))
					inLine, line = false, line[:0]
				} else {
					line = append(line, p[0])
				}
				p = p[1:]
				continue
			}
			got := s.got.Load()
			want := piece(s.offset+got, min(int64(len(p)), s.sent.Load()-got))
			same := min(len(p), len(want))
			if !bytes.Equal(p[:same], want[:same]) {
				for same = 0; p[same] == want[same]; same++ {
				}
			}
			s.got.Add(int64(same))
			if p = p[same:]; len(p) == 0 {
				break
			}
			switch {
			case same == len(want) && s.got.Load() < s.sent.Load():
				continue // the end of pattern, or more was sent meanwhile
			case p[0] == '\n' && s.got.Load() > 0:
				inLine = true
			case p[0] >= 'A' && p[0] <= 'Z' && (s.got.Load() == 0 || len(s.notices) > 0):
				inLine, line = true, append(line, p[0])
			default:
				s.corrupt = fmt.Sprintf("byte %d of %d sent: got %.40q, want %.40q", s.got.Load(), s.sent.Load(), p, want[min(same, len(want)):])
				_ = s.nc.Close()
				return
			}
			p = p[1:]
		}
		if n > 0 {
			select {
			case s.moved <- struct{}{}:
			default:
			}
		}
		if err != nil {
			s.readErr = err
			s.tell.Do(func() { close(s.told) })
			return
		}
	}
}

func (s *session) notice(line string) {
	s.notices = append(s.notices, line)
	if !strings.HasPrefix(line, "NOTICE ") {
		s.tell.Do(func() { close(s.told) })
	}
}

// write sends n bytes in chunks of at most chunk bytes, and sleeps for think between them. A notice stops it.
func (s *session) write(n int64, chunk int, think time.Duration) error {
	for s.sent.Load() < n {
		for s.sent.Load()-s.got.Load() >= s.window {
			select {
			case <-s.told:
				return nil
			case <-s.moved:
			}
		}
		select {
		case <-s.told:
			return nil
		default:
		}
		at := s.sent.Load()
		p := piece(s.offset+at, min(int64(chunk), n-at, s.window))
		s.sent.Add(int64(len(p))) // before, because the echo may be faster than the return of Write
		_ = s.nc.SetWriteDeadline(time.Now().Add(busyTimeout))
		if w, err := s.nc.Write(p); err != nil {
			s.sent.Add(int64(w - len(p)))
			return err
		}
		if think > 0 {
			select {
			case <-s.told:
				return nil
			case <-time.After(think):
			}
		}
	}
	return nil
}

// awaitEcho waits until everything has come back, or the stream has ended.
func (s *session) awaitEcho(ended <-chan struct{}) {
	for s.got.Load() < s.sent.Load() {
		select {
		case <-s.moved:
		case <-ended:
			return
		}
	}
}

// run runs the session: one of five kinds, drawn at random.
func (s *session) run(rng *rand.Rand, stop <-chan struct{}) outcome {
	var n int64
	var chunk, pace int
	var think time.Duration
	switch rng.IntN(5) {
	case 0: // talks
		n, chunk, think = int64(64+rng.IntN(4096)), 16+rng.IntN(64), time.Duration(rng.IntN(100))*time.Millisecond
	case 1: // streams
		n, chunk = 1<<20+rng.Int64N(8<<20), 1<<10+rng.IntN(256<<10)
	case 2: // streams, and reads slowly
		n, chunk, pace = 64<<10+rng.Int64N(1<<20), 64<<10, 200<<10
	case 3: // is idle between messages
		n, chunk, think = int64(2+rng.IntN(8)), 1, time.Duration(500+rng.IntN(2000))*time.Millisecond
	default: // sends one message and leaves
		n, chunk = int64(1+rng.IntN(64<<10)), 64<<10
	}
	if s.from.proxied {
		n = min(n, 256<<10)
	}
	ended := make(chan struct{})
	var helpers sync.WaitGroup
	defer helpers.Wait()
	helpers.Go(func() {
		defer close(ended)
		s.read(pace)
	})
	helpers.Go(func() {
		select {
		case <-stop: // all clients are to leave
			s.tell.Do(func() { close(s.told) })
		case <-ended:
		}
	})
	writeErr := s.write(n, chunk, think)
	if half, ok := s.nc.(interface{ CloseWrite() error }); ok && !s.from.proxied {
		_ = half.CloseWrite()
	} else {
		s.awaitEcho(ended)
		_ = s.nc.Close()
	}
	<-ended
	_ = s.nc.Close()
	return s.classify(writeErr)
}

// outcome is how a session ended.
type outcome struct {
	kind   outcomeKind
	detail string
	at     time.Time
	// connecting means that it was not served yet, as far as the client knows: a proxy connects for it.
	connecting bool
}

type outcomeKind string

const (
	complete     outcomeKind = "complete"     // everything came back
	rejected     outcomeKind = "turned away"  // PAUSED, BUSY, or too late for a drain
	leftWhenTold outcomeKind = "told, left"   // everything came back after the notice of a drain
	refused      outcomeKind = "refused"      // through a proxy, before anything came back
	cut          outcomeKind = "cut off"      // it ended without a notice, or with some bytes missing
	corrupted    outcomeKind = "corrupted"    // bytes that were not sent
	stuck        outcomeKind = "nothing came" // for a minute
)

func (s *session) classify(writeErr error) outcome {
	o := outcome{at: time.Now()}
	shutdown, rejectedByNotice := 0, false
	for _, line := range s.notices {
		switch {
		case strings.HasPrefix(line, "SHUTDOWN 0 "), line == "PAUSED", line == "BUSY":
			rejectedByNotice = true
		case strings.HasPrefix(line, "SHUTDOWN "):
			shutdown++
		case !strings.HasPrefix(line, "NOTICE "):
			s.corrupt = fmt.Sprintf("an unknown notice: %.60q", line)
		}
	}
	if shutdown > 1 {
		s.corrupt = fmt.Sprintf("told %d times: %q", shutdown, s.notices)
	}
	all := s.got.Load() == s.sent.Load()
	closedByUs := errors.Is(s.readErr, net.ErrClosed)
	inOrder := errors.Is(s.readErr, io.EOF) || closedByUs && s.from.proxied
	var timeout net.Error
	switch {
	case s.corrupt != "":
		o.kind = corrupted
	case rejectedByNotice && s.got.Load() == 0:
		o.kind = rejected
	case all && inOrder && writeErr == nil && shutdown > 0:
		o.kind = leftWhenTold
	case all && inOrder && writeErr == nil && s.from.proxied && !closedByUs:
		o.kind = cut
	case all && inOrder && writeErr == nil:
		o.kind = complete
	case errors.As(s.readErr, &timeout) && timeout.Timeout():
		o.kind = stuck
	default:
		o.kind = cut
	}
	o.detail = fmt.Sprintf("%s %s after %s: %d of %d bytes came back, notices %q, read: %v, write: %v %s", s.from.name, s.local,
		o.at.Sub(s.began).Round(time.Millisecond), s.got.Load(), s.sent.Load(), s.notices, s.readErr, writeErr, s.corrupt)
	if o.kind == cut && s.from.proxied && s.got.Load() == 0 && len(s.notices) == 0 {
		o.kind, o.connecting = refused, true
	}
	return o
}

// dialTLS connects and performs the handshake.
func dialTLS(address string, config *tls.Config) (net.Conn, error) {
	return tls.DialWithDialer(&net.Dialer{Timeout: busyTimeout}, "tcp", address, config)
}
