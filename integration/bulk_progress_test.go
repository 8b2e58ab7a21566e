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
)

// On a terminal there are bars: one an input, and one for all.
func TestBulkDrawsBarsOnATerminal(t *testing.T) {
	t.Parallel()
	e := start(t)
	table := writeCSV(t, 3000)
	small := filepath.Join(t.TempDir(), "small.csv")
	check(t, os.WriteFile(small, []byte("a,b\n1\n"), 0o600))
	empty := filepath.Join(t.TempDir(), "empty")
	check(t, os.WriteFile(empty, nil, 0o600))
	term, _ := openTerminal(t)
	term.types(fmt.Sprintf("$ECHOD send --address %s --csv --rate 1500 --output /dev/null %s %s %s; echo \"code=$?\"\n", e.addr, empty, small, table))
	term.awaits(`small\.csv +\[=+>?\] +100 % of 6 B +0 records`)
	term.awaits(`table\.csv +\[=+> +\] +\d+ % of \d+ kB +[\d,]+ records`)
	term.awaits(`total +\[=+> +\] +\d+ % of \d+ kB +[\d,]+ records +[\d,]+/s +\d+s left +1 failed`)
	term.awaits(`small\.csv:2:1: wrong number of fields`)
	term.awaits(`empty +\[ *\] +100 % of 0 B +0 records`)
	term.awaits(`code=1`)
	term.awaits(`3,000 of 3,001 records came back`)
}

// Where the echo goes to the terminal itself, bars would be drawn over it.
func TestBulkDrawsNoBarsOverTheEcho(t *testing.T) {
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

// Without a terminal there is a line from time to time.
func TestBulkTellsItsProgressInLines(t *testing.T) {
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
	if want := regexp.MustCompile(`^echod: 2 records, 8 B back, 8 B done, \d/s\n$`); !want.MatchString(line) {
		t.Errorf("the progress is %q (%v)", line, err)
	}
}

func TestBulkIsQuietOnRequest(t *testing.T) {
	t.Parallel()
	e := start(t)
	cmd := e.sendCommand("--lines", "--quiet")
	cmd.Stdin = strings.NewReader("one\n")
	if got, want := run(t, cmd), (result{stdout: "one\n"}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}
