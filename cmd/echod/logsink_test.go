package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// labelled notes in text what was written through it, behind a label.
type labelled struct {
	label string
	text  *bytes.Buffer
}

func (l labelled) Write(p []byte) (int, error) {
	fmt.Fprintf(l.text, "%s: %s\n", l.label, p)
	return len(p), nil
}

func TestStacksGoToStderrAndNotAmongTheEntries(t *testing.T) {
	var text bytes.Buffer // one goroutine of the sink's writes to it
	sink := newLogSink(labelled{"log", &text}, labelled{"stderr", &text}, nil)
	for _, w := range []struct {
		to   io.Writer
		what string
	}{{sink, "before"}, {stacks{sink}, "goroutine 1 [running]"}, {sink, "after"}} {
		if n, err := io.WriteString(w.to, w.what); n != len(w.what) || err != nil {
			t.Errorf("writing %q: %d, %v", w.what, n, err)
		}
	}
	sink.close()
	<-sink.done
	if got, want := text.String(), "log: before\nstderr: goroutine 1 [running]\nlog: after\n"; got != want {
		t.Errorf("written was %q, want %q", got, want)
	}
}

// blocked takes nothing until it is released.
type blocked struct {
	released chan struct{}
	taken    bytes.Buffer
}

func (b *blocked) Write(p []byte) (int, error) {
	<-b.released
	return b.taken.Write(p)
}

func TestLogOfASlowReaderLosesLinesAndSaysHowMany(t *testing.T) {
	out := &blocked{released: make(chan struct{})}
	sink := newLogSink(out, io.Discard, func(lines int64) []byte { return fmt.Appendf(nil, "%d lost\n", lines) })
	for range logBacklog + 10 { // one more may be with the writer already
		_, _ = io.WriteString(sink, "line\n")
	}
	close(out.released)
	sink.close()
	<-sink.done
	text := out.taken.String()
	if kept := strings.Count(text, "line\n"); kept < logBacklog || kept > logBacklog+1 || !strings.Contains(text, fmt.Sprintf("%d lost\n", logBacklog+10-kept)) {
		t.Errorf("%d lines were kept of %d, and %q was said", kept, logBacklog+10, strings.ReplaceAll(text, "line\n", ""))
	}
}

// leadingToTheJournal makes stderr look as systemd would have made it.
func leadingToTheJournal(t *testing.T) {
	t.Helper()
	info, err := os.Stderr.Stat()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("JOURNAL_STREAM", deviceAndInode(info))
}

func TestLogGoesToTheJournalWhereStderrDoes(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("there is no journal here")
	}
	dir := t.TempDir()
	socket, nowhere := filepath.Join(dir, "journal"), filepath.Join(dir, "nowhere")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	type want struct {
		format string
		direct bool // through the journal's socket
	}
	for name, c := range map[string]struct {
		under         bool
		asked, socket string
		want          want
	}{
		"elsewhere":                    {false, "", socket, want{"json", false}},
		"under the journal":            {true, "", socket, want{"journal", true}},
		"with its socket out of sight": {true, "", nowhere, want{"json", false}},
		"json is asked for":            {true, "json", socket, want{"json", false}},
		"journal is asked for":         {false, "journal", socket, want{"journal", true}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("JOURNAL_STREAM", "")
			if c.under {
				leadingToTheJournal(t)
			}
			format, out, err := destination(c.asked, c.socket)
			if err != nil {
				t.Fatal(err)
			}
			w, direct := out.(journalWriter)
			if direct {
				defer w.from.Close()
			}
			if got := (want{format, direct}); got != c.want {
				t.Errorf("format and way are %v, want %v", got, c.want)
			}
		})
	}
	if _, _, err := destination("journal", nowhere); err == nil || !strings.Contains(err.Error(), "--log-format journal") {
		t.Errorf("without a journal: %v, want an error that names the flag", err)
	}
}
