package bulk

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"echod/internal/records"
)

// What fails of CSV is a row again, whatever is in it.
func TestFailedRowsAreRowsAgain(t *testing.T) {
	const several, one = "a;line;a\n1;\"x;\"\"y\"\"\nz\";\n", "a\n\"\"\nx\n"
	for name, c := range map[string]struct {
		opts  records.Options
		table string
	}{
		"header":               {records.Options{Format: records.CSV, Delimiter: ';'}, several},
		"no header":            {records.Options{Format: records.CSV, Delimiter: ';', NoHeader: true}, several},
		"one field, and empty": {records.Options{Format: records.CSV, Delimiter: ';'}, one},
	} {
		opts, table := c.opts, c.table
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "failed")
			failed, err := OpenFailed(path, opts)
			if err != nil {
				t.Fatal(err)
			}
			source, err := records.New(strings.NewReader(table), "t", opts)
			if err != nil {
				t.Fatal(err)
			}
			for record, err := range source.All() {
				if err == nil {
					err = failed.add(source.Header(), record.Data)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			if err := errors.Join(failed.flush(), failed.close()); err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(path); string(got) != table {
				t.Errorf("got %q (%v), want %q", got, err, table)
			}
		})
	}
}

func TestFailedWithNothingInItIsRemoved(t *testing.T) {
	path := filepath.Join(t.TempDir(), "failed")
	failed, err := OpenFailed(path, records.Options{Format: records.Lines})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := send(t, Options{Inputs: []string{file(t, "a", "x\n")}, Failed: failed}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("it is still there: %v", err)
	}
}
