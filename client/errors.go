package client

import (
	"errors"
	"fmt"
	"io"
)

var (
	// ErrOutstanding is returned by Echo and EchoLine while echoes of an earlier
	// Send, or of an interrupted Echo, are still to be received.
	ErrOutstanding = errors.New("echoes of earlier sends are still to be received")

	// ErrLineTooLong is returned by ReceiveLine for a line longer than
	// Options.MaxLine. Receive can still read the line.
	ErrLineTooLong = errors.New("line too long")

	// ErrNewline is returned by SendLine and EchoLine for text of several lines.
	ErrNewline = errors.New("line contains a newline")

	// ErrUnfinished is wrapped by the errors of items whose echo had not come back
	// when the [Stream] ended. They can be sent again with another Stream.
	ErrUnfinished = errors.New("the stream ended before the echo came back")

	errHalfClosed = errors.New("the client has half-closed the connection")
	errTLSBroken  = errors.New("an interrupted send has broken the TLS connection: dial again")
	errAbandoned  = errors.New("the connection was closed by an Echo that failed")
)

// Reasons why Stream closes a connection or ends.
var (
	errConsumerDone = errors.New("the consumer has stopped the iteration")
	errAllDone      = errors.New("everything has come back")
	errDialTimeout  = errors.New("no connection within the stall timeout")
	errStalled      = errors.New("no echo within the stall timeout")
	errConnDone     = errors.New("everything sent has come back")
)

// A NoticeError says that the server has announced the end of the connection.
type NoticeError struct {
	Notice Notice // Notice.Ends is true

	// Err says how the connection ended, usually an *EndError. It is nil while the
	// connection is open and only new data is refused.
	Err error
}

func (e *NoticeError) Error() string {
	var text string
	switch n := e.Notice; n.Kind {
	case NoticePaused:
		text = "server is paused"
	case NoticeBusy:
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

// An EndError says that the connection has ended. If the server closed it, the
// error matches [io.EOF] after a complete echo and [io.ErrUnexpectedEOF]
// otherwise.
type EndError struct {
	Missing int   // number of bytes sent whose echo never came
	Err     error // io.EOF, io.ErrUnexpectedEOF, or the error that broke the connection
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

// A CorruptionError says that the server sent something that is neither the echo
// nor a notice. Nothing more can be received on the connection.
type CorruptionError struct {
	Offset int64  // offset of the first wrong byte in the echo
	Want   []byte // beginning of the expected echo; empty if none was expected
	Got    []byte // beginning of what came instead
}

func (e *CorruptionError) Error() string {
	return fmt.Sprintf("echo differs at offset %d: got %q, want %q", e.Offset, e.Got, e.Want)
}
