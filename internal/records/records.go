// Package records reads files, standard input and URLs as a stream of records:
// lines, CSV rows as JSON, or blocks. It needs constant memory for any input.
//
// [Open] and [New] make a [Source]; [Source.All] ranges over its records. A record
// that cannot be sent is an *[Error], and reading continues after it.
//
// Formats Lines and CSV read text. A byte order mark selects UTF-8, UTF-16 or
// UTF-32, Options.Encoding names any other encoding, and what is sent is UTF-8.
// gzip, zstd, bzip2, xz and zip with one member are unpacked. Other archives and
// binary formats are refused by name.
//
// # CSV
//
// The first row names the columns. Each later one becomes a line of JSON: the line
// in the source where the row begins, then the columns in order, all strings:
//
//	{"line":2,"name":"Ada","born":"1815"}
//
// Without a header (Options.NoHeader) a row is
//
//	{"line":1,"fields":["Ada","1815"]}
//
// A row ends at LF, CRLF or CR, as in Python's csv module. Fields keep the line
// breaks inside quotes as they are. Empty lines are skipped, but in a file of one
// column they are rows with an empty value. Keys are unique: a repeated name
// becomes "name_2", and a column without a name becomes "column3".
//
// A row is malformed if its number of fields differs from the header's, if a quote
// is misplaced, or if it contains bytes that cannot be decoded. A quote that is
// never closed would swallow the rest of the file. So the error names the place
// where it opens, and the next row begins on the line after. Columns of errors are
// bytes of UTF-8, from 1.
//
// # Goroutines
//
// The package starts none itself. A context.AfterFunc interrupts the read of an
// open file, a timer a download that stalls. Close stops both.
package records

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"strconv"
	"sync/atomic"
	"unicode/utf8"
)

const (
	// defaultBlockSize is the zero value of Options.BlockSize, in bytes.
	defaultBlockSize = 32 << 10

	// defaultMaxRecord is the zero value of Options.MaxRecord, in bytes.
	defaultMaxRecord = 1 << 20

	// excerpt is how much of a record that is too long its Error has, in bytes.
	excerpt = 4 << 10
)

// Errors that an [Error], or an error that ends a source, may wrap. Misplaced quotes
// and field counts are csv.ErrBareQuote, csv.ErrQuote and csv.ErrFieldCount.
var (
	ErrTooLong  = errors.New("too long")
	ErrColumns  = errors.New("too many columns")
	ErrEncoding = errors.New("cannot be decoded")
	ErrNUL      = errors.New("NUL bytes, as in UTF-16 without a byte order mark")
)

// A Format says how the input is split into records.
type Format int

// The formats.
const (
	Lines Format = iota + 1 // a line with its newline
	CSV                     // a row, as JSON
	Raw                     // a block of bytes
)

// String returns the format's name in lower case.
func (f Format) String() string {
	switch f {
	case Lines:
		return "lines"
	case CSV:
		return "csv"
	case Raw:
		return "raw"
	default:
		return "Format(" + strconv.Itoa(int(f)) + ")"
	}
}

// Options configures how a source is read. The zero value reads lines.
type Options struct {
	Format Format // zero means Lines

	NoHeader    bool // CSV: the first row is data
	Delimiter   rune // CSV: between fields; zero means a comma
	LazyQuotes  bool // CSV: quotes may be anywhere in fields, as in encoding/csv
	AllowRagged bool // CSV: rows may have fewer or more fields than the header
	Comment     rune // CSV: skip lines that begin with it; zero means none
	NameRows    bool // CSV: rows begin with "source", the name of the input

	// Encoding is the name of the text's encoding, in Lines and CSV. A byte order
	// mark takes precedence. Empty means UTF-8 for CSV, and any bytes for Lines.
	Encoding string

	// ReplaceInvalid sends U+FFFD for what cannot be decoded, and counts it.
	// Otherwise the record is an Error.
	ReplaceInvalid bool

	// BlockSize is the size of a Raw record, in bytes; the last may be shorter.
	// Zero means 32 KiB.
	BlockSize int

	// MaxRecord is the length of the longest line, or row and its JSON, in bytes.
	// Zero means 1 MiB. It bounds the memory of a Source.
	MaxRecord int

	// Pieces splits a line longer than MaxRecord into several records. Only the
	// last of them has a newline. Otherwise such a line is an Error.
	Pieces bool

	// Verbatim does not unpack, and decodes CSV only.
	Verbatim bool

	HTTP HTTPOptions // for URLs

	validate bool // text must be UTF-8; set by Source

	// From continues an input after this point instead of reading it from the
	// start. Only URLs whose server supports it do: see Source.Point.
	From *Point
}

