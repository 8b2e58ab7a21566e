//go:build linux || darwin || freebsd || netbsd || openbsd || dragonfly

package bulk

import (
	"os"

	"golang.org/x/sys/unix"
)

// openNoFollow makes the opening of a symbolic link fail.
const openNoFollow = unix.O_NOFOLLOW

// inForeground reports whether this process is in the foreground of the terminal, so that
// what it draws does not go over the prompt of a shell.
func inForeground(terminal *os.File) bool {
	group, err := unix.IoctlGetInt(int(terminal.Fd()), unix.TIOCGPGRP)
	return err != nil || group == unix.Getpgrp()
}

// canDraw reports whether escape sequences move the cursor on the terminal.
func canDraw(*os.File) bool { return true }
