package bulk

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"echod/internal/records"
)

// A failed row can be sent again, whatever is in it.
func TestFailedFileHasRows(t *testing.T) {
	const several, one = "a;line;a\n1;\"x;\"\"y\"\"\r\nz\";\n", "a\n\"\"\nx\n"
	for name, c := range map[string]struct {
		opts  records.Options
		table string
	}{
		"header":               {records.Options{Format: records.CSV, Delimiter: ';'}, several},
		"no header":            {records.Options{Format: records.CSV, Delimiter: ';', NoHeader: true}, several},
		"several inputs":       {records.Options{Format: records.CSV, Delimiter: ';', NameRows: true}, several},
		"ragged":               {records.Options{Format: records.CSV, Delimiter: ';', AllowRagged: true}, "a;b\n1\n1;2;3\n"},
		"comments":             {records.Options{Format: records.CSV, Delimiter: ';', Comment: '#'}, "a\n\"#1\"\n"},
		"an encoding":          {records.Options{Format: records.CSV, Delimiter: ';', Encoding: "latin1"}, "\ufeffé\nü\n"},
		"one field, and empty": {records.Options{Format: records.CSV, Delimiter: ';'}, one},
	} {
		opts, table := c.opts, c.table
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "failed")
			failed, err := OpenFailedFile(path, opts)
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

// A run in which nothing fails leaves no file, but does not touch one that exists.
func TestFailedFileWithoutFailures(t *testing.T) {
	for name, before := range map[string]string{"new": "", "existing": "a failed line\n"} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "failed")
			if before != "" {
				path = file(t, "failed", before)
			}
			failed, err := OpenFailedFile(path, records.Options{Format: records.Lines})
			if err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			stream := NewOutput(&out)
			if err := Prepare(stream, failed, nil); err != nil {
				t.Fatal(err)
			}
			if _, _, _, err := send(t, Options{Inputs: []string{file(t, "a", "x\n")}, Out: stream, Failed: failed}); err != nil {
				t.Fatal(err)
			}
			text, err := os.ReadFile(path)
			if string(text) != before || os.IsNotExist(err) != (before == "") ||
				failed.Unchanged() != (before != "") {
				t.Errorf("it is %q (%v), unchanged: %v", text, err, failed.Unchanged())
			}
		})
	}
}

// The first failure replaces the content of a file that exists.
func TestFailedFileIsReplaced(t *testing.T) {
	path := file(t, "failed", "a long line of an earlier run\n")
	failed, err := OpenFailedFile(path, records.Options{Format: records.CSV, Delimiter: ','})
	if err != nil {
		t.Fatal(err)
	}
	stream := NewOutput(io.Discard)
	if err := Prepare(stream, failed, nil); err != nil {
		t.Fatal(err)
	}
	opts := Options{Inputs: []string{file(t, "a", "a,b\n1\n")}, Records: records.Options{Format: records.CSV}, Out: stream, Failed: failed}
	if _, _, summary, err := send(t, opts); err != nil || summary.Malformed != 1 {
		t.Fatalf("%+v, %v", summary, err)
	}
	if got := readFile(t, path); got != "a,b\n1\n" {
		t.Errorf("got %q", got)
	}
}

// A link that others may have planted is not followed.
func TestOutputFollowsNoPlantedLink(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("links need a privilege")
	}
	kept := file(t, "kept", "kept\n")
	for mode, refused := range map[os.FileMode]bool{0o755: false, 0o775: true, os.ModeSticky | 0o777: true} {
		dir := t.TempDir()
		for _, target := range []string{kept, filepath.Join(dir, "new")} {
			link := filepath.Join(dir, "link")
			_ = os.Remove(link)
			if err := errors.Join(os.Symlink(target, link), os.Chmod(dir, mode)); err != nil {
				t.Fatal(err)
			}
			out, err := OpenOutput(link)
			if (err != nil) != refused || err != nil &&
				!strings.Contains(err.Error(), "refused to follow a symbolic link") {
				t.Errorf("in a directory of mode %v: %v", mode, err)
			}
			if err == nil {
				_ = out.close()
			}
		}
	}
}
