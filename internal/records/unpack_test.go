package records

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/zstd"
)

func packGzip(t testing.TB, text string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func packZstd(t testing.TB, text string, opts ...zstd.EOption) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil, append(opts, zstd.WithEncoderConcurrency(1))...)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	return w.EncodeAll([]byte(text), nil)
}

// What is packed is known by what it begins with, in several pieces too, and
// however it comes.
func TestUnpack(t *testing.T) {
	gz, zst := packGzip(t, "a\nb"), packZstd(t, "a\nb")
	skipped := append([]byte("\x5a\x2a\x4d\x18\x03\x00\x00\x00xyz"), zst...)
	for name, tt := range map[string]struct {
		packed []byte
		opts   Options
		want   string
	}{
		"gzip":           {gz, Options{}, "a\nb"},
		"gzip members":   {append(bytes.Clone(gz), gz...), Options{}, "a\nba\nb"},
		"zstd":           {zst, Options{}, "a\nb"},
		"zstd frames":    {append(bytes.Clone(zst), zst...), Options{}, "a\nba\nb"},
		"zstd skipping":  {skipped, Options{}, "a\nb"},
		"empty gzip":     {packGzip(t, ""), Options{}, ""},
		"verbatim":       {gz, Options{Verbatim: true}, string(gz)},
		"like gzip":      {[]byte("\x1f\x8a\x08"), Options{}, "\x1f\x8a\x08"},
		"like zstd":      {[]byte("(\xb5/"), Options{}, "(\xb5/"},
		"like a skipped": {[]byte("P*M"), Options{}, "P*M"},
		"nothing":        {nil, Options{}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := New(iotest.OneByteReader(bytes.NewReader(tt.packed)), "data", tt.opts)
			if err != nil {
				t.Fatal(err)
			}
			got, _, fatal := drain(t, s)
			if data(got) != tt.want || fatal != nil || s.Consumed() != int64(len(tt.packed)) {
				t.Errorf("got %q, %v after %d bytes; want %q after %d", data(got), fatal, s.Consumed(), tt.want, len(tt.packed))
			}
			if err := s.Close(); err != nil {
				t.Errorf("second Close: %v", err)
			}
		})
	}
}

// A person's first line comes without waiting for a second.
func TestUnpackDoesNotWait(t *testing.T) {
	for _, line := range []string{"\n", "P\n", "(\n", "\x1f\n"} {
		s, err := New(iotest.TimeoutReader(iotest.DataErrReader(strings.NewReader(line))), "data", Options{})
		if err != nil {
			t.Fatal(err)
		}
		for record, err := range s.All() {
			if string(record.Data) != line || err != nil {
				t.Errorf("%q: got %+v, %v", line, record, err)
			}
			break
		}
	}
}

// Of packed data that is cut off or damaged, the records before come, and an error
// says where it was.
func TestUnpackDamaged(t *testing.T) {
	var b strings.Builder
	random := rand.New(rand.NewPCG(1, 2))
	for b.Len() < 1<<20 {
		b.WriteString(strings.Repeat(string('a'+random.Int32N(26)), random.IntN(20)) + "\n")
	}
	text := b.String()
	for kind, packed := range map[string][]byte{"gzip": packGzip(t, text), "zstd": packZstd(t, text)} {
		for name, tt := range map[string]struct {
			packed []byte
			most   bool // of the records come
			want   string
		}{
			"cut off":          {packed[:len(packed)-len(packed)/4], true, kind + " data ends too early, after "},
			"last byte":        {packed[:len(packed)-1], true, kind + " data ends too early, after "},
			"cut at the start": {packed[:5], false, kind + " data ends too early, after 5 bytes"},
			"damaged":          {damage(packed, len(packed)*3/4), true, kind + " data is damaged before byte "},
			"followed":         {append(bytes.Clone(packed), "garbage garbage garbage"...), true, kind + " data is damaged before byte "},
		} {
			t.Run(kind+" "+name, func(t *testing.T) {
				s, err := New(bytes.NewReader(tt.packed), "data", Options{})
				if err != nil {
					t.Fatal(err)
				}
				got, _, fatal := drain(t, s)
				if fatal == nil || !strings.HasPrefix(fatal.Error(), "read data: "+tt.want) || strings.Contains(fatal.Error(), "EOF") {
					t.Errorf("error %v, want %q", fatal, tt.want)
				}
				t.Log(fatal)
				if all := data(got); tt.most != (len(all) > len(text)/2) || name != "damaged" && !strings.HasPrefix(text, all) {
					t.Errorf("%d of %d bytes came", len(all), len(text))
				}
			})
		}
	}
}