// A Point is a place between two records of an input.
type Point struct {
	Bytes     int64    // before it
	Records   int64    // before it
	Lines     int64    // before it
	Header    []string // of CSV
	Validator string   // of the version of the URL
}

// A Record is one line, row or block.
type Record struct {
	Number int64 // from 1 within its source, malformed ones counted too
	Line   int64 // of the source where the record begins, from 1; 0 for Raw

	// Data is what to send, owned by the receiver: the line unchanged from the
	// source, the row as a line of JSON, or the block.
	Data []byte

	// Unended reports that Data is the last line of a source that ends without a
	// newline. What is written after it would join it.
	Unended bool
}

// An Error is a record that cannot be sent. Reading continues after it.
type Error struct {
	Source string // its Name
	Number int64  // of the record, as in Record
	Line   int64  // of the fault, from 1
	Column int64  // in bytes, from 1; 0 means the whole line

	Raw []byte // the record as in the source, decoded
	Cut bool   // Raw is only its beginning, because it is too long

	Err error // wraps one of the package's errors or one of encoding/csv
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

// A Source is an input from which one goroutine at a time reads records. Name,
// Size, Consumed, Replaced and Validator may be called concurrently.
type Source struct {
	in     *input
	opts   Options
	read   func() (Record, error)
	window *window  // Lines and CSV, once reading has begun
	rows   *rows    // CSV, once reading has begun
	ahead  buffered // between the input and the window: what was read and not yet used
	number int64
	err    error // the end of the records: io.EOF, or why

	exact    atomic.Bool // Consumed is exact: the input is neither packed nor decoded
	consumed atomic.Int64
	replaced atomic.Int64
}

type buffered interface{ Buffered() int }

// New makes a source of r, which it does not close; name is for errors.
func New(r io.Reader, name string, opts Options) (*Source, error) {
	return newSource(newInput(context.Background(), r, name), opts)
}

// newSource makes a source of in, which it closes on an error.
func newSource(in *input, opts Options) (*Source, error) {
	if opts.Format == 0 {
		opts.Format = Lines
	}
	if opts.Delimiter == 0 {
		opts.Delimiter = ','
	}
	if opts.BlockSize <= 0 {
		opts.BlockSize = defaultBlockSize
	}
	if opts.MaxRecord <= 0 {
		opts.MaxRecord = defaultMaxRecord
	}
	if err := opts.check(); err != nil {
		return nil, errors.Join(fmt.Errorf("read %s: %w", in.name, err), in.close())
	}
	s := &Source{in: in, opts: opts}
	s.read = s.begin
	return s, nil
}

// check reports the first option that makes no sense.
func (o Options) check() error {
	if o.Format < Lines || o.Format > Raw {
		return fmt.Errorf("unknown format: %v", o.Format)
	}
	if !ValidDelimiter(o.Delimiter) {
		return fmt.Errorf("%q cannot be a delimiter", o.Delimiter)
	}
	if o.Comment != 0 && (!ValidDelimiter(o.Comment) || o.Comment == o.Delimiter) {
		return fmt.Errorf("%q cannot begin comments", o.Comment)
	}
	return CheckEncoding(o.Encoding)
}

// ValidDelimiter reports whether r can separate fields of CSV.
func ValidDelimiter(r rune) bool {
	return r > 0 && r != '"' && r != '\r' && r != '\n' && r != utf8.RuneError && utf8.ValidRune(r)
}

// begin reads the first record. Only now is it known what the input contains, so
// that opening does not wait for the writer of a pipe.
func (s *Source) begin() (Record, error) {
	var r io.Reader = s.in
	exact := true
	from := s.opts.From
	if from != nil && !s.in.resumed {
		from = nil // the server sends the whole again
	}
	if !s.opts.Verbatim && from == nil {
		content, unpacked, err := unpack(s.in, s.opts.Format)
		if err != nil {
			return Record{}, err
		}
		s.ahead = content.(buffered)
		r, exact = content, !unpacked
	}
	s.opts.validate = s.opts.Format == CSV
	if from == nil && (s.opts.Format == CSV || s.opts.Format == Lines && !s.opts.Verbatim) {
		text, decoded, err := decode(r, s.opts)
		if err != nil {
			return Record{}, err
		}
		if s.ahead == nil {
			s.ahead = text.(buffered)
		}
		r, exact = text, exact && !decoded
		s.opts.validate = s.opts.validate || decoded
	}
	s.exact.Store(exact)
	if s.opts.Format == Raw {
		s.read = func() (Record, error) { return readBlock(r, s.opts.BlockSize) }
		return s.read()
	}
	s.window = newWindow(r, s.opts.MaxRecord)
	s.window.onlyLF = s.opts.Pieces
	if from != nil {
		s.number, s.window.line = from.Records, from.Lines+1
	}
	s.read = s.readLine
	if s.opts.Format == CSV {
		s.rows = newRows(s.window, s.opts, s.in.name, &s.replaced)
		if from != nil && from.Header != nil {
			s.rows.setHeader(from.Header)
		}
		s.read = s.rows.read
	}
	return s.read()
}

// All returns the records in order. A malformed one comes as an *Error with an
// empty Record. Any other error is the last, and comes after all records before it.
// A loop that breaks is continued by the next one.
func (s *Source) All() iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		for s.err == nil {
			record, err := s.next()
			if err == io.EOF {
				return
			}
			if !yield(record, err) {
				return
			}
		}
	}
}

