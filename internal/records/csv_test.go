package records

import (
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestCSV(t *testing.T) {
	for name, tt := range map[string]struct {
		text string
		opts Options
		want string
	}{
		"empty":         {"", Options{}, ""},
		"header only":   {"a,b\n", Options{}, ""},
		"rows":          {"name,born\nAda,1815\nAlan,1912", Options{}, `{"line":2,"name":"Ada","born":"1815"} {"line":3,"name":"Alan","born":"1912"}`},
		"no header":     {"Ada,1815\nAlan,1912\n", Options{NoHeader: true}, `{"line":1,"fields":["Ada","1815"]} {"line":2,"fields":["Alan","1912"]}`},
		"delimiter":     {"a;b\n1,5;2\n", Options{Delimiter: ';'}, `{"line":2,"a":"1,5","b":"2"}`},
		"tab":           {"a\tb\n1 \t 2\n", Options{Delimiter: '\t'}, `{"line":2,"a":"1 ","b":" 2"}`},
		"wide":          {"a·b\n1·\"x·\"\n", Options{Delimiter: '·'}, `{"line":2,"a":"1","b":"x·"}`},
		"CRLF":          {"a,b\r\n1,2\r\n\"x\r\ny\",z\r\n", Options{}, `{"line":2,"a":"1","b":"2"} {"line":3,"a":"x\r\ny","b":"z"}`},
		"newlines":      {"a\n\"1\n\n2\"\n3\n", Options{}, `{"line":2,"a":"1\n\n2"} {"line":5,"a":"3"}`},
		"empty lines":   {"\n\r\na,b\n\n\n1,2\n\n3,4\n\r", Options{}, `{"line":6,"a":"1","b":"2"} {"line":8,"a":"3","b":"4"}`},
		"no comments":   {"#a\n#1\n", Options{}, `{"line":2,"#a":"#1"}`},
		"lazy":          {"a,b\n1\"2,\"3\"4\"\n", Options{LazyQuotes: true}, `{"line":2,"a":"1\"2","b":"3\"4"}`},
		"byte order":    {"\ufeff\"a\"\n1\n", Options{}, `{"line":2,"a":"1"}`},
		"only an order": {"\ufeff", Options{}, ""},
		"order, empty":  {"\ufeff\na\n\ufeff1\n", Options{}, "{\"line\":3,\"a\":\"\ufeff1\"}"},
		"CR":            {"a,b\r1,2\r\"x\ry\",z\r", Options{}, `{"line":2,"a":"1","b":"2"} {"line":3,"a":"x\ry","b":"z"}`},
		"CR, no end":    {"a\r1\r2", Options{}, `{"line":2,"a":"1"} {"line":3,"a":"2"}`},
		"mixed ends":    {"a\n1\r\n2\r3\n", Options{}, `{"line":2,"a":"1"} {"line":3,"a":"2"} {"line":3,"a":"3"}`},
		"one column":    {"a\n\n1\n\r\n\"\"\n", Options{}, `{"line":2,"a":""} {"line":3,"a":"1"} {"line":4,"a":""} {"line":5,"a":""}`},
		"comments":      {"#x\na,b\n#1,\"\n1,#2\n\"#3\",4\n#", Options{Comment: '#'}, `{"line":4,"a":"1","b":"#2"} {"line":5,"a":"#3","b":"4"}`},
		"ragged":        {"a,column3\n1\n1,2,3,4\n", Options{AllowRagged: true}, `{"line":2,"a":"1"} {"line":3,"a":"1","column3":"2","column3_2":"3","column4":"4"}`},
		"ragged fields": {"1\n1,2\n", Options{AllowRagged: true, NoHeader: true}, `{"line":1,"fields":["1"]} {"line":2,"fields":["1","2"]}`},
		"named rows":    {"source,line\n1,2\n", Options{NameRows: true}, `{"line":2,"source":"data","source_2":"1","line_2":"2"}`},
		"Latin-1":       {"a\n\xe9\x80\n", Options{Encoding: "latin1"}, "{\"line\":2,\"a\":\"é\u0080\"}"},
		"windows-1252":  {"a\n\xe9\x80\n", Options{Encoding: "cp1252"}, `{"line":2,"a":"é€"}`},
		"Shift JIS":     {"a\n\x93\xfa\n", Options{Encoding: "shift_jis"}, `{"line":2,"a":"日"}`},
		"UTF-16":        {"\xff\xfea\x00\n\x00=\xd8\x00\xde\xfd\xff\n\x00", Options{}, "{\"line\":2,\"a\":\"😀\ufffd\"}"},
		"UTF-16BE":      {"\x00a\x00\n\x00\xe9", Options{Encoding: "utf-16be"}, `{"line":2,"a":"é"}`},
		"UTF-32":        {"\xff\xfe\x00\x00a\x00\x00\x00\n\x00\x00\x00\x00\xf6\x01\x00", Options{}, `{"line":2,"a":"😀"}`},
		"mark wins":     {"\ufeffa\né\n", Options{Encoding: "latin1"}, `{"line":2,"a":"é"}`},
		"duplicates":    {"n,n,n_2,n\n1,2,3,4\n", Options{}, `{"line":2,"n":"1","n_3":"2","n_2":"3","n_4":"4"}`},
		"line":          {"line,line_2,line\n1,2,3\n", Options{}, `{"line":2,"line_3":"1","line_2":"2","line_4":"3"}`},
		"nameless":      {",a,,column1\n1,2,3,4\n", Options{}, `{"line":2,"column1":"1","a":"2","column3":"3","column1_2":"4"}`},
		"escapes":       {"\"k\"\"\"\n\"\"\"\\\x00\t\x1f<&>\u2028é\xff\xfe\"\n", Options{ReplaceInvalid: true}, "{\"line\":2,\"k\\\"\":\"\\\"\\\\\\u0000\\t\\u001f<&>\u2028é\ufffd\ufffd\"}"},
		"empty values":  {"a,b\n,\n\"\",\n", Options{}, `{"line":2,"a":"","b":""} {"line":3,"a":"","b":""}`},
	} {
		t.Run(name, func(t *testing.T) {
			tt.opts.Format = CSV
			got, malformed := read(t, tt.text, tt.opts)
			if diff := cmp.Diff(tt.want, strings.ReplaceAll(strings.TrimSuffix(data(got), "\n"), "\n", " ")); diff != "" || malformed != nil {
				t.Errorf("(-want +got):\n%s\nmalformed: %v", diff, malformed)
			}
			for i, record := range got {
				var row struct{ Line int64 }
				if err := json.Unmarshal(record.Data, &row); err != nil || row.Line != record.Line ||
					record.Number != int64(i+1) {
					t.Errorf("record %d: number %d, line %d, %s: %v", i+1, record.Number, record.Line,
						record.Data, err)
				}
			}
		})
	}
}

// The error of a malformed row has its place and its text. The rows around it are not
// affected.
func TestCSVMalformed(t *testing.T) {
	const swallows = 200
	for name, tt := range map[string]struct {
		text  string
		opts  Options
		cause error
		want  []string // errors with their raw rows, and between them the numbers of good rows
	}{
		"bare quote": {
			"a,b\n1,2\n1,x\"y\n3,4\n",
			Options{},
			csv.ErrBareQuote,
			[]string{"1@2", `data:3:4: bare " in non-quoted-field` + "\n1,x\"y\n", "3@4"},
		},
		"bare quote in a later line": {
			"a,b\n\"1\n2\",x\"y\n3,4\n",
			Options{},
			csv.ErrBareQuote,
			[]string{`data:3:5: bare " in non-quoted-field` + "\n\"1\n2\",x\"y\n", "2@4"},
		},
		"quote within quotes": {
			"a,b\n1,\"x\"y\n3,4\n",
			Options{},
			csv.ErrQuote,
			[]string{`data:2:5: extraneous or missing " in quoted-field` + "\n1,\"x\"y\n", "2@3"},
		},
		"never closed": {
			"a,b\n1,2\n\"\"\"\",\"x\n3,4\n\n5,6\n",
			Options{},
			csv.ErrQuote,
			[]string{"1@2", `data:3:6: extraneous or missing " in quoted-field: not closed` + "\n\"\"\"\",\"x\n", "3@4", "4@6"},
		},
		"never closed, on the last line": {
			"a,b\n1,2\n3,\"4",
			Options{},
			csv.ErrQuote,
			[]string{"1@2", `data:3:3: extraneous or missing " in quoted-field: not closed` + "\n3,\"4"},
		},
		"never closed, in a row of several lines": {
			"a,b\n\"1\n1\",\"2\n3,4\n",
			Options{},
			csv.ErrQuote,
			[]string{`data:3:4: extraneous or missing " in quoted-field: not closed` + "\n\"1\n1\",\"2\n", "2@4"},
		},
		"closed by another row's": {
			"a,b\n1,\"2\n3,4\n5,\"6\"\n7,8\n",
			Options{},
			csv.ErrQuote,
			[]string{`data:2:3: extraneous or missing " in quoted-field: not closed before the one in line 4, column 3` + "\n1,\"2\n", "2@3", "3@4", "4@5"},
		},
		"never closed within MaxRecord": {
			"a,b\n\"1,2\n3,4\n" + strings.Repeat("\n", swallows) + "5,6\n",
			Options{MaxRecord: 100},
			csv.ErrQuote,
			[]string{
				`data:2:1: extraneous or missing " in quoted-field: not closed` + "\n\"1,2\n", "2@3",
				fmt.Sprintf("3@%d", swallows+4),
			},
		},
		"never closed, before a line longer than MaxRecord": {
			"a,b\n\"1,2\n" + strings.Repeat("x", swallows) + "\n5,6\n",
			Options{MaxRecord: 30},
			nil,
			[]string{
				`data:2:1: extraneous or missing " in quoted-field: not closed` + "\n\"1,2\n",
				"data:3: too long: more than 30 bytes\n" + strings.Repeat("x", 30), "3@4",
			},
		},
		"lazy, never closed within MaxRecord": {
			"a,b\n1\"1,\"2\"2\n" + strings.Repeat("\n", swallows) + "5,6\n",
			Options{MaxRecord: 100, LazyQuotes: true},
			csv.ErrQuote,
			[]string{
				`data:2:5: extraneous or missing " in quoted-field: not closed` + "\n1\"1,\"2\"2\n",
				fmt.Sprintf("2@%d", swallows+3),
			},
		},
		"too few": {
			"a,b\n1\n2,3\n",
			Options{},
			csv.ErrFieldCount,
			[]string{"data:2:1: wrong number of fields: 1 instead of 2\n1\n", "2@3"},
		},
		"too many, in a later line": {
			"a,b\n\"1\n1\",2,3\n4,5\n",
			Options{},
			csv.ErrFieldCount,
			[]string{"data:3:6: wrong number of fields: 3 instead of 2\n\"1\n1\",2,3\n", "2@4"},
		},
		"against the first row": {
			"1,x\"\n1,2,3\n4,5\n",
			Options{NoHeader: true},
			nil,
			[]string{`data:1:4: bare " in non-quoted-field` + "\n1,x\"\n", "2@2", "data:3:1: wrong number of fields: 2 instead of 3\n4,5\n"},
		},
		"too long as JSON": {
			"a\n" + strings.Repeat("\"\"", 2) + "\n\"\x00\n\x00\x00\"\n1\n",
			Options{MaxRecord: 24},
			ErrTooLong,
			[]string{"1@2", "data:3:1: too long: more than 24 bytes of JSON\n\"\x00\n\x00\x00\"\n", "3@5"},
		},
		"not UTF-8": {
			"a,b\n1,\"x\n\xe9\"\n2,3\n",
			Options{},
			ErrEncoding,
			[]string{"data:3:1: cannot be decoded: byte 0xE9 is not UTF-8\n1,\"x\n\xe9\"\n", "2@4"},
		},
		"not Shift JIS": {
			"a\n\x93\xfa\xff\n2\n",
			Options{Encoding: "shift_jis"},
			ErrEncoding,
			[]string{"data:2:4: cannot be decoded\n日\xff\n", "2@3"},
		},
		"half a pair of UTF-16": {
			"\xfe\xff\x00a\x00\n\xd8\x3d\x00\n\x00b",
			Options{},
			ErrEncoding,
			[]string{"data:2:1: cannot be decoded\n\xff\n", "2@3"},
		},
		"bare quote in a text of CR": {
			"1,x\"\r2,3\r",
			Options{NoHeader: true},
			csv.ErrBareQuote,
			[]string{"data:1:4: bare \" in non-quoted-field\n1,x\"\r", "2@2"},
		},
		"too many columns": {
			"a,b\n" + strings.Repeat(",", maxColumns) + "\n1,2\n",
			Options{},
			ErrColumns,
			[]string{fmt.Sprintf("data:2:%d: too many columns: more than %d\n%s\n", maxColumns+1, maxColumns,
				strings.Repeat(",", maxColumns)), "2@3"},
		},
		"after a byte order mark": {
			"\ufeff1,\"x\"y\n",
			Options{NoHeader: true},
			csv.ErrQuote,
			[]string{`data:1:5: extraneous or missing " in quoted-field` + "\n1,\"x\"y\n"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			tt.opts.Format = CSV
			s, err := New(strings.NewReader(tt.text), "data", tt.opts)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			number := int64(0)
			for record, err := range s.All() {
				number++
				bad, ok := errors.AsType[*Error](err)
				switch {
				case ok && bad.Number == number:
					got = append(got, bad.Error()+"\n"+string(bad.Raw))
					if tt.cause != nil && !errors.Is(bad, tt.cause) {
						t.Errorf("%v is not %v", bad, tt.cause)
					}
				case err == nil && record.Number == number:
					got = append(got, fmt.Sprintf("%d@%d", record.Number, record.Line))
				default:
					t.Fatalf("got %v, %#v as number %d", record, err, number)
				}
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// A malformed header ends the source.
func TestCSVHeaderMalformed(t *testing.T) {
	for text, want := range map[string]string{
		"\na,b\"\n1,2\n":                   `read data: header, line 2, column 4: bare " in non-quoted-field (records before: 0)`,
		"a\x00,\x00b\x00\n\x001\x00":       `read data: header, line 1: NUL bytes, as in UTF-16 without a byte order mark (records before: 0)`,
		"a,\"b\n1,2\n":                     `read data: header, line 1, column 3: extraneous or missing " in quoted-field: not closed (records before: 0)`,
		strings.Repeat("x", 100) + "\n1\n": "read data: header, line 1, column 1: too long: more than 64 bytes (records before: 0)",
	} {
		s, err := New(strings.NewReader(text), "data", Options{Format: CSV, MaxRecord: 64})
		if err != nil {
			t.Fatal(err)
		}
		got, malformed, fatal := drain(t, s)
		if got != nil || malformed != nil || fatal == nil || fatal.Error() != want {
			t.Errorf("%q: got %v, %v, %v; want %s", text, got, malformed, fatal, want)
		}
	}
}

// A quote that is never closed costs time in proportion to the file, not to its square.
func TestCSVUnclosedQuotesInLinearTime(t *testing.T) {
	for _, lazy := range []bool{false, true} {
		const maxRecord = 256 << 10
		text := "a\n" + strings.Repeat("\"a\n", (maxRecord+maxRecord/10)/3)
		s, err := New(strings.NewReader(text), "data", Options{Format: CSV, LazyQuotes: lazy, MaxRecord: maxRecord})
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		got, malformed, fatal := drain(t, s)
		if took := time.Since(began); took > 20*time.Second || fatal != nil ||
			len(malformed) == 0 { // minutes if quadratic
			t.Errorf("lazy: %v: %d records and %d errors in %v, %v", lazy, len(got), len(malformed), took, fatal)
		}
	}
}

// What AppendCSV writes is read as the same fields.
func TestAppendCSV(t *testing.T) {
	opts := Options{Format: CSV, Delimiter: ';', Comment: '#', NoHeader: true, AllowRagged: true}
	want := [][]string{{""}, {"#a", "#b"}, {"a;b", "\"", "x\r\ny"}, {" ", "\r", "\n", ""}, {"é", "1,5"}}
	var text []byte
	for _, fields := range want {
		text = AppendCSV(text, fields, opts)
	}
	got, malformed := read(t, string(text), opts)
	var rows [][]string
	for _, record := range got {
		rows = append(rows, values(t, record.Data, true))
	}
	if diff := cmp.Diff(want, rows); diff != "" || malformed != nil {
		t.Errorf("(-want +got):\n%s\nmalformed: %v\n%s", diff, malformed, text)
	}
}
