package server

import (
	"bufio"
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func init() {
	paths = append(paths, path{"TCP without TCP_INQ", func(t *testing.T, h Handler, o Options) (*Server, func() stream) {
		before := queueReportWorks
		queueReportWorks = func() bool { return false }
		t.Cleanup(func() { queueReportWorks = before }) // runs after the server's cleanup, which is registered later
		return paths[0].serve(t, h, o)
	}})
	roles[fewFiles] = serveWithFewFiles
}

func TestVisit(t *testing.T) {
	// newPair returns the two ends of a Unix socket pair.
	newPair := func(t *testing.T, kind int) [2]int {
		pair, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			unix.Close(pair[0])
			unix.Close(pair[1])
		})
		return pair
	}

	// A client that floods is always readable.
	t.Run("it returns after some reads, although there is more", func(t *testing.T) {
		pair := newPair(t, unix.SOCK_SEQPACKET)
		for range 2 * maxReads { // each message takes one read
			if _, err := unix.Write(pair[0], []byte("x")); err != nil {
				t.Fatal(err)
			}
		}
		s, _ := newServer(t, Echo, Options{})
		c := &Conn{srv: s}
		cp := &copier{src: c, dst: c, echo: true}
		if !cp.onReadable(uintptr(pair[1])) {
			t.Error("onReadable returned false, want true")
		}
		wantEqual(t, "messages echoed in one call", c.BytesOut(), uint64(maxReads))
		cp.releaseBuffer()
	})

	// A client of a Unix socket may send file descriptors, which would leak.
	t.Run("it takes no file descriptors", func(t *testing.T) {
		pair := newPair(t, unix.SOCK_STREAM)
		pipe := make([]int, 2)
		if err := unix.Pipe2(pipe, unix.O_NONBLOCK); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(pipe[0])
		if err := unix.Sendmsg(pair[0], []byte("x"), unix.UnixRights(pipe[1]), nil, 0); err != nil {
			t.Fatal(err)
		}
		unix.Close(pipe[1])
		s, _ := newServer(t, Echo, Options{})
		c := &Conn{srv: s}
		cp := &copier{src: c, dst: c, echo: true}
		cp.onReadable(uintptr(pair[1]))
		wantEqual(t, "bytes in", c.BytesIn(), uint64(1))
		// When the last writer is closed the pipe is at its end.
		if n, err := unix.Read(pipe[0], make([]byte, 1)); n != 0 || err != nil {
			t.Errorf("reading from the pipe: %d, %v; want its end", n, err)
		}
	})

	// An echo that is half written when something happens.
	t.Run("a notice waits for the rest of an echo", func(t *testing.T) {
		sent := strings.Repeat("x", 48<<10)
		got := halfWritten(t, sent, func(c *Conn, cp *copier) {
			c.queueMessage(&message{notice: Notice{Kind: NoticeMessage, Text: "hi"}, done: func(messageResult) {}})
			wantErr(t, "writing the rest", cp.writeUnwritten(), nil)
		})
		if want := sent + "\nNOTICE hi\n"; got != want {
			t.Errorf("the client received %d bytes, the notice at %d; want it at %d", len(got), strings.Index(got, "NOTICE"), len(sent)+1)
		}
	})

	t.Run("bytes out counts what was written, and nothing follows an echo that was cut short", func(t *testing.T) {
		counted := make(chan uint64, 1)
		got := halfWritten(t, strings.Repeat("x", 48<<10), func(c *Conn, cp *copier) {
			_ = c.SetWriteDeadline(time.Now().Add(-time.Second))
			wantErr(t, "writing the rest", cp.writeUnwritten(), os.ErrDeadlineExceeded)
			_, err := c.Write([]byte("more"))
			wantErr(t, "Write", err, ErrWriteBroken)
			counted <- c.BytesOut()
		})
		wantEqual(t, "bytes out", <-counted, uint64(len(got)))
	})
}

