//go:build unix

package integration

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/pem"
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
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
)

// bulk runs 'echod send' to a server.
func (e *echod) bulk(args ...string) result {
	e.t.Helper()
	return run(e.t, e.sendCommand(args...))
}

func TestSendInputs(t *testing.T) {
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

// At a low rate each connection waits for a record, so that all are used.
func TestSendUsesAllConnections(t *testing.T) {
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

// A malformed row is reported and kept, and the others are sent. With --strict it stops the run.
func TestSendMalformedRows(t *testing.T) {
	t.Parallel()
	e := start(t)
	dir := t.TempDir()
	table, failed := filepath.Join(dir, "t.csv"), filepath.Join(dir, "failed.csv")
	check(t, os.WriteFile(table, []byte("a,b\n1,2\n3\n5,x\"y\n7,8\n"), 0o600))
	got := e.bulk("--csv", "--failed", failed, table)
	if want := `{"line":2,"a":"1","b":"2"}` + "\n" + `{"line":5,"a":"7","b":"8"}` + "\n"; got.stdout != want ||
		got.code != 1 {
		t.Errorf("got %+v, want %q and code 1", got, want)
	}
	for _, want := range []string{table + ":3:1: wrong number of fields: 1 instead of 2 (--allow-ragged accepts it)\n", table + ":4:4: bare \" in non-quoted-field (--lazy-quotes accepts it)\n", "2 of 4 records came back", "2 malformed"} {
		if !strings.Contains(got.stderr, want) {
			t.Errorf("stderr lacks %q:\n%s", want, got.stderr)
		}
	}
	if kept, want := readFile(t, failed), "a,b\n3\n5,x\"y\n"; kept != want {
		t.Errorf("the failed are %q, want %q", kept, want)
	}
	got = e.bulk("--csv", "--strict", table)
	if want := `{"line":2,"a":"1","b":"2"}` + "\n"; got.stdout != want || got.code != 1 ||
		!strings.Contains(got.stderr, "stopped at the first malformed record or input") {
		t.Errorf("--strict: got %+v, want %q and code 1", got, want)
	}
}

// corrupting starts an echo server that changes lines with the word "bad" while bad is set.
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

// What came back differently is kept in a form that can be sent again.
func TestSendFailedFile(t *testing.T) {
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

func TestSendErrors(t *testing.T) {
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
		"tar":                  {[]string{"--lines", path("x.tar", strings.Repeat("\x00", 257)+"ustar")}, 1, "tar archives are not supported"},
		"other encoding":       {[]string{"--csv", path("latin1.csv", "a,b\n1,\xe9\n")}, 1, "latin1.csv:2:3: cannot be decoded: byte 0xE9 is not UTF-8 (--encoding NAME decodes it, --replace-invalid replaces it)"},
		"UTF-16 without mark":  {[]string{"--csv", path("utf16.csv", "a\x00,\x00b\x00\n\x00")}, 1, "(--encoding utf-16le decodes it)"},
		"unknown encoding":     {[]string{"--csv", "--encoding", "klingon", table}, 2, `--encoding: unknown encoding "klingon"`},
		"comment":              {[]string{"--csv", "--comment", ",", table}, 2, "--comment \",\": want one character that is not the delimiter"},
		"header of requests":   {[]string{"--lines", "--header", "secret", table}, 2, "--header, number 1: want 'Name: value'"},
		"no certificate":       {[]string{"--lines", "--cacert", table, table}, 2, "it has no certificate in PEM"},
		"not closed":           {[]string{"--csv", path("open.csv", "a\n\"x\n")}, 1, "not closed\n"},
		"a state nowhere":      {[]string{"--lines", "--resume", "-", table}, 2, "--resume -: want the name of a file"},
		"two formats":          {[]string{"--lines", "--csv", table}, 2, "--lines, --csv and --raw: only one of them"},
		"text with a flag":     {[]string{"--conns", "4", table}, 2, "--conns: arguments are text, unless"},
		"flag of CSV":          {[]string{"--lines", "--no-header", table}, 2, "--no-header: only with --csv"},
		"flag of blocks":       {[]string{"--csv", "--block-size", "1MiB", table}, 2, "--block-size: only with --raw"},
		"delimiter":            {[]string{"--csv", "--delimiter", "ab", table}, 2, `--delimiter "ab": want one character`},
		"size":                 {[]string{"--raw", "--block-size", "big", table}, 2, `--block-size "big": want a size`},
		"no connections":       {[]string{"--lines", "--conns", "0", table}, 2, "--conns 0: want a number from 1"},
		"its own output":       {[]string{"--lines", "--output", table, table}, 2, table + ": the file is an input"},
		"twice the same":       {[]string{"--lines", "--output", dir + "/new", "--failed", dir + "/./new", table}, 2, "the file is written for another purpose too"},
		"state over output":    {[]string{"--lines", "--output", kept, "--resume", link, table}, 2, "the file is written for another purpose too"},
		"nowhere for failed":   {[]string{"--lines", "--output", kept, "--failed", dir + "/nodir/f", table}, 1, "no such file or directory"},
		"nowhere for a state":  {[]string{"--lines", "--output", kept, "--resume", dir + "/nodir/f", table}, 1, "cannot save where to continue"},
		"nothing in flight":    {[]string{"--lines", "--in-flight", "0", table}, 2, "--in-flight 0: want a number from 1"},
		"no number":            {[]string{"--lines", "--rate", "NaN", table}, 2, "--rate NaN: want a number"},
		"too long":             {[]string{"--lines", "--max-record", "2B", "--failed", dir + "/f", table}, 1, "too long: more than 2 bytes (--max-record allows more); not kept in " + dir + "/f"},
		"escape sequences":     {[]string{"--lines", dir + "/a\x1b]0;b\n"}, 1, `a\x1b]0;b\n: no such file`},
		"other columns":        {[]string{"--csv", "--failed", dir + "/f", table, other}, 1, "b.csv: its columns differ from those of the input before"},
		"an output that fails": {[]string{"--lines", "--output", "/dev/full", table}, 1, "writing the echoes: "},
		"a broken state":       {[]string{"--lines", "--resume", plain, table}, 1, "x.gz is not the state of an earlier run"},
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
	if got := run(t, cmd); got.code != 2 || !strings.Contains(got.stderr, "the file is an input") {
		t.Errorf("with its output as standard input: %+v", got)
	}
}

// An input that cannot be read does not stop the others.
func TestSendBadInputs(t *testing.T) {
	t.Parallel()
	e := start(t)
	dir := t.TempDir()
	one, two := filepath.Join(dir, "one"), filepath.Join(dir, "two")
	check(t, os.WriteFile(one, []byte("1\n"), 0o600))
	check(t, os.WriteFile(two, []byte("2\n"), 0o600))
	web := httptest.NewServer(http.NotFoundHandler())
	defer web.Close()
	args := []string{"--lines", dir + "/none", one, dir, web.URL + "/x", two}
	got := e.bulk(args...)
	if got.code != 1 || got.stdout != "1\n2\n" {
		t.Errorf("got %+v", got)
	}
	for _, want := range []string{
		"read " + dir + "/none: no such file or directory\n", "read " + dir + ": is a directory\n", web.URL + "/x: 404 Not Found\n",
		"2 records came back", "; 3 inputs not read to the end\n",
	} {
		if !strings.Contains(got.stderr, want) {
			t.Errorf("stderr lacks %q:\n%s", want, got.stderr)
		}
	}
	if got := e.bulk(append([]string{"--quiet"}, args...)...); got.code != 1 || got.stdout != "1\n2\n" ||
		strings.Count(got.stderr, "\n") != 3 {
		t.Errorf("--quiet: got %+v, want the three errors alone", got)
	}
	if got := e.bulk(append([]string{"--strict"}, args...)...); got.code != 1 || got.stdout != "" {
		t.Errorf("--strict: got %+v", got)
	}
}

// When the reader of the output has gone, as in '| head', it ends as filters do.
func TestSendToAReaderThatHasGone(t *testing.T) {
	t.Parallel()
	e := start(t)
	cmd := e.sendCommand("--lines")
	cmd.Stdin = strings.NewReader(strings.Repeat("a line\n", 100_000))
	read, write, err := os.Pipe()
	check(t, err)
	check(t, read.Close())
	var stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr, cmd.Env = write, &stderr, environment()
	_ = cmd.Run()
	check(t, write.Close())
	if code := exitCode(cmd.ProcessState); code != 128+int(syscall.SIGPIPE) || stderr.Len() > 0 {
		t.Errorf("code %d, stderr %q; want 141 and nothing", code, stderr.String())
	}
}

// If the output were also an input, it would grow without end.
func TestSendRefusesItsOutputAsInput(t *testing.T) {
	t.Parallel()
	e := start(t)
	path := filepath.Join(t.TempDir(), "same.txt")
	check(t, os.WriteFile(path, []byte("a\nb\n"), 0o600))
	for _, args := range [][]string{{"--lines", path}, nil} {
		cmd := e.sendCommand(args...)
		out, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
		check(t, err)
		in, err := os.Open(path)
		check(t, err)
		var stderr bytes.Buffer
		cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.Env = in, out, &stderr, environment()
		_ = cmd.Run()
		check(t, in.Close())
		check(t, out.Close())
		if code := exitCode(cmd.ProcessState); code != 2 ||
			!strings.Contains(stderr.String(), "is also the output") || readFile(t, path) != "a\nb\n" {
			t.Errorf("%q: code %d, stderr %q", args, code, stderr.String())
		}
	}
}

// --give-up counts from the last echo, also if the server accepts connections and hangs.
func TestSendGivesUpOnAServerThatHangs(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer ln.Close()
	began := time.Now()
	got := echodRun(t, "send", "--address", ln.Addr().String(), "--lines", "--give-up", "1s", writeCSV(t, 10))
	if took := time.Since(began); got.code != 1 || !strings.Contains(got.stderr, "gave up after 1s: ") ||
		took > 10*time.Second { // the stall timeout is 30 s
		t.Errorf("after %v: %+v", took, got)
	}
}

// Requests have the user's headers, and trust the user's certificates.
func TestSendRequests(t *testing.T) {
	t.Parallel()
	e := start(t)
	web := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if _, err := io.WriteString(w, req.Header.Get("Authorization")+"\n"+req.UserAgent()+"\n"); err != nil {
			t.Error(err)
		}
	}))
	defer web.Close()
	cert := filepath.Join(t.TempDir(), "ca.pem")
	check(t, os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: web.Certificate().Raw}), 0o600))
	got := e.bulk("-l", "--cacert", cert, "-H", "authorization: Bearer x", web.URL)
	if got.code != 0 || got.stdout != "Bearer x\nechod/devel\n" {
		t.Errorf("got %+v", got)
	}
	if got := e.bulk("-l", web.URL); got.code != 1 || !strings.Contains(got.stderr, "certificate") {
		t.Errorf("without --cacert: got %+v", got)
	}
}
