//go:build unix

package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"echod/server"
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

// deadSocket leaves a socket at path that is not served.
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

func TestSocketAccess(t *testing.T) {
	t.Run("the mode is as requested, whatever the umask", testMode)
	t.Run("only the owner can use the socket before its mode is set", testPrivate)
	t.Run("the group is as requested", testGroup)
	t.Run("a socket whose group cannot be set is removed", testGroupFails)
	t.Run("links are not followed", testLinks)
}

func testMode(t *testing.T) {
	for _, mask := range []int{0, 0o022, 0o077} {
		for _, mode := range []fs.FileMode{0, 0o600, 0o660, 0o666, 0o777} {
			umask(t, mask)
			path := filepath.Join(shortDir(t), "s")
			listenAt(t, path, SocketOptions{Mode: mode})
			wantMode(t, path, mode)
		}
	}
}

func testPrivate(t *testing.T) {
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

func testGroup(t *testing.T) {
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

func testGroupFails(t *testing.T) {
	if os.Getuid() == 0 {
		t.Skip("root can give a socket to any group")
	}
	path := filepath.Join(shortDir(t), "s")
	_, err := Listen(t.Context(), path, SocketOptions{Mode: 0o660, GID: new(1)})
	if err == nil || !strings.Contains(err.Error(), "changing its group to 1") {
		t.Errorf("error is %v: want it to name the group", err)
	}
	wantNothing(t, path)
}

func TestListen(t *testing.T) {
	t.Run("replaces a socket that is not served", testDead)
	t.Run("refuses a socket in use", testLive)
	t.Run("refuses a socket in use whose queue is full", testLiveFull)
	t.Run("refuses a file that is not a socket", testNoSocket)
	t.Run("refuses impossible paths", testBadPaths)
	t.Run("takes the longest path that fits", testLongestPath)
	t.Run("one of many servers gets a dead socket", testRace)
	t.Run("a socket that has just been removed is not in use", testJustGone)
	t.Run("takes over from a server that is closing", testTakeOver)
	t.Run("waits for its lock and its context", testLockContext)
	t.Run("other users' locks do not keep it from starting", testForeignLocks)
	t.Run("takes a short relative path in a deep directory", testRelativePath)
}

func testDead(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	deadSocket(t, path)
	listenAt(t, path, SocketOptions{Mode: 0o600})
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatalf("the new socket does not take connections: %v", err)
	}
	_ = c.Close()
}

func testLive(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	listenAt(t, path, SocketOptions{Mode: 0o640})
	_, err := Listen(t.Context(), path, SocketOptions{Mode: 0o600})
	if !errors.Is(err, ErrInUse) {
		t.Errorf("error is %v: want ErrInUse", err)
	}
	wantEqual(t, "error", err.Error(), "control socket "+path+": in use by a running server")
	wantMode(t, path, 0o640)
}

func testLiveFull(t *testing.T) {
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

func testNoSocket(t *testing.T) {
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
			want := "control socket " + path + ": a file that is not a socket is at this path: remove it, or choose another path"
			if err == nil || err.Error() != want {
				t.Errorf("error is %v: want: %s", err, want)
			}
			after, err := os.Lstat(path)
			if err != nil || !os.SameFile(before, after) || before.Mode() != after.Mode() {
				t.Errorf("the file has changed: %v, %v", after, err)
			}
		})
	}
}

