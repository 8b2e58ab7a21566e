package bulk

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"echod/internal/records"
)

// savedState is a State in its file.
type savedState struct {
	Version int `json:"version"`
	reading
	reached
	Inputs []savedInput `json:"inputs"`
}

const stateVersion = 1

// reading is how inputs are read: what has a number then has another when they are read in another way.
type reading struct {
	Format     string `json:"format"`
	NoHeader   bool   `json:"no_header,omitempty"`
	Delimiter  string `json:"delimiter"`
	LazyQuotes bool   `json:"lazy_quotes,omitempty"`
	BlockSize  int    `json:"block_size"`
	MaxRecord  int    `json:"max_record"`
	Pieces     bool   `json:"pieces,omitempty"`
	Verbatim   bool   `json:"verbatim,omitempty"`
}

func readingOf(o records.Options) reading {
	return reading{o.Format.String(), o.NoHeader, string(o.Delimiter), o.LazyQuotes, o.BlockSize, o.MaxRecord, o.Pieces, o.Verbatim}
}

// reached is how far the files have come that are written, and what has come to nothing.
type reached struct {
	Output    *savedTarget `json:"output,omitempty"`
	MidLine   bool         `json:"mid_line,omitempty"` // the output's last line has no end
	Failures  *savedTarget `json:"failures,omitempty"`
	Malformed int64        `json:"malformed,omitempty"`
	Failed    int64        `json:"failed,omitempty"`
}

type savedInput struct {
	Name      string    `json:"name"`                // without what may be secret
	Hash      string    `json:"hash,omitempty"`      // of the name with it
	Size      int64     `json:"size,omitempty"`      // of a file, to know it again
	Modified  time.Time `json:"modified,omitzero"`   // of a file
	Validator string    `json:"validator,omitempty"` // of a URL

	Records  int64          `json:"records"`            // those read
	Missing  []int64        `json:"missing,omitempty"`  // those of them that are to be sent
	Complete bool           `json:"complete,omitempty"` // no more are to be read
	missing  map[int64]bool // Missing, as it was at the start
	before   int64          // Records, as it was at the start
}

func newInput(name string) savedInput {
	in := savedInput{Name: records.PublicName(name)}
	if name != stdin && in.Name != name {
		sum := sha256.Sum256([]byte(name))
		in.Hash = hex.EncodeToString(sum[:8])
	}
	if info := statRegular(name); info != nil {
		in.Size, in.Modified = info.Size(), info.ModTime()
	}
	return in
}

// statRegular is about a regular file, and nil for anything else.
func statRegular(name string) fs.FileInfo {
	if name == stdin {
		return nil
	}
	if info, err := os.Stat(name); err == nil && info.Mode().IsRegular() {
		return info
	}
	return nil
}

// differs says what is not as it was when an earlier run left its state, or nil.
func (is *savedState) differs(was *savedState) error {
	if was.reading != is.reading {
		for _, c := range []struct {
			what    string
			was, is any
		}{
			{"format", was.Format, is.Format},
			{"header", !was.NoHeader, !is.NoHeader},
			{"delimiter", was.Delimiter, is.Delimiter},
			{"lazy quotes", was.LazyQuotes, is.LazyQuotes},
			{"block size", was.BlockSize, is.BlockSize},
			{"longest record", was.MaxRecord, is.MaxRecord},
			{"cutting of long lines", was.Pieces, is.Pieces},
			{"leaving packed input as it is", was.Verbatim, is.Verbatim},
		} {
			if c.was != c.is {
				return fmt.Errorf("it is about inputs read in another way: %s is %v there, and not %v", c.what, c.was, c.is)
			}
		}
	}
	if len(was.Inputs) != len(is.Inputs) {
		return fmt.Errorf("it is about %s, and not %d", plural(int64(len(was.Inputs)), "input"), len(is.Inputs))
	}
	for i := range was.Inputs {
		was, is := &was.Inputs[i], &is.Inputs[i]
		switch {
		case was.Name != is.Name:
			return fmt.Errorf("it is about %s, and not %s", was.Name, is.Name)
		case was.Hash != is.Hash:
			return fmt.Errorf("it is about %s with another user, query or fragment", is.Name)
		case was.Size != is.Size:
			return fmt.Errorf("%s has changed since: it has %d bytes, and had %d", is.Name, is.Size, was.Size)
		case !was.Modified.Equal(is.Modified):
			return fmt.Errorf("%s has changed since: it is of %s, and was of %s", is.Name, is.Modified.Format(time.DateTime), was.Modified.Format(time.DateTime))
		}
	}
	return nil
}

// write puts the file into place once it is whole.
func (is *savedState) write(path string) error {
	text, err := json.MarshalIndent(is, "", "  ")
	if err != nil {
		return err
	}
	temporary, err := os.CreateTemp(filepath.Dir(path), ".echod-send-*")
	if err != nil {
		return err
	}
	_, err = temporary.Write(append(text, '\n'))
	if err = errors.Join(err, temporary.Close()); err == nil {
		err = os.Rename(temporary.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(temporary.Name()))
	}
	return nil
}
