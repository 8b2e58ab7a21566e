//go:build unix

package integration

import (
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The manual has every command with its flags, the names of their values, and their defaults, and mandoc finds nothing.
func TestManPagesSayWhatHelpSays(t *testing.T) {
	t.Parallel()
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
	flag := regexp.MustCompile(`(?m)^ +(?:(-\w), )?(--[a-z-]+)(?: ([a-z]+))?(?: |$)`)
	for _, page := range pages {
		command := strings.Split(strings.TrimSuffix(filepath.Base(page), ".1"), "-")
		if r := run(t, commandOf(mandoc, "-T", "lint", page)); r.stdout+r.stderr != "" {
			t.Errorf("mandoc: %s%s", r.stdout, r.stderr)
		}
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
			if f[3] != "" {
				line += " " + f[3]
			}
			if !strings.Contains(shown, "\n       "+line+"\n") && !strings.Contains(shown, "\n       "+line+" ") {
				t.Errorf("%s has no %q", filepath.Base(page), line)
			}
		}
		for _, byDefault := range regexp.MustCompile(`\(default \[?"?([^")\]]+)`).FindAllStringSubmatch(help, -1) {
			if !regexp.MustCompile(`\(default:\s+` + regexp.QuoteMeta(byDefault[1]) + `\)`).MatchString(shown) {
				t.Errorf("%s does not name the default %s", filepath.Base(page), byDefault[1])
			}
		}
	}
}
