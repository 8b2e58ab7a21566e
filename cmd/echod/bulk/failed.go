package bulk

import (
	"bufio"
	"bytes"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"echod/client/records"
)

// Failed is a file of records that have not come back, in the form in which they can be sent again. A nil one keeps nothing.
type Failed struct {
	file *os.File
	w    *bufio.Writer
	opts records.Options
	any  bool // something is in it
}

// NewFailed creates the file, or goes on with the one that is there.
func NewFailed(path string, opts records.Options, goOn bool) (*Failed, error) {
	file, err := Create(path, goOn)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	return &Failed{file: file, w: bufio.NewWriter(file), opts: opts, any: err == nil && info.Size() > 0}, nil
}

// Create opens a file to write to, which is emptied unless goOn is set.
func Create(path string, goOn bool) (*os.File, error) {
	flags := os.O_WRONLY | os.O_CREATE | os.O_TRUNC
	if goOn {
		flags = os.O_WRONLY | os.O_CREATE | os.O_APPEND
	}
	return os.OpenFile(path, flags, 0o666)
}

// add adds what was sent for a record of an input with that header, which is nil for all but CSV.
func (f *Failed) add(header []string, data []byte) error {
	if f == nil {
		return nil
	}
	var err error
	if f.opts.Format == records.CSV {
		var fields []string
		if fields, err = fieldsOf(data, header != nil); err == nil {
			err = f.write(header, nil)
		}
		if err == nil {
			err = f.writeRow(fields)
		}
	} else {
		err = f.write(nil, data)
	}
	return f.wrap(err)
}

// addMalformed adds a record as it stands in its source, for a person to mend.
func (f *Failed) addMalformed(header []string, e *records.Error) error {
	if f == nil || e.Cut {
		return nil
	}
	return f.wrap(f.write(header, e.Raw))
}

// write writes raw data, as a line of its own but in blocks, and the header before what is the first.
func (f *Failed) write(header []string, raw []byte) error {
	if !f.any && header != nil {
		if err := f.writeRow(header); err != nil {
			return err
		}
	}
	f.any = true
	_, err := f.w.Write(raw)
	if err == nil && f.opts.Format != records.Raw && len(raw) > 0 && !bytes.HasSuffix(raw, []byte("\n")) {
		err = f.w.WriteByte('\n')
	}
	return err
}

func (f *Failed) writeRow(fields []string) error {
	w := csv.NewWriter(f.w)
	w.Comma = f.opts.Delimiter
	_ = w.Write(fields) // Error has it
	w.Flush()
	return w.Error()
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
	return fmt.Errorf("writing %s: %w", f.file.Name(), err)
}

// close writes what is left, and removes a file with nothing in it.
func (f *Failed) close() error {
	if f == nil {
		return nil
	}
	err := errors.Join(f.wrap(f.w.Flush()), f.file.Close())
	if info, statErr := os.Stat(f.file.Name()); err == nil && statErr == nil && info.Size() == 0 && info.Mode().IsRegular() {
		err = os.Remove(f.file.Name())
	}
	return err
}
