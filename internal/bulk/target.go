package bulk

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// Target is what is written to: a file, which another run can go on with, or a stream. A nil one takes nothing.
type Target struct {
	w       io.Writer
	file    *os.File // nil: a stream
	path    string   // absolute
	regular bool
	length  int64  // of a regular file
	tail    []byte // what it ends with, to know it again
}

const tailSize = 4 << 10

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
	absolute, err := filepath.Abs(path)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return &Target{w: file, file: file, path: absolute, regular: info.Mode().IsRegular(), length: info.Size()}, nil
}

// savedTarget is what a state knows of a target.
type savedTarget struct {
	File   string `json:"file"`
	Length int64  `json:"length"` // up to the end of a record
	Tail   string `json:"tail"`   // a hash of what is before that
}

func (t *Target) saved() *savedTarget {
	if t == nil || t.file == nil {
		return nil
	}
	return &savedTarget{t.path, t.length, hashOf(t.tail)}
}

func hashOf(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:8])
}

// goOnFrom finds where to write. A file that is about to be gone on with has all that an earlier run has settled, and maybe more, which
// is sent again. If that run wrote to none, it is written behind what there is.
func (t *Target) goOnFrom(was *savedTarget, goesOn bool) error {
	switch {
	case t == nil || !t.regular || goesOn && was == nil:
		return nil
	case !goesOn:
		t.length = 0
		return nil
	case was.File != t.path:
		return fmt.Errorf("an earlier run has written to %s, and not to %s", was.File, t.path)
	}
	t.tail = make([]byte, min(tailSize, was.Length))
	file, err := os.Open(t.path)
	if err != nil {
		return err
	}
	defer file.Close()
	if _, err := file.ReadAt(t.tail, was.Length-int64(len(t.tail))); err != nil || hashOf(t.tail) != was.Tail {
		return fmt.Errorf("%s is not what an earlier run has written: it differs before byte %d", t.path, was.Length)
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
	t.tail = append(t.tail, p[max(0, n-tailSize):n]...)
	t.tail = append(t.tail[:0], t.tail[max(0, len(t.tail)-tailSize):]...)
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
