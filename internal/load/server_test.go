package load

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// A fault is what a server does wrong with a message.
type fault func(s *faultyConn, m []byte)

// faults are the faults of a server, by the number of the message on its connection.
type faults map[int]fault

func drop(*faultyConn, []byte) {}

func duplicate(s *faultyConn, m []byte) { s.send(m, m) }

func corrupt(s *faultyConn, m []byte) {
	m[len(m)/2] ^= 1
	s.send(m)
}

func delay(by time.Duration) fault {
	return func(s *faultyConn, m []byte) {
		time.Sleep(by)
		s.send(m)
	}
}

// swap sends the message after the next one.
func swap(s *faultyConn, m []byte) { s.held = bytes.Clone(m) }

// misdeliver also sends a message of another connection.
func misdeliver(s *faultyConn, m []byte) {
	from, seq, _ := parseMessage(m)
	from.conn += 1000
	s.send(makeMessage(from, seq, len(m)), m)
}

// noticeInside sends a notice in the middle of the message.
func noticeInside(text string) fault {
	return func(s *faultyConn, m []byte) { s.send(m[:5], []byte("\n"+text), m[5:]) }
}

// noticeBefore sends a notice 100 ms before the message. If the client has half-closed
// by then, the message is not sent.
func noticeBefore(text string) fault {
	return func(s *faultyConn, m []byte) {
		s.send([]byte(text))
		more := make(chan error, 1)
		go func() {
			_, err := s.lines.Peek(1)
			more <- err
		}()
		select {
		case err := <-more:
			s.over = errors.Is(err, io.EOF)
			more <- nil
		case <-time.After(100 * time.Millisecond):
		}
		if !s.over {
			s.send(m)
			<-more
		}
	}
}

// hangUp closes the connection instead of sending the message.
func hangUp(s *faultyConn, _ []byte) { s.over = true }

// swallow reads to the end and sends nothing.
func swallow(s *faultyConn, _ []byte) {
	_, _ = io.Copy(io.Discard, s.lines)
	s.over = true
}

// A faultyConn is a connection of a server with faults.
type faultyConn struct {
	net.Conn
	lines *bufio.Reader
	held  []byte
	over  bool
}

func (s *faultyConn) send(parts ...[]byte) { _, _ = s.Write(bytes.Join(parts, nil)) }

// serve echoes lines to the end.
func (f faults) serve(conn net.Conn) {
	defer conn.Close()
	s := &faultyConn{Conn: conn, lines: bufio.NewReader(conn)}
	for n := 0; !s.over; n++ {
		m, err := s.lines.ReadBytes('\n')
		if err != nil {
			return
		}
		held := s.held
		s.held = nil
		if fault, ok := f[n]; ok {
			fault(s, m)
		} else {
			s.send(m)
		}
		if held != nil {
			s.send(held)
		}
	}
}

// silent reads to the end and echoes nothing.
func silent(conn net.Conn) {
	_, _ = io.Copy(io.Discard, conn)
	_ = conn.Close()
}

// A pipe is one end of a connection in memory that can be half-closed.
type pipe struct {
	*io.PipeReader
	*io.PipeWriter
	net.Conn // for the methods that are not called
}

func (p pipe) Read(b []byte) (int, error)  { return p.PipeReader.Read(b) }
func (p pipe) Write(b []byte) (int, error) { return p.PipeWriter.Write(b) }
func (p pipe) CloseWrite() error           { return p.PipeWriter.Close() }
func (p pipe) Close() error {
	_ = p.PipeReader.Close()
	return p.PipeWriter.Close()
}

func pipes() (near, far pipe) {
	r1, w1 := io.Pipe()
	r2, w2 := io.Pipe()
	return pipe{PipeReader: r1, PipeWriter: w2}, pipe{PipeReader: r2, PipeWriter: w1}
}

var errRefused error = &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}

// inMemory returns a dial function for servers in memory. The first connection goes to
// the first server and so on, and all further ones to the last. A nil server refuses.
func inMemory(t *testing.T, servers ...func(net.Conn)) func(context.Context, string) (net.Conn, error) {
	t.Helper()
	var mu sync.Mutex
	var all sync.WaitGroup
	t.Cleanup(all.Wait)
	n := 0
	return func(context.Context, string) (net.Conn, error) {
		mu.Lock()
		defer mu.Unlock()
		serve := servers[min(n, len(servers)-1)]
		n++
		if serve == nil {
			return nil, errRefused
		}
		near, far := pipes()
		all.Go(func() { serve(far) })
		return near, nil
	}
}

// serveOn serves TCP or Unix connections until the test ends.
func serveOn(t *testing.T, network, address string, serve func(net.Conn)) net.Addr {
	t.Helper()
	ln, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	t.Cleanup(func() {
		_ = ln.Close()
		all.Wait()
	})
	all.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			all.Go(func() { serve(conn) })
		}
	})
	return ln.Addr()
}

// serveTCP serves TCP connections on the loopback interface.
func serveTCP(t *testing.T, serve func(net.Conn)) (address string) {
	t.Helper()
	return serveOn(t, "tcp", "127.0.0.1:0", serve).String()
}

// at returns the stages of a constant rate.
func at(rate float64, duration time.Duration) []Stage { return []Stage{{rate, duration}} }

// runInMemory does a run whose Dial connects to a server in memory.
func runInMemory(t *testing.T, opts Options) *Report {
	t.Helper()
	opts.Address = "in memory"
	return mustRun(t, opts)
}

func mustRun(t *testing.T, opts Options) *Report {
	t.Helper()
	r, err := Run(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func expect(t *testing.T, what string, got, want any) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// makeMessage returns a whole message.
func makeMessage(from origin, seq uint64, size int) []byte {
	padding := newPadding(size)
	var f frame
	t := from.template()
	t.fill(&f, seq, padding)
	return bytes.Join([][]byte{f.head[:], padding, f.tail[:]}, nil)
}
