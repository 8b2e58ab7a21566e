package control

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.uber.org/zap"
)

// SocketOptions configures access to a socket. With the zero value nobody can connect; use Mode 0o600 for the owner
// alone.
type SocketOptions struct {
	Mode fs.FileMode // permission bits
	GID  *int        // group of the socket; nil: the process's
	Name string      // name of the socket in errors and logs; empty: "control socket"
	// Fixed means that a removed or replaced file is not made again. The listener that UnwrapListener returns then
	// never changes.
	Fixed bool
	// Logger logs when the socket's file is removed or replaced while it is open. Nil logs nothing.
	Logger *zap.Logger
}

// ErrInUse means that a running server owns the control socket.
var ErrInUse = errors.New("in use by a running server")

const (
	checkInterval = time.Second           // between two checks of the socket's file
	lockTimeout   = 2 * time.Second       // to wait for another server that starts at the same path
	lockRetry     = 20 * time.Millisecond // between two attempts to lock
	dialTimeout   = time.Second           // to find out whether a server uses a socket
	lockSuffix    = ".lock"               // of the file that Listen locks while it makes a socket
)

// Listen opens a control socket, or another Unix socket, at path. The file never has more permissions than opts
// gives. Listen replaces a socket that no server uses. If a server uses it, the error is ErrInUse. A file that is not
// a socket is an error too.
//
// If the file is removed or replaced while the listener is open, the listener logs that, and makes the file again
// unless another server uses it. Close removes the file if it is still the listener's own.
func Listen(ctx context.Context, path string, opts SocketOptions) (net.Listener, error) {
	s, err := listenWithInterval(ctx, path, opts, checkInterval)
	if err != nil {
		return nil, err // not a nil *socket in an interface
	}
	return s, nil
}

// Check returns the error that Listen would return for path, except ErrInUse. It creates nothing.
func Check(path string, opts SocketOptions) error {
	full, err := socketPath(path)
	if err == nil {
		err = checkWritable(filepath.Dir(full))
	}
	if err == nil {
		if info, statErr := os.Lstat(full); statErr == nil && info.Mode().Type() != fs.ModeSocket {
			err = errNotSocket
		}
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w", cmp.Or(opts.Name, "control socket"), full, withoutPath(err))
	}
	return nil
}

// socketPath returns the absolute path for a socket's path.
func socketPath(path string) (full string, err error) {
	full, err = filepath.Abs(path)
	if err == nil && len(path) > maxSocketPath { // clients could not connect to it
		err = errPathTooLong(path)
	}
	return full, err
}

var errNotSocket = errors.New("a file that is not a socket is at this path: remove it, or choose another path")

func listenWithInterval(ctx context.Context, path string, opts SocketOptions, interval time.Duration) (*socket, error) {
	opts.Name = cmp.Or(opts.Name, "control socket")
	full, err := socketPath(path)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", opts.Name, path, err)
	}
	if opts.Logger == nil {
		opts.Logger = zap.NewNop()
	}
	s := &socket{path: full, opts: opts, log: opts.Logger.With(zap.String("path", full)), watched: make(chan struct{})}
	if s.ln, s.file, err = s.bind(ctx); err != nil {
		return nil, fmt.Errorf("%s %s: %w", opts.Name, full, err)
	}
	if err := checkDirectory(filepath.Dir(full)); err != nil {
		s.log.Warn("Unix socket can be replaced by another user", zap.Error(err))
	}
	s.start(interval)
	return s, nil
}

// start starts the goroutine watch, unless SocketOptions.Fixed is set.
func (s *socket) start(interval time.Duration) {
	ctx, stop := context.WithCancelCause(context.Background())
	if s.stop = stop; s.opts.Fixed {
		close(s.watched)
		return
	}
	go s.watch(ctx, interval)
}

// socket is a Unix listener that makes its file again when it was removed or replaced.
type socket struct {
	path    string
	opts    SocketOptions
	log     *zap.Logger
	stop    context.CancelCauseFunc // ends watch
	watched chan struct{}           // closed when watch has ended
	once    sync.Once
	err     error // of Close

	file fs.FileInfo // of ln; owned by watch

	mu sync.Mutex
	ln *net.UnixListener // guarded by mu
}

// bind makes the socket's file, with the mode and the group of opts.
func (s *socket) bind(ctx context.Context) (ln *net.UnixListener, file fs.FileInfo, err error) {
	unlock, err := lock(ctx, s.path+lockSuffix)
	if err != nil {
		return nil, nil, err
	}
	defer unlock()
	if err := removeUnserved(ctx, s.path); err != nil {
		return nil, nil, err
	}
	address, done, err := shortPath(s.path)
	if err != nil {
		return nil, nil, err
	}
	defer done()
	if ln, err = bindPrivate(ctx, address); err != nil {
		return nil, nil, withoutPath(err)
	}
	ln.SetUnlinkOnClose(false)
	if file, err = os.Lstat(s.path); err == nil {
		err = setAccess(s.path, s.opts)
	}
	if err != nil {
		removeOwn(s.path, file)
		_ = ln.Close()
		return nil, nil, withoutPath(err)
	}
	return ln, file, nil
}

