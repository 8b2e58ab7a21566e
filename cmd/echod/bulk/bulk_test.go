package bulk

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"echod/client"
	"echod/client/records"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// echoServer echoes in memory.
func echoServer(t *testing.T) client.DialFunc {
	var serving sync.WaitGroup
	t.Cleanup(serving.Wait)
	return func(context.Context, string) (net.Conn, error) {
		near, far := net.Pipe()
		serving.Go(func() {
			defer far.Close()
			_, _ = io.Copy(far, far)
		})
		return near, nil
	}
}

// send runs with these options, and returns what came back and what was said.
func send(t *testing.T, opts Options) (out, said string, summary Summary, err error) {
	t.Helper()
	var written, told bytes.Buffer
	opts.Address, opts.Out, opts.Display = "memory", &written, Events(&told)
	opts.Stream.Dial, opts.Stream.Ordered = echoServer(t), true
	if opts.Records.Format == 0 {
		opts.Records.Format = records.Lines
	}
	summary, err = Run(t.Context(), t.Context(), opts)
	return written.String(), told.String(), summary, err
}

func file(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestRecordsStayApartBehindALineWithoutItsEnd(t *testing.T) {
	out, _, summary, err := send(t, Options{Inputs: []string{file(t, "a", "one\ntwo"), file(t, "b", "three")}})
	if want := "one\ntwo\nthree"; err != nil || out != want || summary.Came != 3 {
		t.Errorf("%q, %+v, %v; want %q", out, summary, err, want)
	}
}

func TestOnlyTheFirstFailuresAreNamed(t *testing.T) {
	table := file(t, "t.csv", "a,b\n"+strings.Repeat("1\n", 50))
	_, said, summary, err := send(t, Options{Inputs: []string{table}, Records: records.Options{Format: records.CSV}})
	if err != nil || summary.Malformed != 50 || strings.Count(said, "wrong number of fields") != 10 || !strings.Contains(said, "more failures are only counted") {
		t.Errorf("%+v, %v, said:\n%s", summary, err, said)
	}
}

func TestRateIsKept(t *testing.T) {
	began := time.Now()
	_, _, summary, err := send(t, Options{Inputs: []string{file(t, "a", strings.Repeat("x\n", 101))}, Rate: 1000})
	if took := time.Since(began); err != nil || summary.Came != 101 || took < 85*time.Millisecond { // less a burst of ten
		t.Errorf("%+v in %v, %v", summary, took, err)
	}
}

func TestStateKnowsItsInputs(t *testing.T) {
	input := file(t, "in", "one\n")
	path := filepath.Join(t.TempDir(), "state")
	s, err := OpenState(path, []string{input}, records.Lines)
	if err != nil || s.GoesOn() {
		t.Fatalf("a state without a file: %v, goes on: %v", err, s.GoesOn())
	}
	s.take(key{input: 0, number: 1})
	s.take(key{input: 0, number: 2})
	s.settle(key{input: 0, number: 1})
	if err := s.save(false); err != nil {
		t.Fatal(err)
	}
	s, err = OpenState(path, []string{input}, records.Lines)
	if err != nil || !s.GoesOn() {
		t.Fatalf("%v, goes on: %v", err, s.GoesOn())
	}
	for number, want := range map[int64]bool{1: true, 2: false, 3: false} {
		if got := s.has(key{number: number}); got != want {
			t.Errorf("record %d is settled: %v, want %v", number, got, want)
		}
	}
	if err := os.WriteFile(input, []byte("one\ntwo\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		inputs []string
		format records.Format
		want   string
	}{
		"another format": {[]string{input}, records.CSV, "is about 1 inputs in lines, and not 1 in csv"},
		"another name":   {[]string{file(t, "other", "one\n")}, records.Lines, "is about " + input},
		"another size":   {[]string{input}, records.Lines, "has changed since"},
	} {
		if _, err := OpenState(path, c.inputs, c.format); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// What fails of CSV is a row again, whatever is in it.
func TestFailedRowsAreRowsAgain(t *testing.T) {
	table := "a;line;a\n1;\"x;\"\"y\"\"\nz\";\n"
	for name, opts := range map[string]records.Options{
		"header":    {Format: records.CSV, Delimiter: ';'},
		"no header": {Format: records.CSV, Delimiter: ';', NoHeader: true},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "failed")
			failed, err := NewFailed(path, opts, false)
			if err != nil {
				t.Fatal(err)
			}
			source, err := records.New(strings.NewReader(table), "t", opts)
			if err != nil {
				t.Fatal(err)
			}
			for record, err := range source.All() {
				if err == nil {
					err = failed.add(source.Header(), record.Data)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			if err := failed.close(); err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(path); string(got) != table {
				t.Errorf("got %q (%v), want %q", got, err, table)
			}
		})
	}
}

func TestFailedWithNothingInItIsRemoved(t *testing.T) {
	path := filepath.Join(t.TempDir(), "failed")
	failed, err := NewFailed(path, records.Options{Format: records.Lines}, false)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := send(t, Options{Inputs: []string{file(t, "a", "x\n")}, Failed: failed}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("it is still there: %v", err)
	}
}

func TestSummaryIsALine(t *testing.T) {
	for want, s := range map[string]Summary{
		"1 record came back: 5 B in 1s, 1/s":                 {Came: 1, Bytes: 5, Took: time.Second},
		"all 2,000 records came back: 5.0 kB in 2s, 1,000/s": {Came: 2000, Bytes: 5000, Took: 2 * time.Second},
		"0 of 1 record came back: 0 B in 0s; 1 malformed":    {Malformed: 1},
		"1 of 6 records came back: 0 B in 1s, 1/s; 2 failed; 3 not finished; 4 done before; 5 reconnects; 6 sent again": {
			Came: 1, Failed: 2, Unfinished: 3, Skipped: 4, Reconnects: 5, Resent: 6, Took: time.Second,
		},
	} {
		if got := fmt.Sprint(s); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
