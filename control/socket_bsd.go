//go:build unix && !linux

package control

import (
	"context"
	"net"
	"syscall"
)

// bindPrivate binds a socket that only its owner can use from the first instant. Only the umask can see
// to that here; it is the whole process's, so files that others make in this moment are more private
// than meant, never less.
func bindPrivate(ctx context.Context, path string) (*net.UnixListener, error) {
	before := syscall.Umask(0o177)
	defer syscall.Umask(before)
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	return ln.(*net.UnixListener), nil
}
