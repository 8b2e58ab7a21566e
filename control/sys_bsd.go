//go:build unix && !linux

package control

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// bindPrivate binds a socket that only its owner can use from the first instant. On this platform only the umask can do
// that. The umask is that of the whole process, so files that other goroutines create meanwhile may get fewer permissions
// than intended, never more.
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

// setAccess sets the group and the mode of the socket at path. It never follows a link.
func setAccess(path string, opts SocketOptions) error {
	if opts.GID != nil {
		if err := os.Lchown(path, -1, *opts.GID); err != nil {
			return fmt.Errorf("changing its group to %d: %w", *opts.GID, withoutPath(err))
		}
	}
	if opts.Mode.Perm() == 0o600 {
		return nil // bindPrivate has set it
	}
	if err := unix.Fchmodat(unix.AT_FDCWD, path, uint32(opts.Mode.Perm()), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("setting its mode: %w", err)
	}
	return nil
}

// shortPath returns an address for the socket at path that fits sun_path. done releases it.
func shortPath(path string) (address string, done func(), err error) {
	if len(path) <= maxSocketPath {
		return path, func() {}, nil
	}
	if wd, err := os.Getwd(); err == nil {
		if relative, err := filepath.Rel(wd, path); err == nil && len(relative) <= maxSocketPath {
			return relative, func() {}, nil
		}
	}
	return "", nil, errPathTooLong(path)
}
