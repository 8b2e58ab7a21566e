//go:build unix

package integration

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// bulk runs 'echod send' to a server.
func (e *echod) bulk(args ...string) result {
	e.t.Helper()
	return run(e.t, e.sendCommand(args...))
}

func TestBulkReadsFilesURLsAndStandardInput(t *testing.T) {
	t.Parallel()
	e := start(t)
	dir := t.TempDir()
	const text = "one\ntwo\nthree"
	files := map[string][]byte{"plain": []byte(text), "empty": nil}
	var zipped bytes.Buffer
	gz := gzip.NewWriter(&zipped)
	_, _ = gz.Write([]byte(text))
	check(t, gz.Close())
	files["text.gz"] = zipped.Bytes()
	zst, err := zstd.NewWriter(nil)
	check(t, err)
	files["no ending"] = zst.EncodeAll([]byte(text), nil)
	check(t, zst.Close())
	for name, data := range files {
		check(t, os.WriteFile(filepath.Join(dir, name), data, 0o600))
	}
	web := httptest.NewServer(http.FileServer(http.Dir(dir)))
	defer web.Close()

	for name, c := range map[string]struct {
		args  []string
		stdin string
		want  string
	}{
		"file":           {[]string{"--lines", dir + "/plain"}, "", text},
		"gzip":           {[]string{"--lines", dir + "/text.gz"}, "", text},
		"zstd, by magic": {[]string{"--lines", dir + "/no ending"}, "", text},
		"URL":            {[]string{"--lines", web.URL + "/text.gz"}, "", text},
		"standard input": {[]string{"--lines"}, text, text},
		"several":        {[]string{"--lines", "--conns", "3", "--ordered", dir + "/plain", "-", dir + "/empty", web.URL + "/plain"}, "four\n", text + "\nfour\n" + text},
		"blocks":         {[]string{"--raw", "--block-size", "2B", "--conns", "3", "--ordered", dir + "/plain"}, "", text},
		"packed blocks":  {[]string{"--raw", "--verbatim", dir + "/text.gz"}, "", zipped.String()},
		"csv":            {[]string{"--csv", "--delimiter", ";"}, "a;b\n1;2\n", `{"line":2,"a":"1","b":"2"}` + "\n"},
		"lazy quotes":    {[]string{"--csv", "--lazy-quotes"}, "a\nx\"y\n", `{"line":2,"a":"x\"y"}` + "\n"},
		"no header":      {[]string{"--csv", "--no-header"}, "1,2\n", `{"line":1,"fields":["1","2"]}` + "\n"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := e.sendCommand(c.args...)
			cmd.Stdin = strings.NewReader(c.stdin)
			got := run(t, cmd)
			if got.code != 0 || got.stdout != c.want || !strings.Contains(got.stderr, " came back: ") {
				t.Errorf("got %+v, want %q and a summary", got, c.want)
			}
		})
	}
}

// With a rate there is a record at a time, and each connection waits for one.
func TestBulkUsesItsConnections(t *testing.T) {
	t.Parallel()
	e := start(t)
	const conns = 12
	cmd := e.sendCommand("--lines", "--rate", "1000", "--conns", strconv.Itoa(conns))
	cmd.Stdin = strings.NewReader(strings.Repeat("a line\n", 1000))
	if got := run(t, cmd); got.code != 0 {
		t.Error(got)
	}
	if n := e.status().Accepted; n != conns {
		t.Errorf("%d connections were made, want %d", n, conns)
	}
}

// A malformed row is named, kept, and does not stop the rest; with --strict it does.
func TestBulkNamesMalformedRows(t *testing.T) {
	t.Parallel()
	e := start(t)
	dir := t.TempDir()
	table, failed := filepath.Join(dir, "t.csv"), filepath.Join(dir, "failed.csv")
	check(t, os.WriteFile(table, []byte("a,b\n1,2\n3\n5,x\"y\n7,8\n"), 0o600))
	got := e.bulk("--csv", "--failed", failed, table)
	if want := `{"line":2,"a":"1","b":"2"}` + "\n" + `{"line":5,"a":"7","b":"8"}` + "\n"; got.stdout != want || got.code != 1 {
		t.Errorf("got %+v, want %q and code 1", got, want)
	}
	for _, want := range []string{table + ":3:1: wrong number of fields: 1 instead of 2\n", table + ":4:4: bare \" in non-quoted-field\n", "2 of 4 records came back", "2 malformed"} {
		if !strings.Contains(got.stderr, want) {
			t.Errorf("stderr lacks %q:\n%s", want, got.stderr)
		}
	}
	if kept, want := readFile(t, failed), "a,b\n3\n5,x\"y\n"; kept != want {
		t.Errorf("the failed are %q, want %q", kept, want)
	}
	got = e.bulk("--csv", "--strict", table)
	if want := `{"line":2,"a":"1","b":"2"}` + "\n"; got.stdout != want || got.code != 1 || !strings.Contains(got.stderr, "stopped at a malformed record") {
		t.Errorf("--strict: got %+v, want %q and code 1", got, want)
	}
}

// corrupting is an echo server that changes lines with the word "bad" while bad is set.
func corrupting(t *testing.T, bad *atomic.Bool) (address string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	t.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				lines := bufio.NewReader(conn)
				for {
					line, err := lines.ReadString('\n')
					if err != nil {
						return
					}
					if bad.Load() {
						line = strings.ReplaceAll(line, "bad", "BAD")
					}
					if _, err := io.WriteString(conn, line); err != nil {
						return
					}
				}
			}()
		}
	}()
	return ln.Addr().String()
}

