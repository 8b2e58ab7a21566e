//go:build gendocs

package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spf13/cobra"
)

// generators are the commands that only a build for making packages has.
func generators() []*cobra.Command {
	return []*cobra.Command{{
		Use:    "gendocs DIRECTORY",
		Short:  "Write man pages and shell completions",
		Hidden: true,
		Args:   takes(cobra.ExactArgs(1)),
		RunE:   func(cmd *cobra.Command, args []string) error { return generate(cmd.Root(), args[0]) },
	}}
}

// generate writes man pages to man/, and completions as the shells want them named.
func generate(root *cobra.Command, dir string) error {
	// The same source makes the same pages, whenever that is.
	seconds, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64)
	if err != nil {
		return fmt.Errorf("SOURCE_DATE_EPOCH: %w", err)
	}
	date := time.Unix(seconds, 0).UTC()
	man := filepath.Join(dir, "man")
	if err := os.MkdirAll(man, 0o755); err != nil {
		return err
	}
	if err := writeMan(root, man, date); err != nil {
		return fmt.Errorf("writing man pages: %w", err)
	}
	for name, write := range map[string]func(io.Writer) error{
		"echod.bash": func(w io.Writer) error { return root.GenBashCompletionV2(w, true) },
		"_echod":     root.GenZshCompletion,
		"echod.fish": func(w io.Writer) error { return root.GenFishCompletion(w, true) },
	} {
		file, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		err = write(file)
		if closed := file.Close(); err == nil {
			err = closed
		}
		if err != nil {
			return fmt.Errorf("writing %s: %w", name, err)
		}
	}
	return nil
}

// writeMan writes the page of a command and of those below it.
func writeMan(cmd *cobra.Command, dir string, date time.Time) error {
	for _, below := range documented(cmd) {
		if err := writeMan(below, dir, date); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(dir, pageName(cmd)+".1"), manPage(cmd, date), 0o644)
}
