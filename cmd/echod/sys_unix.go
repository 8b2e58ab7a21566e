//go:build unix

package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
)

// checkOwnDirectory checks that dir belongs to this user or root, and that no other user can write to it.
func checkOwnDirectory(dir string) error { return checkDirectory(dir, false) }

// checkOwnDirectoryAndParents checks dir like checkOwnDirectory, and all directories above it, as written and with
// symbolic links resolved.
func checkOwnDirectoryAndParents(dir string) error {
	if err := checkParents(dir); err != nil {
		return err
	}
	return checkDirectory(dir, false)
}

// checkParents checks that only root and this user can replace dir.
func checkParents(dir string) error {
	parent := filepath.Dir(filepath.Clean(dir))
	real, err := filepath.EvalSymlinks(parent)
	if err != nil {
		return err
	}
	for _, start := range []string{parent, real} {
		for at := start; ; at = filepath.Dir(at) {
			if err := checkDirectory(at, true); err != nil {
				return fmt.Errorf("%s: %w", at, err)
			}
			if at == filepath.Dir(at) {
				break
			}
		}
	}
	return nil
}

// checkDirectory checks the owner and mode of a directory, or of a symbolic link above one. In a sticky
// directory, such as /tmp, other users cannot replace the files of this one.
func checkDirectory(dir string, above bool) error {
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	owner := int(info.Sys().(*syscall.Stat_t).Uid)
	link := info.Mode()&os.ModeSymlink != 0
	switch {
	case !info.IsDir() && !(above && link):
		return errors.New("it is not a directory")
	case owner != 0 && owner != os.Getuid():
		return fmt.Errorf("it belongs to another user (uid %d)", owner)
	case !link && info.Mode().Perm()&0o022 != 0 && !(above && info.Mode()&os.ModeSticky != 0):
		return errors.New("other users can write to it")
	}
	return nil
}

// ignoreBackgroundWrite lets a background job write to its terminal if 'stty tostop' is set. Otherwise the kernel would
// stop the job.
func ignoreBackgroundWrite() { signal.Ignore(syscall.SIGTTOU) }
