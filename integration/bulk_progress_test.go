//go:build unix

package integration

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"
)

func TestSendProgress(t *testing.T) {
	t.Run("bars on a terminal", testBarsOnATerminal)
	t.Run("no bars over the echo", testNoBarsOverTheEcho)
	t.Run("lines without a terminal", testProgressInLines)
	t.Run("nothing with --quiet", testQuiet)
	t.Run("no escape sequences if TERM=dumb", testDumbTerminal)
	t.Run("draws nothing in the background", testBackground)
	t.Run("a terminal that shrinks", testShrinkingTerminal)
}

// A terminal shows a bar for each input, and one for all.
func testBarsOnATerminal(t *testing.T) {
	t.Parallel()
	e := start(t)
	table := writeCSV(t, 3000)
	small := filepath.Join(t.TempDir(), "small.csv")
	check(t, os.WriteFile(small, []byte("a,b\n1\n"), 0o600))
	empty := filepath.Join(t.TempDir(), "empty")
	check(t, os.WriteFile(empty, nil, 0o600))
	term, _ := openTerminal(t)
	term.types(fmt.Sprintf("$ECHOD send --address %s --csv --rate 1500 --output /dev/null %s %s %s; echo \"code=$?\"\n", e.addr, empty, small, table))
	term.awaits(`small\.csv +100 % \[=+\] +6 B of 6 B +0 records`)
	term.awaits(`table\.csv +\d+ % \[=+> +\] +\d+ kB of \d+ kB +[\d,]+ records`)
	term.awaits(`all 2/3 +\d+ % (\[=*>? *\])? +(\d+ kB of \d+ kB +)?00:0\d<00:\d\d +\d+ kB/s +[\d,]+ records.* 1 failed`)
	term.awaits(`small\.csv:2:1: wrong number of fields`)
	term.awaits(`empty +100 % \[=+\] +0 B of 0 B +0 records`)
	term.awaits(`code=1`)
	term.awaits(`3,000 of 3,001 records came back`)
}

// Bars would be drawn over an echo that goes to the terminal.
func testNoBarsOverTheEcho(t *testing.T) {
	t.Parallel()
	e := start(t)
	input := filepath.Join(t.TempDir(), "in")
	check(t, os.WriteFile(input, []byte(strings.Repeat("a line\n", 1000)), 0o600))
	term, _ := openTerminal(t)
	term.types(fmt.Sprintf("$ECHOD send --address %s --lines --rate 1000 %s; echo \"code=$?\"\n", e.addr, input))
	term.awaits(`(?m)^code=0$`)
	if strings.Contains(term.screen(), " % of ") {
		t.Error("there are bars")
	}
}

// Without a terminal, a line is printed every five seconds.
func testProgressInLines(t *testing.T) {
	t.Parallel()
	e := start(t)
	cmd := e.sendCommand("--lines", "--output", "/dev/null")
	cmd.Env = environment()
	in, err := cmd.StdinPipe()
	check(t, err)
	stderr, err := cmd.StderrPipe()
	check(t, err)
	check(t, cmd.Start())
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	_, err = io.WriteString(in, "one\ntwo\n")
	check(t, err)
	overdue := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
	defer overdue.Stop()
	line, err := bufio.NewReader(stderr).ReadString('\n') // after five seconds
	if want := regexp.MustCompile(`^echod: 2 records, 8 B back, 8 B done, \d B/s, \d records/s, 00:05 elapsed\n$`); !want.MatchString(line) {
		t.Errorf("the progress is %q (%v)", line, err)
	}
}

func testQuiet(t *testing.T) {
	t.Parallel()
	e := start(t)
	cmd := e.sendCommand("--lines", "--quiet")
	cmd.Stdin = strings.NewReader("one\n")
	if got, want := run(t, cmd), (result{stdout: "one\n"}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func testDumbTerminal(t *testing.T) {
	t.Parallel()
	e := start(t)
	input := filepath.Join(t.TempDir(), "in")
	check(t, os.WriteFile(input, []byte(strings.Repeat("a line\n", 1000)), 0o600))
	term, _ := openTerminal(t)
	term.types(fmt.Sprintf("TERM=dumb $ECHOD send --address %s --lines --rate 900 --output /dev/null %s; echo \"code=$?\"\n", e.addr, input))
	term.awaits(`(?m)^code=0`)
	term.awaits(`all 1,000 records came back`)
	if out := term.screen(); strings.Contains(out, "\x1b[") {
		t.Errorf("there are escape sequences: %q", out)
	}
}

// A background job draws nothing over what is typed, and is not stopped by 'stty tostop'.
func testBackground(t *testing.T) {
	t.Parallel()
	e := start(t)
	input := filepath.Join(t.TempDir(), "in")
	check(t, os.WriteFile(input, []byte(strings.Repeat("a line\n", 1500)), 0o600))
	term, _ := openTerminal(t)
	term.types("set -m; stty tostop\n")
	term.types(fmt.Sprintf("$ECHOD send --address %s --lines --rate 1000 --output /dev/null %s & wait; echo \"code=$?\"\n", e.addr, input))
	term.awaits(`code=0`)
	if out := term.screen(); strings.Contains(out, " % ") || !strings.Contains(out, "all 1,500 records came back") {
		t.Errorf("the terminal shows %q", out)
	}
}

// When the terminal shrinks, the bars do, and nothing above them is overwritten.
func testShrinkingTerminal(t *testing.T) {
	t.Parallel()
	e := start(t)
	input := filepath.Join(t.TempDir(), "in")
	check(t, os.WriteFile(input, []byte(strings.Repeat("a line\n", 1000)), 0o600))
	term, _ := openTerminal(t)
	term.types(fmt.Sprintf("$ECHOD send --address %s --lines --rate 500 --output /dev/null %s %s; echo \"code=$?\"\n", e.addr, input, input))
	term.awaits(`all 0/2 .*records`)
	check(t, pty.Setsize(term.tty, &pty.Winsize{Cols: 40, Rows: 24}))
	term.awaits(`\nall \d/2[^\n\x1b]{0,30}\x1b\[K\x1b\[J\x1b\[\dA`) // within 40 columns
	term.awaits(`code=0`)
}
