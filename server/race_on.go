//go:build race && linux

package server

import "syscall"

// The race detector sees nothing of raw system calls. That the kernel has written to p, it is told by writing there;
// that what was sent comes before what is received, by calls of package syscall that do nothing else.

func raceRead(tcp uintptr, p []byte) {
	_, _ = syscall.Read(int(tcp), p[:0])
	copy(p, p)
}

func raceWrite() { _, _ = syscall.Write(-1, nil) }
