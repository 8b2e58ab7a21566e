package records

import (
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"slices"
	"unicode/utf8"
)

const byteOrderMark = "\ufeff"

// rows reads CSV. encoding/csv parses; rows gives it one line at a time, so that
// it never has more than the row that it is about, and rows can go back.
type rows struct {
	w    *window
	csv  *csv.Reader
	rest []byte // of the line that csv is reading

	begun  bool     // the header was read, or there is none
	header []string // as it stands there
	fields int      // in each row; 0 until the first was read
	object *object  // where JSON is made
}

func newRows(w *window, opts Options) *rows {
	r := &rows{w: w, begun: opts.NoHeader, object: &object{limit: w.max}}
	r.csv = csv.NewReader(r)
	r.csv.Comma = opts.Delimiter
	r.csv.LazyQuotes = opts.LazyQuotes
	r.csv.ReuseRecord = true
	r.csv.FieldsPerRecord = -1 // or a malformed first row would set it
	return r
}

// validDelimiter reports whether encoding/csv takes comma.
func validDelimiter(comma rune) bool {
	return comma != '"' && comma != '\r' && comma != '\n' && comma != utf8.RuneError && utf8.ValidRune(comma)
}

// Read gives csv.Reader what it asks for, up to the end of a line.
func (r *rows) Read(p []byte) (int, error) {
	if len(r.rest) == 0 {
		var err error
		if r.rest, err = r.w.readLine(); err != nil {
			return 0, err
		}
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// readRecord reads a row and makes JSON of it.
func (r *rows) readRecord() (Record, error) {
	if !r.begun {
		if err := r.readHeader(); err != nil {
			return Record{}, err
		}
	}
	fields, err := r.readRow()
	if err != nil {
		return Record{}, err
	}
	if r.fields == 0 {
		r.fields = len(fields)
	}
	if len(fields) != r.fields {
		return Record{}, r.miscounted(len(fields))
	}
	data := r.object.of(r.w.first, fields)
	if data == nil {
		return Record{}, r.fault(r.w.first, 1, fmt.Errorf("%w: more than %d bytes of JSON", ErrTooLong, r.w.max))
	}
	return Record{Line: r.w.first, Data: data}, nil
}

// readHeader reads the names of the columns. Without them no row means anything,
// so that an error is the last.
func (r *rows) readHeader() error {
	names, err := r.readRow()
	if bad, ok := errors.AsType[*Error](err); ok {
		return fmt.Errorf("header, line %d, column %d: %w", bad.Line, max(bad.Column, 1), bad.Err)
	} else if err != nil {
		return err
	}
	r.begun, r.fields, r.header = true, len(names), slices.Clone(names)
	r.object.name(names)
	return nil
}

// readRow reads the next row that is not empty. Its fields are valid until the
// next call.
func (r *rows) readRow() ([]string, error) {
	for len(r.rest) == 0 {
		r.w.begin()
		line, err := r.w.readLine()
		if err == ErrTooLong {
			return nil, r.w.tooLong()
		} else if err != nil {
			return nil, err
		}
		if r.w.first == 1 && bytes.HasPrefix(line, []byte(byteOrderMark)) {
			line = line[len(byteOrderMark):]
			r.w.start += len(byteOrderMark)
		}
		// csv.Reader would skip an empty line, and the row begin later than we think.
		if !isEmpty(line) {
			r.rest = line
		}
	}
	fields, err := r.csv.Read()
	parse, ok := errors.AsType[*csv.ParseError](err)
	switch {
	case ok && parse.Err == csv.ErrBareQuote:
		line := r.w.first + int64(parse.Line-parse.StartLine)
		return nil, r.misplaced(line, int64(parse.Column), parse.Err)
	case ok || err == ErrTooLong:
		return nil, r.misquoted()
	}
	return fields, err
}

// isEmpty reports whether csv.Reader skips the line.
func isEmpty(line []byte) bool {
	return len(bytes.TrimSuffix(bytes.TrimSuffix(line, []byte("\n")), []byte("\r"))) == 0
}

// fault returns the error for the row.
func (r *rows) fault(line, column int64, err error) *Error {
	return &Error{Line: line, Column: column, Raw: bytes.Clone(r.w.record()), Err: err}
}

// misplaced ends the row with the line in which a quote is misplaced, and returns its
// error.
func (r *rows) misplaced(line, column int64, err error) *Error {
	r.w.endRecord(line)
	return r.fault(line, column, err)
}

// miscounted returns the error for a row of n fields, at the first that is too
// many.
func (r *rows) miscounted(n int) *Error {
	line, column := 0, 1
	if n > r.fields {
		first, _ := r.csv.FieldPos(0)
		line, column = r.csv.FieldPos(r.fields)
		line -= first
	}
	return r.fault(r.w.first+int64(line), int64(column),
		fmt.Errorf("%w: %d instead of %d", csv.ErrFieldCount, n, r.fields))
}

// misquoted returns the error for a row that csv.Reader has left in a quoted
// field.
func (r *rows) misquoted() *Error {
	row := r.w.record()
	opening, other := lastQuotes(row, string(r.csv.Comma), r.csv.LazyQuotes)
	line, column := r.place(row[:opening])
	if other < 0 {
		return r.misplaced(line, column, fmt.Errorf("%w: not closed", csv.ErrQuote))
	}
	otherLine, otherColumn := r.place(row[:other])
	if otherLine == line {
		return r.misplaced(line, otherColumn, csv.ErrQuote)
	}
	return r.misplaced(line, column, fmt.Errorf("%w: not closed before the one in line %d, column %d",
		csv.ErrQuote, otherLine, otherColumn))
}

// place returns where in the source the byte behind the beginning of a row is.
func (r *rows) place(before []byte) (line, column int64) {
	newlines := bytes.Count(before, []byte("\n"))
	return r.w.first + int64(newlines), int64(len(before) - bytes.LastIndexByte(before, '\n'))
}

// lastQuotes goes through a row that csv.Reader has left in a quoted field, and
// returns where the quotes are that open this field and that neither close it nor are
// doubled, which is negative if there is none.
func lastQuotes(row []byte, comma string, lazy bool) (opening, other int) {
	quoted := false
	for i := 0; i < len(row); {
		rest := row[i:]
		quote := bytes.IndexByte(rest, '"')
		switch {
		case !quoted && quote == 0:
			quoted, opening = true, i
			i++
		case !quoted:
			field, _, _ := bytes.Cut(rest, []byte(comma))
			i += len(field) + len(comma)
		case quote < 0:
			return opening, -1
		case bytes.HasPrefix(rest[quote+1:], []byte{'"'}):
			i += quote + 2
		case bytes.HasPrefix(rest[quote+1:], []byte(comma)):
			quoted = false
			i += quote + 1 + len(comma)
		case lazy:
			i += quote + 1
		default:
			return opening, i + quote
		}
	}
	return opening, -1
}
