package bulk

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"echod/client"
	"echod/internal/records"
)

func TestStateKnowsWhatIsSettled(t *testing.T) {
	inputs := []string{file(t, "in", "one\n"), file(t, "all", "1\n"), file(t, "but one", "1\n")}
	path := filepath.Join(t.TempDir(), "state")
	s, err := OpenState(path, inputs, records.Options{})
	if err != nil || s.goesOn() {
		t.Fatalf("a state without a file: %v, goes on: %v", err, s.goesOn())
	}
	for i := range inputs {
		s.take(key{input: i, number: 1})
		s.take(key{input: i, number: 2})
		s.settle([]key{{input: i, number: 1}}, reached{Malformed: 1})
	}
	s.settle([]key{{input: 1, number: 2}}, reached{Malformed: 1})
	s.read(1)
	s.read(2)
	if err := s.save(); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time from what the first has saved without a record more
		s, err = OpenState(path, inputs, records.Options{})
		if err != nil || !s.goesOn() || s.reached().Malformed != 1 {
			t.Fatalf("%v, goes on: %v, %+v", err, s.goesOn(), s.reached())
		}
		for number, want := range map[int64]bool{1: true, 2: false, 3: false} {
			if got := s.has(key{number: number}); got != want {
				t.Errorf("record %d is settled: %v, want %v", number, got, want)
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

// Going on from a state needs the same inputs, read in the same way.
func TestStateIsAboutItsInputs(t *testing.T) {
	input, path := file(t, "in", "one\n"), filepath.Join(t.TempDir(), "state")
	const url, secret = "http://me:pw@host/x?", "token=a"
	was := records.Options{Format: records.CSV, Delimiter: ',', BlockSize: 1, MaxRecord: 2}
	s, err := OpenState(path, []string{input, url + secret}, was)
	if err != nil || s.save() != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(path); err != nil || strings.Contains(string(text), "pw") || strings.Contains(string(text), "token") {
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
		"format":      {func(o *records.Options) { o.Format = records.Raw }, nil, "format is csv there, and not raw"},
		"header":      {func(o *records.Options) { o.NoHeader = true }, nil, "header is true there, and not false"},
		"delimiter":   {func(o *records.Options) { o.Delimiter = ';' }, nil, "delimiter is , there, and not ;"},
		"quotes":      {func(o *records.Options) { o.LazyQuotes = true }, nil, "lazy quotes"},
		"block size":  {func(o *records.Options) { o.BlockSize = 4 }, nil, "block size is 1 there, and not 4"},
		"max record":  {func(o *records.Options) { o.MaxRecord = 4 }, nil, "longest record is 2 there, and not 4"},
		"pieces":      {func(o *records.Options) { o.Pieces = true }, nil, "cutting of long lines"},
		"verbatim":    {func(o *records.Options) { o.Verbatim = true }, nil, "leaving packed input as it is"},
		"one less":    {nil, []string{input}, "is about 2 inputs, and not 1"},
		"other name":  {nil, []string{file(t, "other", "one\n"), url + secret}, "is about " + input},
		"other query": {nil, []string{input, url + "token=b"}, "is about http://host/x?... with another user, query or fragment"},
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
		{"two\n", modified.Add(time.Hour), input + " has changed since: it is of "},
		{"one and two\n", modified, input + " has changed since: it has 12 bytes, and had 4"},
	} {
		if err := errors.Join(os.WriteFile(input, []byte(c.text), 0o600), os.Chtimes(input, time.Time{}, c.modified)); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenState(path, []string{input, url + secret}, was); (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("with %q of %v: %v, want %q", c.text, c.modified, err, c.want)
		}
	}
}

// A state that cannot be written is noticed before anything is given up.
func TestPrepareTriesTheState(t *testing.T) {
	kept := file(t, "out", "what is there\n")
	s, err := OpenState(filepath.Join(t.TempDir(), "no such", "state"), nil, records.Options{})
	if err != nil {
		t.Fatal(err)
	}
	out, err := OpenTarget(kept)
	if err != nil {
		t.Fatal(err)
	}
	defer out.close()
	if err := Prepare(out, nil, s); err == nil || !strings.Contains(err.Error(), "where to go on was not saved") {
		t.Errorf("got %v", err)
	}
	if text, err := os.ReadFile(kept); string(text) != "what is there\n" {
		t.Errorf("the output is %q (%v)", text, err)
	}
}

// What a state is about is at the beginning of the output; what is behind it is sent again.
func TestOutputIsCutToWhatIsSettled(t *testing.T) {
	path, another := file(t, "out", "one\ntwo\nth"), file(t, "another", "kept\n")
	const settled = int64(len("one\n"))
	write := func(path string, was *savedTarget, goesOn bool) (string, error) {
		t.Helper()
		out, err := OpenTarget(path)
		if err != nil {
			t.Fatal(err)
		}
		defer out.close()
		if err := out.goOnFrom(was, goesOn); err != nil {
			return "", err
		}
		if err := out.cut(); err != nil {
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
		name   string
		path   string
		was    *savedTarget
		goesOn bool
		want   string
	}{
		{"going on", path, &savedTarget{path, settled, one}, true, "one\nX"},
		{"after a stream", another, nil, true, "kept\nX"},
		{"from the beginning", another, nil, false, "X"},
		{"before anything was sent", path, &savedTarget{path, 0, ""}, false, "X"},
	} {
		if got, err := write(c.path, c.was, c.goesOn); err != nil || got != c.want {
			t.Errorf("%s: %q (%v), want %q", c.name, got, err, c.want)
		}
	}
	for want, was := range map[string]*savedTarget{
		"it differs before byte 100":                       {path, 100, one},
		"it differs before byte 1":                         {path, 1, one},
		"has written to " + path + "2, and not to " + path: {path + "2", settled, one},
	} {
		if _, err := write(path, was, true); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("an output that is another: %v, want %q", err, want)
		}
	}
	if got := readFile(t, path); got != "X" {
		t.Errorf("what is not gone on with is %q now", got)
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

// An input that an earlier run has read to its end is not read again, and counts.
func TestInputsThatAreCompleteCount(t *testing.T) {
	inputs := []string{file(t, "a", "1\n2\n3\n"), file(t, "b", "4\n5\n")}
	path := filepath.Join(t.TempDir(), "state")
	before, err := OpenState(path, inputs, records.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for number := range int64(3) {
		before.take(key{number: number + 1})
		before.settle([]key{{number: number + 1}}, reached{})
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
		t.Errorf("%q, %+v, %v; want those of the second, and three done before", out, summary, err)
	}
}

// However a file is called, it is the same one.
func TestOutputIsKnownByItsWholeName(t *testing.T) {
	t.Chdir(t.TempDir())
	for i, name := range []string{"out", "./out"} {
		out, err := OpenTarget(name)
		if err != nil {
			t.Fatal(err)
		}
		if i > 0 {
			text := readFile(t, name)
			err = out.goOnFrom(&savedTarget{out.path, int64(len(text)), hashOf([]byte(text))}, true)
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

// Who interrupts the reading of standard input has not come to its end.
func TestStandardInputThatIsCutShortIsNotAtItsEnd(t *testing.T) {
	for range 50 { // what was wrong once hung on chance
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
				Address: "memory", Inputs: []string{stdin}, Stdin: strings.NewReader(strings.Repeat("a line\n", 100_000)),
				Stream: client.StreamOptions{Dial: slow, Conns: 1}, Out: Stream(io.Discard), Display: Events(io.Discard),
			})
			if !errors.Is(err, ErrStopped) || !summary.Unread || summary.Came == 0 || summary.Missing() > 0 {
				t.Fatalf("%+v, %v", summary, err)
			}
		})
	}
}

// A run that is killed can be gone on with: its state is at the most two seconds old.
func TestStateIsKeptUpToDate(t *testing.T) {
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
			if settled := in.Records - int64(len(in.Missing)); settled < 300 || settled > 600 {
				t.Errorf("%d records are settled after 5.5 s of 100 a second", settled)
			}
		})
		defer looked.Stop()
		if err := Prepare(Stream(nil), nil, state); err != nil {
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
