package bulk

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"echod/client"
	"echod/internal/records"
	"echod/internal/text"
)

// State is what a run leaves for a later one to continue: how far each input was read,
// which of these records are still to be sent, and how much of the output belongs to the
// others. Its file exists from the start and is at most a few seconds old, so that a run
// that was killed can be continued. A nil State keeps nothing.
type State struct {
	path string

	mu         sync.Mutex // guards what follows
	now        savedState
	unfinished []map[int64]start // by input: the records that were taken and are not done
	last       []start           // by input: of the last record that was taken
	saved      time.Time
}

// saveEvery is how often the file is written.
const saveEvery = 2 * time.Second

// ErrNotSaved is returned if the state of a run cannot be written to its file.
var ErrNotSaved = errors.New("cannot save where to continue")

// A start is a place in an input where a later run can begin: before a record.
type start struct {
	point  records.Point
	ok     bool   // point is known, and not the beginning
	digest digest // of the records before
}

// A digest is a running hash of records. It recognises an input that is read again.
type digest [sha256.Size]byte

// add adds a record, or a malformed one.
func (d *digest) add(record records.Record, malformed *records.Error) {
	h := sha256.New()
	h.Write(d[:])
	if malformed != nil {
		fmt.Fprintf(h, "malformed %d %d %v ", malformed.Line, malformed.Column, malformed.Cut)
		h.Write(malformed.Raw)
	} else {
		h.Write(record.Data)
	}
	h.Sum(d[:0])
}

// OpenState reads the state of an earlier run from a file, which need not exist. The
// inputs, and how they are read, must be the same.
func OpenState(path string, inputs []string, opts records.Options) (*State, error) {
	s := &State{path: path, now: savedState{Version: stateVersion, reading: readingOf(opts)}}
	for _, name := range inputs {
		s.now.Inputs = append(s.now.Inputs, newSavedInput(name))
		s.unfinished = append(s.unfinished, map[int64]start{})
	}
	s.last = make([]start, len(inputs))
	content, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	} else if err != nil {
		return nil, err
	}
	var was savedState
	if err := json.Unmarshal(content, &was); err != nil || was.Version != stateVersion {
		return nil, fmt.Errorf("%s is not the state of an earlier run", path)
	}
	if err := was.validate(); err != nil {
		return nil, fmt.Errorf("%s is damaged: %w", path, err)
	}
	if err := s.now.differs(&was); err != nil {
		return nil, fmt.Errorf("continue from %s: %w", path, err)
	}
	s.now = was
	for i := range was.Inputs {
		in := &was.Inputs[i]
		in.before, in.missing = in.Records, map[int64]bool{}
		for _, number := range in.Missing {
			in.missing[number] = true
			s.unfinished[i][number] = start{} // set when the record is read again
		}
		if from := in.Continue; from != nil {
			first := start{from.point(in.Validator), true, from.digest()}
			s.last[i] = first
			if len(in.Missing) > 0 {
				s.unfinished[i][in.Missing[0]] = first
			}
		}
	}
	return s, nil
}

// continues reports whether there was an earlier run.
func (s *State) continues() bool {
	return s != nil && slices.ContainsFunc(s.now.Inputs, func(in savedInput) bool { return in.before > 0 })
}

// progress returns the progress of the earlier run.
func (s *State) progress() progress {
	if s == nil {
		return progress{}
	}
	return s.now.progress
}

// complete reports whether all of an input is done.
func (s *State) complete(i int) bool {
	if s == nil {
		return false
	}
	in := &s.now.Inputs[i]
	return in.Complete && len(in.missing) == 0
}

// records returns how many records of an input were read.
func (s *State) records(i int) int64 { return s.now.Inputs[i].Records }

// from returns where an input can be continued, or nil for its beginning.
func (s *State) from(i int) *records.Point {
	if s == nil || s.now.Inputs[i].Continue == nil {
		return nil
	}
	point := s.now.Inputs[i].Continue.point(s.now.Inputs[i].Validator)
	return &point
}

