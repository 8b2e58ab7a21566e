package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// A built contender can be run.
type built struct {
	contender
	command []string // but for the arguments
	version string
}

// buildAll builds the contenders into dir. Those that this machine has no compiler or interpreter for
// are left out, and named.
func buildAll(ctx context.Context, dir string, chosen []contender) (ready []built, missing []string, err error) {
	for _, c := range chosen {
		tool := map[string]string{".c": "cc", ".py": "python3"}[filepath.Ext(c.source)]
		if tool != "" {
			if _, err := exec.LookPath(tool); err != nil {
				missing = append(missing, c.Name+" (there is no "+tool+")")
				continue
			}
		}
		b, err := build(ctx, dir, c)
		if err != nil {
			return nil, nil, fmt.Errorf("building %s: %w", c.Name, err)
		}
		ready = append(ready, b)
	}
	return ready, missing, nil
}

func build(ctx context.Context, dir string, c contender) (b built, err error) {
	binary := filepath.Join(dir, strings.NewReplacer(" ", "", ",", "-").Replace(c.Name))
	b = built{contender: c, command: []string{binary}}
	switch filepath.Ext(c.source) {
	case ".c":
		if err := run(ctx, "", "cc", "-O2", "-o", binary, c.source); err != nil {
			return b, err
		}
		b.version, err = firstLine(ctx, "cc", "--version")
	case ".py":
		b.command = []string{"python3", c.source}
		b.version, err = firstLine(ctx, "python3", "--version")
	default:
		where, source := "", c.source
		if rest, ok := strings.CutPrefix(source, "../"); ok { // a package of the module above
			where, source = "..", "./"+rest
			if binary, err = filepath.Abs(binary); err != nil {
				return b, err
			}
		}
		if err := run(ctx, where, "go", "build", "-trimpath", "-buildvcs=false", "-tags", c.tags, "-o", binary, source); err != nil {
			return b, err
		}
		switch {
		case c.Name == subject:
			b.version, err = firstLine(ctx, "git", "describe", "--always", "--dirty")
		case c.module != "":
			b.version, err = firstLine(ctx, "go", "list", "-m", "-f", "{{.Version}}", c.module)
		}
	}
	return b, err
}

// run runs a command in a directory. An error has what the command said.
func run(ctx context.Context, dir, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(slices.Concat([]string{name}, args), " "), err, out)
	}
	return nil
}

// firstLine returns the first line that a command prints.
func firstLine(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w", name, err)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return line, nil
}