func testBadPaths(t *testing.T) {
	dir := shortDir(t)
	for _, bad := range []struct{ name, path, says string }{
		{"too long", filepath.Join(dir, strings.Repeat("x", maxSocketPath)), "has at most " + strconv.Itoa(maxSocketPath)},
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

func testLongestPath(t *testing.T) {
	dir := shortDir(t)
	listenAt(t, filepath.Join(dir, strings.Repeat("x", maxSocketPath-len(dir)-1)), SocketOptions{Mode: 0o600})
}

func TestSocketClose(t *testing.T) {
	t.Run("removes the file, and may be repeated", testCloseRemoves)
	t.Run("leaves the socket of another server alone", testCloseOther)
}

func testCloseRemoves(t *testing.T) {
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

// testCloseOther has another server make a socket while this one does not look at its file.
func testCloseOther(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	ln, err := listenWithInterval(t.Context(), path, SocketOptions{Mode: 0o600}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	listenAt(t, path, SocketOptions{Mode: 0o660})
	if err := ln.Close(); err != nil {
		t.Error(err)
	}
	wantMode(t, path, 0o660)
}

func testRace(t *testing.T) {
	for range 20 {
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
				t.Errorf("another server's error is %v: want ErrInUse", err)
			}
		}
		wantEqual(t, "servers that have the socket", won, 1)
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatalf("connecting: %v", err)
		}
		_ = c.Close()
	}
}

func testJustGone(t *testing.T) {
	if err := checkUnserved(t.Context(), filepath.Join(shortDir(t), "s")); err != nil {
		t.Errorf("error is %v: want none", err)
	}
}

func testTakeOver(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	for range 50 {
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

func testLockContext(t *testing.T) {
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

func testForeignLocks(t *testing.T) {
	flock := func(t *testing.T, path string, flags int) {
		t.Helper()
		fd, err := unix.Open(path, flags, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Close(fd) })
		if err := unix.Flock(fd, unix.LOCK_EX); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		name string
		lock func(t *testing.T, path string)
	}{
		{"on the directory", func(t *testing.T, path string) { flock(t, filepath.Dir(path), unix.O_RDONLY) }},
		{"on a lock file that others can open", func(t *testing.T, path string) {
			flock(t, path+lockSuffix, unix.O_RDWR|unix.O_CREAT)
			if err := os.Chmod(path+lockSuffix, 0o644); err != nil {
				t.Fatal(err)
			}
		}},
		{"on a lock file of another user", func(t *testing.T, path string) {
			if os.Getuid() != 0 {
				t.Skip("only root can make another user's file")
			}
			flock(t, path+lockSuffix, unix.O_RDWR|unix.O_CREAT)
			if err := os.Chown(path+lockSuffix, 12345, 12345); err != nil {
				t.Fatal(err)
			}
		}},
		{"on what a lock file links to", func(t *testing.T, path string) {
			flock(t, path+"2", unix.O_RDWR|unix.O_CREAT)
			if err := os.Symlink(path+"2", path+lockSuffix); err != nil {
				t.Fatal(err)
			}
		}},
		{"by a fifo", func(t *testing.T, path string) {
			if err := unix.Mkfifo(path+lockSuffix, 0o600); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(shortDir(t), "s")
			tt.lock(t, path)
			began := time.Now()
			listenAt(t, path, SocketOptions{Mode: 0o600})
			if took := time.Since(began); took > lockTimeout/2 {
				t.Errorf("it took %s", took)
			}
		})
	}
	t.Run("no lock file is left behind", func(t *testing.T) {
		path := filepath.Join(shortDir(t), "s")
		listenAt(t, path, SocketOptions{Mode: 0o600})
		wantNothing(t, path+lockSuffix)
	})
}

func testRelativePath(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("the test's directory is too deep for other systems")
	}
	deep := filepath.Join(shortDir(t), strings.Repeat("d", maxSocketPath))
	if err := os.Mkdir(deep, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Chdir(deep)
	listenAt(t, "c.sock", SocketOptions{Mode: 0o640})
	wantMode(t, filepath.Join(deep, "c.sock"), 0o640)
	conn, err := dialSocket(t.Context(), filepath.Join(deep, "c.sock"))
	if err != nil {
		t.Fatalf("connecting by the absolute path: %v", err)
	}
	_ = conn.Close()
}

// testLinks puts a link in the place of a socket before its access is set.
func testLinks(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	if err := os.WriteFile(path+"2", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(path+"2", path); err != nil {
		t.Fatal(err)
	}
	gid := os.Getgid()
	err := setAccess(path, SocketOptions{Mode: 0o666, GID: &gid})
	if err == nil && runtime.GOOS == "linux" {
		t.Error("setting the access of a link is no error")
	}
	info, err := os.Stat(path + "2")
	if err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "mode of the link's target", info.Mode(), fs.FileMode(0o600))
}

func TestSocketWatch(t *testing.T) {
	watched := func(t *testing.T) (path string, ln *socket, logs *observer.ObservedLogs, dial func() error) {
		t.Helper()
		path = filepath.Join(shortDir(t), "s")
		core, logs := observer.New(zap.InfoLevel)
		ln, err := listenWithInterval(t.Context(), path, SocketOptions{Mode: 0o640, Logger: zap.New(core)}, time.Millisecond)
		if err != nil {
			t.Fatal(err)
		}
		accepting := make(chan struct{})
		go func() {
			defer close(accepting)
			for {
				c, err := ln.Accept()
				switch {
				case err == nil:
					_ = c.Close()
				case !errors.Is(err, os.ErrDeadlineExceeded):
					return
				}
			}
		}()
		t.Cleanup(func() {
			_ = ln.Close()
			<-accepting
		})
		return path, ln, logs, func() error {
			c, err := net.Dial("unix", path)
			if err == nil {
				_ = c.Close()
			}
			return err
		}
	}
	awaitLog := func(t *testing.T, logs *observer.ObservedLogs, message string) {
		t.Helper()
		for deadline := time.Now().Add(patience); logs.FilterMessage(message).Len() == 0; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("not logged: %s", message)
			}
		}
	}
	const again, cannot = "control socket created again", "cannot create the control socket again"
	t.Run("a socket file that was removed is created again", func(t *testing.T) {
		path, _, logs, dial := watched(t)
		for range 3 {
			logs.TakeAll()
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			awaitLog(t, logs, again)
			wantMode(t, path, 0o640)
			if err := dial(); err != nil {
				t.Error(err)
			}
		}
		wantEqual(t, "warnings", logs.FilterMessage("control socket was removed or replaced by another program").Len(), 1)
	})
	t.Run("a dead socket in its place is replaced", func(t *testing.T) {
		path, _, logs, dial := watched(t)
		deadSocket(t, path+"2")
		if err := os.Rename(path+"2", path); err != nil {
			t.Fatal(err)
		}
		awaitLog(t, logs, again)
		if err := dial(); err != nil {
			t.Error(err)
		}
	})
	t.Run("a file in its place is left alone, and logged once", func(t *testing.T) {
		path, ln, logs, dial := watched(t)
		if err := os.WriteFile(path+"2", []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+"2", path); err != nil {
			t.Fatal(err)
		}
		awaitLog(t, logs, cannot)
		if text, err := os.ReadFile(path); string(text) != "precious" {
			t.Errorf("the file has %q, %v", text, err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		awaitLog(t, logs, again)
		wantEqual(t, "errors logged", logs.FilterMessage(cannot).Len(), 1)
		if err := dial(); err != nil {
			t.Error(err)
		}
		_ = ln.Close()
		wantNothing(t, path)
	})
	t.Run("another server's socket is left alone until that server stops", func(t *testing.T) {
		path, ln, logs, dial := watched(t)
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		other, err := Listen(t.Context(), path, SocketOptions{Mode: 0o600})
		if errors.Is(err, ErrInUse) {
			t.Skip("the first server was faster")
		}
		if err != nil {
			t.Fatal(err)
		}
		awaitLog(t, logs, cannot)
		wantEqual(t, "error", strings.Contains(fmt.Sprint(logs.FilterMessage(cannot).All()[0].ContextMap()["error"]), ErrInUse.Error()), true)
		_ = other.Close()
		awaitLog(t, logs, again)
		if err := dial(); err != nil {
			t.Error(err)
		}
		_ = ln.Close()
	})
}

func TestControlPlaneOutlivesItsFile(t *testing.T) {
	r := newRig(t, server.Options{})
	if err := os.Remove(r.socket); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		if _, err := NewClient(r.socket).Status(t.Context()); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	if err := r.plane.Probe(within(t, patience)); err != nil {
		t.Error(err)
	}
}

func TestCheckDirectory(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can make another user's directories")
	}
	mkdir := func(t *testing.T, path string, mode fs.FileMode, uid int) {
		t.Helper()
		if err := errors.Join(os.Mkdir(path, 0o700), os.Chmod(path, mode), os.Chown(path, uid, -1)); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		name string
		mode fs.FileMode
		uid  int
		want string
	}{
		{"our own", 0o755, 0, ""},
		{"another user's", 0o755, 12345, "belongs to user 12345"},
		{"open to all", 0o777, 0, "others can write"},
		{"open to its group", 0o770, 0, "others can write"},
		{"open to all, with the sticky bit", 0o777 | fs.ModeSticky, 0, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			above := filepath.Join(shortDir(t), "above")
			mkdir(t, above, tt.mode, tt.uid)
			dir := filepath.Join(above, "dir")
			mkdir(t, dir, 0o700, 0)
			link := filepath.Join(shortDir(t), "link")
			if err := os.Symlink(dir, link); err != nil {
				t.Fatal(err)
			}
			for _, path := range []string{above, dir, link} {
				err := checkDirectory(path)
				if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
					t.Errorf("%s: error is %v, want %q in it", path, err, tt.want)
				}
			}
		})
	}
	t.Run("a link of another user is not followed", func(t *testing.T) {
		link := filepath.Join(shortDir(t), "link")
		if err := errors.Join(os.Symlink("/usr", link), os.Lchown(link, 12345, -1)); err != nil {
			t.Fatal(err)
		}
		if err := checkDirectory(link); err == nil || !strings.Contains(err.Error(), "belongs to user 12345") {
			t.Errorf("error is %v", err)
		}
	})
}

func TestDialTriesAgainWhileTheQueueIsFull(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	raw, err := ln.(*net.UnixListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.Control(func(fd uintptr) { err = syscall.Listen(int(fd), 1) }) // again, with a short queue
	if err != nil {
		t.Fatal(err)
	}
	for {
		conn, err := net.Dial("unix", path)
		if err != nil {
			break // the queue is full
		}
		defer conn.Close()
	}
	_, err = dialSocket(within(t, 10*busyRetry), path)
	if err == nil {
		t.Error("connected to a full queue")
	}
	connected := make(chan error, 1)
	go func() {
		conn, err := dialSocket(t.Context(), path)
		if err == nil {
			_ = conn.Close()
		}
		connected <- err
	}()
	if conn, err := ln.Accept(); err == nil {
		_ = conn.Close()
	}
	wantEqual(t, "error once there is room", receive(t, "the connection", connected), nil)
	busy := &UnreachableError{Path: "x", Err: errBusy}
	wantEqual(t, "error while there is none", busy.Error(), "the server on control socket x is busy: its queue of connections is full")
}
