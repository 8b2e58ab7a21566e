package load

import (
	"bytes"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// A stream is one connection and what is under way on it.
type stream struct {
	fd    int
	phase int // where in the pattern it began

	queued, sent, received int64 // bytes: what may be sent, was sent, has come back

	began []time.Duration // when each message under way was begun: a ring
	first int             // the oldest of them
	under int             // how many there are
}

// flush writes what may be sent, as far as the kernel takes it.
func (s *stream) flush() error {
	for s.sent < s.queued {
		n, err := unix.Write(s.fd, expect(s.phase, s.sent, int(min(s.queued-s.sent, longest))))
		switch err {
		case nil:
			s.sent += int64(n)
		case unix.EINTR:
		case unix.EAGAIN:
			return nil // the poller says when there is room
		default:
			return fmt.Errorf("writing to the server after %d bytes: %w", s.sent, err)
		}
	}
	return nil
}

// fill reads once into buf and checks what came. It returns how much that was; 0 when there is nothing to read.
func (s *stream) fill(buf []byte, spec *Spec) (int, error) {
	for {
		n, err := unix.Read(s.fd, buf)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			return 0, nil
		case err != nil:
			return 0, fmt.Errorf("reading from the server after %d bytes: %w", s.received, err)
		case n == 0:
			return 0, fmt.Errorf("the server ended the stream after %d of %d bytes", s.received, s.sent)
		default:
			return n, s.take(buf[:n], spec)
		}
	}
}

// take checks got, which is to be the echo of what is under way, with notices between the messages.
func (s *stream) take(got []byte, spec *Spec) error {
	for len(got) > 0 {
		part := got
		if spec.Notice != "" {
			part = got[:min(len(got), spec.Size-int(s.received%int64(spec.Size)))]
		}
		if right(s.phase, s.received, part) {
			s.received += int64(len(part))
			got = got[len(part):]
			continue
		}
		rest, ok := bytes.CutPrefix(bytes.TrimPrefix(got, []byte("\n")), []byte(spec.Notice))
		if !ok || spec.Notice == "" || s.received%int64(spec.Size) != 0 {
			return fmt.Errorf("what the server sent after %d bytes is not what it was sent", s.received)
		}
		got = rest
	}
	return nil
}

// begin allows one more message of size bytes, at the given time.
func (s *stream) begin(size int, now time.Duration) {
	s.began[(s.first+s.under)%len(s.began)] = now
	s.under++
	s.queued += int64(size)
}

// finished reports whether the oldest message under way, of size bytes, has come back.
func (s *stream) finished(size int) bool {
	return s.under > 0 && s.received >= s.queued-int64(s.under-1)*int64(size)
}

// finish takes off the oldest message under way, and says when it was begun.
func (s *stream) finish() time.Duration {
	at := s.began[s.first]
	s.first = (s.first + 1) % len(s.began)
	s.under--
	return at
}
