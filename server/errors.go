package server

import (
	"errors"
	"fmt"
	"time"
)

// Causes with which a connection's context is cancelled, found with context.Cause, and errors that
// the server's methods return.
var (
	// ErrServerClosed is what Serve returns after a drain.
	ErrServerClosed = errors.New("server closed")

	// ErrDeadline: the drain's grace ran out.
	ErrDeadline = errors.New("the drain's deadline has passed")
	// ErrForced: the server was closed without further grace.
	ErrForced = errors.New("the server was closed by force")
	// ErrKilled: Kill was called for this connection.
	ErrKilled = errors.New("the connection was killed")
	// ErrIdle: no byte moved for Options.IdleTimeout.
	ErrIdle = errors.New("the connection was idle for too long")
	// ErrStalled: the client read nothing for Options.StallTimeout.
	ErrStalled = errors.New("the client stopped reading")
	// ErrConnClosed: the handler has returned or closed the connection.
	ErrConnClosed = errors.New("the connection is closed")

	// ErrReleased: the hold was released by its owner.
	ErrReleased = errors.New("the hold was released")
	// ErrResumed: all holds were released by Resume.
	ErrResumed = errors.New("the server was resumed")
	// ErrExpired: the hold's time to live ran out.
	ErrExpired = errors.New("the hold's time to live ran out")

	// ErrTooManyHolds: 1,024 holds stand already.
	ErrTooManyHolds = errors.New("too many holds: release some")
	// ErrNoHold: no hold has the given id.
	ErrNoHold = errors.New("no such hold")
	// ErrNoConn: no open connection has the given id.
	ErrNoConn = errors.New("no such connection")
)

// A DrainingError says that what was asked for cannot be had any more, since the server drains or
// has stopped.
type DrainingError struct {
	Deadline time.Time // when the drain ends at the latest
}

func (e *DrainingError) Error() string {
	return fmt.Sprintf("the server is draining until %s", e.Deadline.Format(time.RFC3339))
}
