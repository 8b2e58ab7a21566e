package records

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
)

const fuzzMaxRecord = 200

func FuzzLines(f *testing.F) {
	f.Add([]byte("a\nb"), false)
	f.Add([]byte("\n\r\n\x00\xff"), true)
	f.Add([]byte(strings.Repeat("x", 300)+"\ny\n"), true)
	f.Fuzz(func(t *testing.T, text []byte, slow bool) {
		s := fuzzSource(t, text, Options{Verbatim: true, MaxRecord: fuzzMaxRecord}, slow)
		eol := []byte("\n")
		if !bytes.Contains(text[:min(len(text), fuzzMaxRecord+1)], eol) && bytes.ContainsRune(text, '\r') {
			return // its lines may end in CR
		}
		lines := bytes.SplitAfter(text, eol)
		if len(lines[len(lines)-1]) == 0 {
			lines = lines[:len(lines)-1]
		}
		n := 0
		for record, err := range s.All() {
			if n == len(lines) {
				t.Fatalf("more than the %d lines", n)
			}
			line := lines[n]
			n++
			if bad, ok := errors.AsType[*Error](err); ok {
				if len(line) <= fuzzMaxRecord || bad.Line != int64(n) || !bytes.HasPrefix(line, bad.Raw) {
					t.Fatalf("line %d, %q: %#v", n, line, bad)
				}
			} else if err != nil || record.Line != int64(n) || !bytes.Equal(record.Data, line) ||
				record.Unended == bytes.HasSuffix(line, []byte("\n")) {
				t.Fatalf("line %d, %q: %+v, %v", n, line, record, err)
			}
		}
		if n != len(lines) {
			t.Fatalf("%d of %d lines", n, len(lines))
		}
	})
}

// FuzzCSV checks that reading ends for any input, that numbers and lines are in
// order, and that every record is a line of JSON. If encoding/csv finds no fault, and
// nothing is too long, both read the same rows.
func FuzzCSV(f *testing.F) {
	f.Add([]byte("a,b\n1,2\n\"x\ny\",z\r\n"), ',', false, false, false)
	f.Add([]byte("\ufeffa,b\n1,\"2\n3,4\n5,\"6\"\n"), ',', true, false, true)
	f.Add([]byte("a\n\"\"\"\n"+strings.Repeat("x\n", 150)+"\"a\"b\n"), ',', true, true, true)
	f.Add([]byte("line\"·\"\"·line\n\"\"\"·\"·1\n\r"), '·', false, true, false)
	f.Fuzz(func(t *testing.T, text []byte, delimiter rune, noHeader, lazy, slow bool) {
		opts := Options{Format: CSV, Delimiter: delimiter, NoHeader: noHeader, LazyQuotes: lazy, MaxRecord: fuzzMaxRecord, Verbatim: true, ReplaceInvalid: true}
		if !ValidDelimiter(delimiter) {
			return
		}
		if bytes.Contains(bytes.ReplaceAll(text, []byte("\r\n"), nil), []byte("\r")) {
			return // CR ends a row, but not for encoding/csv
		}
		if !noHeader && bytes.IndexByte(text, 0) >= 0 {
			return // which a header must not contain
		}
		if bytes.HasPrefix(text, []byte("\xff\xfe")) || bytes.HasPrefix(text, []byte("\xfe\xff")) ||
			bytes.HasPrefix(text, []byte("\x00\x00\xfe\xff")) {
			return // UTF-16 and UTF-32
		}
		s := fuzzSource(t, text, opts, slow)
		var rows [][]string // as JSON has them
		number, line, faults := int64(0), int64(0), 0
		for record, err := range s.All() {
			number++
			if bad, ok := errors.AsType[*Error](err); ok {
				faults++
				if bad.Number != number || bad.Line <= 0 || len(bad.Raw) > fuzzMaxRecord ||
					!bytes.Contains(text, bad.Raw) {
					t.Fatalf("record %d: %#v", number, bad)
				}
				continue
			}
			if err != nil { // of the header: the reader returns no errors
				faults++
				break
			}
			if record.Number != number || record.Line <= line || len(record.Data) > fuzzMaxRecord ||
				bytes.IndexByte(record.Data, '\n') != len(record.Data)-1 {
				t.Fatalf("record %d after line %d: %+v", number, line, record)
			}
			line = record.Line
			rows = append(rows, values(t, record.Data, noHeader))
		}
		if most := int64(bytes.Count(text, []byte("\n")) + 1); number > most || line > most {
			t.Fatalf("%d records, line %d, of %d lines", number, line, most)
		}
		want, err := standard(text, opts)
		if faults > 0 {
			opts.MaxRecord = 100 * (len(text) + 10) // more than any key and value of it take
			if n := countFaults(fuzzSource(t, text, opts, false)); (n > 0) != (err != nil) {
				t.Fatalf("%d faults, but encoding/csv says %v", n, err)
			}
			return
		}
		if err != nil {
			t.Fatalf("no fault was found, but by encoding/csv: %v", err)
		}
		rows, want = withoutEmpty(rows), withoutEmpty(want)
		if len(rows) != len(want) {
			t.Fatalf("%d rows, want %d", len(rows), len(want))
		}
		for i := range rows {
			compareRows(t, rows[i], want[i])
		}
	})
}

