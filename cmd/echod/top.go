package main

import (
	"context"
	"os"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"echod/internal/top"
)

const (
	shortestInterval = 100 * time.Millisecond
	longestInterval  = time.Minute
)

func newTopCommand() *cobra.Command {
	var path string
	var noColor bool
	var opts top.Options
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Watch and control a running server",
		Long: `Watch a running server: its state, holds and drain, its rates over the last minute, and
its connections, sorted and filtered. Keys pause, resume and drain the server and close
connections, after a confirmation. ? lists the keys.

It finds the server like 'echod ctl', and needs a terminal; use 'echod ctl status' and
'echod ctl events' in scripts. When the server stops, it waits for the next one.

Exit codes: 0 quit, 1 failed, 2 usage or no server found.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if opts.Interval < shortestInterval || opts.Interval > longestInterval {
				return usagef("--interval %v: want %v to %v", opts.Interval, shortestInterval, longestInterval)
			}
			opts.In, opts.Out = terminalOf(cmd.InOrStdin()), terminalOf(cmd.OutOrStdout())
			if opts.In == nil || opts.Out == nil {
				return usagef("top needs a terminal: use 'echod ctl status' or 'echod ctl events' in scripts")
			}
			if name := os.Getenv("TERM"); runtime.GOOS != "windows" && (name == "" || name == "dumb") {
				return usagef("top needs a terminal that can move its cursor, and TERM is %q: "+
					"use 'echod ctl status' or 'echod ctl events'", name)
			}
			c, err := controlClient(path, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			defer c.Close()
			opts.Client, opts.Path, opts.Environment = c, c.Path(), os.Environ()
			opts.NoColor = noColor || os.Getenv("NO_COLOR") != ""
			opts.ASCII = !speaksUTF8()
			return interruptible(cmd.Context(), func(ctx context.Context) error { return top.Run(ctx, opts) },
				syscall.SIGHUP)
		},
	}
	cmd.Flags().StringVar(&path, "control", "", "`path` of the control socket")
	cmd.Flags().DurationVar(&opts.Interval, "interval", time.Second, "`time` between two updates")
	cmd.Flags().BoolVar(&noColor, "no-color", false, "no colours; the NO_COLOR variable does the same")
	cmd.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	return cmd
}

// terminalOf returns the file of a stream that is a terminal, or nil.
func terminalOf(stream any) *os.File {
	if file, ok := stream.(*os.File); ok && term.IsTerminal(int(file.Fd())) {
		return file
	}
	return nil
}

// speaksUTF8 reports whether the terminal shows UTF-8, according to the variables of the locale (POSIX, 8.2). Windows does
// not have these variables, and shows UTF-8.
func speaksUTF8() bool {
	for _, name := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if locale := os.Getenv(name); locale != "" {
			locale = strings.ToUpper(locale)
			return strings.Contains(locale, "UTF-8") || strings.Contains(locale, "UTF8")
		}
	}
	return runtime.GOOS == "windows"
}
