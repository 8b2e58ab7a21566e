//go:build unix

package main

import (
	"errors"
	"os"
	"strconv"
	"syscall"
)

// checkPrivate refuses a directory in a place open to all that somebody else has made first.
func checkPrivate(dir string) error {
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !info.IsDir():
		return errors.New("it is not a directory")
	case !ok || int(owner.Uid) != os.Getuid():
		return errors.New("it does not belong to user " + strconv.Itoa(os.Getuid()))
	case info.Mode().Perm()&0o077 != 0:
		return errors.New("others can enter it: its mode must be 0700")
	}
	return nil
}
