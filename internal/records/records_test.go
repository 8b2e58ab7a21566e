package records

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
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

// A line that is too long does not affect its neighbours or their numbers, however the
// reads split it.
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

// A loop that breaks loses nothing: the next one continues.
func TestAllContinues(t *testing.T) {
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

// A closed source returns an error, not its end.
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

// Reading on does not change the data of a record.
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

// A read that fails comes after the records before it, and is not taken for the end of
// the input.
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
			if data(got) != tt.want || !errors.Is(fatal, broken) ||
				!strings.HasPrefix(fatal.Error(), "read data: disk on fire (records before: ") {
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
		"read data: unknown format: Format(4)":      {Format: 4},
		"read data: unknown format: Format(-1)":     {Format: -1},
		`read data: '"' cannot be a delimiter`:      {Format: CSV, Delimiter: '"'},
		`read data: '\n' cannot be a delimiter`:     {Format: CSV, Delimiter: '\n'},
		"read data: '\ufffd' cannot be a delimiter": {Format: CSV, Delimiter: -5},
		"read data: ',' cannot begin comments":      {Format: CSV, Comment: ','},
		"read data: unknown encoding \"klingon\": want one such as utf-8, utf-16, iso-8859-1, windows-1252, shift_jis or gb18030": {Encoding: "klingon"},
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
	if _, err := Open(t.Context(), dir, nil, Options{}); err == nil ||
		err.Error() != "read "+dir+": is a directory" {
		t.Errorf("error %v", err)
	}
}

var errEnough = errors.New("enough")

// The end of the context ends reading, even if records are buffered.
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

// The end of the context interrupts the read of a pipe.
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
	time.AfterFunc(time.Millisecond, func() { cancel(errEnough) }) // before or while it waits
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

// Consumed ends with the record, however much was read ahead.
func TestConsumedEndsWithTheRecord(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		opts Options
		want []int64
	}{
		"lines":    {"one\ntwo\n\nthree", Options{}, []int64{4, 8, 9, 14}},
		"too long": {"1234567\ntwo\n", Options{MaxRecord: 6}, []int64{8, 12}},
		"pieces":   {"1234567\ntwo\n", Options{MaxRecord: 6, Pieces: true}, []int64{6, 8, 12}},
		"verbatim": {"one\ntwo\n", Options{Verbatim: true}, []int64{4, 8}},
		"csv":      {"a,b\n1,\"x\ny\"\n3\n", Options{Format: CSV}, []int64{12, 14}},
		"raw":      {"12345", Options{Format: Raw, BlockSize: 2}, []int64{2, 4, 5}},
	} {
		s, err := New(strings.NewReader(c.text), name, c.opts)
		if err != nil {
			t.Fatal(err)
		}
		var got []int64
		for range s.All() {
			got = append(got, s.Consumed())
		}
		if !slices.Equal(got, c.want) || s.Consumed() != int64(len(c.text)) {
			t.Errorf("%s: %v, then %d; want %v, then %d", name, got, s.Consumed(), c.want, len(c.text))
		}
	}
}

// Consumed of packed input grows as the records come.
func TestConsumedOfPackedInput(t *testing.T) {
	var packed bytes.Buffer
	gz := gzip.NewWriter(&packed)
	random := rand.New(rand.NewPCG(1, 2)) // which cannot be packed well
	for range 100_000 {
		_, _ = fmt.Fprintf(gz, "%d\n", random.Uint64())
	}
	_ = gz.Close()
	s, err := New(&packed, "data", Options{})
	if err != nil {
		t.Fatal(err)
	}
	size, n := int64(packed.Len()), 0
	for range s.All() {
		if n++; n == 50_000 && (s.Consumed() < size*4/10 || s.Consumed() > size*6/10) {
			t.Errorf("%d of %d bytes are consumed after half of the lines", s.Consumed(), size)
		}
	}
	if s.Consumed() != size {
		t.Errorf("%d of %d bytes are consumed at the end", s.Consumed(), size)
	}
}

func TestPiecesOfLongLines(t *testing.T) {
	long := strings.Repeat("x", 20)
	for text, want := range map[string][]string{
		long + "\nshort\n":         {"xxxxxxxx", "xxxxxxxx", "xxxx\n", "short\n"},
		long[:8] + "\n":            {"xxxxxxxx", "\n"},
		long[:9]:                   {"xxxxxxxx", "x"},
		"\n" + long[:7] + "\ny":    {"\n", "xxxxxxx\n", "y"},
		strings.Repeat("y", 1<<17): slices.Repeat([]string{"yyyyyyyy"}, 1<<14),
	} {
		got, malformed := read(t, text, Options{MaxRecord: 8, Pieces: true})
		var pieces []string
		for _, record := range got {
			pieces = append(pieces, string(record.Data))
		}
		if malformed != nil || !slices.Equal(pieces, want) {
			t.Errorf("%.30q: %d pieces, %.100q, and %v; want %.100q", text, len(pieces), pieces, malformed, want)
		}
	}
}

