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
	"echod/internal/records"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// echoServer dials a server in memory.
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

// send runs with these options, and returns the output and the reports.
func send(t *testing.T, opts Options) (out, reported string, summary Summary, err error) {
	t.Helper()
	var written, reports bytes.Buffer
	opts.Address, opts.Display = "memory", Events(&reports)
	if opts.Out == nil {
		opts.Out = NewOutput(&written)
	}
	opts.Stream.Ordered = true
	if opts.Stream.Dial == nil {
		opts.Stream.Dial = echoServer(t)
	}
	if opts.Records.Format == 0 {
		opts.Records.Format = records.Lines
	}
	summary, err = Run(t.Context(), t.Context(), opts)
	return written.String(), reports.String(), summary, err
}

func file(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestRunSeparatesInputsWithoutANewline(t *testing.T) {
	out, _, summary, err := send(t, Options{Inputs: []string{file(t, "a", "one\ntwo"), file(t, "b", "three")}})
	if want := "one\ntwo\nthree"; err != nil || out != want || summary.Came != 3 {
		t.Errorf("%q, %+v, %v; want %q", out, summary, err, want)
	}
}

func TestRunReportsTheFirstFailures(t *testing.T) {
	table := file(t, "t.csv", "a,b\n"+strings.Repeat("1\n", 50))
	_, reported, summary, err := send(t, Options{Inputs: []string{table}, Records: records.Options{Format: records.CSV}})
	if err != nil || summary.Malformed != 50 ||
		strings.Count(reported, "instead of 2 (--allow-ragged accepts it)") != 10 ||
		!strings.Contains(reported, "further failures are counted, and not reported") {
		t.Errorf("%+v, %v, reported:\n%s", summary, err, reported)
	}
}

func TestRunKeepsTheRate(t *testing.T) {
	began := time.Now()
	_, _, summary, err := send(t, Options{Inputs: []string{file(t, "a", strings.Repeat("x\n", 101))}, Rate: 1000})
	if took := time.Since(began); err != nil || summary.Came != 101 ||
		took < 85*time.Millisecond { // minus a burst of ten
		t.Errorf("%+v in %v, %v", summary, took, err)
	}
}

func TestSummary(t *testing.T) {
	for want, s := range map[string]Summary{
		"1 record came back: 5 B in 1s, 1/s":                                                    {Came: 1, Bytes: 5, Took: time.Second},
		"all 2,000 records came back: 5.0 kB in 2s, 1,000/s":                                    {Came: 2000, Bytes: 5000, Took: 2 * time.Second},
		"0 of 1 record came back: 0 B in 0s; 1 malformed":                                       {Malformed: 1},
		"0 records came back: 0 B in 0s":                                                        {},
		"2 records came back: 0 B in 1s, 2/s; not all of the input was read":                    {Came: 2, Unread: true, Took: time.Second},
		"2 of 3 records came back: 0 B in 1s, 2/s; 1 failed before; 4 done before; 1 reconnect": {Came: 2, Earlier: 1, Skipped: 5, Reconnects: 1, Took: time.Second},
		"1 of 6 records came back: 0 B in 1s, 1/s; 2 failed; 3 not finished; 4 done before; 6 sent again; 5 reconnects": {
			Came: 1, Failed: 2, Unfinished: 3, Skipped: 4, Reconnects: 5, Resent: 6, Took: time.Second,
		},
	} {
		if got := fmt.Sprint(s); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
