//go:build unix

package control

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// umask sets the process's umask for the rest of the test.
func umask(t *testing.T, mask int) {
	t.Helper()
	before := syscall.Umask(mask)
	t.Cleanup(func() { syscall.Umask(before) })
}

// wantMode checks that a socket of the given mode is at path.
func wantMode(t *testing.T, path string, mode fs.FileMode) {
	t.Helper()
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "mode", info.Mode(), fs.ModeSocket|mode)
}

// wantNothing checks that no file is at path.
func wantNothing(t *testing.T, path string) {
	t.Helper()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s: error is %v: want nothing there", filepath.Base(path), err)
	}
}

func listenAt(t *testing.T, path string, opts SocketOptions) net.Listener {
	t.Helper()
	ln, err := Listen(t.Context(), path, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln
}

// deadSocket leaves a socket at path that nobody serves.
func deadSocket(t *testing.T, path string) {
	t.Helper()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestSocketHasTheModeAskedForWhateverTheUmask(t *testing.T) {
	for _, mask := range []int{0, 0o022, 0o077} {
		for _, mode := range []fs.FileMode{0, 0o600, 0o660, 0o666, 0o777} {
			umask(t, mask)
			path := filepath.Join(shortDir(t), "s")
			listenAt(t, path, SocketOptions{Mode: mode})
			wantMode(t, path, mode)
		}
	}
}

func TestSocketIsItsOwnersAloneUntilItIsOpened(t *testing.T) {
	for _, mask := range []int{0, 0o022} {
		umask(t, mask)
		path := filepath.Join(shortDir(t), "s")
		ln, err := bindPrivate(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		wantMode(t, path, 0o600)
		wantEqual(t, "umask after it", syscall.Umask(mask), mask)
		if err := setAccess(path, SocketOptions{Mode: 0o660}); err != nil {
			t.Fatal(err)
		}
		wantMode(t, path, 0o660)
	}
}

func TestSocketBelongsToTheGroupAskedFor(t *testing.T) {
	gid := os.Getgid()
	if os.Getuid() == 0 {
		gid = 12345 // root can give it to any
	}
	path := filepath.Join(shortDir(t), "s")
	listenAt(t, path, SocketOptions{Mode: 0o660, GID: &gid})
	var stat unix.Stat_t
	if err := unix.Lstat(path, &stat); err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "group", int(stat.Gid), gid)
	wantMode(t, path, 0o660)
}

func TestSocketThatCannotBeGivenAwayIsNotLeftBehind(t *testing.T) {
	if os.Getuid() == 0 {
		t.Skip("root can give a socket to any group")
	}
	path := filepath.Join(shortDir(t), "s")
	_, err := Listen(t.Context(), path, SocketOptions{Mode: 0o660, GID: new(1)})
	if err == nil || !strings.Contains(err.Error(), "giving it to group 1") {
		t.Errorf("error is %v: want it to name the group", err)
	}
	wantNothing(t, path)
}

func TestDeadSocketIsReplaced(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	deadSocket(t, path)
	listenAt(t, path, SocketOptions{Mode: 0o600})
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatalf("the new socket does not take connections: %v", err)
	}
	_ = c.Close()
}

func TestLiveSocketIsRefused(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	listenAt(t, path, SocketOptions{Mode: 0o640})
	_, err := Listen(t.Context(), path, SocketOptions{Mode: 0o600})
	if !errors.Is(err, ErrInUse) {
		t.Errorf("error is %v: want ErrInUse", err)
	}
	wantEqual(t, "error", err.Error(), "control socket "+path+": in use by a running server")
	wantMode(t, path, 0o640)
}

func TestLiveSocketWithAFullQueueIsRefused(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	for { // until the queue is full
		c, err := new(net.Dialer).DialContext(t.Context(), "unix", path)
		if err != nil {
			break
		}
		defer c.Close()
	}
	_, err = Listen(t.Context(), path, SocketOptions{Mode: 0o600})
	if !errors.Is(err, ErrInUse) {
		t.Errorf("error is %v: want ErrInUse", err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the live socket is gone: %v", err)
	}
}

func TestWhatIsNoSocketIsLeftAlone(t *testing.T) {
	for name, put := range map[string]func(path string) error{
		"file":      func(path string) error { return os.WriteFile(path, []byte("precious"), 0o644) },
		"directory": func(path string) error { return os.Mkdir(path, 0o755) },
		"fifo":      func(path string) error { return unix.Mkfifo(path, 0o644) },
		"link":      func(path string) error { return os.Symlink("elsewhere", path) },
		"link to a dead socket": func(path string) error {
			deadSocket(t, path+"2")
			return os.Symlink(path+"2", path)
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(shortDir(t), "s")
			if err := put(path); err != nil {
				t.Fatal(err)
			}
			before, _ := os.Lstat(path)
			_, err := Listen(t.Context(), path, SocketOptions{Mode: 0o600})
			want := "control socket " + path + ": a file that is not a socket is in the way: remove it, or choose another path"
			if err == nil || err.Error() != want {
				t.Errorf("error is %v: want: %s", err, want)
			}
			after, err := os.Lstat(path)
			if err != nil || !os.SameFile(before, after) || before.Mode() != after.Mode() {
				t.Errorf("what was there is not as it was: %v, %v", after, err)
			}
		})
	}
}

func TestPathsThatCannotBe(t *testing.T) {
	dir := shortDir(t)
	for _, bad := range []struct{ name, path, says string }{
		{"too long", filepath.Join(dir, strings.Repeat("x", maxSocketPath)), "can have at most " + strconv.Itoa(maxSocketPath)},
		{"no directory", filepath.Join(dir, "none", "s"), "no such file or directory"},
		{"file as directory", filepath.Join(os.Args[0], "s"), "not a directory"},
	} {
		t.Run(bad.name, func(t *testing.T) {
			_, err := Listen(t.Context(), bad.path, SocketOptions{Mode: 0o600})
			if err == nil || !strings.Contains(err.Error(), bad.says) || !strings.HasPrefix(err.Error(), "control socket "+bad.path+": ") {
				t.Errorf("error is %v: want it to name the path and to say: %s", err, bad.says)
			}
		})
	}
}

func TestLongestPathIsTaken(t *testing.T) {
	dir := shortDir(t)
	listenAt(t, filepath.Join(dir, strings.Repeat("x", maxSocketPath-len(dir)-1)), SocketOptions{Mode: 0o600})
}

func TestCloseRemovesTheSocketAndMayBeRepeated(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	ln := listenAt(t, path, SocketOptions{Mode: 0o600})
	for range 2 {
		if err := ln.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		wantNothing(t, path)
	}
	listenAt(t, path, SocketOptions{Mode: 0o600})
	if err := ln.Close(); err != nil {
		t.Errorf("Close once more: %v", err)
	}
	wantMode(t, path, 0o600)
}

func TestCloseLeavesAnothersSocketAlone(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	ln := listenAt(t, path, SocketOptions{Mode: 0o600})
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	listenAt(t, path, SocketOptions{Mode: 0o660})
	if err := ln.Close(); err != nil {
		t.Error(err)
	}
	wantMode(t, path, 0o660)
}

func TestOneOfManyServersGetsADeadSocket(t *testing.T) {
	for range 50 {
		path := filepath.Join(shortDir(t), "s")
		deadSocket(t, path)
		const servers = 4
		listeners, errs := make([]net.Listener, servers), make([]error, servers)
		var racing sync.WaitGroup
		for i := range servers {
			racing.Go(func() { listeners[i], errs[i] = Listen(t.Context(), path, SocketOptions{Mode: 0o600}) })
		}
		racing.Wait()
		won := 0
		for i, err := range errs {
			switch {
			case err == nil:
				won++
				defer listeners[i].Close()
			case !errors.Is(err, ErrInUse):
				t.Errorf("a server that lost says %v: want ErrInUse", err)
			}
		}
		wantEqual(t, "servers that have the socket", won, 1)
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatalf("nobody answers on the socket: %v", err)
		}
		_ = c.Close()
	}
}

func TestSocketThatHasJustGoneIsNotInUse(t *testing.T) {
	if err := checkDead(t.Context(), filepath.Join(shortDir(t), "s")); err != nil {
		t.Errorf("error is %v: want none", err)
	}
}

func TestServerTakesOverFromOneThatIsClosing(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	for range 200 {
		before := listenAt(t, path, SocketOptions{Mode: 0o600})
		var closing sync.WaitGroup
		closing.Go(func() { _ = before.Close() })
		after, err := Listen(t.Context(), path, SocketOptions{Mode: 0o600})
		closing.Wait()
		switch {
		case errors.Is(err, ErrInUse) && !errors.Is(err, fs.ErrNotExist): // it came too early
			wantNothing(t, path)
		case err != nil:
			t.Fatal(err)
		default:
			wantMode(t, path, 0o600)
			_ = after.Close()
		}
	}
}

func TestListenWaitsForItsLockAndItsContext(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	unlock, err := lock(t.Context(), path+lockSuffix)
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	enough := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(enough)
	_, err = Listen(ctx, path, SocketOptions{Mode: 0o600})
	if !errors.Is(err, enough) {
		t.Errorf("error is %v: want the context's cause", err)
	}
}
