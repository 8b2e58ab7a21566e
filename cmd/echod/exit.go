package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"echod/control"
	"echod/internal/bulk"
)

// Exit codes.
const (
	exitFailed      = 1
	exitUsage       = 2
	exitUnreachable = 2  // ctl
	exitTimeout     = 3  // ctl wait
	exitUsageCtl    = 64 // ctl, where 2 is taken: EX_USAGE of sysexits.h
	exitSignal      = 128
)

// exitError ends the process with a code. Without an error it does so in silence, since all has been said.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// usageError says that the command line made no sense.
type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// report says err on stderr, and returns the exit code for it.
func report(cmd *cobra.Command, err error) int {
	if err == nil {
		return 0
	}
	exit, isExit := errors.AsType[*exitError](err)
	if isExit && exit.err == nil {
		return exit.code
	}
	lines := strings.Split(err.Error(), "\n")
	for i, line := range lines {
		lines[i] = bulk.Printable(line)
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "echod: %s\n", strings.Join(lines, "\n"))
	if _, ok := errors.AsType[usageError](err); ok {
		fmt.Fprintf(cmd.ErrOrStderr(), "Try '%s --help'.\n", cmd.CommandPath())
		if strings.HasPrefix(cmd.CommandPath(), "echod ctl") {
			return exitUsageCtl
		}
		return exitUsage
	}
	if isExit {
		return exit.code
	}
	if problem, ok := errors.AsType[*control.Problem](err); ok && problem.Type == control.ProblemTimeout {
		return exitTimeout
	}
	if _, ok := errors.AsType[*control.UnreachableError](err); ok {
		return exitUnreachable
	}
	return exitFailed
}

// signalNumber is what a shell adds to 128 for a process that sig has ended.
func signalNumber(sig os.Signal) int {
	if n, ok := sig.(syscall.Signal); ok {
		return int(n)
	}
	return 0
}

// takes makes cobra's complaints about arguments usage errors.
func takes(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return usageError{err}
		}
		return nil
	}
}