// FuzzCSVWellFormed writes well-formed CSV of any fields, and checks that it reads as
// the same fields.
func FuzzCSVWellFormed(f *testing.F) {
	f.Add("a", "b", "x\ny", "\"", 3, true)
	f.Add("line", "", "\r", ",", 1, false)
	f.Fuzz(func(t *testing.T, a, b, c, d string, repeat int, crlf bool) {
		var text bytes.Buffer
		w := csv.NewWriter(&text)
		w.UseCRLF = crlf
		want := [][]string{{a, b}}
		for range min(repeat, 20) {
			want = append(want, []string{c, d}, []string{d, a})
		}
		if err := w.WriteAll(want); err != nil {
			t.Fatal(err)
		}
		opts := Options{Format: CSV, NoHeader: true, Verbatim: true, ReplaceInvalid: true}
		want, err := standard(text.Bytes(), opts)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(bytes.ReplaceAll(text.Bytes(), []byte("\r\n"), nil), []byte("\r")) {
			return // encoding/csv writes a lone CR without quotes
		}
		n := 0
		for record, err := range fuzzSource(t, text.Bytes(), opts, false).All() {
			if err != nil || n == len(want) {
				t.Fatalf("record %d of %q: %v", n+1, text.Bytes(), err)
			}
			compareRows(t, values(t, record.Data, true), want[n])
			n++
		}
		if n != len(want) {
			t.Fatalf("%d of %d rows", n, len(want))
		}
	})
}

// withoutEmpty returns rows without those of one empty field, which encoding/csv skips
// if they are empty lines.
func withoutEmpty(rows [][]string) [][]string {
	return slices.DeleteFunc(rows, func(row []string) bool { return len(row) == 1 && row[0] == "" })
}

func countFaults(s *Source) (n int) {
	for _, err := range s.All() {
		if err != nil {
			n++
		}
	}
	return n
}

func fuzzSource(t *testing.T, text []byte, opts Options, slow bool) *Source {
	t.Helper()
	var r io.Reader = bytes.NewReader(text)
	if slow {
		r = iotest.OneByteReader(r)
	}
	s, err := New(r, "data", opts)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// standard reads text with encoding/csv, without its byte order mark.
func standard(text []byte, opts Options) ([][]string, error) {
	r := csv.NewReader(bytes.NewReader(bytes.TrimPrefix(text, []byte("\ufeff"))))
	r.Comma, r.LazyQuotes = opts.Delimiter, opts.LazyQuotes
	if r.Comma == 0 {
		r.Comma = ','
	}
	rows, err := r.ReadAll()
	if !opts.NoHeader && len(rows) > 0 {
		rows = rows[1:]
	}
	return rows, err
}

// values returns the values of a line of JSON in order, without the line number.
func values(t *testing.T, line []byte, noHeader bool) []string {
	t.Helper()
	if noHeader {
		var row struct{ Fields []string }
		if err := json.Unmarshal(line, &row); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		return row.Fields
	}
	var tokens []string
	keys := make(map[string]bool)
	for d, n := json.NewDecoder(bytes.NewReader(line)), 0; ; n++ {
		token, err := d.Token()
		if err == io.EOF {
			break
		}
		text, ok := token.(string)
		switch {
		case err != nil:
			t.Fatalf("%s: %v", line, err)
		case ok && n%2 == 1:
			if keys[text] {
				t.Fatalf("%s: the key %q is there twice", line, text)
			}
			keys[text] = true
		case ok:
			tokens = append(tokens, text)
		}
	}
	return tokens
}

// compareRows compares got with want as encoding/json encodes it.
func compareRows(t *testing.T, got, want []string) {
	t.Helper()
	line, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	var encoded []string
	if err := json.Unmarshal(line, &encoded); err != nil {
		t.Fatal(err)
	}
	for i, field := range got { // encoding/csv changes line breaks inside quotes
		got[i] = strings.ReplaceAll(field, "\r\n", "\n")
	}
	if strings.Join(got, "\x00|") != strings.Join(encoded, "\x00|") || len(got) != len(want) {
		t.Fatalf("row %q, want %q", got, want)
	}
}