// next reads a record, counts it, and completes its error.
func (s *Source) next() (Record, error) {
	record, err := Record{}, context.Cause(s.in.ctx)
	if err == nil {
		record, err = s.read()
	}
	malformed, ok := errors.AsType[*Error](err)
	s.consume(err == nil || ok)
	switch {
	case err == nil:
		s.number++
		record.Number = s.number
		return record, nil
	case ok:
		s.number++
		malformed.Source, malformed.Number = s.in.name, s.number
		return Record{}, malformed
	case err != io.EOF:
		err = fmt.Errorf("read %s: %w (records before: %d)", s.in.name, err, s.number)
	}
	s.err = err
	return Record{}, err
}

// consume updates Consumed after a record, or at the end of the input.
func (s *Source) consume(record bool) {
	n := s.in.consumed.Load()
	if record {
		if s.ahead != nil {
			n -= int64(s.ahead.Buffered())
		}
		if s.exact.Load() && s.window != nil {
			n -= int64(s.window.Buffered())
		}
	}
	s.consumed.Store(n)
}

// Name returns the name of the source in errors: that of the file, the URL without
// its secrets, or "standard input".
func (s *Source) Name() string { return s.in.name }

// Header returns the first row of CSV, once the first record or *Error has come. It
// is nil if there is none.
func (s *Source) Header() []string {
	if s.rows == nil {
		return nil
	}
	return s.rows.header
}

// Size returns the length of the input in bytes, as packed, if it is known: for a
// regular file, and for a URL whose server sends it. A file that grows while it is
// read has at least the size that was read.
func (s *Source) Size() (int64, bool) {
	if s.in.size < 0 {
		return 0, false
	}
	return max(s.in.size, s.in.consumed.Load()), true
}

// Consumed returns how many bytes of the input, as packed, the records so far took.
// For packed or decoded input it runs ahead of them by a few buffers.
func (s *Source) Consumed() int64 { return s.consumed.Load() }

// Replaced returns how many bytes or characters that could not be decoded were
// replaced by U+FFFD.
func (s *Source) Replaced() int64 { return s.replaced.Load() }

// Validator returns the ETag of a URL, or else the time of its last change, as its
// server sent it. It is empty for anything else.
func (s *Source) Validator() string { return s.in.validator }

// Resumed reports whether the source began at Options.From.
func (s *Source) Resumed() bool { return s.in.resumed }

// Point returns the place after the last record, and whether another source can
// begin there: for a URL that was read plainly, and whose server sent a validator.
func (s *Source) Point() (Point, bool) {
	if !s.exact.Load() || s.in.validator == "" || s.window != nil && s.window.eol == '\r' {
		return Point{}, false
	}
	p := Point{Bytes: s.Consumed(), Records: s.number, Header: s.Header(), Validator: s.in.validator}
	if s.window != nil {
		p.Lines = s.window.line - 1
	}
	return p, true
}

// Close closes the file or the connection that Open made. It must not be called
// while another goroutine is in a loop. A second Close returns nil.
func (s *Source) Close() error {
	s.read = func() (Record, error) { return Record{}, fs.ErrClosed } // frees the buffers
	return s.in.close()
}

// readBlock reads a block of that size, however the input delivers it, so that each
// reading of the same input has the same blocks.
func readBlock(r io.Reader, size int) (Record, error) {
	block := make([]byte, size)
	n, err := io.ReadFull(r, block)
	if err == io.ErrUnexpectedEOF {
		block, err = bytes.Clone(block[:n]), nil
	}
	if err != nil {
		return Record{}, err
	}
	return Record{Data: block}, nil
}
