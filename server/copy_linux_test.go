package server

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A client that floods is always readable, so the look at the deadline must not wait for silence.
func TestWriteToLooksUpFromAFlood(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	for range 2 * maxReads { // each message is a read of its own
		if _, err := unix.Write(pair[0], []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	s, _ := newServer(t, Echo, Options{})
	c := &Conn{srv: s}
	cp := &copier{src: c, dst: c, echo: true}
	if !cp.visit(uintptr(pair[1])) {
		t.Error("visit waits, want it to return")
	}
	if got := c.BytesOut(); got != maxReads {
		t.Errorf("%d messages were echoed in one visit, want %d", got, maxReads)
	}
	cp.release()
}

// interrupted runs do in a handler at the instant when an echo has written a part of what it read, and
// the client takes no more; then it returns what the client reads to the end of the stream.
func interrupted(t *testing.T, sent string, do func(*Conn, *copier)) string {
	t.Helper()
	const socketBuffer = 4 << 10 // on either side: far less than what is sent
	_, address := serveTCP(t, HandlerFunc(func(_ context.Context, c *Conn) error {
		if err := c.nc.(*net.TCPConn).SetWriteBuffer(socketBuffer); err != nil {
			return err
		}
		cp := &copier{src: c, dst: c, echo: true, size: mediumBuffer}
		raw := rawConn(c.nc)
		err := raw.Read(func(fd uintptr) bool {
			n, err := unix.IoctlGetInt(int(fd), unix.SIOCINQ)
			return err != nil || n >= len(sent)
		})
		if err := errors.Join(err, raw.Read(cp.visit)); err != nil {
			return err
		}
		if !cp.locked || len(cp.rest) == 0 || len(cp.rest) == len(sent) {
			t.Errorf("after the visit %d bytes of %d are left, lock kept: %t", len(cp.rest), len(sent), cp.locked)
		}
		do(c, cp)
		cp.release()
		return nil
	}), Options{})
	dialer := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		return errors.Join(raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, socketBuffer)
		}), err)
	}}
	nc, err := dialer.DialContext(t.Context(), "tcp", address.String())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	send(t, nc, sent)
	got, err := io.ReadAll(nc)
	if err != nil {
		t.Error(err)
	}
	return string(got)
}

func TestWriteToKeepsNoticesOutOfItsWrites(t *testing.T) {
	sent := strings.Repeat("x", 48<<10)
	got := interrupted(t, sent, func(c *Conn, cp *copier) {
		c.post(&message{notice: Notice{Kind: NoticeMessage, Text: "hi"}, done: func(messageResult) {}})
		if err := cp.writeRest(); err != nil {
			t.Error(err)
		}
	})
	if want := sent + "\nNOTICE hi\n"; got != want {
		t.Errorf("the client received %d bytes, the notice at %d; want it at %d", len(got), strings.Index(got, "NOTICE"), len(sent)+1)
	}
}

func TestNothingFollowsAnEchoThatWasCutShort(t *testing.T) {
	interrupted(t, strings.Repeat("x", 48<<10), func(c *Conn, cp *copier) {
		if err := c.SetWriteDeadline(time.Now().Add(-time.Second)); err != nil {
			t.Error(err)
		}
		if err := cp.writeRest(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("writing the rest: %v, want the deadline exceeded", err)
		}
		if _, err := c.Write([]byte("more")); !errors.Is(err, ErrWriteBroken) {
			t.Errorf("writing after that: %v, want %v", err, ErrWriteBroken)
		}
	})
}

// socketOf returns the descriptor of a TCP connection, for as long as that is open.
func socketOf(t *testing.T, nc net.Conn) (fd uintptr) {
	t.Helper()
	if err := rawConn(nc).Control(func(d uintptr) { fd = d }); err != nil {
		t.Fatal(err)
	}
	return fd
}

// What is left decides whether an echo waits for more, so a pending end of stream must count.
func TestReadTellsWhatIsLeft(t *testing.T) {
	ln, err := Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	client := dialTCP(t, ln.Addr())
	served, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer served.Close()
	fd := socketOf(t, served)
	if !reportQueue(fd) {
		t.Fatal("TCP does not tell what is left")
	}
	arrive := func(n int) {
		t.Helper()
		if err := rawConn(served).Read(func(fd uintptr) bool {
			queued, err := unix.IoctlGetInt(int(fd), unix.SIOCINQ)
			return err != nil || queued >= n
		}); err != nil {
			t.Fatal(err)
		}
	}
	b := &buffer{bytes: make([]byte, 4)}
	wantRead := func(text string, left int) {
		t.Helper()
		n, gotLeft, err := readFD(fd, b, true)
		if err != nil || string(b.bytes[:n]) != text || gotLeft != left {
			t.Errorf("read %q, %d left, error %v; want %q, %d left", b.bytes[:n], gotLeft, err, text, left)
		}
	}
	send(t, client, "abcdef")
	arrive(6)
	wantRead("abcd", 2)
	wantRead("ef", 0)
	if _, _, err := readFD(fd, b, true); !wouldBlock(err) {
		t.Errorf("reading what is not there: %v, want EAGAIN", err)
	}
	send(t, client, "gh")
	client.CloseWrite()
	arrive(2)
	for ended := false; !ended; { // the end of stream may be a moment behind
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			t.Fatal(err)
		}
		ended = info.State == unix.BPF_TCP_CLOSE_WAIT
	}
	wantRead("gh", 1)
	wantRead("", 1)
}

// A Unix socket's client may send file descriptors along. Nobody here wants them, or would close them.
func TestWriteToTakesNoFileDescriptors(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	pipe := make([]int, 2)
	if err := unix.Pipe2(pipe, unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	if err := unix.Sendmsg(pair[0], []byte("x"), unix.UnixRights(pipe[1]), nil, 0); err != nil {
		t.Fatal(err)
	}
	unix.Close(pipe[1])
	s, _ := newServer(t, Echo, Options{})
	c := &Conn{srv: s}
	cp := &copier{src: c, dst: c, echo: true}
	cp.visit(uintptr(pair[1]))
	if got := c.BytesIn(); got != 1 {
		t.Fatalf("%d bytes were read, want 1", got)
	}
	// With the last writer gone the pipe is at its end.
	if n, err := unix.Read(pipe[0], make([]byte, 1)); n != 0 || err != nil {
		t.Errorf("reading from the pipe: %d, %v; want its end, since nobody holds the other one", n, err)
	}
	unix.Close(pipe[0])
}

func TestAtLeastComparesReleases(t *testing.T) {
	for release, want := range map[string]bool{
		"6.18.44-fc-v669": true, "5.1": true, "5.1.0": true, "5.10-rc1": true, "10.0.1": true,
		"5.0.21": false, "4.4.0": false, "4.19.0-25-amd64": false, "": false, "next": false, "5": false,
	} {
		if got := atLeast(release, 5, 1); got != want {
			t.Errorf("%q is at least 5.1: %t, want %t", release, got, want)
		}
	}
}
