package records

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestLines(t *testing.T) {
	for name, tt := range map[string]struct {
		text string
		want []Record
	}{
		"empty":      {"", nil},
		"one":        {"a\n", []Record{{Number: 1, Line: 1, Data: []byte("a\n")}}},
		"unended":    {"a\nb", []Record{{Number: 1, Line: 1, Data: []byte("a\n")}, {Number: 2, Line: 2, Data: []byte("b"), Unended: true}}},
		"empty line": {"\n\r\n", []Record{{Number: 1, Line: 1, Data: []byte("\n")}, {Number: 2, Line: 2, Data: []byte("\r\n")}}},
		"any bytes":  {"\x00\xff\n", []Record{{Number: 1, Line: 1, Data: []byte("\x00\xff\n")}}},
	} {
		t.Run(name, func(t *testing.T) {
			got, malformed := read(t, tt.text, Options{})
			if diff := cmp.Diff(tt.want, got); diff != "" || malformed != nil {
				t.Errorf("(-want +got):\n%s\nmalformed: %v", diff, malformed)
			}
		})
	}
}

// A line that is too long costs neither its neighbours nor their numbers, whatever
// pieces it comes in.
func TestLineTooLong(t *testing.T) {
	long := strings.Repeat("x", 200_000)
	text := "a\n" + long + "\n12345\n123456\nb\n" + long
	for name, r := range map[string]io.Reader{
		"whole":     strings.NewReader(text),
		"byte-wise": iotest.OneByteReader(strings.NewReader(text)),
	} {
		t.Run(name, func(t *testing.T) {
			s, err := New(r, "data", Options{MaxRecord: 6})
			if err != nil {
				t.Fatal(err)
			}
			got, malformed, fatal := drain(t, s)
			want := []Record{
				{Number: 1, Line: 1, Data: []byte("a\n")},
				{Number: 3, Line: 3, Data: []byte("12345\n")},
				{Number: 5, Line: 5, Data: []byte("b\n")},
			}
			if diff := cmp.Diff(want, got); diff != "" || fatal != nil {
				t.Errorf("(-want +got):\n%s\nerror: %v", diff, fatal)
			}
			var said []string
			for _, e := range malformed {
				said = append(said, e.Error()+" "+string(e.Raw))
				if !errors.Is(e, ErrTooLong) || !e.Cut {
					t.Errorf("%#v is not ErrTooLong, cut", e)
				}
			}
			if diff := cmp.Diff([]string{
				"data:2: too long: more than 6 bytes xxxxxx",
				"data:4: too long: more than 6 bytes 123456",
				"data:6: too long: more than 6 bytes xxxxxx",
			}, said); diff != "" {
				t.Errorf("errors (-want +got):\n%s", diff)
			}
			if s.number != 6 {
				t.Errorf("%d records counted, want 6", s.number)
			}
		})
	}
}

func TestRaw(t *testing.T) {
	text := strings.Repeat("0123456789", 10)
	s, err := New(iotest.HalfReader(strings.NewReader(text)), "data", Options{Format: Raw, BlockSize: 40})
	if err != nil {
		t.Fatal(err)
	}
	got, malformed, fatal := drain(t, s)
	want := []Record{{Number: 1, Data: []byte(text[:40])}, {Number: 2, Data: []byte(text[40:80])}, {Number: 3, Data: []byte(text[80:])}}
	if diff := cmp.Diff(want, got); diff != "" || malformed != nil || fatal != nil {
		t.Errorf("(-want +got):\n%s\nerrors: %v, %v", diff, malformed, fatal)
	}
}

// Leaving a loop loses nothing: the next one goes on.
func TestAllGoesOn(t *testing.T) {
	s, err := New(strings.NewReader("a\nb\nc\n"), "data", Options{})
	if err != nil {
		t.Fatal(err)
	}
	for record := range s.All() {
		if string(record.Data) != "a\n" {
			t.Errorf("first record %q", record.Data)
		}
		break
	}
	got, _, _ := drain(t, s)
	if data(got) != "b\nc\n" || got[0].Number != 2 {
		t.Errorf("the second loop got %v", got)
	}
	for record, err := range s.All() {
		t.Errorf("after the end: %v, %v", record, err)
	}
}

