package server

import (
	"errors"
	"fmt"
	"net"
	"time"
)

// ErrServerClosed is returned by Serve after a drain, as in net/http.
var ErrServerClosed = errors.New("server closed")

// Causes with which the server ends a connection. context.Cause finds them in the handler's context, and the
// connection's Read and Write return them. All of them match net.ErrClosed.
var (
	ErrDeadline   error = closedError("the grace period is over")
	ErrForced     error = closedError("the server was closed by force")
	ErrKilled     error = closedError("the connection was killed")
	ErrIdle       error = closedError("the connection was idle for too long")
	ErrStalled    error = closedError("the client stopped reading")
	ErrConnClosed error = closedError("the connection is closed")

	// ErrClientGone is the cause with which Options.CancelWhenGone cancels a handler's context.
	ErrClientGone error = closedError("the client has closed or reset the connection")
)

// closedError is a cause with which the server ends a connection.
type closedError string

func (e closedError) Error() string        { return string(e) }
func (e closedError) Is(target error) bool { return target == net.ErrClosed }

// Errors after which the connection stays open.
var (
	// ErrDraining is returned by a Read that a drain has interrupted, after Conn.MarkIdle. No byte was lost, and the handler
	// may continue.
	ErrDraining = errors.New("the connection is being drained")
	// ErrHandover is returned by a Read that a handover has interrupted, after Conn.MarkIdle. No byte was lost.
	ErrHandover = errors.New("the connection is being handed over")
	// ErrWriteClosed is returned by Write after CloseWrite.
	ErrWriteClosed = errors.New("write after CloseWrite")
	// ErrWriteBroken is returned by Write after an earlier write has sent only a part of its bytes.
	ErrWriteBroken = errors.New("an earlier write was incomplete")
)

// Causes that end a hold, found with Hold.Cause. A *DrainingError is another one.
var (
	ErrReleased = errors.New("the hold was released")
	ErrResumed  = errors.New("the server was resumed")
	ErrExpired  = errors.New("the hold expired")
)

// Errors of the server's methods.
var (
	// ErrTooManyHolds means that 1,024 holds exist already.
	ErrTooManyHolds = errors.New("too many holds: release some")
	// ErrNoHold means that no hold has the given id.
	ErrNoHold = errors.New("no such hold")
	// ErrNoConn means that no open connection has the given id.
	ErrNoConn = errors.New("no such connection")
	// ErrNotDraining means that no drain is in progress.
	ErrNotDraining = errors.New("no drain is in progress")
	// ErrDrainFinal means that a drain can no longer be cancelled or extended.
	ErrDrainFinal = errors.New("the drain can no longer be changed")
	// ErrNoListener means that the server no longer serves the given listener.
	ErrNoListener = errors.New("no such listener")
	// ErrStuck is returned by Probe when the server does not work and will not recover by itself.
	ErrStuck = errors.New("the server is stuck")

	errNotNew = errors.New("server: the Server was not made by New")
)

// A HoldsError is returned by Resume if several holds exist. Release them by their ids, or all of them with ResumeAll.
type HoldsError struct{ Holds []HoldInfo }

func (e *HoldsError) Error() string {
	return fmt.Sprintf("%d holds exist: name those to release, or ask for all of them", len(e.Holds))
}

// A DrainingError means that the server refused a request because it is draining or has stopped.
type DrainingError struct {
	Deadline time.Time // latest end of the drain
}

func (e *DrainingError) Error() string {
	return fmt.Sprintf("the server is draining until %s", e.Deadline.Format(time.RFC3339))
}
