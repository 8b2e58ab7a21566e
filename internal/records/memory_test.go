package records

import (
	"bytes"
	"compress/gzip"
	"io"
	"runtime"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// endless repeats text up to a length.
func endless(text string, length int64) io.Reader {
	return io.LimitReader(&repeated{text: []byte(strings.Repeat(text, 1+4096/len(text)))}, length)
}

type repeated struct {
	text []byte
	at   int
}

func (r *repeated) Read(p []byte) (int, error) {
	n := copy(p, r.text[r.at:])
	r.at = (r.at + n) % len(r.text)
	return n, nil
}

// packed returns what r holds, packed.
func packed(t testing.TB, r io.Reader, pack func(io.Writer) io.WriteCloser) io.Reader {
	var b bytes.Buffer
	w := pack(&b)
	if _, err := io.Copy(w, r); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

// TestMemory streams several times what may be in memory at any time.
func TestMemory(t *testing.T) {
	const (
		total  = 12 << 20
		short  = 2 << 20   // of short records, which take long to read
		step   = 512 << 10 // between two measurements
		buffer = 512 << 10 // more than all buffers, without long records
		window = maxZstdWindow * 3 / 2
	)
	row := "1234567,\"Lovelace, Ada\",1815-12-10,London\n"
	toGzip := func(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) }
	toZstd := func(w io.Writer) io.WriteCloser {
		z, err := zstd.NewWriter(w, zstd.WithWindowSize(maxZstdWindow), zstd.WithEncoderConcurrency(1))
		if err != nil {
			t.Fatal(err)
		}
		return z
	}
	for name, tt := range map[string]struct {
		source io.Reader
		opts   Options
		most   uint64 // bytes
	}{
		"lines":                {endless(row, short), Options{}, buffer},
		"csv":                  {endless(row, short), Options{Format: CSV}, buffer},
		"raw":                  {endless(row, total), Options{Format: Raw}, buffer},
		"gzip":                 {packed(t, endless(row, short), toGzip), Options{}, buffer},
		"zstd":                 {packed(t, endless(row, 2*total), toZstd), Options{}, buffer + window},
		"a line":               {endless("x", total), Options{}, buffer + 2*defaultMaxRecord},
		"long lines":           {endless(strings.Repeat("x", defaultMaxRecord-1)+"\n", total), Options{}, buffer + 3*defaultMaxRecord},
		"a row":                {endless("x,", total), Options{Format: CSV, NoHeader: true}, buffer + 3*defaultMaxRecord},
		"a quote never closed": {io.MultiReader(strings.NewReader("a\n\"b\n"), endless(strings.Repeat("x", 99)+"\n", total)), Options{Format: CSV}, buffer + 5*defaultMaxRecord},
		"empty lines":          {endless("\n", total/16), Options{Format: CSV}, buffer},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := New(tt.source, "data", tt.opts)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			base, most := live(), uint64(0)
			sample := func() { most = max(most, max(base, live())-base) }
			read, due := 0, step
			for record, err := range s.All() {
				read += len(record.Data)
				if _, ok := err.(*Error); err != nil && !ok {
					t.Fatal(err)
				}
				if read >= due || err != nil {
					sample()
					due += step
				}
			}
			sample()
			t.Logf("%d KiB", most>>10)
			if most > tt.most {
				t.Errorf("%d KiB are in memory, want at most %d", most>>10, tt.most>>10)
			}
		})
	}
}

// live returns the size of the heap without garbage, in bytes.
func live() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// A record costs one allocation: its data.
func TestAllocations(t *testing.T) {
	for format, most := range map[Format]float64{Lines: 1, CSV: 1, Raw: 1} {
		s, err := New(endless("some,text,and,\"more, quoted\"\n", 1<<30), "data", Options{Format: format, BlockSize: 64})
		if err != nil {
			t.Fatal(err)
		}
		for range s.All() {
			break // with what is allocated once
		}
		const n = 1000
		got := testing.AllocsPerRun(10, func() {
			i := 0
			for range s.All() {
				if i++; i == n {
					break
				}
			}
		}) / n
		if got > most+0.05 {
			t.Errorf("%v: %.2f allocations a record, want %.0f", format, got, most)
		}
	}
}
