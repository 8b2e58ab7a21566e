package bulk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"echod/client"
	"echod/internal/records"
)

func TestStateKnowsWhatIsDone(t *testing.T) {
	inputs := []string{file(t, "in", "one\n"), file(t, "all", "1\n"), file(t, "but one", "1\n")}
	path := filepath.Join(t.TempDir(), "state")
	s, err := OpenState(path, inputs, records.Options{})
	if err != nil || s.continues() {
		t.Fatalf("a state without a file: %v, continues: %v", err, s.continues())
	}
	for i := range inputs {
		s.take(key{input: i, number: 1})
		s.take(key{input: i, number: 2})
		s.done([]key{{input: i, number: 1}}, progress{Malformed: 1})
	}
	s.done([]key{{input: 1, number: 2}}, progress{Malformed: 1})
	s.read(1)
	s.read(2)
	if err := s.save(); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time from what the first saved without another record
		s, err = OpenState(path, inputs, records.Options{})
		if err != nil || !s.continues() || s.progress().Malformed != 1 {
			t.Fatalf("%v, continues: %v, %+v", err, s.continues(), s.progress())
		}
		for number, want := range map[int64]bool{1: true, 2: false, 3: false} {
			if got := s.has(key{number: number}); got != want {
				t.Errorf("record %d is done: %v, want %v", number, got, want)
			}
		}
		for i, want := range []bool{false, true, false} {
			if s.complete(i) != want {
				t.Errorf("input %d is complete: %v, want %v", i, !want, want)
			}
		}
		if err := s.save(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestStateModel continues a run again and again, each time from what the last one has saved.
func TestStateModel(t *testing.T) {
	const total = 6
	input, path := file(t, "in", "1\n2\n3\n4\n5\n6\n"), filepath.Join(t.TempDir(), "state")
	rapid.Check(t, func(t *rapid.T) {
		_ = os.Remove(path)
		saved := make(map[int64]bool) // records that are done, as of the last save
		for run := range rapid.IntRange(2, 5).Draw(t, "runs") {
			s, err := OpenState(path, []string{input}, records.Options{})
			if err != nil {
				t.Fatal(err)
			}
			for number := range int64(total + 1) {
				if got := s.has(key{number: number + 1}); got != saved[number+1] {
					t.Fatalf("run %d: record %d is done: %v, want %v", run, number+1, got, saved[number+1])
				}
			}
			now, next := maps.Clone(saved), int64(1)
			var taken []int64
			for range rapid.IntRange(0, 12).Draw(t, "steps") {
				for saved[next] { // a run takes what is not done, in order
					next++
				}
				switch what := rapid.SampledFrom([]string{"take", "take", "done", "save"}).Draw(t, "what"); {
				case what == "take" && next <= total:
					s.take(key{number: next})
					taken = append(taken, next)
					next++
				case what == "done" && len(taken) > 0:
					i := rapid.IntRange(0, len(taken)-1).Draw(t, "which")
					s.done([]key{{number: taken[i]}}, progress{})
					now[taken[i]] = true
					taken = slices.Delete(taken, i, i+1)
				case what == "save":
					if err := s.save(); err != nil {
						t.Fatal(err)
					}
					saved = maps.Clone(now)
				}
			}
		}
	})
}

// A state can be continued only with the same inputs, read in the same way.
func TestStateOfOtherInputs(t *testing.T) {
	input, path := file(t, "in", "one\n"), filepath.Join(t.TempDir(), "state")
	const url, secret = "http://me:pw@host/x?", "token=a"
	was := records.Options{Format: records.CSV, Delimiter: ',', BlockSize: 1, MaxRecord: 2}
	s, err := OpenState(path, []string{input, url + secret}, was)
	if err != nil || s.save() != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(path); err != nil || strings.Contains(string(text), "pw") ||
		strings.Contains(string(text), "token") {
		t.Errorf("a secret is in the state: %s (%v)", text, err)
	}
	if _, err := OpenState(path, []string{input, url + secret}, was); err != nil {
		t.Errorf("the same: %v", err)
	}
	for name, c := range map[string]struct {
		change func(o *records.Options)
		inputs []string
		want   string
	}{
		"format":      {func(o *records.Options) { o.Format = records.Raw }, nil, "format was csv, and is raw"},
		"header":      {func(o *records.Options) { o.NoHeader = true }, nil, "header was true, and is false"},
		"delimiter":   {func(o *records.Options) { o.Delimiter = ';' }, nil, "delimiter was ,, and is ;"},
		"quotes":      {func(o *records.Options) { o.LazyQuotes = true }, nil, "lazy quotes"},
		"block size":  {func(o *records.Options) { o.BlockSize = 4 }, nil, "block size was 1, and is 4"},
		"max record":  {func(o *records.Options) { o.MaxRecord = 4 }, nil, "longest record was 2, and is 4"},
		"pieces":      {func(o *records.Options) { o.Pieces = true }, nil, "splitting of long lines"},
		"verbatim":    {func(o *records.Options) { o.Verbatim = true }, nil, "verbatim input"},
		"one less":    {nil, []string{input}, "the earlier run had 2 inputs, not 1"},
		"other name":  {nil, []string{file(t, "other", "one\n"), url + secret}, "the earlier run read " + input},
		"other query": {nil, []string{input, url + "token=b"}, "the earlier run read http://host/x?... with another user, query or fragment"},
	} {
		opts, inputs := was, []string{input, url + secret}
		if c.change != nil {
			c.change(&opts)
		}
		if c.inputs != nil {
			inputs = c.inputs
		}
		if _, err := OpenState(path, inputs, opts); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("another %s: %v, want %q", name, err, c.want)
		}
	}
	modified := s.now.Inputs[0].Modified
	for _, c := range []struct {
		text     string
		modified time.Time
		want     string
	}{
		{"one\n", modified, ""},
		{"two\n", modified.Add(time.Hour), input + " changed since: its time is "},
		{"one and two\n", modified, input + " changed since: it has 12 bytes, and had 4"},
	} {
		if err := errors.Join(os.WriteFile(input, []byte(c.text), 0o600), os.Chtimes(input, time.Time{}, c.modified)); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenState(path, []string{input, url + secret}, was); (err == nil) != (c.want == "") ||
			err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("with %q of %v: %v, want %q", c.text, c.modified, err, c.want)
		}
	}
}