// halfWritten calls do in a handler when an echo has written a part of what it read, and the client takes no more. It
// returns everything that the client receives.
func halfWritten(t *testing.T, sent string, do func(*Conn, *copier)) string {
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
		if err := errors.Join(err, raw.Read(cp.onReadable)); err != nil {
			return err
		}
		if left := len(cp.unwritten()); !cp.holdsWriteLock || left == 0 || left == len(sent) {
			t.Errorf("after onReadable %d bytes of %d are left, lock kept: %t", left, len(sent), cp.holdsWriteLock)
		}
		do(c, cp)
		cp.releaseBuffer()
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

// acceptOne returns both ends of a TCP connection.
func acceptOne(t *testing.T) (client *net.TCPConn, served *net.TCPConn) {
	t.Helper()
	ln := listen(t)
	client = dialTCP(t, ln.Addr())
	nc, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	return client, nc.(*net.TCPConn)
}

// getOption reads a socket option of nc.
func getOption(t *testing.T, nc syscall.Conn, level, option int) (value int) {
	t.Helper()
	raw, err := nc.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if failed := raw.Control(func(fd uintptr) { value, err = unix.GetsockoptInt(int(fd), level, option) }); failed != nil || err != nil {
		t.Fatal(failed, err)
	}
	return value
}

// What is left decides whether an echo waits for more, so a pending FIN must count.
func TestReadFD(t *testing.T) {
	client, served := acceptOne(t)
	var fd uintptr
	if err := rawConn(served).Control(func(d uintptr) { fd = d }); err != nil {
		t.Fatal(err)
	}
	if !reportQueue(fd) {
		t.Fatal("TCP does not report what is left")
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
		if swapped := int(bits.ReverseBytes32(uint32(left))); gotLeft == swapped && os.Getenv(emulated) != "" {
			gotLeft = left // qemu-user swaps the bytes of control messages for s390x, as testing/qemu shows
		}
		if err != nil || string(b.bytes[:n]) != text || gotLeft != left {
			t.Errorf("read %q, %d left, error %v; want %q, %d left", b.bytes[:n], gotLeft, err, text, left)
		}
	}
	send(t, client, "abcdef")
	arrive(6)
	wantRead("abcd", 2)
	wantRead("ef", 0)
	if _, _, err := readFD(fd, b, true); !wouldBlock(err) {
		t.Errorf("reading without data: %v, want EAGAIN", err)
	}
	send(t, client, "gh")
	_ = client.CloseWrite()
	arrive(2)
	fin := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}} // it may arrive a moment later
	if _, err := unix.Poll(fin, int(time.Minute/time.Millisecond)); err != nil || fin[0].Revents&unix.POLLRDHUP == 0 {
		t.Fatalf("no FIN: events %x, %v", fin[0].Revents, err)
	}
	wantRead("gh", 1)
	wantRead("", 1)
}

// A TLS record may have no content (RFC 8446, 5.1). The server reads one, and then waits inside of crypto/tls, which
// reads all that has come by then.
func TestTLSReadsAllRecordsAfterAnEmptyOne(t *testing.T) {
	forServer, forClient := tlsConfigs(t)
	var secrets bytes.Buffer
	forClient.KeyLogWriter = &secrets
	ln := listen(t)
	s, _ := newServer(t, Echo, Options{})
	serveListener(t, s, Listener{Listener: ln, TLSConfig: forServer})
	c := dialTLS(t, ln.Addr(), forClient)
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	state := c.ConnectionState()
	if state.Version != tls.VersionTLS13 || state.CipherSuite != tls.TLS_AES_128_GCM_SHA256 {
		t.Skipf("the test writes records for another cipher suite than %s", tls.CipherSuiteName(state.CipherSuite))
	}
	seal := recordWriter(t, secrets.String())
	send(t, c.NetConn(), string(seal("x")))
	receives(t, c, "x") // the handshake is over, so the next record is not read together with its end
	send(t, c.NetConn(), string(seal("")))
	await(t, "the server to read the empty record", func() bool {
		queued := uint32(1)
		_ = rawConn(s.openConns()[0].sock).Control(func(fd uintptr) { queued, _ = unix.IoctlGetUint32(int(fd), unix.SIOCINQ) })
		return queued == 0
	})
	send(t, c.NetConn(), string(append(seal("first "), seal("second")...)))
	receives(t, c, "first second")
	_ = c.NetConn().Close()
}

