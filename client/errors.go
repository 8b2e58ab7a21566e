package client

import (
	"errors"
	"fmt"
	"io"
)

var (
	// ErrOutstanding is returned by Echo and EchoLine when echoes of an earlier
	// Send, or of an earlier Echo that was interrupted, have yet to be received.
	ErrOutstanding = errors.New("echoes of earlier sends have yet to be received")

	// ErrLineTooLong is returned by ReceiveLine for a line longer than
	// Options.MaxLine. The line is left for Receive.
	ErrLineTooLong = errors.New("line too long")

	// ErrNewline is returned by SendLine and EchoLine for text of more than one line.
	ErrNewline = errors.New("line contains a newline")

	errHalfClosed = errors.New("the client has closed its sending side")
	errAbandoned  = errors.New("the connection was given up by an Echo")
)

// A NoticeError says that the server ends the connection, and why.
type NoticeError struct {
	Notice Notice // one that Ends

	// Err is how the connection ended, mostly an *EndError. It is nil while
	// the connection still stands and only something new was refused.
	Err error
}

func (e *NoticeError) Error() string {
	var text string
	switch n := e.Notice; n.Kind {
	case Paused:
		text = "server is paused"
	case Busy:
		text = "server is at its connection limit"
	default:
		text = "server is shutting down"
		if n.Text != "" {
			text += " (" + n.Text + ")"
		}
	}
	if e.Err != nil {
		text += ": " + e.Err.Error()
	}
	return text
}

// Unwrap returns e.Err.
func (e *NoticeError) Unwrap() error { return e.Err }

// An EndError says that the connection has ended. It matches [io.EOF] if the
// server closed it after everything had come back, and [io.ErrUnexpectedEOF] if
// the server closed it before.
type EndError struct {
	Missing int   // bytes sent whose echo never came
	Err     error // io.EOF, io.ErrUnexpectedEOF or what broke the connection
}

func (e *EndError) Error() string {
	text := "server closed the connection"
	if e.Err != io.EOF && e.Err != io.ErrUnexpectedEOF {
		text = "connection lost: " + e.Err.Error()
	}
	if e.Missing > 0 {
		text += fmt.Sprintf(" (bytes not echoed: %d)", e.Missing)
	}
	return text
}

// Unwrap returns e.Err.
func (e *EndError) Unwrap() error { return e.Err }

// A CorruptionError says that the server sent something that is neither the
// echo of what was sent nor a notice. Nothing more can be received.
type CorruptionError struct {
	Offset int64  // of the first wrong byte in the stream of echoes
	Want   []byte // what should have come, its first few bytes; empty if nothing was due
	Got    []byte // what came instead, its first few bytes
}

func (e *CorruptionError) Error() string {
	return fmt.Sprintf("echo differs at offset %d: got %q, want %q", e.Offset, e.Got, e.Want)
}
