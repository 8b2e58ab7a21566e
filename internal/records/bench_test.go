package records

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"testing"
)

// BenchmarkRead is one 16 MiB source from its first record to its last. MB/s are
// those of the source, unpacked.
func BenchmarkRead(b *testing.B) {
	const total = 16 << 20
	for _, bm := range []struct {
		name string
		opts Options
		row  func(i int) string
	}{
		{"lines", Options{}, plainRow},
		{"csv", Options{Format: CSV}, plainRow},
		{"csv/quoted", Options{Format: CSV}, quotedRow},
		{"raw", Options{Format: Raw}, plainRow},
	} {
		var text strings.Builder
		for i := 0; text.Len() < total; i++ {
			text.WriteString(bm.row(i))
		}
		source := []byte(text.String())
		packings := []struct {
			name   string
			source []byte
		}{{"", source}}
		if bm.name == "lines" {
			packings = append(packings, []struct {
				name   string
				source []byte
			}{{"/gzip", packGzip(b, text.String())}, {"/zstd", packZstd(b, text.String())}}...)
		}
		for _, packing := range packings {
			b.Run(bm.name+packing.name, func(b *testing.B) {
				b.SetBytes(int64(len(source)))
				b.ReportAllocs()
				records := 0
				for b.Loop() {
					s, err := New(io.MultiReader(bytes.NewReader(packing.source)), "data", bm.opts)
					if err != nil {
						b.Fatal(err)
					}
					records = 0
					for _, err := range s.All() {
						if err != nil {
							b.Fatal(err)
						}
						records++
					}
					if err := s.Close(); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(records), "records/op")
			})
		}
	}
}

func plainRow(i int) string {
	return fmt.Sprintf("%d,Ada Lovelace,London,1815-12-10,%d.%02d\n", i, i%977, i%100)
}

func quotedRow(i int) string {
	return fmt.Sprintf("%d,\"Lovelace, \"\"Ada\"\"\",\"12 Street\nLondon\",1815-12-10,%d.%02d\r\n", i, i%977, i%100)
}
