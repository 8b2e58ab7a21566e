package records

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"unicode/utf8"
)

const (
	// windowSize is the initial memory of a window, in bytes.
	windowSize = 64 << 10

	// maxIdleReads is how often in a row a reader may return neither data nor an error.
	maxIdleReads = 100
)

// A window is the part of the text that is in memory: the record being read, and
// what was read beyond it.
type window struct {
	r   io.Reader
	err error // of r, due once what came before it is used
	max int   // length of a record, in bytes

	buf    []byte
	start  int   // in buf, of the record
	line   int64 // number of its first line, from 1
	eol    byte  // what ends lines: LF, or CR in a text that has nothing else
	onlyLF bool  // CR never ends lines
}

func newWindow(r io.Reader, limit int) *window {
	return &window{r: r, max: limit, buf: make([]byte, 0, windowSize), line: 1, eol: '\n'}
}

// data returns what is in memory from the start of the record. more invalidates it.
func (w *window) data() []byte { return w.buf[w.start:] }

// Buffered returns how much was read beyond the last record.
func (w *window) Buffered() int { return len(w.buf) - w.start }

// more reads more. It returns false at the end of the text, or on an error. It moves
// the record only when half of the memory is free, so that short records after long
// ones do not cost a copy each.
func (w *window) more() bool {
	if w.err != nil {
		return false
	}
	if len(w.buf) == cap(w.buf) {
		if w.start > cap(w.buf)/2 {
			w.buf = w.buf[:copy(w.buf, w.data())]
		} else {
			w.buf = slices.Grow(bytes.Clone(w.data()), cap(w.buf))
		}
		w.start = 0
	}
	for range maxIdleReads {
		n, err := w.r.Read(w.buf[len(w.buf):cap(w.buf)])
		w.buf, w.err = w.buf[:len(w.buf)+n], err
		if n > 0 || err != nil {
			return n > 0
		}
	}
	w.err = io.ErrNoProgress
	return false
}

// advance ends the record after n bytes.
func (w *window) advance(n int) {
	w.line += w.lineEnds(w.data()[:n])
	w.skip(n)
}

func (w *window) skip(n int) {
	if w.start += n; w.start == len(w.buf) {
		w.buf, w.start = w.buf[:0], 0
	}
}

// lineEnds counts the ends of lines in text.
func (w *window) lineEnds(text []byte) int64 { return int64(bytes.Count(text, []byte{w.eol})) }

// place returns the line and the column of the byte at offset i of the record.
func (w *window) place(i int) (line, column int64) {
	before := w.data()[:i]
	return w.line + w.lineEnds(before), int64(i - bytes.LastIndexByte(before, w.eol))
}

// lineEnd returns the offset behind the end of the line at offset i of the record. The
// line may end with the text. If the record would become too long, or cannot be read,
// it returns false, and how much of the record there is.
func (w *window) lineEnd(from int) (end int, whole bool) {
	for i := from; ; {
		d := w.data()
		if n := bytes.IndexByte(d[i:], w.eol); n >= 0 {
			end = i + n + 1
			return end, end <= w.max
		}
		if i = len(d); i <= w.max && w.more() {
			continue
		}
		if w.beginsWithCR(i) {
			w.eol = '\r'
			return w.lineEnd(from)
		}
		return i, i <= w.max && w.err == io.EOF
	}
}

// beginsWithCR reports whether n bytes are the beginning of a text whose lines seem to
// end in CR alone.
func (w *window) beginsWithCR(n int) bool {
	text := w.data()[:n]
	atStart := w.line == 1 && w.eol == '\n' && !w.onlyLF
	return atStart && bytes.IndexByte(text, '\r') >= 0 && bytes.IndexByte(text, '\n') < 0
}

// skipLine ends the record with the line at offset i, however long the line is.
func (w *window) skipLine(i int) {
	w.line += w.lineEnds(w.data()[:i])
	w.skip(i)
	for {
		if n := bytes.IndexByte(w.data(), w.eol); n >= 0 {
			w.skip(n + 1)
			w.line++
			return
		}
		w.skip(len(w.data()))
		if !w.more() {
			return
		}
	}
}

// tooLong ends the record with the line at offset i, and returns its error.
func (w *window) tooLong(i int) *Error {
	line, _ := w.place(i)
	e := &Error{
		Line: line,
		Raw:  bytes.Clone(w.data()[:min(len(w.data()), w.max, excerpt)]),
		Cut:  true,
		Err:  fmt.Errorf("%w: more than %d bytes", ErrTooLong, w.max),
	}
	w.skipLine(i)
	return e
}

// readLine reads a line, or a piece of it.
func (s *Source) readLine() (Record, error) {
	w := s.window
	end, whole := w.lineEnd(0)
	if end == 0 || !whole && end <= w.max {
		return Record{}, w.err
	}
	record := Record{Line: w.line}
	if !whole {
		if !s.opts.Pieces {
			return Record{}, w.tooLong(0)
		}
		record.Data = bytes.Clone(w.data()[:w.max])
		w.advance(w.max)
		return record, nil
	}
	line := w.data()[:end]
	if i := invalid(line); s.opts.validate && i >= 0 {
		if !s.opts.ReplaceInvalid {
			e := undecodable(w, i, end)
			w.advance(end)
			return Record{}, e
		}
		n := 0
		record.Data, n = appendValid(nil, line)
		s.replaced.Add(int64(n))
	} else {
		record.Data = bytes.Clone(line)
	}
	record.Unended = line[end-1] != w.eol
	w.advance(end)
	return record, nil
}

// invalid returns the offset of the first byte that is not UTF-8, or -1.
func invalid(text []byte) int {
	if utf8.Valid(text) {
		return -1
	}
	for i := 0; i < len(text); {
		if text[i] < utf8.RuneSelf {
			i++
			continue
		}
		r, size := utf8.DecodeRune(text[i:])
		if r == utf8.RuneError && size == 1 {
			return i
		}
		i += size
	}
	return -1
}

// undecodable returns the error of the record of n bytes whose byte i is not UTF-8.
func undecodable(w *window, i, n int) *Error {
	line, column := w.place(i)
	what := fmt.Errorf("%w: byte 0x%02X is not UTF-8", ErrEncoding, w.data()[i])
	if w.data()[i] == undecoded {
		what = ErrEncoding
	}
	return &Error{Line: line, Column: column, Raw: bytes.Clone(w.data()[:n]), Err: what}
}

// appendValid appends text to b with U+FFFD for each byte that is not UTF-8, and
// counts these.
func appendValid(b, text []byte) (valid []byte, replaced int) {
	for len(text) > 0 {
		i := invalid(text)
		if i < 0 {
			break
		}
		b = append(append(b, text[:i]...), "\ufffd"...)
		text = text[i+1:]
		replaced++
	}
	return append(b, text...), replaced
}
