package bulk

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"echod/client/records"
)

// State is what a run leaves for another to go on: how far each input was read, and which records before that
// are still to be sent. A nil State keeps nothing.
type State struct {
	path string

	mu    sync.Mutex // guards what follows
	saved savedState
	open  []map[int64]bool // by input: the numbers that were taken and are not settled
}

type savedState struct {
	Version int          `json:"version"`
	Format  string       `json:"format"`
	Inputs  []savedInput `json:"inputs"`
}

type savedInput struct {
	Name     string         `json:"name"`
	Size     int64          `json:"size,omitempty"`     // of a file, to know it again
	Records  int64          `json:"records"`            // those read
	Missing  []int64        `json:"missing,omitempty"`  // those of them that are to be sent
	Complete bool           `json:"complete,omitempty"` // no more are to be read
	missing  map[int64]bool // Missing, as it was at the start
	before   int64          // Records, as it was at the start
}

const stateVersion = 1

// ErrNotSaved says that there is no state to go on from.
var ErrNotSaved = errors.New("where to go on was not saved")

// OpenState reads the state of an earlier run from a file, which needs not exist. These must be the inputs that
// it was about.
func OpenState(path string, inputs []string, format records.Format) (*State, error) {
	s := &State{path: path, saved: savedState{Version: stateVersion, Format: format.String()}}
	for _, name := range inputs {
		s.saved.Inputs = append(s.saved.Inputs, savedInput{Name: name, Size: sizeOf(name)})
		s.open = append(s.open, map[int64]bool{})
	}
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	} else if err != nil {
		return nil, err
	}
	var old savedState
	if err := json.Unmarshal(text, &old); err != nil || old.Version != stateVersion {
		return nil, fmt.Errorf("%s is not what an earlier run has left", path)
	}
	if old.Format != s.saved.Format || len(old.Inputs) != len(inputs) {
		return nil, fmt.Errorf("%s is about %d inputs in %s, and not %d in %s", path, len(old.Inputs), old.Format, len(inputs), s.saved.Format)
	}
	for i := range old.Inputs {
		was, is := &old.Inputs[i], s.saved.Inputs[i]
		if was.Name != is.Name {
			return nil, fmt.Errorf("%s is about %s, and not %s", path, was.Name, is.Name)
		}
		if was.Size != is.Size {
			return nil, fmt.Errorf("%s has changed since %s was written: it has %d bytes, and had %d", is.Name, path, is.Size, was.Size)
		}
		was.before, was.missing = was.Records, map[int64]bool{}
		for _, number := range was.Missing {
			was.missing[number] = true
		}
		maps.Copy(s.open[i], was.missing)
	}
	s.saved = old
	return s, nil
}

// GoesOn says that there was an earlier run.
func (s *State) GoesOn() bool {
	return s != nil && slices.ContainsFunc(s.saved.Inputs, func(in savedInput) bool { return in.before > 0 })
}

// sizeOf is the size of a regular file, and 0 of anything else.
func sizeOf(name string) int64 {
	if info, err := os.Stat(name); err == nil && info.Mode().IsRegular() {
		return info.Size()
	}
	return 0
}

// complete reports whether nothing of an input is left.
func (s *State) complete(i int) bool {
	if s == nil {
		return false
	}
	in := &s.saved.Inputs[i]
	return in.Complete && len(in.missing) == 0
}

// has reports whether a record was settled by an earlier run.
func (s *State) has(k key) bool {
	if s == nil {
		return false
	}
	in := &s.saved.Inputs[k.input]
	return k.number <= in.before && !in.missing[k.number]
}

// take notes that a record is about to be sent.
func (s *State) take(k key) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	in := &s.saved.Inputs[k.input]
	in.Records = max(in.Records, k.number)
	s.open[k.input][k.number] = true
}

// settle notes that records need not be sent another time.
func (s *State) settle(keys ...key) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range keys {
		delete(s.open[k.input], k.number)
	}
}

// read notes that an input was read to its end.
func (s *State) read(i int) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.saved.Inputs[i].Complete = true
}

// save writes the state or, when there is nothing to go on with, removes it.
func (s *State) save(done bool) error {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if done {
		if err := os.Remove(s.path); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	for i := range s.saved.Inputs {
		s.saved.Inputs[i].Missing = slices.Sorted(maps.Keys(s.open[i]))
	}
	text, err := json.MarshalIndent(s.saved, "", "  ")
	if err == nil {
		err = replaceFile(s.path, append(text, '\n'))
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNotSaved, err)
	}
	return nil
}

// replaceFile puts a file into place once it is whole.
func replaceFile(path string, text []byte) error {
	temporary, err := os.CreateTemp(filepath.Dir(path), ".echod-send-*")
	if err != nil {
		return err
	}
	_, err = temporary.Write(text)
	if err = errors.Join(err, temporary.Close()); err == nil {
		err = os.Rename(temporary.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(temporary.Name()))
	}
	return nil
}
