package bulk

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"echod/internal/records"
)

// FuzzOpenState checks that a damaged state file is refused with an error that names it, and that a state that is taken
// can be used and written again.
func FuzzOpenState(f *testing.F) {
	dir := f.TempDir()
	input := filepath.Join(dir, "input")
	if err := os.WriteFile(input, []byte("a\nb\nc\n"), 0o600); err != nil {
		f.Fatal(err)
	}
	opts := records.Options{}
	fresh, err := OpenState(filepath.Join(dir, "none"), []string{input}, opts)
	if err != nil {
		f.Fatal(err)
	}
	seed := filepath.Join(dir, "seed")
	if err := fresh.now.write(seed); err != nil {
		f.Fatal(err)
	}
	valid, err := os.ReadFile(seed)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(valid)
	for _, change := range [][2]string{{`"size":6`, `"size":-6`}, {`{`, `{"length":-5,`}, {`}`, ``}, {`1`, `99999999999999999999`}} {
		f.Add([]byte(strings.Replace(string(valid), change[0], change[1], 1)))
	}
	f.Add([]byte(`{"output":{"length":-5}}`))
	f.Fuzz(func(t *testing.T, content []byte) {
		path := filepath.Join(t.TempDir(), "state")
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := OpenState(path, []string{input}, opts)
		if err != nil {
			if !strings.Contains(err.Error(), path) {
				t.Errorf("error %q does not name the file", err)
			}
			return
		}
		if n := s.records(0); n < 0 {
			t.Errorf("%d records", n)
		}
		_ = s.from(0)
		if err := s.now.write(path); err != nil {
			t.Errorf("writing the state that was read: %v", err)
		}
	})
}
