//go:build unix

package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/zap"

	"echod/control"
)

// expectSocket checks that the default control socket is in dir, or that there is none.
func expectSocket(t *testing.T, dir string) {
	t.Helper()
	ln, path, err := listenDefault(t.Context(), control.SocketOptions{Mode: 0o600}, zap.NewNop())
	if ln != nil {
		_ = ln.Close()
	}
	if err != nil || (ln != nil) != (dir != "") || !strings.HasPrefix(path, dir) {
		t.Errorf("the control socket is %q (error %v), want one in %q", path, err, dir)
	}
}

func TestLogFormat(t *testing.T) {
	info, err := os.Stderr.Stat()
	if err != nil {
		t.Fatal(err)
	}
	st := info.Sys().(*syscall.Stat_t)
	connected := fmt.Sprintf("%d:%d", st.Dev, st.Ino) // as if systemd had connected stderr
	t.Run("json by default", func(t *testing.T) {
		t.Setenv("JOURNAL_STREAM", "")
		if got := chooseFormat(""); got != "json" {
			t.Errorf("got %s", got)
		}
	})
	t.Run("journal if stderr is the journal and its socket is there", func(t *testing.T) {
		t.Setenv("JOURNAL_STREAM", connected)
		want := "json"
		if journalEnabled() {
			want = "journal"
		}
		if got := chooseFormat(""); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	})
	t.Run("as given", func(t *testing.T) {
		t.Setenv("JOURNAL_STREAM", connected)
		if got := chooseFormat("json"); got != "json" {
			t.Errorf("got %s", got)
		}
	})
	t.Run("journal needs the journal", func(t *testing.T) {
		if journalEnabled() {
			t.Skip("the journal is available here")
		}
		if _, _, err := newLogger(zap.InfoLevel, "journal", nil); err == nil || !strings.Contains(err.Error(), "--log-format journal") {
			t.Errorf("error %v, want one that names the flag", err)
		}
	})
}

func TestControlSocketDirectories(t *testing.T) {
	own := func(t *testing.T, mode fs.FileMode) string {
		t.Helper()
		dir := filepath.Join(t.TempDir(), "dir")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	expect := func(t *testing.T, err error, want string) {
		t.Helper()
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
	t.Run("own directories are used", func(t *testing.T) {
		expect(t, checkOwnDirectoryAndParents(own(t, 0o755)), "")
	})
	t.Run("directories that others can write to are not used", func(t *testing.T) {
		expect(t, checkOwnDirectoryAndParents(own(t, 0o777)), "other users can write to it")
		expect(t, checkOwnDirectoryAndParents(filepath.Join(own(t, 0o777), "echod")), "other users can write to it")
		expect(t, checkOwnDirectoryAndParents(own(t, 0o777|fs.ModeSticky)), "other users can write to it")
	})
	t.Run("a sticky parent is safe", func(t *testing.T) {
		dir := filepath.Join(own(t, 0o777|fs.ModeSticky), "echod")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		expect(t, checkOwnDirectoryAndParents(dir), "")
	})
	t.Run("a symbolic link is not followed", func(t *testing.T) {
		target := own(t, 0o700)
		link := filepath.Join(own(t, 0o700), "echod")
		if err := os.Symlink(target, link); err != nil {
			t.Fatal(err)
		}
		expect(t, checkOwnDirectoryAndParents(link), "not a directory")
	})
	t.Run("directories of another user are not used", func(t *testing.T) {
		if os.Getuid() != 0 {
			t.Skip("only root can make one")
		}
		dir := own(t, 0o700)
		if err := os.Chown(dir, 12345, -1); err != nil {
			t.Fatal(err)
		}
		expect(t, checkOwnDirectoryAndParents(dir), "belongs to another user (uid 12345)")
		expect(t, checkOwnDirectoryAndParents(filepath.Join(dir, "echod")), "belongs to another user (uid 12345)")
		t.Setenv("RUNTIME_DIRECTORY", "")
		t.Setenv("XDG_RUNTIME_DIR", dir)
		t.Setenv("TMPDIR", t.TempDir())
		expectSocket(t, os.Getenv("TMPDIR"))
		if _, err := os.Lstat(filepath.Join(dir, "echod")); err == nil {
			t.Error("a directory was made for another user")
		}
	})
	t.Run("a squatted temporary directory does not stop the server", func(t *testing.T) {
		tmp := t.TempDir()
		if err := os.Symlink("/nowhere", filepath.Join(tmp, fmt.Sprintf("echod-%d", os.Getuid()))); err != nil {
			t.Fatal(err)
		}
		t.Setenv("RUNTIME_DIRECTORY", "")
		t.Setenv("XDG_RUNTIME_DIR", "")
		t.Setenv("TMPDIR", tmp)
		t.Setenv("XDG_CACHE_HOME", own(t, 0o700))
		expectSocket(t, os.Getenv("XDG_CACHE_HOME"))
		t.Setenv("HOME", "")
		t.Setenv("XDG_CACHE_HOME", "")
		expectSocket(t, "")
	})
	t.Run("a path that is too long is skipped", func(t *testing.T) {
		tmp := t.TempDir()
		t.Setenv("RUNTIME_DIRECTORY", "")
		t.Setenv("TMPDIR", tmp)
		t.Setenv("XDG_RUNTIME_DIR", filepath.Join(own(t, 0o700), strings.Repeat("x", 100)))
		if err := os.Mkdir(os.Getenv("XDG_RUNTIME_DIR"), 0o700); err != nil {
			t.Fatal(err)
		}
		expectSocket(t, tmp)
	})
}
