package load

import (
	"errors"
	"net"
	"time"
)

// errWouldBlock says that a socket has nothing to read, or no room to write.
var errWouldBlock = errors.New("would block")

// A socket is a connection as a loop uses it. No method blocks.
type socket interface {
	// read also says how long ago the last of what it returns had come, as far as
	// the system tells.
	read(p []byte) (n int, ago time.Duration, err error)
	write(p []byte) (int, error)
	// awaitRoom says whether the poller is to tell when there is room to write.
	awaitRoom(on bool) error
	closeWrite() error
	close()
}

// A poller waits for the sockets of one loop. All but wake is for that loop alone.
type poller interface {
	// add takes a connection over. The poller names it by its user.
	add(conn net.Conn, u *user) (socket, error)
	// wait returns the users whose sockets can be read or written, or have ended,
	// when there are any, when wake is called, and at the latest after the timeout.
	// The slice is valid until the next call.
	wait(timeout time.Duration) ([]*user, error)
	// wake ends a wait, or the next one.
	wake()
	// close frees the poller, whose sockets have been closed.
	close()
}

// A pace is when the schedule has its moments: every so often since it began; never
// if that is zero. A poller may put off to the next what comes between them.
type pace struct {
	began time.Time
	every time.Duration
}
