//go:build unix

package integration

import (
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

// echodRun runs echod and waits until it exits.
func echodRun(t testing.TB, args ...string) result {
	t.Helper()
	return run(t, commandOf(append([]string{built(t, echodBinary)}, args...)...))
}

// TestHelp checks the help of all commands: each has one, in lines that fit a terminal.
func TestHelp(t *testing.T) {
	t.Parallel()
	var seen int
	var visit func(command []string)
	visit = func(command []string) {
		got := echodRun(t, append(command, "--help")...)
		if seen++; got.code != 0 || got.stdout == "" || got.stderr != "" {
			t.Errorf("echod %s --help: exit code %d, stdout %q, stderr %q", strings.Join(command, " "), got.code, got.stdout, got.stderr)
		}
		for line := range strings.Lines(got.stdout) {
			own := len(command) == 0 || command[0] != "completion" // cobra's texts
			if wide := utf8.RuneCountInString(strings.TrimRight(line, "\n")); own && wide >= 100 {
				t.Errorf("echod %s --help has a long line: %s", strings.Join(command, " "), line)
			}
		}
		_, commands, _ := strings.Cut(got.stdout, "\nAvailable Commands:\n")
		commands, _, _ = strings.Cut(commands, "\n\n")
		for line := range strings.Lines(commands) {
			visit(append(command[:len(command):len(command)], strings.Fields(line)[0]))
		}
	}
	visit(nil)
	if seen < 15 {
		t.Errorf("only %d commands found", seen)
	}
}

// Each command has a page with all its flags, and mandoc finds no error in it.
func TestManPages(t *testing.T) {
	t.Parallel()
	slow(t)
	mandoc := require(t, "mandoc")
	dir := t.TempDir()
	generate := exec.Command("go", "run", "-tags", "gendocs", "../cmd/echod", "gendocs", dir)
	generate.Env = environment("SOURCE_DATE_EPOCH=1700000000")
	if out, err := generate.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	pages, err := filepath.Glob(filepath.Join(dir, "man", "*.1"))
	check(t, err)
	if len(pages) < 10 {
		t.Fatalf("there are only %q", pages)
	}
	flag := regexp.MustCompile(`(?m)^ {2,6}(?:(-\w), )?(--[a-z0-9.-]+)`)
	for _, page := range pages {
		command := strings.Split(strings.TrimSuffix(filepath.Base(page), ".1"), "-")
		run(t, commandOf(mandoc, "-T", "lint", "-W", "error", page)).expect(t, 0, "", "")
		shown := run(t, commandOf(mandoc, "-T", "ascii", page)).stdout
		shown = regexp.MustCompile(`.\x08`).ReplaceAllString(shown, "") // bold is typed twice
		help := run(t, commandOf(slices.Concat([]string{built(t, echodBinary)}, command[1:], []string{"--help"})...)).stdout
		flags := flag.FindAllStringSubmatch(help, -1)
		if len(flags) == 0 {
			t.Errorf("%q shows no flags:\n%s", command, help)
		}
		for _, f := range flags {
			line := f[2]
			if f[1] != "" {
				line = f[1] + ", " + line
			}
			if !regexp.MustCompile(`\n +` + line + `[\[= ]`).MatchString(shown) {
				t.Errorf("%s does not have %q", filepath.Base(page), line)
			}
		}
	}
}
