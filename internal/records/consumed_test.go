package records

import (
	"bytes"
	"compress/gzip"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
)

// What is consumed ends with the record, whatever was read ahead.
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

// Of packed input it is not the whole, while there is much to come.
func TestConsumedOfPackedInputGrows(t *testing.T) {
	var packed bytes.Buffer
	gz := gzip.NewWriter(&packed)
	_, _ = io.WriteString(gz, strings.Repeat("a line\n", 1_000_000))
	_ = gz.Close()
	s, err := New(&packed, "data", Options{})
	if err != nil {
		t.Fatal(err)
	}
	size, n := int64(packed.Len()), 0
	for range s.All() {
		if n++; n == 500_000 && (s.Consumed() < size*4/10 || s.Consumed() > size*6/10) {
			t.Errorf("%d of %d bytes are consumed after half of the lines", s.Consumed(), size)
		}
	}
	if s.Consumed() != size {
		t.Errorf("%d of %d bytes are consumed at the end", s.Consumed(), size)
	}
}

// A line that is cut is whole again when its pieces are put together.
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

func TestValidatorIsTheServers(t *testing.T) {
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
