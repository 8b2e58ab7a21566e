package records

import (
	"bytes"
	"fmt"
	"io"
	"slices"
)

const (
	// windowSize is the memory that a window begins with, in bytes.
	windowSize = 64 << 10

	// excerpt is how much of a line that is too long its Error has, in bytes.
	excerpt = 4 << 10

	// maxIdleReads is how often in a row a reader may return nothing at all.
	maxIdleReads = 100
)

// A window is the part of a source that is in memory: the record being read, and
// what was read beyond it. It hands out whole lines, and can go back to any line of
// the record.
type window struct {
	r   io.Reader
	err error // from r, due once what came before it was handed out
	max int   // of a record, in bytes

	buf   []byte
	start int   // in buf, of the record
	first int64 // the number of its first line
	next  int   // in buf, of the line to be handed out next
	line  int64 // its number
}

func newWindow(r io.Reader, limit int) *window {
	return &window{r: r, max: limit, buf: make([]byte, 0, windowSize), line: 1}
}

// begin says that a record begins with the next line. What was before it is gone.
func (w *window) begin() { w.start, w.first = w.next, w.line }

// record returns the lines handed out since begin.
func (w *window) record() []byte { return w.buf[w.start:w.next] }

// readLine hands out the next line, valid until the next call, with its newline
// if it has one. ErrTooLong, which hands out nothing, means that the record would
// become too long.
func (w *window) readLine() ([]byte, error) {
	for seen := w.next; ; {
		end := len(w.buf) // of the line, as far as it is there
		i := bytes.IndexByte(w.buf[seen:], '\n')
		if i >= 0 {
			end = seen + i + 1
		}
		switch whole := i >= 0 || w.err == io.EOF && end > w.next; {
		case end-w.start > w.max:
			return nil, ErrTooLong
		case whole:
			line := w.buf[w.next:end]
			w.next = end
			w.line++
			return line, nil
		case w.err != nil:
			return nil, w.err
		}
		seen = len(w.buf) - w.start // where it will be
		w.fill()
	}
}

// cut hands out the beginning of a line that is too long, and leaves the rest of it for
// the next.
func (w *window) cut() []byte {
	piece := w.buf[w.next:][:w.max]
	w.next += w.max
	return piece
}

// Buffered is how much was read beyond what was handed out.
func (w *window) Buffered() int { return len(w.buf) - w.next }

// fill reads once, behind the record, which it moves to the front.
func (w *window) fill() {
	w.buf = w.buf[:copy(w.buf, w.buf[w.start:])]
	w.next -= w.start
	w.start = 0
	if len(w.buf) == cap(w.buf) {
		w.buf = slices.Grow(w.buf, cap(w.buf))
	}
	free := w.buf[len(w.buf):cap(w.buf)]
	var n int
	for range maxIdleReads {
		if n, w.err = w.r.Read(free); n > 0 || w.err != nil {
			w.buf = w.buf[:len(w.buf)+n]
			return
		}
	}
	w.err = io.ErrNoProgress
}

// endRecord ends the record with that line of it, and goes back to the next.
func (w *window) endRecord(line int64) {
	if line+1 >= w.line {
		return // it is the last that was handed out, maybe without a newline
	}
	for w.next, w.line = w.start, w.first; w.line <= line; w.line++ {
		w.next += bytes.IndexByte(w.buf[w.next:], '\n') + 1
	}
}

// skipLine skips the next line, however long it is.
func (w *window) skipLine() {
	for ; ; w.fill() {
		i := bytes.IndexByte(w.buf[w.next:], '\n')
		if i >= 0 {
			w.next += i + 1
		} else {
			w.next = len(w.buf)
		}
		w.begin()
		if i >= 0 || w.err != nil {
			break
		}
	}
	w.line++
}

// tooLong skips the next line, the first of a record, and returns its error.
func (w *window) tooLong() *Error {
	e := &Error{
		Line: w.line,
		Raw:  bytes.Clone(w.buf[w.start:][:min(w.max, excerpt)]),
		Cut:  true,
		Err:  fmt.Errorf("%w: more than %d bytes", ErrTooLong, w.max),
	}
	w.skipLine()
	return e
}
