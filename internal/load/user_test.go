package load

import (
	"net"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// A slowSocket gives all that was written to it back, in a read that takes a while.
type slowSocket struct {
	takes  time.Duration
	echoes []byte
}

func (s *slowSocket) read(p []byte) (int, time.Duration, error) {
	time.Sleep(s.takes)
	n := copy(p, s.echoes)
	s.echoes = s.echoes[n:]
	return n, 0, nil
}

func (s *slowSocket) write(p []byte) (int, error) {
	s.echoes = append(s.echoes, p...)
	return len(p), nil
}

func (s *slowSocket) awaitRoom(bool) error { return nil }
func (s *slowSocket) closeWrite() error    { return nil }
func (s *slowSocket) close()               {}

// servedBy returns a user that a connection serves.
func servedBy(s socket, opts Options) *user {
	opts = opts.withDefaults()
	r := &run{opts: opts, began: time.Now()}
	u := &user{loop: &loop{run: r, tally: newTally(), buf: make([]byte, readBuffer)}, phase: serving, wake: never, socket: s}
	u.check = newChecker(origin{1, 1}, opts.Size, opts.Late, u.loop.tally, u.told)
	return u
}

// TestLatencyEndsWhenItIsRead: not when the loop woke up to read from many, one after the other.
func TestLatencyEndsWhenItIsRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := servedBy(&slowSocket{takes: 10 * time.Millisecond}, Options{})
		u.send(0)
		u.ready()
		if got := time.Duration(u.loop.tally.echoes.Max()); got < 10*time.Millisecond {
			t.Errorf("latency %v, want 10 ms", got)
		}
	})
}

// A fullPoller has no room for another file.
type fullPoller struct{ poller }

func (fullPoller) add(net.Conn, *user) (socket, error) {
	return nil, os.NewSyscallError("fcntl", syscall.EMFILE)
}

// TestOutOfFilesWhenConnected: the poller may need one more than the connection.
func TestOutOfFilesWhenConnected(t *testing.T) {
	u := servedBy(nil, Options{})
	u.loop.poll = fullPoller{}
	near, _ := pipes()
	u.connected(dialed{u, near, nil, 0}, 0)
	if !outOfFiles(u.loop.failed) {
		t.Errorf("the loop goes on: %v", u.loop.failed)
	}
}

// TestSendsAsMuchAsThereIsRoomFor in the connection, in one go.
func TestSendsAsMuchAsThereIsRoomFor(t *testing.T) {
	s := &slowSocket{}
	u := servedBy(s, Options{Size: 10_000, Pipeline: 100})
	u.send(0)
	if len(s.echoes) != 1_000_000 {
		t.Errorf("%d bytes were written, want 1000000", len(s.echoes))
	}
}

// TestClientsDoNotComeBackTogether: each waits for a random part of a time that grows.
func TestClientsDoNotComeBackTogether(t *testing.T) {
	waits := make(map[time.Duration]bool)
	for range 100 {
		u := servedBy(nil, Options{})
		u.waits = 1
		u.comeBack(0)
		if u.wake < 0 || u.wake > 200*time.Millisecond {
			t.Errorf("waits for %v, want up to 200 ms the second time", u.wake)
		}
		waits[u.wake] = true
	}
	if len(waits) < 50 {
		t.Errorf("100 clients come back at %d times", len(waits))
	}
}
