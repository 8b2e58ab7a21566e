package records

import (
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"strconv"
	"sync/atomic"
	"unicode/utf8"
)

// maxColumns bounds the fields of a row, and with them the memory for a row, which
// is a multiple of its bytes if the fields are short.
const maxColumns = 1 << 16

// rows parses CSV. encoding/csv does not serve here: it changes line breaks inside
// quotes, skips empty values, does not end rows at CR, and cannot go back to the line
// after a quote that is never closed, other than in quadratic time.
type rows struct {
	w        *window
	opts     Options
	delim    []byte
	comment  []byte // lines that begin with it are skipped; nil: none
	special  [256]bool
	replaced *atomic.Int64

	begun  bool     // the header was read, or there is none
	header []string // unchanged from the source
	width  int      // fields in each row; 0 until the first was read

	text     []byte // the fields of the row, one after the other
	ends     []int  // of each field in text
	starts   []int  // of each field in the record
	noClose  int64  // see closing
	position int64  // of the record in the text

	keys object
}

func newRows(w *window, opts Options, name string, replaced *atomic.Int64) *rows {
	r := &rows{w: w, opts: opts, begun: opts.NoHeader, replaced: replaced}
	r.delim = utf8.AppendRune(nil, opts.Delimiter)
	if opts.Comment != 0 {
		r.comment = utf8.AppendRune(nil, opts.Comment)
	}
	for _, c := range []byte{r.delim[0], '\r', '\n', '"'} {
		r.special[c] = true
	}
	r.keys.limit = w.max
	if opts.NameRows {
		r.keys.source = appendString([]byte(`,"source":`), []byte(name))
	}
	return r
}

// read reads a row and converts it to JSON.
func (r *rows) read() (Record, error) {
	if !r.begun {
		if err := r.readHeader(); err != nil {
			return Record{}, err
		}
	}
	n, err := r.parse()
	if err != nil {
		return Record{}, err
	}
	line, fields := r.w.line, len(r.ends)
	if r.width == 0 {
		r.width = fields
	}
	if fields != r.width && !r.opts.AllowRagged {
		at := 0
		if fields > r.width {
			at = r.starts[r.width]
		}
		return Record{}, r.fail(at, n, fmt.Errorf("%w: %d instead of %d", csv.ErrFieldCount, fields, r.width))
	}
	data := r.keys.row(line, r.text, r.ends)
	if data == nil {
		return Record{}, r.fail(0, n, fmt.Errorf("%w: more than %d bytes of JSON", ErrTooLong, r.w.max))
	}
	r.advance(n)
	return Record{Line: line, Data: data}, nil
}

// readHeader reads the names of the columns. No row has a meaning without them, so
// an error ends the source.
func (r *rows) readHeader() error {
	n, err := r.parse()
	if bad, ok := errors.AsType[*Error](err); ok {
		return fmt.Errorf("header, line %d, column %d: %w", bad.Line, max(bad.Column, 1), bad.Err)
	} else if err != nil {
		return err
	}
	if i := bytes.IndexByte(r.text, 0); i >= 0 {
		return fmt.Errorf("header, line %d: %w", r.w.line, ErrNUL)
	}
	names, from := make([]string, len(r.ends)), 0
	for i, end := range r.ends {
		names[i], from = string(r.text[from:end]), end
	}
	r.advance(n)
	r.setHeader(names)
	return nil
}

func (r *rows) setHeader(names []string) {
	r.begun, r.width, r.header = true, len(names), names
	r.keys.setNames(names)
}

// advance ends the record after n bytes.
func (r *rows) advance(n int) {
	r.position += int64(n)
	r.w.advance(n)
}

// fail ends the record after n bytes, and returns its error at offset i.
func (r *rows) fail(i, n int, err error) *Error {
	line, column := r.w.place(i)
	e := &Error{Line: line, Column: column, Raw: bytes.Clone(r.w.data()[:n]), Err: err}
	r.advance(n)
	return e
}

// failLine ends the record with the line at offset last, and returns its error at
// offset i.
func (r *rows) failLine(i, last int, err error) error {
	n, whole := r.w.lineEnd(last)
	if whole {
		return r.fail(i, n, err)
	}
	if n <= r.w.max {
		return r.w.err
	}
	line, column := r.w.place(i)
	e := r.tooLong(last)
	e.Line, e.Column, e.Err = line, column, err
	return e
}

