package records

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"net/http"
	"strconv"
	"sync/atomic"
)

const (
	// defaultBlockSize is the zero value of Options.BlockSize: the buffer of
	// io.Copy. A thousand blocks in flight are 32 MiB.
	defaultBlockSize = 32 << 10

	// defaultMaxRecord is the zero value of Options.MaxRecord.
	defaultMaxRecord = 1 << 20
)

// Format says what a record is.
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

// Options says how a source is read. The zero value is usable.
type Options struct {
	Format Format // zero means Lines

	NoHeader   bool // CSV: the first row is data
	Delimiter  rune // CSV: between fields; zero means a comma
	LazyQuotes bool // CSV: quotes may stand anywhere in fields, as csv.Reader has it

	// BlockSize is the size of a Raw record, in bytes; the last may be shorter.
	// Zero means 32 KiB.
	BlockSize int

	// MaxRecord is the length of the longest line, or row and what becomes of
	// it, in bytes. Zero means 1 MiB. It bounds the memory of a Source.
	MaxRecord int

	// Pieces makes several records of a line longer than MaxRecord, which is an
	// Error otherwise. All but the last have no newline, and belong together.
	Pieces bool

	// Verbatim leaves what is gzip or zstd as it is.
	Verbatim bool

	// HTTP requests URLs; nil means a client that gives up connecting after
	// 10 s. With any client, a server from which nothing comes for a minute is
	// given up, at the start or later.
	HTTP *http.Client
}

// A Record is one line, row or block.
type Record struct {
	Number int64 // from 1 within its source, those that are an Error counted too
	Line   int64 // of the source where the record begins, from 1; 0 for Raw

	// Data is what is to be sent, and the receiver's own. It is the line as it
	// stands in the source, the row as a line of JSON, or the block.
	Data []byte

	// Unended says that Data is the last line of a source that ends without a
	// newline. It has none either, so what is sent behind it would join it.
	Unended bool
}

// A Source is an input from which records are read, by one goroutine at a time.
// Name, Size, Consumed and Validator may be called concurrently.
type Source struct {
	in     *input
	read   func() (Record, error)
	rows   *rows // CSV, once it was begun
	number int64
	err    error // the end of the records: io.EOF, or why

	ahead    []interface{ Buffered() int } // what was read of in, and is in no record yet
	consumed atomic.Int64
}

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
	s := &Source{in: in}
	s.read = func() (Record, error) { return s.begin(opts) }
	switch {
	case opts.Format < Lines || opts.Format > Raw:
		return nil, errors.Join(fmt.Errorf("read %s: no such format: %v", in.name, opts.Format), in.close())
	case !validDelimiter(opts.Delimiter):
		return nil, errors.Join(fmt.Errorf("read %s: %q cannot be a delimiter", in.name, opts.Delimiter), in.close())
	}
	return s, nil
}

// begin reads the first record. What the input is like is seen only now, so that
// opening does not wait for somebody to write it.
func (s *Source) begin(opts Options) (Record, error) {
	var r io.Reader = s.in
	if !opts.Verbatim {
		var err error
		if r, err = unpack(s.in); err != nil {
			return Record{}, err
		}
		s.ahead = append(s.ahead, r.(interface{ Buffered() int }))
	}
	if opts.Format == Raw {
		s.read = func() (Record, error) { return readBlock(r, opts.BlockSize) }
		return s.read()
	}
	w := newWindow(r, opts.MaxRecord)
	s.read = func() (Record, error) { return w.readRecord(opts.Pieces) }
	if opts.Format == CSV {
		s.rows = newRows(w, opts)
		s.read = s.rows.readRecord
	}
	if _, packed := r.(*unpacker); !packed { // else its bytes are others
		s.ahead = append(s.ahead, w)
	}
	return s.read()
}

// All returns the records in their order. A malformed one comes as an *Error,
// with an empty Record; any other error is the last, and comes after all records
// before it. A loop that was left is gone on with by the next.
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
	s.consume(err)
	malformed, ok := errors.AsType[*Error](err)
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

// Name returns what the source is called in errors: the file's name, the URL
// without what may be secret in it, or "standard input".
func (s *Source) Name() string { return s.in.name }

// Header returns the first row of CSV as it stands in the source, once the first
// record, or an *Error, has come. It is nil where there is none.
func (s *Source) Header() []string {
	if s.rows == nil {
		return nil
	}
	return s.rows.header
}

// Size returns the length of the input in bytes, packed as it is, if it is known:
// of a regular file, and of a URL whose server tells it.
func (s *Source) Size() (int64, bool) { return max(s.in.size, 0), s.in.size >= 0 }

// Consumed returns how many bytes of the input, packed as it is, it took to get the
// records so far; of packed input that is ahead of them, by some buffers.
func (s *Source) Consumed() int64 { return s.consumed.Load() }

// consume notes where a record, or with another error than its own the input, ends.
func (s *Source) consume(err error) {
	n := s.in.consumed.Load()
	if _, malformed := errors.AsType[*Error](err); err == nil || malformed {
		for _, buffer := range s.ahead {
			n -= int64(buffer.Buffered())
		}
	}
	s.consumed.Store(n)
}

// Validator returns what the server of a URL says to tell one version of it from
// another: the ETag, or the time of the last change. It is empty for all else.
func (s *Source) Validator() string { return s.in.validator }

// Close closes the file or the connection that Open made. It must not be called
// while another goroutine is in a loop. A second Close returns nil.
func (s *Source) Close() error {
	s.read = func() (Record, error) { return Record{}, fs.ErrClosed } // frees the buffers
	return s.in.close()
}

// readRecord reads a line, or a piece of it.
func (w *window) readRecord(pieces bool) (Record, error) {
	w.begin()
	line, err := w.readLine()
	switch {
	case err == ErrTooLong && pieces:
		return Record{Line: w.first, Data: bytes.Clone(w.cut())}, nil
	case err == ErrTooLong:
		return Record{}, w.tooLong()
	case err != nil:
		return Record{}, err
	}
	return Record{Line: w.first, Data: bytes.Clone(line), Unended: line[len(line)-1] != '\n'}, nil
}

// readBlock reads a block of that size, so that blocks are the same whenever a
// source is read.
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
