//go:build unix

package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxSocketPath is how many bytes sun_path holds, without its final zero.
var maxSocketPath = len(unix.RawSockaddrUnix{}.Path) - 1

// lock locks the file at path, so that two servers of this user do not replace the same unserved socket at the same time.
// The file belongs to this user alone, so that no other user can keep the server from starting. If there is a file of
// another user, lock does nothing.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	starting := fmt.Errorf("another server of this user is starting: %s is locked", path)
	ctx, cancel := context.WithTimeoutCause(ctx, lockTimeout, starting)
	defer cancel()
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
		if err != nil {
			return func() {}, nil // making the socket fails, too, or the file is another user's
		}
		switch locked, err := lockOwn(f, path); {
		case err != nil:
			_ = f.Close()
			return func() {}, nil
		case locked:
			return func() {
				_ = os.Remove(path) // before the unlock, because lockOwn checks that the file still exists
				_ = f.Close()
			}, nil
		}
		_ = f.Close()
		select {
		case <-time.After(lockRetry):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// lockOwn tries to lock f. It returns an error if f does not belong to this user alone.
func lockOwn(f *os.File, path string) (locked bool, err error) {
	info, err := f.Stat()
	if err != nil {
		return false, err
	}
	if uid, ok := ownerOf(info); !ok || uid != os.Geteuid() || !info.Mode().IsRegular() ||
		info.Mode().Perm()&0o077 != 0 {
		return false, errors.New("not a private file")
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return false, nil
	}
	now, err := os.Lstat(path)
	return err == nil && os.SameFile(now, info), nil // otherwise its owner has removed it
}

func ownerOf(info fs.FileInfo) (uid int, ok bool) {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, false
	}
	return int(stat.Uid), true
}

// checkDirectory returns an error if another user than root and this process's could replace files in dir. Each directory
// and link in the path must belong to one of the two. A directory that others may write to must have the sticky bit.
func checkDirectory(dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return fmt.Errorf("checking directory %s: %w", dir, err)
	}
	trusted := map[int]bool{0: true, os.Geteuid(): true}
	if root, err := os.Lstat("/"); err == nil { // in a user namespace root may have another uid
		if uid, ok := ownerOf(root); ok {
			trusted[uid] = true
		}
	}
	const maxLinks = 40 // as in the kernel
	at, rest, links := "/", strings.Split(dir, "/"), 0
	for len(rest) > 0 {
		next := filepath.Join(at, rest[0])
		rest = rest[1:]
		info, err := os.Lstat(next)
		if err != nil {
			return fmt.Errorf("checking directory %s: %w", dir, err)
		}
		uid, ok := ownerOf(info)
		switch {
		case !ok || !trusted[uid]:
			return fmt.Errorf("checking directory %s: %s belongs to user %d", dir, next, uid)
		case info.Mode().Type() == fs.ModeSymlink:
			if links++; links > maxLinks {
				return fmt.Errorf("checking directory %s: %w", dir, unix.ELOOP)
			}
			target, err := os.Readlink(next)
			if err != nil {
				return fmt.Errorf("checking directory %s: %w", dir, err)
			}
			rest = append(strings.Split(target, "/"), rest...)
			if filepath.IsAbs(target) {
				at = "/"
			}
			continue
		case !info.IsDir():
			return fmt.Errorf("checking directory %s: %s: %w", dir, next, unix.ENOTDIR)
		case info.Mode().Perm()&0o022 != 0 && info.Mode()&fs.ModeSticky == 0:
			return fmt.Errorf("checking directory %s: others can write to %s", dir, next)
		}
		at = next
	}
	return nil
}

// checkWritable returns an error if this process may not create files in dir.
func checkWritable(dir string) error { return unix.Access(dir, unix.W_OK|unix.X_OK) }

func isRefused(err error) bool { return errors.Is(err, syscall.ECONNREFUSED) }

// isBusy reports whether a connect failed because the socket's queue is full.
func isBusy(err error) bool { return errors.Is(err, syscall.EAGAIN) }

func isOutOfFiles(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)
}

// hungUp reports whether the other end has closed conn in both directions.
func hungUp(conn net.Conn) (gone bool) {
	if raw := rawConn(conn); raw != nil {
		err := raw.Control(func(fd uintptr) { gone = pollHangup(fd) })
		return gone || err != nil
	}
	return false
}

// awaitHangup returns when the other end has closed conn in both directions, or when conn is closed. It returns at once on
// systems that do not report that.
func awaitHangup(conn net.Conn) {
	if raw := rawConn(conn); raw != nil {
		_ = raw.Read(pollHangup) // the poller calls pollHangup again after each change
	}
}

// hasInput reports whether conn has input to read.
func hasInput(conn net.Conn) (pending bool) {
	if raw := rawConn(conn); raw != nil {
		_ = raw.Control(func(fd uintptr) { // an error means that conn is closed
			var b [1]byte
			n, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
			pending = err == nil && n > 0
		})
	}
	return pending
}

func rawConn(conn net.Conn) syscall.RawConn {
	if sc, ok := conn.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			return raw
		}
	}
	return nil
}

func pollHangup(fd uintptr) bool {
	fds := []unix.PollFd{{Fd: int32(fd)}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n > 0 && fds[0].Revents&(unix.POLLHUP|unix.POLLERR|unix.POLLNVAL) != 0
}

// openFilesLimit returns how many files the process may have open, and whether there is a limit.
func openFilesLimit() (files int, limited bool) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil || uint64(limit.Cur) > math.MaxInt32 {
		return 0, false
	}
	return int(limit.Cur), true
}