// open prepares the check that a source has the records that an earlier run read.
func (s *State) open(i int, source *records.Source) (*inputCheck, error) {
	if s == nil {
		return &inputCheck{}, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	in := &s.now.Inputs[i]
	if v := source.Validator(); in.before == 0 {
		in.Validator = v
	} else if v != in.Validator {
		return nil, fmt.Errorf("read %s: it changed since %s was written: its ETag or time is %q, and was %q",
			source.Name(), s.path, v, in.Validator)
	}
	c := &inputCheck{enabled: true, before: in.before, want: in.Digest}
	if source.Resumed() {
		c.current = start{in.Continue.point(in.Validator), true, in.Continue.digest()}
		c.number, c.from = c.current.point.Records, c.current.point
	}
	return c, nil
}

// has reports whether an earlier run is done with a record.
func (s *State) has(k key) bool {
	if s == nil {
		return false
	}
	in := &s.now.Inputs[k.input]
	return k.number <= in.before && !in.missing[k.number]
}

// take notes that a record is about to be sent.
func (s *State) take(k key) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	in := &s.now.Inputs[k.input]
	if k.number > in.Records {
		in.Records, in.Digest = k.number, hex.EncodeToString(k.digest[:])
		s.last[k.input] = k.start
	}
	s.unfinished[k.input][k.number] = k.start
}

// done notes that records need not be sent again, and the progress with them.
func (s *State) done(keys []key, p progress) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range keys {
		delete(s.unfinished[k.input], k.number)
	}
	s.now.progress = p
}

// read notes that an input was read to its end.
func (s *State) read(i int) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now.Inputs[i].Complete = true
}

// checkpoint writes the file if it is due.
func (s *State) checkpoint() error {
	if s == nil || time.Since(s.saved) < saveEvery {
		return nil
	}
	return s.save()
}

// save writes the file. Only the goroutine of Run calls it.
func (s *State) save() error {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.now.Inputs {
		in := &s.now.Inputs[i]
		in.Missing = slices.Sorted(maps.Keys(s.unfinished[i]))
		from := s.last[i]
		if len(in.Missing) > 0 {
			from = s.unfinished[i][in.Missing[0]]
		}
		in.Continue = from.saved()
	}
	s.saved = time.Now()
	if err := s.now.write(s.path); err != nil {
		return fmt.Errorf("%w: %w", ErrNotSaved, err)
	}
	return nil
}

