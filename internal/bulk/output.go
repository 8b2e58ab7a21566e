package bulk

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"echod/internal/records"
)

// Output is what a run writes to: a file, which a later run can continue, or a stream. A
// nil Output takes nothing.
type Output struct {
	w       io.Writer
	file    *os.File // nil: a stream
	path    string   // absolute
	regular bool
	created bool   // the file did not exist
	cut     bool   // the first Write truncates the file to length
	length  int64  // of a regular file
	tail    []byte // the last bytes before length, to recognise the file
}

const tailSize = 4 << 10

// NewOutput makes an output of a stream, which stays open.
func NewOutput(w io.Writer) *Output { return &Output{w: w} }

// OpenOutput opens a file to write to. Its content stays until Prepare. It follows no
// symbolic link in a directory in which others can create one.
func OpenOutput(path string) (*Output, error) {
	file, created, err := openForWriting(path)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	absolute, err := filepath.Abs(path)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return &Output{
		w: file, file: file, path: absolute, created: created,
		regular: info.Mode().IsRegular(), length: info.Size(),
	}, nil
}

// openForWriting opens or creates a file, and reports whether it created it.
func openForWriting(path string) (file *os.File, created bool, err error) {
	const mode = 0o666
	file, err = os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode) // follows no link
	if !errors.Is(err, fs.ErrExist) {
		return file, err == nil, err
	}
	file, err = os.OpenFile(path, os.O_WRONLY|openNoFollow, mode)
	if !isSymlink(path, err) {
		return file, false, err
	}
	dir, err := os.Stat(filepath.Dir(path))
	if err != nil {
		return nil, false, err
	}
	const othersWrite = 0o022
	if dir.Mode()&othersWrite != 0 {
		return nil, false, fmt.Errorf("open %s: refused to follow a symbolic link in a directory that others "+
			"can write to", path)
	}
	file, err = os.OpenFile(path, os.O_WRONLY|os.O_CREATE, mode)
	return file, false, err
}

// isSymlink reports whether err, from opening path without following links, means that
// it is one.
func isSymlink(path string, err error) bool {
	if err == nil {
		return false
	}
	info, statErr := os.Lstat(path)
	return statErr == nil && info.Mode()&fs.ModeSymlink != 0
}

// savedOutput is what a state file contains about an output.
type savedOutput struct {
	File   string `json:"file"`
	Hash   string `json:"hash,omitempty"` // of the name, if it is not UTF-8
	Length int64  `json:"length"`         // up to the end of a record
	Tail   string `json:"tail"`           // a hash of the bytes before it
}

func (o *Output) saved() *savedOutput {
	if o == nil || o.file == nil {
		return nil
	}
	s := &savedOutput{File: validName(o.path), Length: o.length, Tail: hashOf(o.tail)}
	if s.File != o.path {
		s.Hash = hashOf([]byte(o.path))
	}
	return s
}

func (o *Output) name() string { return o.file.Name() }

// seek finds where to write. The file of an earlier run has all records that are done,
// and maybe more, which are sent again. If the earlier run wrote to no file, this run
// appends to the file.
func (o *Output) seek(was *savedOutput, continues bool) error {
	switch {
	case o == nil || !o.regular || continues && was == nil:
		return nil
	case !continues:
		o.length = 0
		return nil
	}
	if now := o.saved(); was.File != now.File || was.Hash != now.Hash {
		return fmt.Errorf("the earlier run wrote to %s, not to %s", was.File, o.path)
	}
	tail := make([]byte, min(tailSize, was.Length))
	file, err := os.Open(o.path)
	if err != nil {
		return err
	}
	defer file.Close()
	if _, err := file.ReadAt(tail, was.Length-int64(len(tail))); err != nil || hashOf(tail) != was.Tail {
		return fmt.Errorf("%s is not the output of the earlier run: it differs before byte %d", o.path, was.Length)
	}
	o.length, o.tail = was.Length, tail
	return nil
}

// truncate removes everything after the place to write to.
func (o *Output) truncate() error {
	if o == nil || !o.regular {
		return nil
	}
	o.cut = false
	_, err := o.file.Seek(o.length, io.SeekStart)
	return errors.Join(err, o.file.Truncate(o.length))
}

func (o *Output) Write(p []byte) (int, error) {
	if o.cut {
		if err := o.truncate(); err != nil {
			return 0, err
		}
	}
	n, err := o.w.Write(p)
	o.length += int64(n)
	o.tail = append(o.tail, p[max(0, n-tailSize):n]...)
	o.tail = append(o.tail[:0], o.tail[max(0, len(o.tail)-tailSize):]...)
	return n, err
}

