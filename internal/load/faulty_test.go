package load

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// A fault is what a server does wrong with some message of each connection.
type fault func(s *faultyConn, m []byte)

// faults says what goes wrong with which message, by its number on its connection.
type faults map[int]fault

func drop(*faultyConn, []byte) {}

func duplicate(s *faultyConn, m []byte) { s.say(m, m) }

func corrupt(s *faultyConn, m []byte) {
	m[len(m)/2] ^= 1
	s.say(m)
}

func delay(by time.Duration) fault {
	return func(s *faultyConn, m []byte) {
		time.Sleep(by)
		s.say(m)
	}
}

// swap lets the next message go before this one.
func swap(s *faultyConn, m []byte) { s.held = bytes.Clone(m) }

// misdeliver says a message that another connection has sent besides.
func misdeliver(s *faultyConn, m []byte) {
	from, seq, _ := parse(m, len(m))
	from.conn += 1000
	other := from.template(len(m))
	number(other, seq)
	s.say(other, m)
}

// announce puts a notice into the middle of the message.
func announce(text string) fault {
	return func(s *faultyConn, m []byte) { s.say(m[:5], []byte("\n"+text), m[5:]) }
}

// announceFirst sends a notice a while before the message, which is gone when the client has half-closed by then.
func announceFirst(text string) fault {
	return func(s *faultyConn, m []byte) {
		s.say([]byte(text))
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
			s.say(m)
			<-more
		}
	}
}

// hangUp ends the connection instead.
func hangUp(s *faultyConn, _ []byte) { s.over = true }

// A faultyConn is one connection of a server with faults.
type faultyConn struct {
	net.Conn
	lines *bufio.Reader
	held  []byte
	over  bool
}

func (s *faultyConn) say(parts ...[]byte) { _, _ = s.Write(bytes.Join(parts, nil)) }

// serve echoes lines, with faults, to the end.
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
			s.say(m)
		}
		if held != nil {
			s.say(held)
		}
	}
}

// A pipe is one end of a connection in memory that can be half-closed.
type pipe struct {
	*io.PipeReader
	*io.PipeWriter
	net.Conn // for the methods that nobody calls
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

// inMemory serves connections in memory, the first by the first server and so on, the last over and over; a nil one refuses.
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

// overTCP serves real connections.
func overTCP(t *testing.T, serve func(net.Conn)) (address string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
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
	return ln.Addr().String()
}
