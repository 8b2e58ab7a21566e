//go:build !unix

package control

import (
	"context"
	"errors"
	"net"
	"syscall"
)

// maxSocketPath is what sun_path takes, less its final zero (afunix.h).
const maxSocketPath = 107

// lockDirectory: there are no locks on directories here.
func lockDirectory(context.Context, string) (unlock func(), err error) { return func() {}, nil }

// bindPrivate: who may use the socket follows from the directory's permissions here.
func bindPrivate(ctx context.Context, path string) (*net.UnixListener, error) {
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	return ln.(*net.UnixListener), nil
}

// wsaECONNREFUSED is Windows Sockets' connection refused.
const wsaECONNREFUSED = syscall.Errno(10061)

func isRefused(err error) bool { return errors.Is(err, wsaECONNREFUSED) }
