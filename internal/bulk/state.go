package bulk

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"echod/internal/records"
)

// State is what a run leaves for another to go on: how far each input was read, which records before that are
// still to be sent, and how much of the output belongs to the others. It is in its file from the start, and
// brought up to date every few seconds, so that a run which is killed can be gone on with. A nil State keeps nothing.
type State struct {
	path string

	mu     sync.Mutex // guards what follows
	now    savedState
	open   []map[int64]bool // by input: the numbers that were taken and are not settled
	stored time.Time
}

// storedEvery is how often the file is brought up to date.
const storedEvery = 2 * time.Second

// ErrNotSaved says that the state of a run is not in its file.
var ErrNotSaved = errors.New("where to go on was not saved")

// OpenState reads the state of an earlier run from a file, which needs not exist. It must have been about
// these inputs, unchanged, and have read them so.
func OpenState(path string, inputs []string, opts records.Options) (*State, error) {
	s := &State{path: path, now: savedState{Version: stateVersion, reading: readingOf(opts)}}
	for _, name := range inputs {
		s.now.Inputs = append(s.now.Inputs, newInput(name))
		s.open = append(s.open, map[int64]bool{})
	}
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	} else if err != nil {
		return nil, err
	}
	var was savedState
	if err := json.Unmarshal(text, &was); err != nil || was.Version != stateVersion {
		return nil, fmt.Errorf("%s is not what an earlier run has left", path)
	}
	if err := s.now.differs(&was); err != nil {
		return nil, fmt.Errorf("going on from %s: %w", path, err)
	}
	s.now = was
	for i := range was.Inputs {
		in := &was.Inputs[i]
		in.before, in.missing = in.Records, map[int64]bool{}
		for _, number := range in.Missing {
			in.missing[number] = true
		}
		maps.Copy(s.open[i], in.missing)
	}
	return s, nil
}

// goesOn says that there was an earlier run.
func (s *State) goesOn() bool {
	return s != nil && slices.ContainsFunc(s.now.Inputs, func(in savedInput) bool { return in.before > 0 })
}

// reached is what was reached so far.
func (s *State) reached() reached {
	if s == nil {
		return reached{}
	}
	return s.now.reached
}

// complete reports whether nothing of an input is left.
func (s *State) complete(i int) bool {
	if s == nil {
		return false
	}
	in := &s.now.Inputs[i]
	return in.Complete && len(in.missing) == 0
}

// records is how many of an input were read.
func (s *State) records(i int) int64 { return s.now.Inputs[i].Records }

// opened checks that what a URL gives is what it gave to an earlier run.
func (s *State) opened(i int, source *records.Source) error {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	in := &s.now.Inputs[i]
	if is := source.Validator(); in.before == 0 {
		in.Validator = is
	} else if is != in.Validator {
		return fmt.Errorf("%s has changed since %s was written: its ETag or time is %q, and was %q", in.Name, s.path, is, in.Validator)
	}
	return nil
}

// has reports whether a record was settled by an earlier run.
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
	in.Records = max(in.Records, k.number)
	s.open[k.input][k.number] = true
}

// settle notes that records need not be sent another time, and what was reached by that.
func (s *State) settle(keys []key, r reached) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range keys {
		delete(s.open[k.input], k.number)
	}
	s.now.reached = r
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

// checkpoint brings the file up to date, if it is time to.
func (s *State) checkpoint() error {
	if s == nil || time.Since(s.stored) < storedEvery {
		return nil
	}
	return s.save()
}

// save brings the file up to date. Its callers are the consumer of the stream and, before and after it, Prepare and Run.
func (s *State) save() error {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.now.Inputs {
		s.now.Inputs[i].Missing = slices.Sorted(maps.Keys(s.open[i]))
	}
	s.stored = time.Now()
	if err := s.now.write(s.path); err != nil {
		return fmt.Errorf("%w: %w", ErrNotSaved, err)
	}
	return nil
}

// remove removes the file, when there is nothing to go on with.
func (s *State) remove() error {
	if s == nil {
		return nil
	}
	if err := os.Remove(s.path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