// Of a closed source nothing more comes, and that is not taken for its end.
func TestAllAfterClose(t *testing.T) {
	s, err := New(strings.NewReader("a\nb\n"), "data", Options{})
	if err != nil {
		t.Fatal(err)
	}
	for range s.All() {
		break
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if got, _, fatal := drain(t, s); got != nil || !errors.Is(fatal, fs.ErrClosed) {
		t.Errorf("got %v, %v", got, fatal)
	}
}

// A record owns its data: reading on does not change it.
func TestDataIsOwned(t *testing.T) {
	for _, format := range []Format{Lines, CSV, Raw} {
		t.Run(format.String(), func(t *testing.T) {
			text := strings.Repeat("some,text\n", 100)
			s, err := New(strings.NewReader(text), "data", Options{Format: format, BlockSize: 10, NoHeader: true})
			if err != nil {
				t.Fatal(err)
			}
			var kept, copies [][]byte
			for record, err := range s.All() {
				if err != nil {
					t.Fatal(err)
				}
				kept, copies = append(kept, record.Data), append(copies, bytes.Clone(record.Data))
			}
			if diff := cmp.Diff(copies, kept); diff != "" || len(kept) != 100 {
				t.Errorf("%d records, changed (-before +after):\n%s", len(kept), diff)
			}
		})
	}
}

// A read that fails ends the records after those before it, and is not taken for
// the end of the input.
func TestReadError(t *testing.T) {
	broken := errors.New("disk on fire")
	for name, tt := range map[string]struct {
		opts Options
		text string
		want string
	}{
		"lines":        {Options{}, "a\nb\nincompl", "a\nb\n"},
		"csv":          {Options{Format: CSV, NoHeader: true}, "a\nincompl", `{"line":1,"fields":["a"]}` + "\n"},
		"csv, quoted":  {Options{Format: CSV, NoHeader: true}, "a\n\"in\ncompl", `{"line":1,"fields":["a"]}` + "\n"},
		"csv, skipped": {Options{Format: CSV, NoHeader: true, MaxRecord: 40}, "a\n" + strings.Repeat("x", 1000), `{"line":1,"fields":["a"]}` + "\n"},
		"raw":          {Options{Format: Raw, BlockSize: 2}, "abc", "ab"},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := New(io.MultiReader(strings.NewReader(tt.text), iotest.ErrReader(broken)), "data", tt.opts)
			if err != nil {
				t.Fatal(err)
			}
			got, _, fatal := drain(t, s)
			if data(got) != tt.want || !errors.Is(fatal, broken) || !strings.HasPrefix(fatal.Error(), "read data: disk on fire (records before: ") {
				t.Errorf("got %q, %v; want %q", data(got), fatal, tt.want)
			}
		})
	}
}

func TestReaderWithoutProgress(t *testing.T) {
	s, err := New(io.MultiReader(strings.NewReader("abcd\n"), idleReader{}), "data", Options{Verbatim: true})
	if err != nil {
		t.Fatal(err)
	}
	if got, _, fatal := drain(t, s); data(got) != "abcd\n" || !errors.Is(fatal, io.ErrNoProgress) {
		t.Errorf("got %q, %v", data(got), fatal)
	}
}

type idleReader struct{}

func (idleReader) Read([]byte) (int, error) { return 0, nil }

func TestOptionsRefused(t *testing.T) {
	for want, opts := range map[string]Options{
		"read data: no such format: Format(4)":      {Format: 4},
		"read data: no such format: Format(-1)":     {Format: -1},
		`read data: '"' cannot be a delimiter`:      {Format: CSV, Delimiter: '"'},
		`read data: '\n' cannot be a delimiter`:     {Format: CSV, Delimiter: '\n'},
		"read data: '\ufffd' cannot be a delimiter": {Format: CSV, Delimiter: -5},
	} {
		if _, err := New(strings.NewReader(""), "data", opts); err == nil || err.Error() != want {
			t.Errorf("%+v: error %v, want %s", opts, err, want)
		}
	}
}

func TestOpenFile(t *testing.T) {
	name := write(t, "data.txt", "a\nb\n")
	s, err := Open(t.Context(), name, nil, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if size, known := s.Size(); size != 4 || !known {
		t.Errorf("size %d, %v", size, known)
	}
	got, _, fatal := drain(t, s)
	if data(got) != "a\nb\n" || fatal != nil || s.Name() != name || s.Consumed() != 4 {
		t.Errorf("got %q, %v from %s, %d bytes", data(got), fatal, s.Name(), s.Consumed())
	}
	if err := s.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

func TestOpenStdin(t *testing.T) {
	s, err := Open(t.Context(), "-", strings.NewReader("a\n"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if size, known := s.Size(); known {
		t.Errorf("size %d is known", size)
	}
	if got, _, fatal := drain(t, s); data(got) != "a\n" || fatal != nil || s.Name() != "standard input" {
		t.Errorf("got %q, %v from %s", data(got), fatal, s.Name())
	}
	file, err := os.Open(write(t, "data.txt", "a\n"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	s, err = Open(t.Context(), "-", file, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if size, known := s.Size(); size != 2 || !known {
		t.Errorf("size of a redirected file: %d, %v", size, known)
	}
	if _, _, fatal := drain(t, s); fatal != nil {
		t.Error(fatal)
	}
	if _, err := file.Stat(); err != nil {
		t.Errorf("standard input was closed: %v", err)
	}
}

func TestOpenFails(t *testing.T) {
	if _, err := Open(t.Context(), filepath.Join(t.TempDir(), "none"), nil, Options{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v", err)
	}
	dir := t.TempDir()
	if _, err := Open(t.Context(), dir, nil, Options{}); err == nil || err.Error() != "read "+dir+": is a directory" {
		t.Errorf("error %v", err)
	}
}

var errEnough = errors.New("enough")

// The end of the context ends reading, even where records are there already.
func TestContextEnds(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	s, err := Open(ctx, write(t, "data.txt", "a\nb\nc\n"), nil, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range s.All() {
		if err != nil {
			t.Fatal(err)
		}
		cancel(errEnough)
		break
	}
	got, _, fatal := drain(t, s)
	if got != nil || !errors.Is(fatal, errEnough) {
		t.Errorf("got %v, %v", got, fatal)
	}
}

// A pipe to which nobody writes is left when the context ends.
func TestContextInterruptsPipe(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("no /dev/fd")
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	s, err := Open(ctx, fmt.Sprint("/dev/fd/", r.Fd()), nil, Options{Verbatim: true})
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(time.Millisecond, func() { cancel(errEnough) }) // before or while it waits: all the same
	if got, _, fatal := drain(t, s); got != nil || !errors.Is(fatal, errEnough) {
		t.Errorf("got %v, %v", got, fatal)
	}
}

// write writes a file and returns its name.
func write(t *testing.T, name, text string) string {
	t.Helper()
	name = filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}
