package server

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"
)

// A Link carries the messages of a handover, and sends connections and listeners with them. NewUnixLink makes one
// between processes. Tests may use one in memory. One goroutine may send while another receives.
type Link interface {
	// Send sends a message with files, each a net.Conn or a net.Listener. It does not close them.
	Send(message []byte, files []any) error
	// Receive receives a message, and copies of the files that were sent with it.
	Receive() (message []byte, files []any, err error)
	// Carries reports whether Send can send file, a net.Conn or a net.Listener.
	Carries(file any) bool
	SetDeadline(t time.Time) error
	Close() error
}

// NewUnixLink returns a Link over one end of a Unix stream socket pair; see socketpair(2). It passes descriptors
// (unix(7), SCM_RIGHTS). The error is errors.ErrUnsupported on systems that are not unix.
func NewUnixLink(c *net.UnixConn) (Link, error) {
	if !linkSupported {
		return nil, fmt.Errorf("passing descriptors: %w", errors.ErrUnsupported)
	}
	return unixLink{c}, nil
}

type unixLink struct{ *net.UnixConn }

// Bounds of a message. The header is the length of the message and the number of descriptors.
const (
	linkHeaderSize = 8
	maxLinkMessage = 256 << 20 // bytes: 10,000 connections with 24 KiB of state each
	maxLinkFiles   = 253
)

func (l unixLink) Carries(file any) bool {
	sc, ok := file.(syscall.Conn)
	if !ok {
		return false
	}
	switch file.(type) {
	case *net.TCPConn, *net.UnixConn, *net.TCPListener, *net.UnixListener:
	default:
		return false // another type may wrap the socket, as TLS does
	}
	_, err := sc.SyscallConn()
	return err == nil
}

func (l unixLink) Send(message []byte, files []any) error {
	if len(files) > maxLinkFiles || len(message) > maxLinkMessage {
		return fmt.Errorf("message of %d bytes with %d descriptors is too large", len(message), len(files))
	}
	var header [linkHeaderSize]byte
	binary.BigEndian.PutUint32(header[:], uint32(len(message)))
	binary.BigEndian.PutUint32(header[4:], uint32(len(files)))
	if err := sendHeader(l.UnixConn, header[:], files); err != nil {
		return err
	}
	_, err := l.Write(message)
	return err
}

func (l unixLink) Receive() (message []byte, files []any, err error) {
	header, received, err := receiveHeader(l.UnixConn)
	defer func() {
		for _, f := range received {
			_ = f.Close()
		}
	}()
	if err != nil {
		return nil, nil, err
	}
	length, count := binary.BigEndian.Uint32(header), binary.BigEndian.Uint32(header[4:])
	if length > maxLinkMessage || int(count) != len(received) {
		return nil, nil, fmt.Errorf("message of %d bytes arrived with %d of its %d descriptors", length, len(received), count)
	}
	message = make([]byte, length)
	if _, err := io.ReadFull(l, message); err != nil {
		return nil, nil, err
	}
	for _, f := range received {
		file, err := fromFile(f)
		if err != nil {
			closeFiles(files)
			return nil, nil, err
		}
		files = append(files, file)
	}
	return message, files, nil
}

// fromFile makes a net.Listener or a net.Conn of a descriptor. The caller closes f.
func fromFile(f *os.File) (any, error) {
	listening, err := isListening(f)
	if err != nil {
		return nil, err
	}
	if listening {
		return net.FileListener(f)
	}
	return net.FileConn(f)
}

func closeFiles(files []any) {
	for _, f := range files {
		if c, ok := f.(io.Closer); ok {
			_ = c.Close()
		}
	}
}