// A state that cannot be written is an error before any file is truncated.
func TestPrepareSavesTheStateFirst(t *testing.T) {
	kept := file(t, "out", "what is there\n")
	s, err := OpenState(filepath.Join(t.TempDir(), "no such", "state"), nil, records.Options{})
	if err != nil {
		t.Fatal(err)
	}
	out, err := OpenOutput(kept)
	if err != nil {
		t.Fatal(err)
	}
	defer out.close()
	if err := Prepare(out, nil, s); err == nil || !strings.Contains(err.Error(), "cannot save where to continue") {
		t.Errorf("got %v", err)
	}
	if text, err := os.ReadFile(kept); string(text) != "what is there\n" {
		t.Errorf("the output is %q (%v)", text, err)
	}
}

// A later run truncates the output to the records that are done.
func TestOutputIsTruncatedToWhatIsDone(t *testing.T) {
	path, another := file(t, "out", "one\ntwo\nth"), file(t, "another", "kept\n")
	const done = int64(len("one\n"))
	write := func(path string, was *savedOutput, continues bool) (string, error) {
		t.Helper()
		out, err := OpenOutput(path)
		if err != nil {
			t.Fatal(err)
		}
		defer out.close()
		if err := out.seek(was, continues); err != nil {
			return "", err
		}
		if err := out.truncate(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Write([]byte("X")); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(path)
		if got := out.saved().Length; got != int64(len(text)) {
			t.Errorf("the length of %q is %d", text, got)
		}
		return string(text), err
	}
	one := hashOf([]byte("one\n"))
	for _, c := range []struct {
		name      string
		path      string
		was       *savedOutput
		continues bool
		want      string
	}{
		{"continuing", path, &savedOutput{File: path, Length: done, Tail: one}, true, "one\nX"},
		{"after a stream", another, nil, true, "kept\nX"},
		{"from the beginning", another, nil, false, "X"},
		{"before anything was sent", path, &savedOutput{File: path}, false, "X"},
	} {
		if got, err := write(c.path, c.was, c.continues); err != nil || got != c.want {
			t.Errorf("%s: %q (%v), want %q", c.name, got, err, c.want)
		}
	}
	for want, was := range map[string]*savedOutput{
		"it differs before byte 100":                             {File: path, Length: 100, Tail: one},
		"it differs before byte 1":                               {File: path, Length: 1, Tail: one},
		"the earlier run wrote to " + path + "2, not to " + path: {File: path + "2", Length: done, Tail: one},
	} {
		if _, err := write(path, was, true); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("another output: %v, want %q", err, want)
		}
	}
	if got := readFile(t, path); got != "X" {
		t.Errorf("an output that was refused is %q now", got)
	}
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// An input that an earlier run finished is not read again, and its records are counted.
func TestStateSkipsCompleteInputs(t *testing.T) {
	inputs := []string{file(t, "a", "1\n2\n3\n"), file(t, "b", "4\n5\n")}
	path := filepath.Join(t.TempDir(), "state")
	before, err := OpenState(path, inputs, records.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for number := range int64(3) {
		before.take(key{number: number + 1})
		before.done([]key{{number: number + 1}}, progress{})
	}
	before.read(0)
	if err := before.save(); err != nil {
		t.Fatal(err)
	}
	state, err := OpenState(path, inputs, records.Options{})
	if err != nil {
		t.Fatal(err)
	}
	out, _, summary, err := send(t, Options{Inputs: inputs, State: state})
	if err != nil || out != "4\n5\n" || summary.Came != 2 || summary.Skipped != 3 {
		t.Errorf("%q, %+v, %v; want the records of the second, and three done before", out, summary, err)
	}
}

// The state has the absolute path of the output.
func TestOutputHasAnAbsolutePath(t *testing.T) {
	t.Chdir(t.TempDir())
	for i, name := range []string{"out", "./out"} {
		out, err := OpenOutput(name)
		if err != nil {
			t.Fatal(err)
		}
		if i > 0 {
			text := readFile(t, name)
			err = out.seek(&savedOutput{File: out.path, Length: int64(len(text)), Tail: hashOf([]byte(text))}, true)
		}
		if err == nil {
			_, err = out.Write([]byte("line\n"))
		}
		if err != nil {
			t.Fatal(err)
		}
		if want := filepath.Join(must(os.Getwd()), "out"); out.saved().File != want {
			t.Errorf("%s is saved as %s, want %s", name, out.saved().File, want)
		}
		if err := out.close(); err != nil {
			t.Fatal(err)
		}
	}
}

func must(text string, err error) string {
	if err != nil {
		panic(err)
	}
	return text
}

// An interrupt while standard input is read is not taken for its end.
func TestRunIsStoppedWhileItReadsStandardInput(t *testing.T) {
	for range 50 { // the order of events is random
		synctest.Test(t, func(t *testing.T) {
			stop, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			time.AfterFunc(50*time.Millisecond, func() { cancel(errors.New("interrupted")) })
			slow := func(context.Context, string) (net.Conn, error) {
				near, far := net.Pipe()
				go func() {
					defer far.Close()
					buf := make([]byte, 256)
					for {
						n, err := far.Read(buf)
						if err != nil {
							return
						}
						time.Sleep(5 * time.Millisecond)
						_, _ = far.Write(buf[:n])
					}
				}()
				return near, nil
			}
			summary, err := Run(t.Context(), stop, Options{
				Address: "memory", Inputs: []string{stdinName}, Stdin: strings.NewReader(strings.Repeat("a line\n", 100_000)),
				Stream: client.StreamOptions{Dial: slow, Conns: 1}, Out: NewOutput(io.Discard), Display: Events(io.Discard),
			})
			if !errors.Is(err, ErrStopped) || !summary.Unread || summary.Came == 0 || summary.Missing() > 0 {
				t.Fatalf("%+v, %v", summary, err)
			}
		})
	}
}

// The state of a run that is killed is at most two seconds old.
func TestStateIsSavedPeriodically(t *testing.T) {
	input, path := file(t, "in", strings.Repeat("a line\n", 1000)), filepath.Join(t.TempDir(), "state")
	synctest.Test(t, func(t *testing.T) {
		state, err := OpenState(path, []string{input}, records.Options{})
		if err != nil {
			t.Fatal(err)
		}
		looked := time.AfterFunc(5500*time.Millisecond, func() {
			was, err := OpenState(path, []string{input}, records.Options{})
			if err != nil {
				t.Error(err)
				return
			}
			in := was.now.Inputs[0]
			if done := in.Records - int64(len(in.Missing)); done < 300 || done > 600 {
				t.Errorf("%d records are done after 5.5 s of 100 a second", done)
			}
		})
		defer looked.Stop()
		if err := Prepare(NewOutput(nil), nil, state); err != nil {
			t.Fatal(err)
		}
		if _, _, summary, err := send(t, Options{Inputs: []string{input}, Rate: 100, State: state}); err != nil || summary.Came != 1000 {
			t.Errorf("%+v, %v", summary, err)
		}
	})
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the state is still there: %v", err)
	}
}

// A run that is continued with another input sends nothing of it.
func TestStateRefusesAnotherInput(t *testing.T) {
	lines := func(from, to int) string {
		var b strings.Builder
		for i := range to - from {
			fmt.Fprintf(&b, "line %d\n", from+i)
		}
		return b.String()
	}
	for name, c := range map[string]struct {
		input string
		want  string // in the report
		lines int    // sent
	}{
		"the same":  {lines(0, 3000), "", 3000},
		"longer":    {lines(0, 4000), "", 4000},
		"different": {lines(1, 3001), "it is not the input that the earlier run read: its first ", 0},
		"shorter":   {lines(0, 10), "it is not the input that the earlier run read: it has 10 records, and had at least ", 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				path, out := filepath.Join(t.TempDir(), "state"), filepath.Join(t.TempDir(), "out")
				run := func(ctx context.Context, input io.Reader, rate float64) (string, Summary) {
					t.Helper()
					opts := Options{Inputs: []string{stdinName}, Stdin: input, Records: records.Options{Format: records.Lines}, Rate: rate}
					opts.Stream.Dial, opts.Stream.Ordered = echoServer(t), true
					var reports bytes.Buffer
					opts.Display = Events(&reports)
					var err error
					if opts.State, err = OpenState(path, opts.Inputs, opts.Records); err != nil {
						t.Fatal(err)
					}
					if opts.Out, err = OpenOutput(out); err != nil {
						t.Fatal(err)
					}
					if err := Prepare(opts.Out, nil, opts.State); err != nil {
						t.Fatal(err)
					}
					summary, _ := Run(t.Context(), ctx, opts)
					return reports.String(), summary
				}
				stop, cancel := context.WithCancelCause(t.Context())
				time.AfterFunc(50*time.Millisecond, func() { cancel(errors.New("interrupted")) })
				_, first := run(stop, strings.NewReader(lines(0, 3000)), 4000)
				if first.Came == 0 || first.Came >= 3000 {
					t.Fatalf("the first run sent %d records", first.Came)
				}
				reported, second := run(t.Context(), strings.NewReader(c.input), 0)
				want := c.lines
				if want == 0 {
					want = int(first.Came)
				}
				if got := strings.Count(readFile(t, out), "\n"); got != want ||
					!strings.Contains(reported, c.want) || (second.BadInputs > 0) != (c.want != "") {
					t.Errorf("%d lines, want %d; reported %q; %+v", got, want, reported, second)
				}
				if c.want == "" && readFile(t, out) != c.input {
					t.Error("the output is not the input")
				}
			})
		})
	}
}

