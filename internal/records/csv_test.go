package records

import (
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

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
		"CRLF":          {"a,b\r\n1,2\r\n\"x\r\ny\",z\r\n", Options{}, `{"line":2,"a":"1","b":"2"} {"line":3,"a":"x\ny","b":"z"}`},
		"newlines":      {"a\n\"1\n\n2\"\n3\n", Options{}, `{"line":2,"a":"1\n\n2"} {"line":5,"a":"3"}`},
		"empty lines":   {"\n\r\na\n\n\n1\n\n2\n\r", Options{}, `{"line":6,"a":"1"} {"line":8,"a":"2"}`},
		"no comments":   {"#a\n#1\n", Options{}, `{"line":2,"#a":"#1"}`},
		"lazy":          {"a,b\n1\"2,\"3\"4\"\n", Options{LazyQuotes: true}, `{"line":2,"a":"1\"2","b":"3\"4"}`},
		"byte order":    {"\ufeff\"a\"\n1\n", Options{}, `{"line":2,"a":"1"}`},
		"only an order": {"\ufeff", Options{}, ""},
		"order, empty":  {"\ufeff\na\n\ufeff1\n", Options{}, "{\"line\":3,\"a\":\"\ufeff1\"}"},
		"duplicates":    {"n,n,n_2,n\n1,2,3,4\n", Options{}, `{"line":2,"n":"1","n_3":"2","n_2":"3","n_4":"4"}`},
		"line":          {"line,line_2,line\n1,2,3\n", Options{}, `{"line":2,"line_3":"1","line_2":"2","line_4":"3"}`},
		"nameless":      {",a,,column1\n1,2,3,4\n", Options{}, `{"line":2,"column1":"1","a":"2","column3":"3","column1_2":"4"}`},
		"escapes":       {"\"k\"\"\"\n\"\"\"\\\x00\t\x1f<&>\u2028é\xff\xfe\"\n", Options{}, "{\"line\":2,\"k\\\"\":\"\\\"\\\\\\u0000\\t\\u001f<&>\u2028é\ufffd\ufffd\"}"},
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
				if err := json.Unmarshal(record.Data, &row); err != nil || row.Line != record.Line || record.Number != int64(i+1) {
					t.Errorf("record %d: number %d, line %d, %s: %v", i+1, record.Number, record.Line, record.Data, err)
				}
			}
		})
	}
}

// A malformed row is named with its place and comes back as it was. The rows
// around it are not touched.
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
			[]string{`data:2:1: extraneous or missing " in quoted-field: not closed` + "\n\"1,2\n", "2@3", fmt.Sprintf("3@%d", swallows+4)},
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
			[]string{`data:2:5: extraneous or missing " in quoted-field: not closed` + "\n1\"1,\"2\"2\n", fmt.Sprintf("2@%d", swallows+3)},
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

// Without its header no row of a file means anything.
func TestCSVHeaderMalformed(t *testing.T) {
	for text, want := range map[string]string{
		"\na,b\"\n1,2\n":                   `read data: header, line 2, column 4: bare " in non-quoted-field (records before: 0)`,
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