func (o *Output) close() error {
	if o.file == nil {
		return nil
	}
	return o.file.Close()
}

// Prepare makes the files ready to be written. Their content is discarded only after the state was saved. A file of
// failed records that exists stays as it is until one fails.
func Prepare(out *Output, failed *FailedFile, state *State) error {
	p := state.progress()
	for o, was := range map[*Output]*savedOutput{out: p.Output, failed.output(): p.Failures} {
		if err := o.seek(was, state.continues()); err != nil {
			return err
		}
	}
	p.Output, p.Failures = out.saved(), failed.output().saved()
	state.done(nil, p)
	if err := state.save(); err != nil {
		return err
	}
	if err := out.truncate(); err != nil {
		return err
	}
	if to := failed.output(); to != nil && to.regular && to.length == 0 {
		to.cut = true
		return nil
	}
	return failed.output().truncate()
}

// FailedFile is a file of records that did not come back, in a form in which they can be
// sent again. A nil FailedFile keeps nothing.
type FailedFile struct {
	to   *Output
	w    *bufio.Writer
	opts records.Options
}

// OpenFailedFile opens the file. Its content stays until Prepare.
func OpenFailedFile(path string, opts records.Options) (*FailedFile, error) {
	to, err := OpenOutput(path)
	if err != nil {
		return nil, err
	}
	return &FailedFile{to: to, w: bufio.NewWriter(to), opts: opts}, nil
}

func (f *FailedFile) output() *Output {
	if f == nil {
		return nil
	}
	return f.to
}

// Unchanged reports whether the file existed, and still has its earlier content, because
// no record failed. It may be called after Run.
func (f *FailedFile) Unchanged() bool {
	return f != nil && f.to.cut && !f.to.created
}

// add adds a record that was sent. header is that of its input; nil if there is none.
func (f *FailedFile) add(header []string, data []byte) error {
	if f == nil {
		return nil
	}
	if f.opts.Format != records.CSV {
		return f.wrap(f.write(nil, data))
	}
	fields, err := f.fields(data, header != nil)
	if err == nil {
		err = f.write(header, records.AppendCSV(nil, fields, f.opts))
	}
	return f.wrap(err)
}

// addMalformed adds a record unchanged from its source, for a person to correct, unless
// only its beginning is known.
func (f *FailedFile) addMalformed(header []string, e *records.Error) error {
	if f == nil || e.Cut {
		return nil
	}
	return f.wrap(f.write(header, e.Raw))
}

// write writes a record, and the header before the first. All but blocks are lines, in
// UTF-8. The file begins with a byte order mark, since that takes precedence over --encoding.
func (f *FailedFile) write(header []string, raw []byte) error {
	if first := f.to.length == 0 && f.w.Buffered() == 0; first {
		if f.opts.Encoding != "" {
			_, _ = f.w.WriteString("\ufeff") // the bufio.Writer keeps its error
		}
		if header != nil {
			_, _ = f.w.Write(records.AppendCSV(nil, header, f.opts))
		}
	}
	_, err := f.w.Write(raw)
	if f.opts.Format != records.Raw && !bytes.HasSuffix(raw, []byte("\n")) {
		err = f.w.WriteByte('\n')
	}
	return err
}

// fields returns the fields of a row that package records has converted to JSON.
func (f *FailedFile) fields(data []byte, named bool) ([]string, error) {
	if !named {
		var row struct{ Fields []string }
		err := json.Unmarshal(data, &row)
		return row.Fields, err
	}
	skip := 1 // the line
	if f.opts.NameRows {
		skip = 2 // and the source
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	var fields []string
	_, err := dec.Token() // the brace
	for n := 0; err == nil && dec.More(); n++ {
		var value any
		if _, err = dec.Token(); err == nil { // the name
			err = dec.Decode(&value)
		}
		if field, ok := value.(string); ok && n >= skip {
			fields = append(fields, field)
		}
	}
	return fields, err
}

func (f *FailedFile) wrap(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("writing %s: %w", f.to.name(), err)
}

func (f *FailedFile) flush() error {
	if f == nil {
		return nil
	}
	return f.wrap(f.w.Flush())
}

// close closes the file. It removes one that the run has created and left empty.
func (f *FailedFile) close() error {
	if f == nil {
		return nil
	}
	err := f.wrap(f.to.close())
	if err == nil && f.to.created && f.to.length == 0 {
		err = os.Remove(f.to.name())
	}
	return err
}
