package load

import (
	"errors"
	"net"
	"testing"
	"time"
)

// TestTheKernelSaysWhenItCame: what was there for a while before it is read has not just come.
func TestTheKernelSaysWhenItCame(t *testing.T) {
	written := make(chan time.Time, 1)
	address := overTCP(t, func(conn net.Conn) {
		defer conn.Close()
		for ask := make([]byte, 1); ; {
			if _, err := conn.Read(ask); err != nil {
				return
			}
			_, _ = conn.Write([]byte("hello"))
			written <- time.Now()
		}
	})
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	p, err := newEpoll(true, pace{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	s, err := p.add(conn, &user{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	for try := 0; ; try++ { // the kernel begins to note times a while after the first socket has asked for them
		if _, err := s.write([]byte("?")); err != nil {
			t.Fatal(err)
		}
		since := <-written
		time.Sleep(20 * time.Millisecond) // to tell a while from nothing
		buf := make([]byte, 10)
		n, ago, err := s.read(buf)
		if string(buf[:n]) != "hello" || err != nil {
			t.Fatalf("read %q, %v", buf[:n], err)
		}
		if ago == 0 && try < 50 {
			continue
		}
		if ago < 20*time.Millisecond || ago > time.Since(since)+time.Second {
			t.Errorf("it came %v ago, want 20 ms at least", ago)
		}
		if _, _, err := s.read(buf); !errors.Is(err, errWouldBlock) {
			t.Errorf("reading nothing: %v", err)
		}
		return
	}
}
