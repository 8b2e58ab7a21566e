//go:build unix && !linux

package server

import "golang.org/x/sys/unix"

type receiver struct{}

// announceLeft is false: these systems do not tell with what is read how much there is left.
func announceLeft(uintptr) bool { return false }

func readFD(fd uintptr, b *buffer, _ bool) (n, left int, err error) {
	n, err = once(unix.Read, fd, b.bytes)
	return n, -1, err
}

func writeFD(fd uintptr, p []byte) (int, error) { return once(unix.Write, fd, p) }

func once(call func(int, []byte) (int, error), fd uintptr, p []byte) (int, error) {
	for {
		n, err := call(int(fd), p)
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}
