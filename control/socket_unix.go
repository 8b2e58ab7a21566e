//go:build unix

package control

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxSocketPath is what sun_path takes, less its final zero.
var maxSocketPath = len(unix.RawSockaddrUnix{}.Path) - 1

const lockRetry = 20 * time.Millisecond

// lockDirectory keeps other servers from judging and replacing the same dead socket at the same time.
// The lock is on the directory itself, so that it leaves no file behind.
func lockDirectory(ctx context.Context, dir string) (unlock func(), err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("its directory: %w", bare(err))
	}
	ctx, cancel := context.WithTimeoutCause(ctx, 2*time.Second, errors.New("its directory is locked by another program"))
	defer cancel()
	for {
		err := unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return func() { _ = d.Close() }, nil
		case !errors.Is(err, unix.EWOULDBLOCK):
			_ = d.Close()
			return nil, fmt.Errorf("locking its directory: %w", err)
		}
		select {
		case <-time.After(lockRetry):
		case <-ctx.Done():
			_ = d.Close()
			return nil, context.Cause(ctx)
		}
	}
}

func isRefused(err error) bool { return errors.Is(err, syscall.ECONNREFUSED) }