// removeUnserved removes a socket at path that no server uses.
func removeUnserved(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return withoutPath(err)
	case info.Mode().Type() != fs.ModeSocket:
		return errNotSocket
	}
	if err := checkUnserved(ctx, path); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return withoutPath(err)
	}
	return nil
}

// checkUnserved returns nil if no server uses the socket at path, or if it has just been removed.
func checkUnserved(ctx context.Context, path string) error {
	address, done, err := shortPath(path)
	if err != nil {
		return err
	}
	defer done()
	ctx, cancel := context.WithTimeoutCause(ctx, dialTimeout, ErrInUse)
	defer cancel()
	c, err := new(net.Dialer).DialContext(ctx, "unix", address)
	switch {
	case err == nil:
		_ = c.Close()
		return ErrInUse
	case isRefused(err), errors.Is(err, fs.ErrNotExist):
		return nil
	default: // for example a full accept queue, or a socket of another user
		return fmt.Errorf("%w, or not accessible (%w)", ErrInUse, withoutPath(err))
	}
}

// removeOwn removes the file at path if it is still the given one.
func removeOwn(path string, file fs.FileInfo) {
	if now, err := os.Lstat(path); err == nil && file != nil && os.SameFile(now, file) {
		_ = os.Remove(path)
	}
}

// watch is the goroutine that makes the file again when it was removed or replaced. Close ends it and waits for it.
func (s *socket) watch(ctx context.Context, interval time.Duration) {
	defer close(s.watched)
	ticks := time.NewTicker(interval)
	defer ticks.Stop()
	var last error // the last error logged, so that each is logged once
	for {
		select {
		case <-ticks.C:
		case <-ctx.Done():
			return
		}
		now, err := os.Lstat(s.path)
		if err == nil && os.SameFile(now, s.file) {
			last = nil
			continue
		}
		if last == nil {
			s.log.Warn("control socket was removed or replaced by another program")
		}
		ln, file, err := s.bind(ctx)
		switch {
		case err == nil:
			s.log.Info("control socket created again")
			s.file = file
			s.replace(ln)
		case last == nil || err.Error() != last.Error():
			s.log.Error("cannot create the control socket again", zap.Error(err))
		}
		last = err
	}
}

// replace makes Accept continue with ln.
func (s *socket) replace(ln *net.UnixListener) {
	s.mu.Lock()
	before := s.ln
	s.ln = ln
	s.mu.Unlock()
	_ = before.Close()
}

func (s *socket) listener() *net.UnixListener {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ln
}

// Accept waits for the next connection. It returns os.ErrDeadlineExceeded, a temporary error, when the file was made
// again.
func (s *socket) Accept() (net.Conn, error) {
	ln := s.listener()
	c, err := ln.Accept()
	if err != nil && s.listener() != ln {
		return nil, os.ErrDeadlineExceeded
	}
	return c, err
}

// SetDeadline sets the deadline of Accept.
func (s *socket) SetDeadline(t time.Time) error { return s.listener().SetDeadline(t) }

// Addr returns the socket's absolute path.
func (s *socket) Addr() net.Addr { return &net.UnixAddr{Name: s.path, Net: "unix"} }

// Close removes the file and closes the socket. It may be called more than once.
func (s *socket) Close() error { return s.close(true) }

func (s *socket) close(remove bool) error {
	s.once.Do(func() {
		s.stop(net.ErrClosed)
		<-s.watched
		if remove {
			removeOwn(s.path, s.file)
		}
		s.err = s.ln.Close()
	})
	return s.err
}

// UnwrapListener returns the net.UnixListener inside a listener from Listen, so that its descriptor can be passed to
// another process. It returns any other listener unchanged.
func UnwrapListener(ln net.Listener) net.Listener {
	if s, ok := ln.(*socket); ok {
		return s.listener()
	}
	return ln
}

// Adopt is like Listen, for a control socket that another process has opened and passed to this one.
func Adopt(ln net.Listener, opts SocketOptions) (net.Listener, error) {
	unixLn, ok := ln.(*net.UnixListener)
	if !ok {
		return nil, fmt.Errorf("%s %s: not a Unix socket", cmp.Or(opts.Name, "control socket"), ln.Addr())
	}
	opts.Name = cmp.Or(opts.Name, "control socket")
	if opts.Logger == nil {
		opts.Logger = zap.NewNop()
	}
	path := ln.Addr().String()
	s := &socket{
		path: path, opts: opts, log: opts.Logger.With(zap.String("path", path)),
		watched: make(chan struct{}), ln: unixLn,
	}
	var err error
	if s.file, err = os.Lstat(path); err != nil {
		return nil, fmt.Errorf("%s %s: %w", opts.Name, path, withoutPath(err))
	}
	unixLn.SetUnlinkOnClose(false)
	s.start(checkInterval)
	return s, nil
}

func errPathTooLong(path string) error {
	return fmt.Errorf("the path has %d bytes: the path of a socket has at most %d", len(path), maxSocketPath)
}

// withoutPath removes the operation and the path that packages net and os add to an error, because the caller's message
// has the path.
func withoutPath(err error) error {
	if oe, ok := errors.AsType[*net.OpError](err); ok {
		err = oe.Err
	}
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err
	}
	if se, ok := errors.AsType[*os.SyscallError](err); ok {
		return se.Err
	}
	return err
}