// tooLong ends the record with the line at offset i, which exceeds the limit.
func (r *rows) tooLong(i int) *Error {
	e := r.w.tooLong(i)
	r.position, r.noClose = 0, 0 // the length of what was skipped is not known
	return e
}

// parse parses the next row that is not empty, and returns its length. The row
// remains the window's record.
func (r *rows) parse() (n int, err error) {
	for {
		skip, err := r.skippable()
		if err != nil {
			return 0, err
		}
		if skip == 0 {
			break
		}
		r.advance(skip)
	}
	r.text, r.ends, r.starts = r.text[:0], r.ends[:0], r.starts[:0]
	for done := false; !done; {
		if len(r.ends) == maxColumns {
			return 0, r.failLine(n, n, fmt.Errorf("%w: more than %d", ErrColumns, maxColumns))
		}
		r.starts = append(r.starts, n)
		if r.has(n, 1) && r.w.data()[n] == '"' {
			n, done, err = r.quoted(n)
		} else {
			n, done, err = r.unquoted(n)
		}
		if err != nil {
			return 0, err
		}
		r.ends = append(r.ends, len(r.text))
	}
	if n > r.w.max {
		return 0, r.tooLong(bytes.LastIndexByte(r.w.data()[:n-1], r.w.eol) + 1)
	}
	return n, r.validate(n)
}

// validate checks, or replaces, what is not UTF-8 in a row of n bytes.
func (r *rows) validate(n int) error {
	if !r.opts.validate {
		return nil
	}
	i := invalid(r.w.data()[:n])
	if i < 0 {
		return nil
	}
	if !r.opts.ReplaceInvalid {
		e := undecodable(r.w, i, n)
		r.advance(n)
		return e
	}
	var text []byte
	from := 0
	for f, end := range r.ends {
		var replaced int
		text, replaced = appendValid(text, r.text[from:end])
		r.replaced.Add(int64(replaced))
		r.ends[f], from = len(text), end
	}
	r.text = text
	return nil
}

// skippable returns the length of the empty line, or of the comment, at the start of
// the record, or 0 if there is a row.
func (r *rows) skippable() (int, error) {
	if !r.has(0, 1) {
		return 0, r.w.err
	}
	if len(r.comment) > 0 && r.has(0, len(r.comment)) && bytes.HasPrefix(r.w.data(), r.comment) {
		n, whole := r.w.lineEnd(0)
		if !whole && n > r.w.max {
			r.w.skipLine(n)
			r.position, r.noClose = 0, 0
			return r.skippable()
		} else if !whole {
			return 0, r.w.err
		}
		return n, nil
	}
	if r.width == 1 {
		return 0, nil // an empty line is an empty value
	}
	return r.rowEnd(0), nil
}

// has reads until there are n bytes at offset i, and reports whether there are.
func (r *rows) has(i, n int) bool {
	for len(r.w.data()) < i+n {
		if !r.w.more() {
			return false
		}
	}
	return true
}

// rowEnd returns the length of the LF, CRLF or CR at offset i, or 0.
func (r *rows) rowEnd(i int) int {
	switch {
	case !r.has(i, 1):
		return 0
	case r.w.data()[i] == '\n':
		return 1
	case r.w.data()[i] != '\r':
		return 0
	case r.has(i, 2) && r.w.data()[i+1] == '\n':
		return 2
	}
	if r.w.beginsWithCR(i + 1) {
		r.w.eol = '\r'
	}
	return 1
}

// unquoted parses a field at offset i that does not begin with a quote. It returns where
// the next field, or if done the next row, begins.
func (r *rows) unquoted(i int) (next int, done bool, err error) {
	start := i
	for {
		d := r.w.data()
		for i < len(d) && !r.special[d[i]] {
			i++
		}
		if i == len(d) {
			if i > r.w.max {
				return 0, false, r.tooLong(start)
			}
			if r.w.more() {
				continue
			}
			if r.w.err != io.EOF {
				return 0, false, r.w.err
			}
			r.text = append(r.text, r.w.data()[start:]...)
			return i, true, nil
		}
		if d[i] == '"' {
			if !r.opts.LazyQuotes {
				return 0, false, r.failLine(i, i, csv.ErrBareQuote)
			}
			i++
			continue
		}
		size, done := r.separator(i)
		if size == 0 {
			i++
			continue
		}
		r.text = append(r.text, r.w.data()[start:i]...)
		return i + size, done, nil
	}
}