// remove removes the file when there is nothing to continue.
func (s *State) remove() error {
	if s == nil {
		return nil
	}
	if err := os.Remove(s.path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// An inputCheck checks that an input begins with the records that an earlier run read.
// Until the check has passed, the records that the earlier run did not finish are pending.
type inputCheck struct {
	enabled bool
	before  int64         // records that the earlier run read
	want    string        // their digest; empty in files of older versions
	from    records.Point // where the input was continued

	number  int64 // of the last record
	current start // after it
	pending []client.Item[key]
}

// next notes a record, and returns the start before it and the digest with it.
func (c *inputCheck) next(
	source *records.Source, record records.Record, malformed *records.Error,
) (before start, with digest) {
	if !c.enabled {
		return start{}, digest{}
	}
	before = c.current
	c.number++
	c.current.digest.add(record, malformed)
	c.current.point, c.current.ok = source.Point()
	return before, c.current.digest
}

// verify reports whether the records that the earlier run read are the same.
func (c *inputCheck) verify(name string) error {
	if c.want == "" || c.want == hex.EncodeToString(c.current.digest[:]) {
		return nil
	}
	return fmt.Errorf("read %s: it is not the input that the earlier run read: its first %s differ",
		name, text.Count(c.before, "record"))
}

// atEnd reports whether the input has all records that the earlier run read.
func (c *inputCheck) atEnd(name string) error {
	if c.number >= c.before {
		return nil
	}
	return fmt.Errorf("read %s: it is not the input that the earlier run read: it has %s, and had at least %d",
		name, text.Count(c.number, "record"), c.before)
}

// savedState is the content of a state file.
type savedState struct {
	Version int `json:"version"`
	reading
	progress
	Inputs []savedInput `json:"inputs"`
}

const stateVersion = 1

// reading is how inputs are read. It determines the numbers of records.
type reading struct {
	Format     string `json:"format"`
	NoHeader   bool   `json:"no_header,omitempty"`
	Delimiter  string `json:"delimiter"`
	LazyQuotes bool   `json:"lazy_quotes,omitempty"`
	Ragged     bool   `json:"allow_ragged,omitempty"`
	Comment    string `json:"comment,omitempty"`
	Encoding   string `json:"encoding,omitempty"`
	Replace    bool   `json:"replace_invalid,omitempty"`
	BlockSize  int    `json:"block_size"`
	MaxRecord  int    `json:"max_record"`
	Pieces     bool   `json:"pieces,omitempty"`
	Verbatim   bool   `json:"verbatim,omitempty"`
}

func readingOf(o records.Options) reading {
	r := reading{
		Format: o.Format.String(), NoHeader: o.NoHeader, Delimiter: string(o.Delimiter), LazyQuotes: o.LazyQuotes,
		Ragged: o.AllowRagged, Encoding: strings.ToLower(o.Encoding), Replace: o.ReplaceInvalid,
		BlockSize: o.BlockSize, MaxRecord: o.MaxRecord, Pieces: o.Pieces, Verbatim: o.Verbatim,
	}
	if o.Comment != 0 {
		r.Comment = string(o.Comment)
	}
	return r
}

// progress describes what was written to the files, and what failed.
type progress struct {
	Output    *savedOutput `json:"output,omitempty"`
	MidLine   bool         `json:"mid_line,omitempty"` // the output's last line has no newline
	Failures  *savedOutput `json:"failures,omitempty"`
	Malformed int64        `json:"malformed,omitempty"`
	Failed    int64        `json:"failed,omitempty"`
}

type savedInput struct {
	Name      string    `json:"name"`                // without its secrets
	Hash      string    `json:"hash,omitempty"`      // of the whole name, where Name does not determine it
	Size      int64     `json:"size,omitempty"`      // of a file
	Modified  time.Time `json:"modified,omitzero"`   // of a file
	Validator string    `json:"validator,omitempty"` // of a URL

	Records  int64       `json:"records"`            // those that were read
	Digest   string      `json:"digest,omitempty"`   // of those
	Missing  []int64     `json:"missing,omitempty"`  // those of them that are still to be sent
	Complete bool        `json:"complete,omitempty"` // there are no more
	Continue *savedStart `json:"continue,omitempty"` // of a URL, before the first of Missing

	missing map[int64]bool // Missing, as it was read
	before  int64          // Records, as it was read
}

type savedStart struct {
	Bytes   int64    `json:"bytes"`
	Records int64    `json:"records"`
	Lines   int64    `json:"lines"`
	Header  []string `json:"header,omitempty"`
	Digest  string   `json:"digest"`
}

func (s start) saved() *savedStart {
	if !s.ok || s.point.Bytes == 0 {
		return nil
	}
	return &savedStart{s.point.Bytes, s.point.Records, s.point.Lines, s.point.Header, hex.EncodeToString(s.digest[:])}
}

func (s *savedStart) point(validator string) records.Point {
	return records.Point{Bytes: s.Bytes, Records: s.Records, Lines: s.Lines, Header: s.Header, Validator: validator}
}

func (s *savedStart) digest() (d digest) {
	_, _ = hex.Decode(d[:], []byte(s.Digest)) // validated when it was read
	return d
}

func newSavedInput(name string) savedInput {
	in := savedInput{Name: validName(records.PublicName(name))}
	if name != stdinName && in.Name != name {
		in.Hash = hashOf([]byte(name))
	}
	if info := statRegular(name); info != nil {
		in.Size, in.Modified = info.Size(), info.ModTime()
	}
	return in
}

// validName returns the name in a form that JSON can hold. A file name can have any bytes.
func validName(name string) string { return strings.ToValidUTF8(name, string(utf8.RuneError)) }

func hashOf(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:8])
}

