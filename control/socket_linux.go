package control

import (
	"context"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// bindPrivate binds a socket that only its owner can use from the first instant: on Linux bind(2)
// gives the file the mode of the socket's inode.
func bindPrivate(ctx context.Context, path string) (*net.UnixListener, error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		failed := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) })
		if failed != nil {
			return failed
		}
		return err
	}}
	ln, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	return ln.(*net.UnixListener), nil
}
