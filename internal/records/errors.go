package records

import (
	"errors"
	"strconv"
)

// ErrTooLong is what an [Error] wraps for a record longer than Options.MaxRecord.
var ErrTooLong = errors.New("too long")

// An Error is a record that cannot be sent. Reading goes on after it.
type Error struct {
	Source string // its Name
	Number int64  // of the record, as Record has it
	Line   int64  // where the fault is, from 1
	Column int64  // in bytes, from 1; 0 means the whole line

	Raw []byte // the record as it stands in the source
	Cut bool   // Raw is only its beginning, for it is too long

	Err error // wraps ErrTooLong, or what encoding/csv names such as csv.ErrBareQuote
}

// Error begins with the place, as compilers do: "data.csv:17:5: bare \" in
// non-quoted-field".
func (e *Error) Error() string {
	place := e.Source + ":" + strconv.FormatInt(e.Line, 10)
	if e.Column > 0 {
		place += ":" + strconv.FormatInt(e.Column, 10)
	}
	return place + ": " + e.Err.Error()
}

// Unwrap returns e.Err.
func (e *Error) Unwrap() error { return e.Err }
