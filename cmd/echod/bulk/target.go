package bulk

import (
	"errors"
	"fmt"
	"io"
	"os"
)

// Target is what is written to: a file, which another run can go on with, or a stream. A nil one takes nothing.
type Target struct {
	w       io.Writer
	file    *os.File // nil: a stream
	regular bool
	length  int64 // of a regular file
}

// Stream makes a target of a stream, which stays open.
func Stream(w io.Writer) *Target { return &Target{w: w} }

// OpenTarget opens a file to write to. It stays as it is until Prepare.
func OpenTarget(path string) (*Target, error) {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o666)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return &Target{w: file, file: file, regular: info.Mode().IsRegular(), length: info.Size()}, nil
}

// savedTarget is what a state knows of a target.
type savedTarget struct {
	File   string `json:"file"`
	Length int64  `json:"length"` // up to the end of a record
}

func (t *Target) saved() *savedTarget {
	if t == nil || t.file == nil {
		return nil
	}
	return &savedTarget{t.file.Name(), t.length}
}

// goOnFrom finds where to write. A file that is about to be gone on with has all that an earlier run has settled, and maybe more, which
// is sent again. One that the earlier run did not write to is kept.
func (t *Target) goOnFrom(was *savedTarget, goesOn bool) error {
	switch {
	case t == nil || !t.regular || goesOn && (was == nil || was.File != t.file.Name()):
		return nil
	case !goesOn:
		t.length = 0
		return nil
	case t.length < was.Length:
		return fmt.Errorf("%s has %d bytes, and had %d: it is not what an earlier run has written", was.File, t.length, was.Length)
	}
	t.length = was.Length
	return nil
}

// cut removes what is behind the place to write to.
func (t *Target) cut() error {
	if t == nil || !t.regular {
		return nil
	}
	_, err := t.file.Seek(t.length, io.SeekStart)
	return errors.Join(err, t.file.Truncate(t.length))
}

func (t *Target) Write(p []byte) (int, error) {
	n, err := t.w.Write(p)
	t.length += int64(n)
	return n, err
}

func (t *Target) close() error {
	if t.file == nil {
		return nil
	}
	return t.file.Close()
}

// Prepare makes the files ready to be written to, once all are known to be there. What is in them is given up only after the
// state is known to be writable.
func Prepare(out *Target, failed *Failed, state *State) error {
	was := state.reached()
	for t, saved := range map[*Target]*savedTarget{out: was.Output, failed.target(): was.Failures} {
		if err := t.goOnFrom(saved, state.goesOn()); err != nil {
			return err
		}
	}
	was.Output, was.Failures = out.saved(), failed.target().saved()
	state.settle(nil, was)
	if err := state.save(); err != nil {
		return err
	}
	return errors.Join(out.cut(), failed.target().cut())
}