// statRegular returns what is known of a regular file, and nil for anything else.
func statRegular(name string) fs.FileInfo {
	if name == stdinName {
		return nil
	}
	if info, err := os.Stat(name); err == nil && info.Mode().IsRegular() {
		return info
	}
	return nil
}

// validate checks every number of a file that was read.
func (s *savedState) validate() error {
	for _, out := range []*savedOutput{s.Output, s.Failures} {
		if out != nil && out.Length < 0 {
			return fmt.Errorf("the length %d is negative", out.Length)
		}
	}
	if s.Malformed < 0 || s.Failed < 0 {
		return errors.New("a number of failures is negative")
	}
	for _, in := range s.Inputs {
		if in.Records < 0 || in.Size < 0 {
			return fmt.Errorf("a number of %s is negative", in.Name)
		}
		last := int64(0)
		for _, number := range in.Missing {
			if number <= last || number > in.Records {
				return fmt.Errorf("record %d of %s is out of place", number, in.Name)
			}
			last = number
		}
		if from := in.Continue; from != nil {
			if from.Bytes < 0 || from.Lines < 0 || from.Records < 0 || from.Records > in.Records ||
				len(in.Missing) > 0 && from.Records >= in.Missing[0] {
				return fmt.Errorf("the place to continue %s is out of range", in.Name)
			}
			if d, err := hex.DecodeString(from.Digest); err != nil || len(d) != sha256.Size {
				return fmt.Errorf("a digest of %s is malformed", in.Name)
			}
		}
	}
	return nil
}

// differs returns an error if the inputs, or how they are read, differ from was.
func (s *savedState) differs(was *savedState) error {
	for _, c := range []struct {
		what     string
		was, now any
	}{
		{"format", was.Format, s.Format},
		{"header", !was.NoHeader, !s.NoHeader},
		{"delimiter", was.Delimiter, s.Delimiter},
		{"lazy quotes", was.LazyQuotes, s.LazyQuotes},
		{"ragged rows", was.Ragged, s.Ragged},
		{"comments", was.Comment, s.Comment},
		{"encoding", was.Encoding, s.Encoding},
		{"replacing of invalid text", was.Replace, s.Replace},
		{"block size", was.BlockSize, s.BlockSize},
		{"longest record", was.MaxRecord, s.MaxRecord},
		{"splitting of long lines", was.Pieces, s.Pieces},
		{"verbatim input", was.Verbatim, s.Verbatim},
	} {
		if c.was != c.now {
			return fmt.Errorf("the earlier run read its input in another way: %s was %v, and is %v", c.what,
				c.was, c.now)
		}
	}
	if len(was.Inputs) != len(s.Inputs) {
		return fmt.Errorf("the earlier run had %s, not %d", text.Count(len(was.Inputs), "input"), len(s.Inputs))
	}
	for i := range was.Inputs {
		was, now := &was.Inputs[i], &s.Inputs[i]
		switch {
		case was.Name != now.Name:
			return fmt.Errorf("the earlier run read %s, not %s", was.Name, now.Name)
		case was.Hash != now.Hash:
			return fmt.Errorf("the earlier run read %s with another user, query or fragment", now.Name)
		case was.Size != now.Size:
			return fmt.Errorf("%s changed since: it has %d bytes, and had %d", now.Name, now.Size, was.Size)
		case !was.Modified.Equal(now.Modified):
			return fmt.Errorf("%s changed since: its time is %s, and was %s", now.Name,
				now.Modified.Format(time.DateTime), was.Modified.Format(time.DateTime))
		}
	}
	return nil
}

// write replaces the file by a complete one.
func (s *savedState) write(path string) error {
	content, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	temporary, err := os.CreateTemp(filepath.Dir(path), ".echod-send-*")
	if err != nil {
		return err
	}
	_, err = temporary.Write(append(content, '\n'))
	if err = errors.Join(err, temporary.Close()); err == nil {
		err = os.Rename(temporary.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(temporary.Name()))
	}
	return nil
}
