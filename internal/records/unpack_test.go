package records

import (
	"archive/zip"
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

// "a\nb", packed by Python's bz2 and lzma modules.
const (
	bzip2Text    = "\x42\x5a\x68\x39\x31\x41\x59\x26\x53\x59\x8b\xe0\xbf\xfc\x00\x00\x00\xc1\x00\x00\x10\x30\x00\x20\x00\x21\x98\x19\x81\x61\x77\x24\x53\x85\x09\x08\xbe\x0b\xff\xc0"
	xzText       = "\xfd\x37\x7a\x58\x5a\x00\x00\x04\xe6\xd6\xb4\x46\x02\x00\x21\x01\x16\x00\x00\x00\x74\x2f\xe5\xa3\x01\x00\x02\x61\x0a\x62\x00\x00\x0b\x72\xee\xec\xd2\x60\x4d\x4e\x00\x01\x1b\x03\x0b\x2f\xb9\x10\x1f\xb6\xf3\x7d\x01\x00\x00\x00\x00\x04\x59\x5a"
	xzDelta      = "\xfd\x37\x7a\x58\x5a\x00\x00\x04\xe6\xd6\xb4\x46\x02\x01\x03\x01\x03\x21\x01\x16\x97\x8f\x71\xfc\x01\x00\x02\x61\x0a\x62\x00\x00\x0b\x72\xee\xec\xd2\x60\x4d\x4e\x00\x01\x1b\x03\x0b\x2f\xb9\x10\x1f\xb6\xf3\x7d\x01\x00\x00\x00\x00\x04\x59\x5a"
	xzDictionary = "\xfd\x37\x7a\x58\x5a\x00\x00\x04\xe6\xd6\xb4\x46\x02\x00\x21\x01\x1e\x00\x00\x00\x9b\x07\x51\x66\x01\x00\x02\x61\x0a\x62\x00\x00\x0b\x72\xee\xec\xd2\x60\x4d\x4e\x00\x01\x1b\x03\x0b\x2f\xb9\x10\x1f\xb6\xf3\x7d\x01\x00\x00\x00\x00\x04\x59\x5a"
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

// Packed input is recognised by its first bytes, in any number of members, and however
// the reads split it.
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
		"gzip padded":    {append(bytes.Clone(gz), make([]byte, 512)...), Options{}, "a\nb"},
		"bzip2":          {[]byte(bzip2Text), Options{}, "a\nb"},
		"bzip2 streams":  {[]byte(bzip2Text + bzip2Text), Options{}, "a\nba\nb"},
		"xz":             {[]byte(xzText), Options{}, "a\nb"},
		"xz streams":     {[]byte(xzText + "\x00\x00\x00\x00" + xzText), Options{}, "a\nba\nb"},
		"blocks of tar":  {tarOf("a"), Options{Format: Raw}, string(tarOf("a"))},
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
				t.Errorf("got %q, %v after %d bytes; want %q after %d", data(got), fatal, s.Consumed(), tt.want,
					len(tt.packed))
			}
			if err := s.Close(); err != nil {
				t.Errorf("second Close: %v", err)
			}
		})
	}
}

// The first line that a person types comes before a second is typed.
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