// separator returns the length of the delimiter, or of the end of the row, at offset i.
// It is 0 if there is neither. At the end of the text it is 0 and done is true.
func (r *rows) separator(i int) (size int, done bool) {
	if r.has(i, len(r.delim)) && bytes.HasPrefix(r.w.data()[i:], r.delim) {
		return len(r.delim), false
	}
	if size := r.rowEnd(i); size > 0 {
		return size, true
	}
	return 0, len(r.w.data()) <= i
}

// quoted parses a field at offset i that begins with a quote.
func (r *rows) quoted(i int) (next int, done bool, err error) {
	end, err := r.closingQuote(i)
	if err != nil {
		return 0, false, err
	}
	content := r.w.data()[i+1 : end]
	for {
		q := bytes.IndexByte(content, '"')
		if q < 0 {
			break
		}
		r.text = append(r.text, content[:q+1]...)
		if content = content[q+1:]; len(content) > 0 && content[0] == '"' {
			content = content[1:]
		}
	}
	r.text = append(r.text, content...)
	if end == len(r.w.data()) {
		return end, true, nil // lazy: the text ends inside the quotes
	}
	size, done := r.separator(end + 1)
	return end + 1 + size, done, nil
}

// closingQuote returns the offset of the quote that closes the one at offset open. Quotes
// come in runs; a run closes the field if its length is odd, and a delimiter or the
// end of the row comes after it.
//
// With LazyQuotes any other quote is content. If no run closes the field within the limit, each of the lines that
// follow would repeat the search. So noClose is the offset up to which no run closes a field.
func (r *rows) closingQuote(open int) (int, error) {
	for i := open + 1; ; {
		d := r.w.data()
		q := bytes.IndexByte(d[i:], '"')
		if q < 0 {
			i = len(d)
			if i > r.w.max {
				return 0, r.unclosedQuote(open, i)
			}
			if r.w.more() {
				continue
			}
			if r.w.err != io.EOF {
				return 0, r.w.err
			}
			if r.opts.LazyQuotes {
				return i, nil
			}
			return 0, r.unclosedQuote(open, i)
		}
		run := i + q
		i = run + 1
		for r.has(i, 1) && r.w.data()[i] == '"' {
			i++
		}
		if r.w.err != nil && r.w.err != io.EOF && i == len(r.w.data()) {
			return 0, r.w.err
		}
		if (i-run)%2 == 1 {
			if size, done := r.separator(i); size > 0 || done {
				if i > r.w.max {
					return 0, r.unclosedQuote(open, i)
				}
				return i - 1, nil
			}
			if !r.opts.LazyQuotes {
				return 0, r.misplacedQuote(open, i-1)
			}
		}
		if skip := r.noClose - r.position; r.opts.LazyQuotes && skip > int64(i) {
			i = int(min(skip, int64(len(r.w.data()))))
		}
		if i > r.w.max {
			return 0, r.unclosedQuote(open, i)
		}
	}
}

// unclosedQuote returns the error for a quote at offset open that nothing closes before
// offset i.
func (r *rows) unclosedQuote(open, i int) error {
	d := r.w.data()
	for i > open+1 && d[i-1] == '"' {
		i-- // the next read may add quotes to the run
	}
	r.noClose = max(r.noClose, r.position+int64(i))
	return r.failLine(open, open, fmt.Errorf("%w: not closed", csv.ErrQuote))
}

// misplacedQuote returns the error for a quote at offset i inside the field that opens at
// offset open.
func (r *rows) misplacedQuote(open, i int) error {
	line, _ := r.w.place(open)
	other, column := r.w.place(i)
	if line == other {
		return r.failLine(i, i, csv.ErrQuote)
	}
	err := fmt.Errorf("%w: not closed before the one in line %d, column %d", csv.ErrQuote, other, column)
	return r.failLine(open, open, err)
}

// lineKey and sourceKey are the keys of the line in which a row begins, and of the input.
const (
	lineKey   = "line"
	sourceKey = "source"
)

// An object converts rows to lines of JSON. Without names the fields are a list.
type object struct {
	limit  int      // of a line, in bytes
	source []byte   // `,"source":"name"`; empty: none
	named  bool     // there are names
	keys   [][]byte // `,"name":`, in the order of the columns
	names  uniqueNames
	buf    []byte
}

// setNames makes the keys of the columns' names.
func (o *object) setNames(columns []string) {
	o.named = true
	reserved := []string{lineKey}
	if len(o.source) > 0 {
		reserved = append(reserved, sourceKey)
	}
	o.names = newUniqueNames(reserved, columns)
	for i, name := range columns {
		o.addKey(i, name)
	}
}

