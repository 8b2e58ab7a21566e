//go:build unix

package server

import (
	"errors"
	"io"
	"math"
	"net"
	"os"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// acceptErrors are those after which accept(2) is to be tried again: the process or the system lacks something, or the
// error belongs to the one connection (accept(2), "Error handling").
var acceptErrors = []syscall.Errno{
	syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM,
	syscall.ECONNABORTED, syscall.ECONNRESET, syscall.EPROTO, syscall.EPERM, syscall.ETIMEDOUT,
	syscall.ENETDOWN, syscall.ENETUNREACH, syscall.EHOSTDOWN, syscall.EHOSTUNREACH, syscall.ENOPROTOOPT,
	syscall.EOPNOTSUPP,
}

func acceptRetryable(err error) bool {
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		return slices.Contains(acceptErrors, errno)
	}
	return isTemporary(err)
}

// rawConn gives access to the descriptor of nc. It returns nil if nc is not a socket. A TLS session, for example, is
// not one.
func rawConn(nc net.Conn) syscall.RawConn {
	switch nc := nc.(type) {
	case *net.TCPConn:
		raw, _ := nc.SyscallConn()
		return raw
	case *net.UnixConn:
		raw, _ := nc.SyscallConn()
		return raw
	default:
		return nil
	}
}

// writeNow writes without waiting. It uses Control, because RawConn.Write waits for a Write that is in progress.
func writeNow(raw syscall.RawConn, p []byte) (n int, err error) {
	if failed := raw.Control(func(fd uintptr) { n, err = writeFD(fd, p) }); failed != nil {
		return 0, failed
	}
	return n, err
}

func wouldBlock(err error) bool { return err == unix.EAGAIN }

// discardPending discards input that has arrived, up to a bound, without waiting.
func discardPending(raw syscall.RawConn) {
	const most = 256 << 10
	_ = raw.Control(func(fd uintptr) {
		p := make([]byte, 8<<10)
		for read := 0; read < most; {
			n, _, err := unix.Recvfrom(int(fd), p, unix.MSG_DONTWAIT)
			if err != nil || n <= 0 {
				return
			}
			read += n
		}
	})
}

// peerGone reports whether the peer has reset the connection, or has closed it and all its input was read.
func peerGone(nc net.Conn) (gone bool) {
	raw := rawConn(nc)
	if raw == nil {
		return false
	}
	_ = raw.Control(func(fd uintptr) {
		n, _, err := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
		gone = err == nil && n == 0 || err != nil && !wouldBlock(err) && err != unix.EINTR
	})
	return gone
}

// A readWaiter waits for input of a socket, and reads it. It holds no buffer while it waits, and allocates nothing for
// each wait.
type readWaiter struct {
	raw        syscall.RawConn
	onReadable func(fd uintptr) bool // read, bound once
	size       bufferSize            // of the next buffer
	buf        *buffer               // with what was read; nil if nothing was
	n          int
	err        error
}

func newReadWaiter(raw syscall.RawConn) *readWaiter {
	w := &readWaiter{raw: raw}
	w.onReadable = w.read
	return w
}

// wait waits until the socket has input, the end of the stream or an error to read, or until its read deadline. It
// returns input and errors of the socket; at the end of the stream and the deadline it returns nothing, because the
// next read says so.
func (w *readWaiter) wait(size bufferSize) (buf *buffer, n int, err error) {
	w.size, w.buf, w.n, w.err = size, nil, 0, nil
	_ = w.raw.Read(w.onReadable) // the deadline
	return w.buf, w.n, w.err
}

func (w *readWaiter) read(fd uintptr) bool {
	buf := getBuffer(w.size)
	for {
		n, err := unix.Read(int(fd), buf.bytes)
		switch {
		case err == unix.EINTR:
			continue
		case n > 0:
			w.buf, w.n = buf, n
			return true
		case err != nil && !wouldBlock(err):
			w.err = os.NewSyscallError("read", err)
		}
		buf.put()
		return !wouldBlock(err)
	}
}

// keepUrgentInline leaves urgent data in its place in the stream, for a TCP socket and the connections that it
// accepts (socket(7), SO_OOBINLINE; RFC 6093 advises against any other use).
func keepUrgentInline(raw syscall.RawConn) {
	_ = raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) })
}

func setBacklog(ln net.Listener, n int) error {
	return controlListener(ln, func(fd int) error { return unix.Listen(fd, n) })
}

// controlListener calls f with the descriptor of ln. The error is errors.ErrUnsupported if ln does not give access to
// it.
func controlListener(ln net.Listener, f func(fd int) error) error {
	sc, ok := ln.(syscall.Conn)
	if !ok {
		return errors.ErrUnsupported
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return err
	}
	failed := raw.Control(func(fd uintptr) { err = f(int(fd)) })
	return errors.Join(failed, err)
}

// socketOptions are socket settings that connections keep from an inherited listener.
type socketOptions struct {
	known     bool
	keepAlive net.KeepAliveConfig
	noDelay   bool
}

func (o socketOptions) apply(nc net.Conn) {
	tcp, ok := nc.(*net.TCPConn)
	if !ok || !o.known {
		return
	}
	_ = tcp.SetKeepAliveConfig(o.keepAlive)
	_ = tcp.SetNoDelay(o.noDelay)
	if raw, err := tcp.SyscallConn(); err == nil {
		keepUrgentInline(raw)
	}
}

// openFilesLimit returns the process's soft RLIMIT_NOFILE, which Go raises to the hard limit at start. ok is false if
// there is no limit.
func openFilesLimit() (limit int, ok bool) {
	var rlimit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &rlimit); err != nil {
		return 0, false
	}
	if n := uint64(rlimit.Cur); n < math.MaxInt32 { //nolint:unconvert // signed on freebsd
		return int(n), true
	}
	return 0, false // RLIM_INFINITY
}

const linkSupported = true

// sendHeader sends a header together with the descriptors of files. It takes them by SyscallConn: File would make the
// shared description blocking.
func sendHeader(link *net.UnixConn, header []byte, files []any) error {
	fds := make([]int, 0, len(files))
	defer func() {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	}()
	for _, file := range files {
		raw, err := file.(syscall.Conn).SyscallConn()
		if err != nil {
			return err
		}
		failed := raw.Control(func(fd uintptr) {
			var dup int
			if dup, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0); err == nil {
				fds = append(fds, dup)
			}
		})
		if err := errors.Join(failed, err); err != nil {
			return err
		}
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	n, _, err := link.WriteMsgUnix(header, oob, nil)
	if err == nil && n < len(header) {
		err = io.ErrShortWrite
	}
	return err
}

// receiveHeader receives a header and the descriptors that come with it.
func receiveHeader(link *net.UnixConn) (header []byte, files []*os.File, err error) {
	header = make([]byte, linkHeaderSize)
	oob := make([]byte, unix.CmsgSpace(4*maxLinkFiles))
	n, oobn, flags, _, err := link.ReadMsgUnix(header, oob)
	if err != nil {
		return nil, nil, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, nil, err
	}
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			continue
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "handover"))
		}
	}
	if flags&unix.MSG_CTRUNC != 0 {
		return nil, files, errors.New("the kernel dropped descriptors: the limit on open files is too low")
	}
	if n == 0 {
		return nil, files, io.EOF
	}
	if _, err := io.ReadFull(link, header[n:]); err != nil {
		return nil, files, err
	}
	return header, files, nil
}

func isListening(f *os.File) (listening bool, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return false, err
	}
	failed := raw.Control(func(fd uintptr) {
		var n int
		n, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
		listening = n != 0
	})
	return listening, errors.Join(failed, err)
}