// Of packed data that is cut off or damaged, the records before the fault come, and then
// an error that says where it is.
func TestUnpackDamaged(t *testing.T) {
	var b strings.Builder
	random := rand.New(rand.NewPCG(1, 2))
	for b.Len() < 512<<10 {
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
				if fatal == nil || !strings.HasPrefix(fatal.Error(), "read data: "+tt.want) ||
					strings.Contains(fatal.Error(), "EOF") {
					t.Errorf("error %v, want %q", fatal, tt.want)
				}
				t.Log(fatal)
				if all := data(got); tt.most != (len(all) > len(text)/2) || name != "damaged" &&
					!strings.HasPrefix(text, all) {
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

// An error of the input is not taken for damage.
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

func TestUnpackMisnamed(t *testing.T) {
	for name, want := range map[string]string{
		"data.csv.gz":  "the name says gzip, and the content is not; --verbatim sends it as it is",
		"data.csv.ZST": "the name says zstd, and the content is not; --verbatim sends it as it is",
	} {
		name = write(t, name, "a\nb\n")
		s, err := Open(t.Context(), name, nil, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if _, _, fatal := drain(t, s); fatal == nil ||
			fatal.Error() != "read "+name+": "+want+" (records before: 0)" {
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
	// The content decides, not the name.
	s, err := Open(t.Context(), write(t, "data.gz", string(packZstd(t, "a\n"))), nil, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if got, _, fatal := drain(t, s); data(got) != "a\n" || fatal != nil {
		t.Errorf("got %q, %v", data(got), fatal)
	}
}

// The end of the input is final, although a terminal would deliver more after it.
func TestUnpackEndsOnce(t *testing.T) {
	s, err := New(&terminal{}, "data", Options{})
	if err != nil {
		t.Fatal(err)
	}
	if got, _, fatal := drain(t, s); data(got) != "P" || fatal != nil {
		t.Errorf("got %q, %v", data(got), fatal)
	}
}

// A terminal is one where somebody types P, Ctrl-D, and P again.
type terminal struct{ reads int }

func (r *terminal) Read(p []byte) (int, error) {
	if r.reads++; r.reads == 2 {
		return 0, io.EOF
	}
	return copy(p, "P"), nil
}

// A zstd window that needs much memory is refused, with a way out.
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

// tarOf returns the beginning of a tar archive.
func tarOf(name string) []byte {
	header := make([]byte, 512)
	copy(header, name)
	copy(header[257:], "ustar\x0000")
	return header
}

// zipOf returns a zip archive of these members.
func zipOf(t *testing.T, members ...string) string {
	t.Helper()
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	for _, text := range members {
		f, err := w.Create("dir/" + text)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(f, text); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Create("empty/"); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestUnpackZip(t *testing.T) {
	name := write(t, "data.csv.zip", zipOf(t, strings.Repeat("a\nb\n", 10_000)))
	s, err := Open(t.Context(), name, nil, Options{})
	if err != nil {
		t.Fatal(err)
	}
	got, _, fatal := drain(t, s)
	size, _ := s.Size()
	if len(got) != 20_000 || fatal != nil || s.Consumed() == 0 || s.Consumed() > size {
		t.Errorf("%d records, %v after %d of %d bytes", len(got), fatal, s.Consumed(), size)
	}
}

// What cannot be unpacked is refused by name.
func TestUnpackRefuses(t *testing.T) {
	for content, want := range map[string]string{
		zipOf(t, "a", "b"):                      "the zip archive has 3 members: extract one with unzip -p, into standard input",
		zipOf(t):                                "the zip archive has no members",
		string(tarOf("x")):                      "tar archives are not supported: extract a member with tar -xO, into standard input",
		string(packGzip(t, string(tarOf("x")))): "tar archives are not supported: extract a member with tar -xO, into standard input",
		"7z\xbc\xaf\x27\x1c":                    "7-Zip is not supported: unpack it with 7z",
		"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1":      "a Microsoft Office document is not supported: save it as CSV",
		xzDelta:                                 "xz uses a filter that is not supported; unpack it with xz -dc, into standard input",
		xzDictionary:                            "xz needs a dictionary of more than 64 MiB; unpack it with xz -dc, into standard input",
	} {
		name := write(t, "data", content)
		s, err := Open(t.Context(), name, nil, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if got, _, fatal := drain(t, s); got != nil || fatal == nil ||
			fatal.Error() != "read "+name+": "+want+" (records before: 0)" {
			t.Errorf("%.20q: %d records, %v; want %s", content, len(got), fatal, want)
		}
	}
	s, err := New(strings.NewReader(zipOf(t, "a")), "data", Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, fatal := drain(t, s); fatal == nil ||
		!strings.Contains(fatal.Error(), "zip is read from regular files only") {
		t.Errorf("a zip archive in a stream: %v", fatal)
	}
}
