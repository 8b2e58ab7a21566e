package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"go.uber.org/zap"

	"echod/control"
	"echod/internal/text"
)

const socketName = "control.sock"

// Paths of the service's control socket, which belong to the system.
const (
	serviceDirectory = "/run/echod"
	unitSocket       = "/run/echod-control.sock" // of echod-control.socket
)

// A socketDir is a directory for control sockets.
type socketDir struct {
	dir     string
	check   func(dir string) error // rejects a directory that another user controls
	created bool                   // the server creates the directory
}

// socketDirs returns the directories for control sockets, in the order in which servers and clients try them.
func socketDirs() (all []socketDir) {
	if dir, _, _ := strings.Cut(os.Getenv("RUNTIME_DIRECTORY"), ":"); dir != "" {
		all = append(all, socketDir{dir: dir, check: checkOwnDirectory})
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) {
		all = append(all, socketDir{filepath.Join(dir, "echod"), checkOwnDirectoryAndParents, true})
	}
	all = append(all, socketDir{filepath.Join(os.TempDir(), "echod-"+strconv.Itoa(os.Getuid())), checkOwnDirectoryAndParents, true})
	if dir, err := os.UserCacheDir(); err == nil {
		all = append(all, socketDir{filepath.Join(dir, "echod"), checkOwnDirectoryAndParents, true})
	}
	return all
}

// listenDefault opens the control socket in the first directory where that works. It skips directories that another user
// controls. If no directory works, the listener is nil, and the server serves without a control socket.
func listenDefault(
	ctx context.Context, opts control.SocketOptions, log *zap.Logger,
) (ln net.Listener, path string, err error) {
	for _, p := range socketDirs() {
		err := p.prepare()
		if err == nil {
			path = filepath.Join(p.dir, socketName)
			ln, err = control.Listen(ctx, path, opts)
		}
		if err == nil || errors.Is(err, control.ErrInUse) {
			return ln, path, err
		}
		log.Warn("directory for the control socket skipped", zap.String("directory", p.dir), zap.Error(err))
	}
	log.Error("no directory for a control socket: serving without one; --control names a path")
	return nil, "", nil
}

// prepare checks the directory, after it has created it if necessary.
func (p socketDir) prepare() error {
	if p.created {
		if err := checkParents(p.dir); err != nil {
			return err
		}
		if err := os.Mkdir(p.dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return p.check(p.dir)
}

// socketPaths returns the paths at which servers open their control socket by default. skipped are the directories that
// another user controls, because that user could impersonate a server.
func socketPaths() (paths, skipped []string) {
	for _, p := range socketDirs() {
		err := p.check(p.dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			skipped = append(skipped, fmt.Sprintf("%s: %v", p.dir, err))
			continue
		}
		paths = append(paths, filepath.Join(p.dir, socketName))
	}
	return append(paths, filepath.Join(serviceDirectory, socketName), unitSocket), skipped
}

// clientSocket returns the path of the first control socket that accepts connections. It writes skipped directories and
// further servers to notes.
func clientSocket(notes io.Writer) (string, error) {
	paths, skipped := socketPaths()
	var found []string
	var denied error
	for _, path := range paths {
		c, err := net.Dial("unix", path)
		if errors.Is(err, fs.ErrPermission) && denied == nil {
			denied = &control.UnreachableError{Path: path, Err: err}
		}
		if err == nil {
			_ = c.Close()
			found = append(found, path)
		}
	}
	for _, s := range skipped {
		fmt.Fprintf(notes, "echod: skipped %s\n", text.Printable(s))
	}
	switch {
	case len(found) > 1:
		fmt.Fprintf(notes, "echod: using %s; servers also answer at %s (--control chooses)\n",
			text.Printable(found[0]), text.Printable(strings.Join(found[1:], ", ")))
		return found[0], nil
	case len(found) == 1:
		return found[0], nil
	case denied != nil:
		return "", denied
	default:
		looked := strings.Join(paths, ", ")
		return "", &exitError{
			exitUnreachable,
			fmt.Errorf("no server found: looked at %s (--control names another socket)", looked),
		}
	}
}

// statusAt returns the status of the server that listens on one of the addresses: host:port, or the path of a Unix
// socket. It asks the control sockets that 'echod ctl' would find. It is nil if none of them belongs to that server.
func statusAt(ctx context.Context, addresses []string) *control.Status {
	paths := []string{os.Getenv("ECHOD_CONTROL")}
	if paths[0] == "" || paths[0] == "off" {
		paths, _ = socketPaths()
	}
	for _, path := range paths {
		if st := statusOf(ctx, path); st != nil && slices.ContainsFunc(st.Listeners, func(l control.Listener) bool {
			return slices.ContainsFunc(addresses, func(address string) bool { return reaches(address, l.Address) })
		}) {
			return st
		}
	}
	return nil
}

// statusOf returns the status of the server with this control socket, or nil.
func statusOf(ctx context.Context, path string) *control.Status {
	c := control.NewClient(path)
	defer c.Close()
	st, err := c.Status(ctx)
	if err != nil {
		return nil
	}
	return &st
}

// reaches reports whether a client that dials address reaches a listener of this machine.
func reaches(address, listener string) bool {
	if address == listener {
		return true
	}
	dialled, err := netip.ParseAddrPort(address)
	at, listenerErr := netip.ParseAddrPort(listener)
	if err != nil || listenerErr != nil || dialled.Port() != at.Port() || !at.Addr().IsUnspecified() {
		return false
	}
	if dialled.Addr().IsLoopback() || dialled.Addr().IsUnspecified() {
		return true
	}
	own, _ := net.InterfaceAddrs()
	return slices.ContainsFunc(own, func(a net.Addr) bool {
		prefix, err := netip.ParsePrefix(a.String())
		return err == nil && prefix.Addr() == dialled.Addr().WithZone("")
	})
}

// socketOf returns the path of the control socket of process pid. If path is empty, it tries all directories. It does not
// check who controls them, because the caller only asks that server to upgrade itself.
func socketOf(ctx context.Context, path string, pid int) (string, error) {
	paths := []string{cmp.Or(path, os.Getenv("ECHOD_CONTROL"))}
	if paths[0] == "" {
		paths = nil
		for _, p := range socketDirs() {
			paths = append(paths, filepath.Join(p.dir, socketName))
		}
		paths = append(paths, filepath.Join(serviceDirectory, socketName), unitSocket)
	}
	var found []string
	var failed error
	for _, path := range paths {
		c := control.NewClient(path)
		st, err := c.Status(ctx)
		c.Close()
		switch {
		case err != nil:
			failed = cmp.Or(failed, err)
		case st.PID == pid:
			return path, nil
		default:
			found = append(found, fmt.Sprintf("%s is that of process %d", path, st.PID))
		}
	}
	if len(paths) == 1 && failed != nil {
		return "", failed
	}
	why := "looked at " + strings.Join(paths, ", ")
	if len(found) > 0 {
		why = strings.Join(found, ", ")
	}
	return "", &exitError{exitUnreachable, fmt.Errorf("no control socket of process %d found: %s", pid, why)}
}

// controlClient returns a client for the control socket at path. With an empty path it uses the socket of
// a server in this environment ($ECHOD_CONTROL), or else the first one that clientSocket finds.
func controlClient(path string, notes io.Writer) (*control.Client, error) {
	if path == "" {
		path = os.Getenv("ECHOD_CONTROL")
	}
	if path == "" || path == "off" {
		found, err := clientSocket(notes)
		if err != nil {
			return nil, err
		}
		path = found
	}
	return control.NewClient(path), nil
}
