//go:build !unix

package control

import (
	"context"
	"errors"
	"net"
	"os"
	"syscall"
)

// maxSocketPath is the length of sun_path in bytes, without its final zero (afunix.h).
const maxSocketPath = 107

// lock is not supported on this platform.
func lock(context.Context, string) (unlock func(), err error) { return func() {}, nil }

// checkDirectory checks nothing on this platform.
func checkDirectory(string) error { return nil }

// bindPrivate binds a socket. On this platform the directory's permissions decide who can use it.
func bindPrivate(ctx context.Context, path string) (*net.UnixListener, error) {
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	return ln.(*net.UnixListener), nil
}

// setAccess does nothing, because sockets have no mode on this platform.
func setAccess(string, SocketOptions) error { return nil }

func shortPath(path string) (address string, done func(), err error) {
	if len(path) > maxSocketPath {
		return "", nil, errPathTooLong(path)
	}
	return path, func() {}, nil
}

// checkWritable returns an error if dir does not exist.
func checkWritable(dir string) error {
	_, err := os.Stat(dir)
	return err
}

// Errors of Windows Sockets.
const (
	wsaEMFILE       = syscall.Errno(10024)
	wsaECONNREFUSED = syscall.Errno(10061)
)

func isRefused(err error) bool { return errors.Is(err, wsaECONNREFUSED) }

func isBusy(error) bool { return false }

// isOutOfFiles also recognizes EMFILE, which portable listeners return and the system does not.
func isOutOfFiles(err error) bool { return errors.Is(err, wsaEMFILE) || errors.Is(err, syscall.EMFILE) }

func hungUp(net.Conn) bool { return false }

func awaitHangup(net.Conn) {}

func hasInput(net.Conn) bool { return false }

func openFilesLimit() (files int, limited bool) { return 0, false }