// Every number of a state file is validated.
func TestStateValidatesItsFile(t *testing.T) {
	input := file(t, "in", "one\n")
	for change, want := range map[string]string{
		`"records": 0`:                              "",
		`"records": -5`:                             "a number of " + input + " is negative",
		`"records": 1, "missing": [2]`:              "record 2 of " + input + " is out of place",
		`"records": 3, "missing": [2, 2]`:           "record 2 of " + input + " is out of place",
		`"records": 3, "missing": [0]`:              "record 0 of " + input + " is out of place",
		`"records": 1, "continue": {"bytes": -1}`:   "the place to continue " + input + " is out of range",
		`"records": 1, "continue": {"digest": "x"}`: "a digest of " + input + " is malformed",
		`"records": 1e30`:                           " is not the state of an earlier run",
	} {
		s, err := OpenState(filepath.Join(t.TempDir(), "state"), []string{input}, records.Options{})
		if err != nil || s.save() != nil {
			t.Fatal(err)
		}
		text := strings.Replace(readFile(t, s.path), `"records": 0`, change, 1)
		if _, err := OpenState(file(t, "state", text), []string{input}, records.Options{}); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", change, err, want)
		}
	}
	text := `{"version": 1, "format": "Format(0)", "delimiter": "\u0000", "block_size": 0, "max_record": 0, "output": {"length": -5}, "inputs": []}`
	if _, err := OpenState(file(t, "state", text), nil, records.Options{}); err == nil ||
		!strings.Contains(err.Error(), "the length -5 is negative") {
		t.Errorf("a negative length: %v", err)
	}
}

// A name that is not UTF-8 is recognised.
func TestStateOfANameThatIsNotUTF8(t *testing.T) {
	input, path := "caf\xe9", filepath.Join(t.TempDir(), "state")
	s, err := OpenState(path, []string{input}, records.Options{})
	if err != nil || s.save() != nil {
		t.Fatal(err)
	}
	if _, err := OpenState(path, []string{input}, records.Options{}); err != nil {
		t.Errorf("the same: %v", err)
	}
	if _, err := OpenState(path, []string{"caf\xe8"}, records.Options{}); err == nil {
		t.Error("another name was taken for the same")
	}
}