func damage(packed []byte, at int) []byte {
	packed = bytes.Clone(packed)
	for i := range 16 {
		packed[at+i] ^= 0x55
	}
	return packed
}

// An error of the input is not one of what is packed in it.
func TestUnpackReadError(t *testing.T) {
	broken := errors.New("disk on fire")
	for kind, packed := range map[string][]byte{"gzip": packGzip(t, "some text\n"), "zstd": packZstd(t, "some text\n")} {
		for n := range packed {
			s, err := New(io.MultiReader(bytes.NewReader(packed[:n]), iotest.ErrReader(broken)), "data.gz", Options{})
			if err != nil {
				t.Fatal(err)
			}
			_, _, fatal := drain(t, s)
			if !errors.Is(fatal, broken) || !strings.HasPrefix(fatal.Error(), "read data.gz: disk on fire (") {
				t.Errorf("%s, after %d bytes: %v", kind, n, fatal)
			}
		}
	}
}

func TestUnpackBelied(t *testing.T) {
	for name, want := range map[string]string{
		"data.csv.gz":  "not packed by gzip, whatever its name says",
		"data.csv.ZST": "not packed by zstd, whatever its name says",
	} {
		name = write(t, name, "a\nb\n")
		s, err := Open(t.Context(), name, nil, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if _, _, fatal := drain(t, s); fatal == nil || fatal.Error() != "read "+name+": "+want+" (records before: 0)" {
			t.Errorf("error %v, want %s", fatal, want)
		}
		s, err = Open(t.Context(), name, nil, Options{Verbatim: true})
		if err != nil {
			t.Fatal(err)
		}
		if got, _, fatal := drain(t, s); data(got) != "a\nb\n" || fatal != nil {
			t.Errorf("verbatim: got %q, %v", data(got), fatal)
		}
	}
	// What it is counts, not what it is called.
	s, err := Open(t.Context(), write(t, "data.gz", string(packZstd(t, "a\n"))), nil, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if got, _, fatal := drain(t, s); data(got) != "a\n" || fatal != nil {
		t.Errorf("got %q, %v", data(got), fatal)
	}
}

// The end of the input is its end, though a terminal would give more after it.
func TestUnpackEndsOnce(t *testing.T) {
	s, err := New(&terminal{}, "data", Options{})
	if err != nil {
		t.Fatal(err)
	}
	if got, _, fatal := drain(t, s); data(got) != "P" || fatal != nil {
		t.Errorf("got %q, %v", data(got), fatal)
	}
}

// A terminal is one where somebody typed P, Ctrl-D twice, and goes on.
type terminal struct{ reads int }

func (r *terminal) Read(p []byte) (int, error) {
	if r.reads++; r.reads == 2 {
		return 0, io.EOF
	}
	return copy(p, "P"), nil
}

// A window of zstd that would take much memory is refused, with what helps.
func TestUnpackLargeWindow(t *testing.T) {
	var b bytes.Buffer
	w, err := zstd.NewWriter(&b, zstd.WithWindowSize(2*maxZstdWindow), zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := w.Write(make([]byte, maxZstdWindow)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	s, err := New(&b, "data", Options{})
	if err != nil {
		t.Fatal(err)
	}
	got, _, fatal := drain(t, s)
	if got != nil || fatal == nil || !strings.Contains(fatal.Error(), "--ultra") {
		t.Errorf("%d records, %v", len(got), fatal)
	}
}
