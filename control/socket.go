package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// SocketOptions says who may use a control socket. The zero value lets nobody in: use 0o600 for its
// owner alone.
type SocketOptions struct {
	Mode fs.FileMode // permission bits
	GID  *int        // group to own the socket; nil leaves it its owner's
}

// Listen opens a control socket at path. Not for an instant is it more open than asked for. A socket there
// that nobody serves any more is replaced; one that is served, and a file that is no socket, are
// refused. Closing the listener removes the socket, unless another has taken its place.
func Listen(ctx context.Context, path string, opts SocketOptions) (net.Listener, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("control socket %s: %w", path, err)
	}
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("control socket %s: the path has %d bytes, and a socket's can have no more than %d", path, len(path), maxSocketPath)
	}
	unlock, err := lockDirectory(ctx, filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("control socket %s: %w", path, err)
	}
	defer unlock()
	if err := removeDead(ctx, path); err != nil {
		return nil, fmt.Errorf("control socket %s: %w", path, err)
	}
	ln, err := bindPrivate(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("control socket %s: %w", path, bare(err))
	}
	ln.SetUnlinkOnClose(false)
	s := &socket{UnixListener: ln, path: path}
	if s.made, err = os.Lstat(path); err == nil {
		err = open(path, opts)
	}
	if err != nil {
		_ = s.Close()
		return nil, fmt.Errorf("control socket %s: %w", path, err)
	}
	return s, nil
}

// open gives a socket that only its owner can use to whom the options name.
func open(path string, opts SocketOptions) error {
	if opts.GID != nil {
		if err := os.Lchown(path, -1, *opts.GID); err != nil {
			return fmt.Errorf("giving it to group %d: %w", *opts.GID, bare(err))
		}
	}
	if err := os.Chmod(path, opts.Mode.Perm()); err != nil {
		return fmt.Errorf("setting its mode: %w", bare(err))
	}
	return nil
}

// ErrInUse: a live server has the control socket.
var ErrInUse = errors.New("in use by a running server")

// removeDead makes way for a new socket at path.
func removeDead(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return bare(err)
	case info.Mode().Type() != fs.ModeSocket:
		return errors.New("there is a file that is not a socket: it is left alone")
	}
	if err := checkDead(ctx, path); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return bare(err)
	}
	return nil
}

// checkDead returns an error unless nobody serves the socket at path, or it has just gone with its server.
func checkDead(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Second, ErrInUse)
	defer cancel()
	c, err := new(net.Dialer).DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		_ = c.Close()
		return ErrInUse
	case isRefused(err), errors.Is(err, fs.ErrNotExist):
		return nil
	default: // alive with a full queue, or not ours to judge
		return fmt.Errorf("%w, or not to be looked at (%w)", ErrInUse, bare(err))
	}
}

// socket removes its file when it is closed.
type socket struct {
	*net.UnixListener
	path string
	made fs.FileInfo
	once sync.Once
	err  error // of closing
}

// Close may be called more than once.
func (s *socket) Close() error {
	s.once.Do(func() {
		if now, err := os.Lstat(s.path); err == nil && s.made != nil && os.SameFile(now, s.made) {
			_ = os.Remove(s.path)
		}
		s.err = s.UnixListener.Close()
	})
	return s.err
}

// bare strips what the operating system's packages put around an error: the message has the path already.
func bare(err error) error {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err
	}
	if se, ok := errors.AsType[*os.SyscallError](err); ok {
		return se.Err
	}
	return err
}
