//go:build unix

package server

import (
	"math"

	"golang.org/x/sys/unix"
)

// openFilesLimit is the process's soft RLIMIT_NOFILE, which Go raises to the hard one at start.
func openFilesLimit() (int, bool) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0, false
	}
	if n := uint64(limit.Cur); n < math.MaxInt32 { //nolint:unconvert // signed on freebsd
		return int(n), true
	}
	return 0, false // RLIM_INFINITY
}
