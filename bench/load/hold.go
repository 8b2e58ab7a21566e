package load

import (
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Held is a number of idle connections, each of which has sent one message.
type Held struct {
	runner   *runner
	sessions []*tls.Conn // over TLS, in place of runner
}

// Hold opens connections one after another, sends a message of spec.Size on each, and waits for its echo. The caller
// must call Close.
func Hold(spec Spec) (*Held, error) {
	if spec.TLS {
		return holdTLS(spec)
	}
	spec.Depth = 1
	r, err := newRunner(spec)
	if err != nil {
		return nil, err
	}
	for i := range spec.Conns {
		if err := r.holdOne(i); err != nil {
			r.close()
			return nil, fmt.Errorf("connection %d: %w", i, err)
		}
	}
	return &Held{runner: r}, nil
}

func (r *runner) holdOne(i int) error {
	fd, err := connect(r.target, i, true)
	if err != nil {
		return err
	}
	s := &stream{fd: fd, phase: i * 131 % period, began: make([]time.Duration, 1)}
	r.streams = append(r.streams, s)
	s.begin(r.spec.Size, 0)
	if err := s.flush(); err != nil {
		return err
	}
	for !s.finished(r.spec.Size) {
		if err := await(fd, cmp.Or(r.spec.Timeout, echoTimeout)); err != nil {
			return err
		}
		if _, err := s.fill(r.buf, &r.spec); err != nil {
			return err
		}
	}
	s.finish()
	return nil
}

// echoTimeout is the default of Spec.Timeout.
const echoTimeout = 10 * time.Second

// await waits until fd can be read.
func await(fd int, timeout time.Duration) error {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(timeout/time.Millisecond))
	switch {
	case err == unix.EINTR:
		return nil
	case err != nil:
		return fmt.Errorf("waiting for the server: %w", err)
	case n == 0:
		return fmt.Errorf("no echo within %v", timeout)
	}
	return nil
}

// ReadUntil reads and discards data until done is closed. An error means that the server closed a connection.
func (h *Held) ReadUntil(done <-chan struct{}) error {
	if h.sessions != nil { // the server sends nothing
		<-done
		return nil
	}
	r := h.runner
	if err := h.watch(); err != nil {
		return err
	}
	var events [256]unix.EpollEvent
	for {
		select {
		case <-done:
			return nil
		default:
		}
		const interval = 50 // ms between checks of done
		n, err := unix.EpollWait(r.poll, events[:], interval)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("waiting for the server: %w", err)
		}
		for _, e := range events[:max(n, 0)] {
			if _, err := r.readText(int(e.Fd)); err != nil {
				return fmt.Errorf("connection %d: %w", e.Fd, err)
			}
		}
	}
}

// Pulse sends a message on one connection after another, one each interval, until done is closed, and waits for the
// last echoes. A connection that still waits for its echo is left out.
func (h *Held) Pulse(done <-chan struct{}, interval time.Duration) (Result, error) {
	r := h.runner
	if err := h.watch(); err != nil {
		return Result{}, err
	}
	r.ending = true // serve begins no messages
	r.echoes = 0
	begun := r.now()
	due := begun
	for next := 0; ; {
		select {
		case <-done:
			result := r.result(r.now() - begun)
			return result, r.finish()
		default:
		}
		for now := r.now(); due <= now; due += interval {
			s := r.streams[next]
			next = (next + 1) % len(r.streams)
			if s.inFlight > 0 {
				continue
			}
			s.begin(r.spec.Size, due)
			if err := s.flush(); err != nil {
				return Result{}, err
			}
		}
		if err := r.until(due); err != nil {
			return Result{}, err
		}
	}
}

// watch adds all connections to the epoll instance.
func (h *Held) watch() error {
	for i, s := range h.runner.streams {
		event := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLRDHUP, Fd: int32(i)}
		if err := unix.EpollCtl(h.runner.poll, unix.EPOLL_CTL_ADD, s.fd, &event); err != nil {
			return fmt.Errorf("watching a connection: %w", err)
		}
	}
	return nil
}

// Close closes all connections.
func (h *Held) Close() {
	if h.runner != nil {
		h.runner.close()
	}
	for _, c := range h.sessions {
		_ = c.Close()
	}
}

// A Drained is how clients saw a drain.
type Drained struct {
	// Since the signal.
	HalfTold, LastTold      time.Duration
	FirstClosed, LastClosed time.Duration
}

// Drain sends SIGTERM to the server, and waits until it has sent every client one notice and has closed every
// connection with a FIN.
func (h *Held) Drain() (d Drained, err error) {
	r := h.runner
	if err := h.watch(); err != nil {
		return d, err
	}
	notices := make([]string, len(r.streams))
	told, open := 0, len(r.streams)
	signalled := r.now()
	if err := unix.Kill(r.spec.PID, unix.SIGTERM); err != nil {
		return d, fmt.Errorf("sending SIGTERM: %w", err)
	}
	var events [256]unix.EpollEvent
	for open > 0 {
		n, err := unix.EpollWait(r.poll, events[:], 60_000)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			return d, errors.Join(err, fmt.Errorf("%d of %d connections are still open after a minute without events",
				open, len(r.streams)))
		}
		for _, e := range events[:n] {
			text, err := r.readText(int(e.Fd))
			since := r.now() - signalled
			if text != "" && notices[e.Fd] == "" {
				told++
				d.LastTold = since
				if told == len(r.streams)/2 {
					d.HalfTold = since
				}
			}
			notices[e.Fd] += text
			switch {
			case err == io.EOF:
				if d.FirstClosed == 0 {
					d.FirstClosed = since
				}
				d.LastClosed = since
				open--
			case err != nil:
				return d, fmt.Errorf("connection %d: %w", e.Fd, err)
			}
		}
	}
	for i, notice := range notices {
		notice = strings.TrimPrefix(notice, "\n") // in front of the notice, because the echo did not end in one
		if !strings.HasPrefix(notice, "SHUTDOWN ") || strings.Index(notice, "\n") != len(notice)-1 {
			return d, fmt.Errorf("connection %d read %q, want one notice", i, notice)
		}
	}
	return d, nil
}

// readText reads available data. At the end of the stream it half-closes and returns io.EOF.
func (r *runner) readText(i int) (string, error) {
	s := r.streams[i]
	n, err := unix.Read(s.fd, r.buf)
	switch {
	case err == unix.EINTR || err == unix.EAGAIN:
		return "", nil
	case err != nil:
		return "", fmt.Errorf("reading from the server: %w", err)
	case n == 0:
		unix.EpollCtl(r.poll, unix.EPOLL_CTL_DEL, s.fd, nil)
		unix.Shutdown(s.fd, unix.SHUT_WR) // the server waits for it; close closes the descriptor
		return "", io.EOF
	}
	return string(r.buf[:n]), nil
}
