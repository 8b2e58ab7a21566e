//go:build gendocs

package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// generators are the commands that only a build for making packages has: what they need would add a megabyte to the
// program.
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
	root.DisableAutoGenTag = true
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
	for _, below := range cmd.Commands() {
		if below.IsAvailableCommand() && below.Name() != "completion" {
			if err := writeMan(below, dir, date); err != nil {
				return err
			}
		}
	}
	name := strings.ReplaceAll(cmd.CommandPath(), " ", "-")
	var page bytes.Buffer
	header := &doc.GenManHeader{Title: strings.ToUpper(name), Section: "1", Source: "echod " + version, Manual: "echod", Date: &date}
	if err := doc.GenMan(cmd, header, &page); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, name+".1"), tidy(page.Bytes(), date), 0o644)
}

var (
	title  = regexp.MustCompile(`(?m)^(\.TH "[^"]*" "1" )"[^"]*"`)
	long   = regexp.MustCompile(`(?m)^([^.\\ ].{40,76}) ([^ ].*)$`)
	option = regexp.MustCompile(`\.PP\n(\\fB-[^\n]*)\n\t`)
)

// tidy mends what mandoc(1) objects to: dates without a day, options that are set off by tabs, and long lines.
func tidy(page []byte, date time.Time) []byte {
	page = title.ReplaceAll(page, []byte(`${1}"`+date.Format(time.DateOnly)+`"`))
	page = option.ReplaceAll(page, []byte(".TP\n${1}\n"))
	page = bytes.ReplaceAll(page, []byte("\t"), []byte("    "))
	return long.ReplaceAll(page, []byte("${1}\n${2}"))
}
