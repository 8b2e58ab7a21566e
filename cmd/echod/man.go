//go:build gendocs

package main

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// documented are the commands below one that have a page.
func documented(cmd *cobra.Command) (below []*cobra.Command) {
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() && c.Name() != "completion" {
			below = append(below, c)
		}
	}
	return below
}

func pageName(cmd *cobra.Command) string { return strings.ReplaceAll(cmd.CommandPath(), " ", "-") }

// manPage renders the help of a command for man(7).
func manPage(cmd *cobra.Command, date time.Time) []byte {
	cmd.InitDefaultHelpFlag()
	var page bytes.Buffer
	fmt.Fprintf(&page, ".TH %q 1 %q %q\n", strings.ToUpper(pageName(cmd)), date.Format(time.DateOnly), "echod "+version)
	fmt.Fprintf(&page, ".nh\n.ad l\n.SH NAME\n%s\n", roff(filled(pageName(cmd)+" - "+cmd.Short)))
	fmt.Fprintf(&page, ".SH SYNOPSIS\n%s\n", bold(cmd.UseLine()))
	page.WriteString(".SH DESCRIPTION\n")
	text := cmd.Long
	if text == "" {
		text = cmd.Short + "."
	}
	for i, paragraph := range strings.Split(text, "\n\n") {
		if i > 0 {
			page.WriteString(".PP\n")
		}
		page.WriteString(roff(filled(paragraph)) + "\n")
	}
	if below := documented(cmd); len(below) > 0 {
		page.WriteString(".SH COMMANDS\n")
		for _, c := range below {
			fmt.Fprintf(&page, ".TP\n%s\n%s.\n", bold(c.Name()), roff(c.Short))
		}
	}
	writeFlags(&page, "OPTIONS", cmd.NonInheritedFlags())
	writeFlags(&page, "COMMON OPTIONS", cmd.InheritedFlags())
	if cmd.Example != "" {
		fmt.Fprintf(&page, ".SH EXAMPLES\n.nf\n%s\n.fi\n", roff(cmd.Example))
	}
	var others []string
	if cmd.HasParent() {
		others = append(others, bold(pageName(cmd.Parent()))+"(1)")
	}
	for _, c := range documented(cmd) {
		others = append(others, bold(pageName(c))+"(1)")
	}
	if len(others) > 0 {
		fmt.Fprintf(&page, ".SH SEE ALSO\n%s\n", strings.Join(others, ",\n"))
	}
	return page.Bytes()
}

// writeFlags writes a section of flags: their name, that of their value, what they do, and their default where there is one
// that the text does not name.
func writeFlags(page *bytes.Buffer, section string, flags *pflag.FlagSet) {
	if !flags.HasAvailableFlags() {
		return
	}
	fmt.Fprintf(page, ".SH %s\n", section)
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			return
		}
		name := bold("--" + f.Name)
		if f.Shorthand != "" {
			name = bold("-"+f.Shorthand) + ", " + name
		}
		value, usage := pflag.UnquoteUsage(f)
		if value != "" {
			name += ` \fI` + roff(value) + `\fP`
		}
		fmt.Fprintf(page, ".TP\n%s\n%s\n", name, roff(usage))
		byDefault := strings.Trim(f.DefValue, "[]")
		if !slices.Contains([]string{"", "0", "0s", "false"}, byDefault) && !strings.Contains(usage, "default:") {
			fmt.Fprintf(page, "(default: %s)\n", roff(byDefault))
		}
	})
}

// filled breaks a paragraph into lines that stay short when they are escaped. One that is indented is left as it is.
func filled(paragraph string) string {
	const width = 70
	if strings.HasPrefix(paragraph, " ") {
		return paragraph
	}
	var lines []string
	for _, word := range strings.Fields(paragraph) {
		if last := len(lines) - 1; last >= 0 && len(lines[last])+len(word) < width {
			lines[last] += " " + word
		} else {
			lines = append(lines, word)
		}
	}
	return strings.Join(lines, "\n")
}

func bold(text string) string { return `\fB` + roff(text) + `\fP` }

// roff keeps text from being taken for anything else.
func roff(text string) string {
	lines := strings.Split(strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(text), "\n")
	for i, line := range lines {
		if strings.HasPrefix(line, ".") || strings.HasPrefix(line, "'") {
			lines[i] = `\&` + line
		}
	}
	return strings.Join(lines, "\n")
}
