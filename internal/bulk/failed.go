package bulk

import (
	"bufio"
	"bytes"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"echod/internal/records"
)

// Failed is a file of records that have not come back, in the form in which they can be sent again. A nil one keeps nothing.
//
// Rows of CSV are written anew from what was sent: CRLF within quotes has become LF, and what is not UTF-8 U+FFFD.
type Failed struct {
	to   *Target
	w    *bufio.Writer
	opts records.Options
}

// OpenFailed opens the file. It stays as it is until Prepare.
func OpenFailed(path string, opts records.Options) (*Failed, error) {
	to, err := OpenTarget(path)
	if err != nil {
		return nil, err
	}
	return &Failed{to: to, w: bufio.NewWriter(to), opts: opts}, nil
}

func (f *Failed) target() *Target {
	if f == nil {
		return nil
	}
	return f.to
}

// add adds what was sent for a record of an input with that header, which is nil for all but CSV.
func (f *Failed) add(header []string, data []byte) error {
	if f == nil {
		return nil
	}
	if f.opts.Format != records.CSV {
		return f.wrap(f.write(nil, data))
	}
	fields, err := fieldsOf(data, header != nil)
	if err == nil {
		err = f.write(header, f.row(fields))
	}
	return f.wrap(err)
}

// addMalformed adds a record as it stands in its source, for a person to mend, unless only its beginning is known.
func (f *Failed) addMalformed(header []string, e *records.Error) error {
	if f == nil || e.Cut {
		return nil
	}
	return f.wrap(f.write(header, e.Raw))
}

// write writes raw data, as a line of its own but in blocks, and the header before what is the first.
func (f *Failed) write(header []string, raw []byte) error {
	if header != nil && f.to.length == 0 && f.w.Buffered() == 0 {
		_, _ = f.w.Write(f.row(header)) // the error stays
	}
	_, err := f.w.Write(raw)
	if f.opts.Format != records.Raw && !bytes.HasSuffix(raw, []byte("\n")) {
		err = f.w.WriteByte('\n')
	}
	return err
}

// row writes a row as it is read: one of a single empty field would be an empty line, which is no row.
func (f *Failed) row(fields []string) []byte {
	if len(fields) == 1 && fields[0] == "" {
		return []byte("\"\"\n")
	}
	var b bytes.Buffer
	w := csv.NewWriter(&b)
	w.Comma = f.opts.Delimiter
	_ = w.Write(fields) // which format has checked
	w.Flush()
	return b.Bytes()
}

// fieldsOf undoes what package records makes of a row.
func fieldsOf(data []byte, named bool) ([]string, error) {
	if !named {
		var row struct{ Fields []string }
		err := json.Unmarshal(data, &row)
		return row.Fields, err
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	var fields []string
	_, err := dec.Token() // the brace
	for err == nil && dec.More() {
		var value any
		if _, err = dec.Token(); err == nil { // the name
			err = dec.Decode(&value)
		}
		if field, ok := value.(string); ok { // all but the number of the line are
			fields = append(fields, field)
		}
	}
	return fields, err
}

func (f *Failed) wrap(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("writing %s: %w", f.to.file.Name(), err)
}

func (f *Failed) flush() error {
	if f == nil {
		return nil
	}
	return f.wrap(f.w.Flush())
}

// close removes a file with nothing in it.
func (f *Failed) close() error {
	if f == nil {
		return nil
	}
	end, _ := f.to.file.Seek(0, io.SeekEnd) // of a regular file
	err := f.wrap(f.to.close())
	if err == nil && f.to.regular && end == 0 {
		err = os.Remove(f.to.file.Name())
	}
	return err
}