// recordWriter returns a function that makes the records of a TLS 1.3 client with AES-128-GCM (RFC 8446, 5.2 and 7.3),
// which crypto/tls would not write. secrets is what crypto/tls has written to Config.KeyLogWriter.
func recordWriter(t *testing.T, secrets string) (seal func(content string) []byte) {
	t.Helper()
	_, text, ok := strings.Cut(secrets, "CLIENT_TRAFFIC_SECRET_0 ")
	fields := strings.Fields(text)
	if !ok || len(fields) < 2 {
		t.Fatalf("no traffic secret in %q", secrets)
	}
	secret, err := hex.DecodeString(fields[1])
	if err != nil {
		t.Fatal(err)
	}
	expand := func(label string, length int) []byte {
		label = "tls13 " + label
		info := append(append([]byte{0, byte(length), byte(len(label))}, label...), 0)
		out, err := hkdf.Expand(sha256.New, secret, string(info), length)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	block, err := aes.NewCipher(expand("key", 16))
	if err != nil {
		t.Fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	iv, next := expand("iv", aead.NonceSize()), byte(0)
	return func(content string) []byte {
		const applicationData = 23
		nonce := slices.Clone(iv)
		nonce[len(nonce)-1] ^= next
		next++
		plain := append([]byte(content), applicationData)
		header := []byte{applicationData, 3, 3, 0, byte(len(plain) + aead.Overhead())}
		return aead.Seal(header, nonce, plain, header)
	}
}

func TestAtLeast(t *testing.T) {
	for release, want := range map[string]bool{
		"6.18.44-fc-v669": true, "5.1": true, "5.1.0": true, "5.10-rc1": true, "10.0.1": true,
		"5.0.21": false, "4.4.0": false, "4.19.0-25-amd64": false, "": false, "next": false, "5": false,
	} {
		wantEqual(t, release+" is at least 5.1", atLeast(release, 5, 1), want)
	}
}

func TestStopHandshakes(t *testing.T) {
	t.Run("keeps out new clients of a TCP listener, but not those in the queue", func(t *testing.T) {
		ln := listen(t)
		early := dialTCP(t, ln.Addr())
		if err := stopHandshakes(ln); err != nil {
			t.Fatal(err)
		}
		_, err := net.DialTimeout("tcp", ln.Addr().String(), 200*time.Millisecond)
		if ne, ok := errors.AsType[net.Error](err); !ok || !ne.Timeout() {
			t.Errorf("a late client got %v, want a timeout", err)
		}
		_ = ln.(*net.TCPListener).SetDeadline(time.Now().Add(10 * time.Second))
		nc, err := ln.Accept()
		if err != nil {
			t.Fatalf("accepting the early client: %v", err)
		}
		defer nc.Close()
		send(t, early, "x") // nc has inherited the filter, which keeps no data out
		receives(t, nc, "x")
		_ = ln.Close()
		if _, err := net.DialTimeout("tcp", ln.Addr().String(), 10*time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("after the close a client gets %v, want connection refused", err)
		}
		wantErr(t, "for a closed listener", stopHandshakes(ln), net.ErrClosed)
		wantErr(t, "for another listener", stopHandshakes(newFakeListener()), errors.ErrUnsupported)
	})

	t.Run("refuses new clients of a Unix listener, but not those in the queue", func(t *testing.T) {
		ln := listenUnix(t)
		early := dialTo(t, ln.Addr())
		if err := stopHandshakes(ln); err != nil {
			t.Fatal(err)
		}
		if nc, err := net.Dial("unix", ln.Addr().String()); err == nil {
			_ = nc.Close()
			t.Error("a late client could connect")
		}
		nc, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		send(t, early, "x")
		receives(t, nc, "x")
	})
}

func TestListsHandshake(t *testing.T) {
	const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:270F 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 0100007F:270F 0100007F:8D2C 03 00000000:00000000 01:00000017 00000000     0        0 0 1 0
   2: 0100007F:2710 0100007F:8D2C 01 00000000:00000000 01:00000017 00000000     0        0 0 1 0
`
	for port, want := range map[int]bool{0x270F: true, 0x2710: false, 0x8D2C: false} {
		wantEqual(t, fmt.Sprint("handshake at port ", port), listsHandshake(bufio.NewScanner(strings.NewReader(table)), port), want)
	}
}

// TestDrainOverTCP covers what only real sockets show of a drain.
func TestDrainOverTCP(t *testing.T) {
	// A client that has been told tries at once to connect again.
	t.Run("no client is told before accepting has stopped", func(t *testing.T) {
		for range 10 {
			s, addr := serveTCP(t, Echo, Options{})
			c := dialTCP(t, addr)
			echoed(t, c, "x\n")
			s.StartDrain(DrainOptions{Grace: 20 * time.Second, Reason: "x"})
			receives(t, c, "SHUTDOWN 20 x\n")
			if late, err := net.DialTimeout("tcp", addr.String(), 20*time.Millisecond); err == nil {
				_ = late.Close()
				t.Error("a client could connect after another one had been told of the drain")
			}
			_ = c.Close()
			next(t, s.Done())
		}
	})

	// Clients connect as fast as they can while the drain begins. A client that is connected gets an echo or a notice.
	t.Run("no client is reset in a storm of clients", func(t *testing.T) {
		var connected, told atomic.Int64
		for range 3 {
			s, addr := serveTCP(t, Echo, Options{})
			var all sync.WaitGroup
			for range 8 {
				all.Go(func() {
					for range 10_000 {
						nc, err := net.DialTimeout("tcp", addr.String(), time.Second)
						if err != nil {
							return // refused
						}
						connected.Add(1)
						_ = nc.SetDeadline(time.Now().Add(20 * time.Second))
						_, _ = nc.Write([]byte("x\n"))
						line, err := bufio.NewReader(nc).ReadString('\n')
						switch {
						case err != nil:
							t.Errorf("a connected client read %q and %v, want an echo or a notice", line, err)
						case strings.HasPrefix(line, "SHUTDOWN "):
							told.Add(1)
						case line != "x\n":
							t.Errorf("a client read %q", line)
						}
						_ = nc.Close()
					}
				})
			}
			_ = s.state.Await(t.Context(), func(st *state) bool { return st.accepted > 300 })
			drainIn(s, 20*time.Second, "x")
			all.Wait()
		}
		t.Logf("%d connected, %d of them were told of the drain before an echo", connected.Load(), told.Load())
	})
}

// listenerFile returns a copy of ln's socket, as a successor has one.
func listenerFile(t *testing.T, ln net.Listener) *os.File {
	t.Helper()
	f, err := ln.(interface{ File() (*os.File, error) }).File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func TestInheritedListener(t *testing.T) {
	for network, listen := range map[string]func(testing.TB) net.Listener{"TCP": listen, "Unix": listenUnix} {
		t.Run("its accept queue is left to the successor: "+network, func(t *testing.T) {
			ln := listen(t)
			if u, ok := ln.(*net.UnixListener); ok {
				u.SetUnlinkOnClose(false) // as systemd's
			}
			successor := listenerFile(t, ln)
			s, _ := newServer(t, Echo, Options{Limits: Limits{MaxConns: 1}})
			served := serveListener(t, s, Listener{Listener: ln, Inherited: true})
			c := dialTo(t, ln.Addr())
			echoed(t, c, "x")
			queued := dialTo(t, ln.Addr())
			s.StartDrain(DrainOptions{Grace: 20 * time.Second, Reason: "x"})
			receives(t, c, "\nSHUTDOWN 20 x\n")
			_ = c.(stream).CloseWrite()
			receivesAll(t, c, "")
			wantErr(t, "Serve", next(t, served), ErrServerClosed)

			ln2, err := net.FileListener(successor)
			if err != nil {
				t.Fatal(err)
			}
			next, _ := newServer(t, Echo, Options{})
			serve(t, next, ln2)
			late := dialTo(t, ln.Addr()) // the socket still accepts
			for _, c := range []net.Conn{queued, late} {
				echoed(t, c, "y")
			}
		})
	}

	t.Run("with EmptyQueue its accept queue is served, and later clients are left to the successor", func(t *testing.T) {
		ln := listen(t)
		listenerFile(t, ln) // keeps the socket open
		s, _ := newServer(t, Echo, Options{Limits: Limits{MaxConns: 1}})
		serveListener(t, s, Listener{Listener: ln, Inherited: true, EmptyQueue: true})
		c := dialTCP(t, ln.Addr())
		echoed(t, c, "x")
		queued := dialTCP(t, ln.Addr())
		s.StartDrain(DrainOptions{Grace: 20 * time.Second, Reason: "x"})
		receives(t, c, "\nSHUTDOWN 20 x\n")
		receives(t, queued, "SHUTDOWN 20 x\n")
		echoed(t, queued, "y")
		late := dialTCP(t, ln.Addr())
		for _, c := range []*net.TCPConn{c, queued} {
			_ = c.CloseWrite()
			receivesAll(t, c, "")
			_ = c.Close()
		}
		next(t, s.Done())
		wantEqual(t, "accepted", s.Status().Accepted, uint64(2))
		_ = late.SetReadDeadline(time.Now().Add(50 * time.Millisecond)) // real time: nothing may come
		if n, err := late.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the late client read %d bytes, %v; want it left alone", n, err)
		}
	})

	t.Run("its connections keep its settings", func(t *testing.T) {
		ln := listen(t)
		raw, err := ln.(*net.TCPListener).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		_ = raw.Control(func(fd uintptr) {
			err = errors.Join(
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1),
				unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 77),
				unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NODELAY, 0))
		})
		if err != nil {
			t.Fatal(err)
		}
		s, _ := newServer(t, Echo, Options{})
		serveListener(t, s, Listener{Listener: ln, Inherited: true})
		echoed(t, dialTCP(t, ln.Addr()), "x")
		sock := s.openConns()[0].sock.(*net.TCPConn)
		wantEqual(t, "TCP_KEEPIDLE", getOption(t, sock, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE), 77)
		wantEqual(t, "TCP_NODELAY", getOption(t, sock, unix.IPPROTO_TCP, unix.TCP_NODELAY), 0)
	})
}

func TestListenConfig(t *testing.T) {
	ln, err := ListenConfig{
		Backlog: 3, KeepAlive: net.KeepAliveConfig{Enable: true, Idle: 77 * time.Second, Interval: 7 * time.Second, Count: 2},
	}.Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s, _ := newServer(t, Echo, Options{})
	serve(t, s, ln)
	echoed(t, dialTCP(t, ln.Addr()), "x")
	if _, _, known := acceptQueue(ln); known || os.Getenv(emulated) == "" { // qemu-user does not tell
		wantEqual(t, "limit of the accept queue", s.Status().Listeners[0].AcceptQueueLimit, 3)
	}
	sock := s.openConns()[0].sock.(*net.TCPConn)
	wantEqual(t, "TCP_KEEPIDLE", getOption(t, sock, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE), 77)

	off, err := ListenConfig{KeepAlive: net.KeepAliveConfig{Idle: 1}}.Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serve(t, s, off)
	echoed(t, dialTCP(t, off.Addr()), "x")
	sock = s.openConns()[1].sock.(*net.TCPConn)
	wantEqual(t, "SO_KEEPALIVE when it is not enabled", getOption(t, sock, unix.SOL_SOCKET, unix.SO_KEEPALIVE), 0)
}

func TestAcceptQueueInStatus(t *testing.T) {
	s, addr := serveTCP(t, Echo, Options{})
	_ = s.AwaitStatus(t.Context(), func(st State, _ int) bool { return st == StateRunning })
	if _, err := s.Pause(PauseOptions{}); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		dialTCP(t, addr)
	}
	st := s.Status()
	if len(st.Listeners) != 1 {
		t.Fatalf("%d listeners, want 1", len(st.Listeners))
	}
	if st.Listeners[0].AcceptQueue < 0 && os.Getenv(emulated) != "" {
		t.Skip("the emulator does not tell the length of an accept queue") // testing/emulators shows it
	}
	waiting := st.Listeners[0].AcceptQueue + st.Connections // one may have been accepted nevertheless
	if waiting != 3 || st.Listeners[0].AcceptQueueLimit < 3 {
		t.Errorf("accept queue %+v beside %d connections, want 3 clients together", st.Listeners[0], st.Connections)
	}
}

// Health checks that connect and close during a long pause must not fill the accept queue.
func TestParking(t *testing.T) {
	ln, err := ListenConfig{Backlog: 4}.Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s, _ := newServer(t, Echo, Options{})
	h, err := s.Pause(PauseOptions{})
	if err != nil {
		t.Fatal(err)
	}
	serve(t, s, ln)
	first := dialTCP(t, ln.Addr())
	send(t, first, "first")
	for range 7 {
		_ = dialTCP(t, ln.Addr()).Close()
	}
	last := dialTCP(t, ln.Addr())
	send(t, last, "last")
	if n := s.Status().Closed[ReasonClientClosed]; n < 3 {
		t.Errorf("%d clients that had gone were closed during the pause, want at least 3", n)
	}
	for info := range s.Conns() {
		wantEqual(t, "phase of a parked client", info.Phase, PhaseWaiting)
	}
	h.Release()
	receives(t, first, "first")
	receives(t, last, "last")
	awaitConns(t, s, 2) // the rest of those that had gone
	var served []string
	for info := range s.Conns() {
		served = append(served, info.Remote.String())
	}
	wantEqual(t, "clients in their order", served, []string{first.LocalAddr().String(), last.LocalAddr().String()})
}

func TestMaxConnsPerUID(t *testing.T) {
	ln := listenUnix(t)
	s, _ := newServer(t, Echo, Options{Limits: Limits{MaxConnsPerUID: 1}})
	serve(t, s, ln)
	first := dialTo(t, ln.Addr())
	echoed(t, first, "x")
	receivesAll(t, dialTo(t, ln.Addr()), "BUSY\n")
	_ = first.Close()
	_ = s.state.Await(t.Context(), func(st *state) bool { return st.conns.len() == 0 })
	echoed(t, dialTo(t, ln.Addr()), "x")
}

// Urgent data is a part of the stream, in its place.
func TestUrgentData(t *testing.T) {
	for name, inherited := range map[string]bool{"own listener": false, "inherited listener": true} {
		t.Run("is echoed in order: "+name, func(t *testing.T) {
			ln := listen(t)
			s, _ := newServer(t, Echo, Options{})
			serveListener(t, s, Listener{Listener: ln, Inherited: inherited})
			c := dialTCP(t, ln.Addr())
			echoed(t, c, "warm") // an inherited listener's option is set after the accept
			send(t, c, "abc")
			raw, err := c.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			_ = raw.Control(func(fd uintptr) { err = unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil) })
			if err != nil {
				t.Fatal(err)
			}
			send(t, c, "def")
			_ = c.CloseWrite()
			receivesAll(t, c, "abc!def")
		})
	}
}

func TestPeerCredentials(t *testing.T) {
	creds := make(chan Credentials, 1)
	h := HandlerFunc(func(_ context.Context, c *Conn) error {
		cred, ok := c.PeerCredentials()
		if !ok {
			cred.PID = -1
		}
		creds <- cred
		return nil
	})
	t.Run("identify the client of a Unix socket", func(t *testing.T) {
		ln := listenUnix(t)
		s, _ := newServer(t, h, Options{})
		serve(t, s, ln)
		dialTo(t, ln.Addr())
		wantEqual(t, "credentials", next(t, creds), Credentials{PID: os.Getpid(), UID: os.Getuid(), GID: os.Getgid()})
	})
	t.Run("do not exist for TCP", func(t *testing.T) {
		_, addr := serveTCP(t, h, Options{})
		dialTCP(t, addr)
		wantEqual(t, "credentials", next(t, creds), Credentials{PID: -1})
	})
}

// After the server has closed, the kernel must not keep unsent data for ever.
func TestOrphanTimeout(t *testing.T) {
	_, served := acceptOne(t)
	setOrphanTimeout(served)
	wantEqual(t, "TCP_USER_TIMEOUT in ms", getOption(t, served, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT), int(orphanTimeout.Milliseconds()))

	t.Run("is set on a connection whose client has not closed", func(t *testing.T) {
		for name, staying := range map[string]bool{"stays": true, "has closed": false} {
			s, addr := serveTCP(t, Echo, Options{})
			c := dialTCP(t, addr)
			echoed(t, c, "x")
			sock := s.openConns()[0].sock.(*net.TCPConn)
			copied, err := sock.File() // shares the socket, so that it can be looked at after the close
			if err != nil {
				t.Fatal(err)
			}
			if staying {
				_ = s.Kill(1)
			} else {
				_ = c.CloseWrite()
			}
			awaitConns(t, s, 0)
			ms, err := unix.GetsockoptInt(int(copied.Fd()), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT)
			if err != nil {
				t.Fatal(err)
			}
			_ = copied.Close()
			if got := ms > 0; got != staying {
				t.Errorf("the client %s: TCP_USER_TIMEOUT %d ms", name, ms)
			}
		}
	})
}

func TestCancelWhenGone(t *testing.T) {
	for name, tt := range map[string]struct {
		leave func(*net.TCPConn)
		want  Reason
	}{
		"closes":      {func(c *net.TCPConn) { _ = c.Close() }, ReasonClientClosed},
		"half-closes": {func(c *net.TCPConn) { _ = c.CloseWrite() }, ReasonClientClosed},
		"resets":      {func(c *net.TCPConn) { _ = c.SetLinger(0); _ = c.Close() }, ReasonClientClosed},
	} {
		t.Run("the context of a handler that does not read ends when the client "+name, func(t *testing.T) {
			causes := make(chan error, 1)
			using := make(chan struct{})
			s, addr := serveTCP(t, HandlerFunc(func(ctx context.Context, _ *Conn) error {
				done := ctx.Done()
				close(using)
				<-done
				causes <- context.Cause(ctx)
				return context.Cause(ctx)
			}), Options{CancelWhenGone: true, Timeouts: Timeouts{Idle: Off, Stall: 80 * time.Millisecond}}) // sweeps every 10 ms
			c := dialTCP(t, addr)
			next(t, using)
			tt.leave(c)
			wantErr(t, "cause", next(t, causes), ErrClientGone)
			awaitConns(t, s, 0)
			wantClosed(t, s, map[Reason]uint64{tt.want: 1})
		})
	}

	t.Run("unread data keeps it", func(t *testing.T) {
		conns := make(chan *Conn, 1)
		s, addr := serveTCP(t, HandlerFunc(func(ctx context.Context, c *Conn) error {
			done := ctx.Done()
			conns <- c
			<-done
			return nil
		}), Options{CancelWhenGone: true})
		c := dialTCP(t, addr)
		send(t, c, "x")
		_ = c.CloseWrite()
		conn := next(t, conns)
		newSweeper(s).sweep(time.Now())
		wantErr(t, "cause", context.Cause((*connContext)(conn)), nil)
	})
}

// A client that reads slowly makes the server's writes complete less often than the stall timeout. Its acknowledgements
// show that it reads.
func TestStallTimeoutOverTCP(t *testing.T) {
	t.Run("a slow reader is not closed, and one that has stopped is", func(t *testing.T) {
		const stall = 700 * time.Millisecond
		s, addr := serveTCP(t, untilWriteFails, Options{Timeouts: Timeouts{Stall: stall}})
		c := dialTCP(t, addr)
		_ = c.SetReadBuffer(64 << 10)
		tick := time.NewTicker(20 * time.Millisecond) // real time: the kernel's
		defer tick.Stop()
		buf := make([]byte, 8<<10)
		for began := time.Now(); time.Since(began) < 4*stall; <-tick.C {
			if _, err := c.Read(buf); err != nil {
				t.Fatalf("a client that reads slowly got %v after %v", err, time.Since(began))
			}
		}
		began := time.Now()
		awaitConns(t, s, 0)
		if took := time.Since(began); took < stall/2 || took > stall+stall/4+flushTimeout+time.Second {
			t.Errorf("a client that stopped reading was closed after %v, want about %v", took, stall)
		}
		wantClosed(t, s, map[Reason]uint64{ReasonStalled: 1})
	})

	// Everything is in our kernel's send buffer, so no write of the server blocks.
	t.Run("a client that does not read what the kernel holds is closed", func(t *testing.T) {
		for network, listen := range map[string]func(testing.TB) net.Listener{"TCP": listen, "Unix": listenUnix} {
			written := make(chan struct{})
			ln := listen(t)
			s, _ := newServer(t, HandlerFunc(func(ctx context.Context, c *Conn) error {
				if tcp, ok := c.sock.(*net.TCPConn); ok {
					_ = tcp.SetWriteBuffer(1 << 20)
				}
				if _, err := c.Write(make([]byte, 150<<10)); err != nil {
					return err
				}
				close(written)
				return untilDone(ctx, c)
			}), Options{})
			serve(t, s, ln)
			c := dialTo(t, ln.Addr())
			if tcp, ok := c.(*net.TCPConn); ok {
				_ = tcp.SetReadBuffer(4 << 10)
			}
			next(t, written)
			conn := s.openConns()[0]
			now := time.Now()
			sw := newSweeper(s)
			sw.sweep(now)
			sw.sweep(now.Add(DefaultStallTimeout))
			wantEqual(t, network+": reason within the slack", conn.closeReason(), Reason(0))
			sw.sweep(now.Add(2 * DefaultStallTimeout))
			wantEqual(t, network+": reason in the end", conn.closeReason(), ReasonStalled)
		}
	})
}

// G9: every way in which a connection, a pause, a subscription and a server can end.
func TestG9NothingLeaks(t *testing.T) {
	warmUp, err := net.Listen("tcp", "127.0.0.1:0") // makes the runtime open the files that it keeps
	if err != nil {
		t.Fatal(err)
	}
	_ = warmUp.Close()
	goroutines := goleak.IgnoreCurrent()
	files := openFiles(t)
	conns := connFiles.Load()
	for _, end := range []func(*Server){
		func(s *Server) { _ = s.Close() },
		func(s *Server) { drainIn(s, 100*time.Millisecond, "x") },
		func(s *Server) { s.StartDrain(DrainOptions{Grace: Off, Reason: "x"}); s.Force("y"); <-s.Done() },
	} {
		tryEverything(t, end)
	}
	if err := goleak.Find(goroutines); err != nil {
		t.Error(err)
	}
	wantEqual(t, "open files", openFiles(t), files)
	wantEqual(t, "counted files of connections", connFiles.Load(), conns)
}

// openFiles returns the files that this process has open, by descriptor.
func openFiles(t *testing.T) map[string]string {
	t.Helper()
	const dir = "/proc/self/fd"
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	files := make(map[string]string)
	for _, e := range entries {
		if what, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil { // else it was the directory's own
			files[e.Name()] = what
		}
	}
	return files
}

func tryEverything(t *testing.T, end func(*Server)) {
	t.Helper()
	s, _ := newServer(t, commanded, Options{Timeouts: Timeouts{Stall: 50 * time.Millisecond}, Limits: Limits{MaxConnsPerIP: 100}})
	forServer, forClient := tlsConfigs(t)
	unixFile := filepath.Join(t.TempDir(), "s")
	atUnix, err := Listen(t.Context(), "unix://"+unixFile)
	if err != nil {
		t.Fatal(err)
	}
	lns := []Listener{
		{Listener: listen(t)},
		{Listener: listen(t), Inherited: true},
		{Listener: tls.NewListener(listen(t), forServer)},
		{Listener: listen(t), WrapConn: TLS(forServer)},
		{Listener: atUnix},
	}
	served := make(chan error, len(lns))
	for _, ln := range lns {
		go func() { served <- s.ServeListener(ln) }()
	}

	sub := s.Subscribe()
	defer sub.Close()
	var clients []net.Conn
	for _, ln := range lns[:2] {
		for _, word := range []string{"hello", "panic", "goexit", ""} {
			c := dialTCP(t, ln.Addr())
			send(t, c, word)
			clients = append(clients, c)
		}
		reset := dialTCP(t, ln.Addr())
		_ = reset.SetLinger(0)
		_ = reset.Close()
		gone := dialTCP(t, ln.Addr())
		_ = gone.Close()
	}
	for _, ln := range lns[2:4] {
		secret := tls.Client(dialTCP(t, ln.Addr()), forClient)
		echoed(t, secret, "hello")
		clients = append(clients, secret, dialTCP(t, ln.Addr())) // the second one never begins a handshake
		bad := dialTCP(t, ln.Addr())
		send(t, bad, "this is no handshake\n")
		clients = append(clients, bad)
	}
	local := dialTo(t, lns[4].Addr())
	echoed(t, local, "hello")
	clients = append(clients, local)

	_, _ = s.Pause(PauseOptions{TTL: time.Hour})
	_, _ = s.Pause(PauseOptions{TTL: time.Nanosecond})
	clients = append(clients, dialTCP(t, lns[0].Addr()))
	if _, err := s.Pause(PauseOptions{Mode: PauseReject}); err != nil {
		t.Error(err)
	}
	rejected := dialTCP(t, lns[0].Addr())
	receives(t, rejected, "PAUSED\n")
	clients = append(clients, rejected)
	_ = s.Kill(1)
	_, _, _ = s.Notify(t.Context(), "hello")
	if _, err := s.ResumeAll(Caller{}); err != nil {
		t.Error(err)
	}
	wantErr(t, "CloseListener", s.CloseListener(lns[4].Listener), nil)
	wantErr(t, "Serve", next(t, served), net.ErrClosed)
	_, _ = s.Pause(PauseOptions{TTL: time.Hour})
	clients = append(clients, dialTCP(t, lns[0].Addr()))
	end(s)
	for range lns[1:] {
		wantErr(t, "Serve", next(t, served), ErrServerClosed)
	}
	for _, c := range clients {
		_, _ = io.Copy(io.Discard, c)
		_ = c.Close()
	}
}

// fewFiles is the role of a server that exhausts its files on command.
const fewFiles = "few-files"

func TestOutOfFiles(t *testing.T) {
	child := startWithFewFiles(t)
	first := dialTCP(t, child.addr)
	echoed(t, first, "x\n")

	child.does(t, "exhaust")
	queued := dialTCP(t, child.addr)
	send(t, queued, "y\n")
	_ = queued.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if n, err := queued.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a client was served without a file: %d bytes, %v", n, err)
	}
	echoed(t, first, "still here\n")

	child.does(t, "free")
	_ = queued.SetReadDeadline(time.Now().Add(30 * time.Second))
	receives(t, queued, "y\n")

	child.does(t, "exhaust")
	late := dialTCP(t, child.addr)
	child.does(t, "drain")
	for _, c := range []*net.TCPConn{first, queued, late} { // each that leaves makes room for the next
		receives(t, c, "SHUTDOWN ")
		_ = c.CloseWrite()
		if rest, err := io.ReadAll(c); err != nil || !strings.HasSuffix(string(rest), " x\n") {
			t.Errorf("client received the end of the notice %q, %v", rest, err)
		}
	}
	child.does(t, "wait")
}

type fewFilesChild struct {
	in   io.Writer
	out  *bufio.Reader
	addr net.Addr
}

func startWithFewFiles(t *testing.T) *fewFilesChild {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(context.Background(), self) // it ends with its input
	cmd.Env = append(os.Environ(), roleEnv+"="+fewFiles)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = in.Close()
		if err := cmd.Wait(); err != nil && !t.Failed() {
			t.Errorf("child: %v", err)
		}
	})
	child := &fewFilesChild{in: in, out: bufio.NewReader(out)}
	child.addr, err = net.ResolveTCPAddr("tcp", child.does(t, "listen"))
	if err != nil {
		t.Fatal(err)
	}
	return child
}

// does gives the child a command, and returns its answer.
func (c *fewFilesChild) does(t *testing.T, what string) string {
	t.Helper()
	if _, err := fmt.Fprintln(c.in, what); err != nil {
		t.Fatalf("command %s: %v", what, err)
	}
	answer, err := c.out.ReadString('\n')
	if err != nil {
		t.Fatalf("command %s: %v", what, err)
	}
	return strings.TrimSpace(answer)
}

// serveWithFewFiles is the child.
func serveWithFewFiles() {
	must := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(1)
		}
	}
	must(unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 64, Max: 64}))
	s, err := New(Echo, Options{Notifier: DefaultLineNotifier()})
	must(err)
	served := make(chan error, 1)
	var hoard []*os.File
	for commands := bufio.NewScanner(os.Stdin); commands.Scan(); {
		answer := "done"
		switch commands.Text() {
		case "listen":
			ln, err := net.Listen("tcp4", "127.0.0.1:0")
			must(err)
			answer = ln.Addr().String()
			go func() { served <- s.Serve(ln) }()
		case "exhaust":
			for {
				f, err := os.Open(os.DevNull)
				if err != nil {
					break
				}
				hoard = append(hoard, f)
			}
		case "free":
			for _, f := range hoard {
				must(f.Close())
			}
			hoard = nil
		case "drain":
			s.StartDrain(DrainOptions{Grace: 20 * time.Second, Reason: "x"})
		case "wait":
			if err := <-served; !errors.Is(err, ErrServerClosed) {
				must(err)
			}
		}
		fmt.Println(answer)
	}
	must(s.Close())
}
