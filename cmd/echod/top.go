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
		Short: "Watch a running server, and drive it by keys",
		Long: `Watch a running server, and drive it by keys: its state, holds and drain, its rates
over the last minute, and its connections, sorted and filtered as you like. Keys pause,
resume, drain, and end a connection; each says first what will happen. ? lists them.

It finds the server as 'echod ctl' does, and needs a terminal; scripts are better off with
'echod ctl status' and 'echod ctl events'. When the server goes, it waits for the next.

Exit codes: 0 quit, 1 failed, 2 usage, or no server answers.`,
		Args: takes(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if opts.Interval < shortestInterval || opts.Interval > longestInterval {
				return usagef("--interval %v: want %v to %v", opts.Interval, shortestInterval, longestInterval)
			}
			opts.In, opts.Out = terminalOf(cmd.InOrStdin()), terminalOf(cmd.OutOrStdout())
			if opts.In == nil || opts.Out == nil {
				return usagef("top needs a terminal as its input and output; use 'echod ctl status' or 'echod ctl events' in scripts")
			}
			c, err := controlClient(path)
			if err != nil {
				return err
			}
			defer c.Close()
			opts.Client, opts.Path, opts.Environment = c, c.Path(), os.Environ()
			opts.NoColor = noColor || os.Getenv("NO_COLOR") != ""
			opts.ASCII = !speaksUTF8()
			return interruptible(cmd.Context(), func(ctx context.Context) error { return top.Run(ctx, opts) }, syscall.SIGHUP)
		},
	}
	cmd.Flags().StringVar(&path, "control", "", "control socket's `path`")
	cmd.Flags().DurationVar(&opts.Interval, "interval", time.Second, "`time` between two looks at the server")
	cmd.Flags().BoolVar(&noColor, "no-color", false, "no colours; the variable NO_COLOR says so too")
	return cmd
}

// terminalOf gives the file of a stream that is a terminal, else nil.
func terminalOf(stream any) *os.File {
	if file, ok := stream.(*os.File); ok && term.IsTerminal(int(file.Fd())) {
		return file
	}
	return nil
}

// speaksUTF8 says whether the terminal can be expected to show more than ASCII: by the first of the variables
// that the locale is taken from (POSIX, 8.2). Windows has none of them, and shows it.
func speaksUTF8() bool {
	for _, name := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if locale := os.Getenv(name); locale != "" {
			locale = strings.ToUpper(locale)
			return strings.Contains(locale, "UTF-8") || strings.Contains(locale, "UTF8")
		}
	}
	return runtime.GOOS == "windows"
}
