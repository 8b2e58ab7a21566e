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
	"github.com/spf13/cobra/doc"
)

// gendocs is only in builds with the tag gendocs, because package doc adds a megabyte to the binary.
func init() {
	buildCommands = append(buildCommands, &cobra.Command{
		Use:    "gendocs DIRECTORY",
		Short:  "Write man pages and shell completions",
		Hidden: true,
		Args:   usageArgs(cobra.ExactArgs(1)),
		RunE:   func(cmd *cobra.Command, args []string) error { return generate(cmd.Root(), args[0]) },
	})
}

// generate writes the man pages to dir/man, and the completions under the names that the shells expect.
func generate(root *cobra.Command, dir string) error {
	// A fixed date makes the same source produce the same pages.
	seconds, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64)
	if err != nil {
		return fmt.Errorf("SOURCE_DATE_EPOCH: %w", err)
	}
	date := time.Unix(seconds, 0).UTC()
	man := filepath.Join(dir, "man")
	if err := os.MkdirAll(man, 0o755); err != nil {
		return err
	}
	root.DisableAutoGenTag = true
	for _, cmd := range root.Commands() {
		if cmd.Name() == "completion" {
			cmd.Hidden = true // without a man page
		}
	}
	header := &doc.GenManHeader{Section: "1", Date: &date, Source: "echod " + version, Manual: "User Commands"}
	if err := doc.GenManTree(root, header, man); err != nil {
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
