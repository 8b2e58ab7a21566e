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

// Each command has a page with all its flags, and mandoc finds no error in it.
func TestManPages(t *testing.T) {
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
	flag := regexp.MustCompile(`(?m)^ +(?:(-\w), )?(--[a-z0-9.-]+)`)
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
