package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

func init() {
	peerOf = func(fd int) (uid, pid int) { // unix(7), SO_PEERCRED
		cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			return 0, 0
		}
		return int(cred.Uid), int(cred.Pid)
	}
}

// bindPrivate binds a socket that only its owner can use from the first instant: bind(2) gives the file the mode
// of the socket's inode.
func bindPrivate(ctx context.Context, path string) (*net.UnixListener, error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		failed := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(failed, err)
	}}
	ln, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	return ln.(*net.UnixListener), nil
}

// setAccess sets the group and the mode of the socket at path. It never follows a link.
func setAccess(path string, opts SocketOptions) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return err
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFSOCK || int(stat.Uid) != os.Geteuid() {
		return errors.New("another program has replaced it")
	}
	if opts.GID != nil {
		if err := unix.Fchownat(fd, "", -1, *opts.GID, unix.AT_EMPTY_PATH); err != nil {
			return fmt.Errorf("changing its group to %d: %w", *opts.GID, err)
		}
	}
	if opts.Mode.Perm() == 0o600 {
		return nil // bindPrivate has set it
	}
	err = os.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), opts.Mode.Perm()) // the opened file, even if path now names another
	if errors.Is(err, fs.ErrNotExist) {                                   // there is no /proc
		err = unix.Fchmodat(fd, "", uint32(opts.Mode.Perm()), unix.AT_EMPTY_PATH)
	}
	if err != nil {
		return fmt.Errorf("setting its mode: %w", withoutPath(err))
	}
	return nil
}

// shortPath returns an address for the socket at path that fits sun_path. done releases it.
func shortPath(path string) (address string, done func(), err error) {
	if len(path) <= maxSocketPath {
		return path, func() {}, nil
	}
	dir, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, err
	}
	address = fmt.Sprintf("/proc/self/fd/%d/%s", dir, filepath.Base(path))
	if _, err := os.Stat(filepath.Dir(address)); err != nil || len(address) > maxSocketPath {
		_ = unix.Close(dir)
		return "", nil, errPathTooLong(path)
	}
	return address, func() { _ = unix.Close(dir) }, nil
}
