package load

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Data that was there for a while before it is read has not just arrived.
func TestReadSaysHowLongAgo(t *testing.T) {
	written := make(chan time.Time, 1)
	address := serveTCP(t, func(conn net.Conn) {
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
	for try := 0; ; try++ { // the kernel starts to note times only after the first socket asks for them
		if _, err := s.write([]byte("?")); err != nil {
			t.Fatal(err)
		}
		since := <-written
		time.Sleep(20 * time.Millisecond) // the time to be measured
		buf := make([]byte, 10)
		n, ago, err := s.read(buf)
		if string(buf[:n]) != "hello" || err != nil {
			t.Fatalf("read %q, %v", buf[:n], err)
		}
		if ago == 0 && try < 50 {
			continue
		}
		if ago < 20*time.Millisecond || ago > time.Since(since)+time.Second {
			t.Errorf("it arrived %v ago, want at least 20 ms", ago)
		}
		if _, _, err := s.read(buf); !errors.Is(err, errWouldBlock) {
			t.Errorf("reading nothing: %v", err)
		}
		return
	}
}

// More connections than this machine has files or ports for are refused before the run.
func TestPreflight(t *testing.T) {
	ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, errors.New("the run was started"))
	defer cancel()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	connected := false
	address := serveTCP(t, func(conn net.Conn) {
		connected = true
		_ = conn.Close()
	})
	_, err := Run(ctx, Options{Address: address, Conns: int(min(limit.Cur, 1<<30)), Duration: time.Hour})
	if err == nil || !strings.Contains(err.Error(), "raise the limit (ulimit -n)") {
		t.Errorf("too many files: %v", err)
	}
	for _, tt := range []struct {
		ports, addresses, conns int
		want                    string
	}{
		{51, 1, 51, ""},
		{51, 1, 52, "this machine has 51 local ports for 52 connections"},
		{51, 2, 102, ""},
		{51, 2, 103, "this machine has 102 local ports for 103 connections"},
		{0, 1, 1000, ""},
	} {
		if err := checkPorts(tt.ports, tt.addresses, tt.conns); (err == nil) != (tt.want == "") ||
			err != nil && !strings.HasPrefix(err.Error(), tt.want) {
			t.Errorf("%+v: %v", tt, err)
		}
	}
	if n := localPorts(); n < 1 || n > 1<<16 {
		t.Errorf("%d local ports", n)
	}
	if connected {
		t.Error("a connection was made")
	}
	if _, err := Run(ctx, Options{Address: "127.0.0.1:99999"}); err == nil {
		t.Error("port 99999 is accepted")
	}
}