func (o *object) addKey(i int, name string) {
	key := appendString([]byte{','}, []byte(o.names.add(columnName(name, i))))
	o.keys = append(o.keys, append(key, ':'))
}

// columnName returns the name of column i, counted from 0. A column without a name is named after its position.
func columnName(name string, i int) string {
	if name == "" {
		return "column" + strconv.Itoa(i+1)
	}
	return name
}

// uniqueNames makes names unique by appending numbers. The first of several equal names stays as it is.
type uniqueNames struct {
	taken map[string]bool
	last  map[string]int // the number that was given to a name last
}

func newUniqueNames(reserved, columns []string) uniqueNames {
	u := uniqueNames{taken: make(map[string]bool, len(columns)), last: map[string]int{}}
	for i, name := range columns {
		u.taken[columnName(name, i)] = true
	}
	for _, name := range reserved {
		u.last[name] = 1
	}
	return u
}

func (u uniqueNames) add(name string) string {
	u.last[name]++
	for ; u.last[name] > 1; u.last[name]++ {
		if numbered := name + "_" + strconv.Itoa(u.last[name]); !u.taken[numbered] {
			u.taken[numbered] = true
			return numbered
		}
	}
	u.taken[name] = true
	return name
}

// row returns the line for a row whose fields end at these offsets of text, or nil if
// it exceeds the limit.
func (o *object) row(line int64, text []byte, ends []int) []byte {
	b := strconv.AppendInt(append(o.buf[:0], `{"`+lineKey+`":`...), line, 10)
	b = append(b, o.source...)
	closing := "}\n"
	if !o.named {
		b = append(b, `,"fields":[`...)
		closing = "]}\n"
	}
	from := 0
	for i, end := range ends {
		switch {
		case o.named:
			if i == len(o.keys) {
				o.addKey(i, "") // of a ragged row
			}
			b = append(b, o.keys[i]...)
		case i > 0:
			b = append(b, ',')
		}
		b, from = appendString(b, text[from:end]), end
		if len(b) > o.limit {
			break
		}
	}
	b = append(b, closing...)
	o.buf = b
	if len(b) > o.limit {
		return nil
	}
	return bytes.Clone(b)
}

// appendString appends s to b as a JSON string. Bytes that are not UTF-8 become U+FFFD.
func appendString(b, s []byte) []byte {
	const hex = "0123456789abcdef"
	b = append(b, '"')
	from := 0 // s[from:i] is not appended yet
	for i := 0; i < len(s); {
		c := s[i]
		if c >= utf8.RuneSelf {
			r, size := utf8.DecodeRune(s[i:])
			if r == utf8.RuneError && size == 1 {
				b = append(append(b, s[from:i]...), "\ufffd"...)
				from = i + 1
			}
			i += size
			continue
		}
		if c >= ' ' && c != '"' && c != '\\' {
			i++
			continue
		}
		b = append(b, s[from:i]...)
		switch c {
		case '"', '\\':
			b = append(b, '\\', c)
		case '\n':
			b = append(b, `\n`...)
		case '\r':
			b = append(b, `\r`...)
		case '\t':
			b = append(b, `\t`...)
		default:
			b = append(b, '\\', 'u', '0', '0', hex[c>>4], hex[c&0xf])
		}
		i++
		from = i
	}
	return append(append(b, s[from:]...), '"')
}

// AppendCSV appends a row of these fields to b, as it can be read with opts: the
// reverse of what a Source makes of a row.
func AppendCSV(b []byte, fields []string, opts Options) []byte {
	var buf [utf8.UTFMax]byte
	delim := utf8.AppendRune(buf[:0], opts.Delimiter)
	for i, field := range fields {
		if i > 0 {
			b = append(b, delim...)
		}
		special := bytes.ContainsAny([]byte(field), "\"\r\n") || bytes.Contains([]byte(field), delim)
		if i == 0 {
			r, _ := utf8.DecodeRuneInString(field)
			special = special || field == "" && len(fields) == 1 || field != "" && r == opts.Comment
		}
		if !special {
			b = append(b, field...)
			continue
		}
		b = append(b, '"')
		for _, c := range []byte(field) {
			if c == '"' {
				b = append(b, '"')
			}
			b = append(b, c)
		}
		b = append(b, '"')
	}
	return append(b, '\n')
}