// What did not come back right is kept in a form that can be sent again.
func TestBulkKeepsWhatFailed(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ flag, input, kept, again string }{
		"lines": {"--lines", "good\nbad 1\ngood\nbad 2\n", "bad 1\nbad 2\n", "bad 1\nbad 2\n"},
		"csv":   {"--csv", "line,b\n1,good\n2,\"bad \"\"one\"\"\"\n", "line,b\n2,\"bad \"\"one\"\"\"\n", `{"line":2,"line_2":"2","b":"bad \"one\""}` + "\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var bad atomic.Bool
			bad.Store(true)
			address := corrupting(t, &bad)
			failed := filepath.Join(t.TempDir(), "failed")
			cmd := exec.Command(built(t, echodBinary), "send", "--address", address, c.flag, "--failed", failed)
			cmd.Stdin = strings.NewReader(c.input)
			got := run(t, cmd)
			if got.code != 1 || !strings.Contains(got.stderr, "echo differs") {
				t.Errorf("got %+v, want code 1 and what differs", got)
			}
			if kept := readFile(t, failed); kept != c.kept {
				t.Errorf("the failed are %q, want %q", kept, c.kept)
			}
			bad.Store(false)
			got = run(t, exec.Command(built(t, echodBinary), "send", "--address", address, c.flag, failed))
			if got.code != 0 || got.stdout != c.again {
				t.Errorf("sent again, %+v, want %q", got, c.again)
			}
		})
	}
}

func TestBulkSaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	e := start(t)
	dir := t.TempDir()
	path := func(name, text string) string {
		name = filepath.Join(dir, name)
		check(t, os.WriteFile(name, []byte(text), 0o600))
		return name
	}
	table, other, plain := path("a.csv", "a,b\n1,2\n"), path("b.csv", "c,d\n1,2\n"), path("x.gz", "plain\n")
	kept, link := path("kept", "what is there\n"), filepath.Join(dir, "link")
	check(t, os.Symlink(kept, link))
	for name, c := range map[string]struct {
		args []string
		code int
		want string
	}{
		"no such file":         {[]string{"--lines", dir + "/nosuch"}, 1, "read " + dir + "/nosuch: no such file or directory\n"},
		"a directory":          {[]string{"--lines", dir}, 1, "is a directory"},
		"not packed":           {[]string{"--lines", plain}, 1, "the name says gzip, and the content is not"},
		"a state nowhere":      {[]string{"--lines", "--resume", "-", table}, 2, "--resume -: want the name of a file"},
		"two formats":          {[]string{"--lines", "--csv", table}, 2, "--lines, --csv and --raw: only one of them"},
		"text with a flag":     {[]string{"--conns", "4", table}, 2, "--conns: arguments are text, unless"},
		"flag of CSV":          {[]string{"--lines", "--no-header", table}, 2, "--no-header: only with --csv"},
		"flag of blocks":       {[]string{"--csv", "--block-size", "1MiB", table}, 2, "--block-size: only with --raw"},
		"delimiter":            {[]string{"--csv", "--delimiter", "ab", table}, 2, `--delimiter "ab": want one character`},
		"size":                 {[]string{"--raw", "--block-size", "big", table}, 2, `--block-size "big": want a size`},
		"no connections":       {[]string{"--lines", "--conns", "0", table}, 2, "--conns 0: want a number from 1"},
		"its own output":       {[]string{"--lines", "--output", table, table}, 2, table + ": it is to be read, and not to be written to"},
		"twice the same":       {[]string{"--lines", "--output", dir + "/new", "--failed", dir + "/./new", table}, 2, "it is to be written to for another flag"},
		"state over output":    {[]string{"--lines", "--output", kept, "--resume", link, table}, 2, "it is to be written to for another flag"},
		"nowhere for failed":   {[]string{"--lines", "--output", kept, "--failed", dir + "/nodir/f", table}, 1, "no such file or directory"},
		"nowhere for a state":  {[]string{"--lines", "--output", kept, "--resume", dir + "/nodir/f", table}, 1, "where to go on was not saved"},
		"nothing in flight":    {[]string{"--lines", "--in-flight", "0", table}, 2, "--in-flight 0: want a number from 1"},
		"no number":            {[]string{"--lines", "--rate", "NaN", table}, 2, "--rate NaN: want a number"},
		"too long":             {[]string{"--lines", "--max-record", "2B", "--failed", dir + "/f", table}, 1, "too long: more than 2 bytes (--max-record allows more; not kept in " + dir + "/f)"},
		"escape sequences":     {[]string{"--lines", dir + "/a\x1b]0;b\n"}, 1, "a\ufffd]0;b\n"},
		"other columns":        {[]string{"--csv", "--failed", dir + "/f", table, other}, 1, "b.csv has other columns"},
		"an output that fails": {[]string{"--lines", "--output", "/dev/full", table}, 1, "writing what came back: "},
		"a broken state":       {[]string{"--lines", "--resume", plain, table}, 1, "x.gz is not what an earlier run has left"},
	} {
		t.Run(name, func(t *testing.T) {
			got := e.bulk(c.args...)
			if got.code != c.code || !strings.Contains(got.stderr, c.want) {
				t.Errorf("got %+v, want code %d and %q", got, c.code, c.want)
			}
		})
	}
	if readFile(t, table) != "a,b\n1,2\n" {
		t.Error("an input was written to")
	}
	if readFile(t, kept) != "what is there\n" {
		t.Error("an output was emptied, though nothing was sent")
	}
	cmd := e.sendCommand("--lines", "--output", table)
	input, err := os.Open(table)
	check(t, err)
	defer input.Close()
	cmd.Stdin = input
	if got := run(t, cmd); got.code != 2 || !strings.Contains(got.stderr, "it is to be read") {
		t.Errorf("with its output as standard input: %+v", got)
	}
}