func TestPublicNameHidesSecrets(t *testing.T) {
	for name, want := range map[string]string{
		"-":                                   "standard input",
		"dir/file":                            "dir/file",
		"http":                                "http",
		"https://me:secret@host/x?token=y#z":  "https://host/x?...",
		"HTTP://host/%2Fx":                    "http://host/%2Fx",
		"http://me:secret@host:port/x?token=": "URL",
	} {
		if got := PublicName(name); got != want {
			t.Errorf("PublicName(%q) is %q, want %q", name, got, want)
		}
	}
}

func TestValidator(t *testing.T) {
	for want, headers := range map[string]map[string]string{
		"":                              {},
		`"one"`:                         {"ETag": `"one"`, "Last-Modified": "Mon, 02 Jan 2006 15:04:05 GMT"},
		"Mon, 02 Jan 2006 15:04:05 GMT": {"Last-Modified": "Mon, 02 Jan 2006 15:04:05 GMT"},
	} {
		address := serve(t, func(w http.ResponseWriter, _ *http.Request) {
			for name, value := range headers {
				w.Header().Set(name, value)
			}
		})
		s, err := Open(t.Context(), address, nil, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if s.Validator() != want {
			t.Errorf("the validator is %q, want %q", s.Validator(), want)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestLinesOfText(t *testing.T) {
	for name, tt := range map[string]struct {
		text string
		opts Options
		want []string
	}{
		"CR":           {"a\rb\r", Options{}, []string{"a\r", "b\r"}},
		"CR, no end":   {"a\rb", Options{}, []string{"a\r", "b"}},
		"CR and LF":    {"a\rb\nc\rd\n", Options{}, []string{"a\rb\n", "c\rd\n"}},
		"UTF-8 mark":   {"\ufeffa\n", Options{}, []string{"\ufeffa\n"}},
		"UTF-16":       {"\xff\xfea\x00\n\x00\xe9\x00", Options{}, []string{"a\n", "é"}},
		"windows-1252": {"\x80\n", Options{Encoding: "windows-1252"}, []string{"€\n"}},
		"UTF-8":        {"a\xff\n", Options{Encoding: "utf-8", ReplaceInvalid: true}, []string{"a\ufffd\n"}},
		"any bytes":    {"a\xff\n", Options{}, []string{"a\xff\n"}},
		"long, of CR":  {strings.Repeat("x", 70_000) + "\r" + strings.Repeat("y", 70_000) + "\r", Options{MaxRecord: 80_000}, []string{strings.Repeat("x", 70_000) + "\r", strings.Repeat("y", 70_000) + "\r"}},
	} {
		t.Run(name, func(t *testing.T) {
			records, malformed := read(t, tt.text, tt.opts)
			var got []string
			for _, r := range records {
				got = append(got, string(r.Data))
			}
			if diff := cmp.Diff(tt.want, got); diff != "" || malformed != nil {
				t.Errorf("(-want +got):\n%s\nmalformed: %v", diff, malformed)
			}
		})
	}
	_, malformed := read(t, "a\nb\xff\n", Options{Encoding: "utf-8"})
	if len(malformed) != 1 || malformed[0].Error() != "data:2:2: cannot be decoded" ||
		!errors.Is(malformed[0], ErrEncoding) {
		t.Errorf("a line that is not UTF-8: %v", malformed)
	}
}

func TestReplacedIsCounted(t *testing.T) {
	for format, text := range map[Format]string{Lines: "\xc3\n\xfe\xfe\n", CSV: "a\n\"\xc3\"\n\xfe\xfe\n"} {
		s, err := New(strings.NewReader(text), "data", Options{Format: format, Encoding: "utf-8", ReplaceInvalid: true})
		if err != nil {
			t.Fatal(err)
		}
		if _, malformed, fatal := drain(t, s); malformed != nil || fatal != nil || s.Replaced() != 3 {
			t.Errorf("%v: %d replaced, want 3; %v, %v", format, s.Replaced(), malformed, fatal)
		}
	}
}

// A file that shrinks is not taken for complete, nor half of its line for a line. The
// progress of a file that grows does not exceed its size.
func TestFileChangesWhileItIsRead(t *testing.T) {
	for name, size := range map[string]int64{"shrinks": 150_001, "grows": 300_000} {
		t.Run(name, func(t *testing.T) {
			path := write(t, "data", strings.Repeat("a\n", 100_000))
			s, err := Open(t.Context(), path, nil, Options{})
			if err != nil {
				t.Fatal(err)
			}
			for range s.All() {
				break
			}
			if err := os.Truncate(path, size); err != nil {
				t.Fatal(err)
			}
			got, _, fatal := drain(t, s)
			at, _ := s.Size()
			switch {
			case size < 200_000 && (fatal == nil ||
				!strings.Contains(fatal.Error(), "the file shrank while it was read: it had 200000 bytes, and ends after 150001") || len(got) != 75_000-1):
				t.Errorf("%d records, %v", len(got), fatal)
			case size > 200_000 && (fatal != nil || at != size || s.Consumed() != size):
				t.Errorf("%d of %d bytes, %v", s.Consumed(), at, fatal)
			}
		})
	}
}
