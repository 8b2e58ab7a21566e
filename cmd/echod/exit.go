package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"

	"github.com/spf13/cobra"

	"echod/control"
	"echod/internal/text"
)

// Exit codes.
const (
	exitFailed      = 1
	exitUsage       = 2
	exitUnreachable = 2  // ctl
	exitTimeout     = 3  // ctl wait
	exitTooOld      = 4  // ctl upgrade
	exitUsageCtl    = 64 // ctl, where 2 has another meaning: EX_USAGE of sysexits.h
	exitSignal      = 128
)

// exitError ends the process with an exit code. With a nil err nothing is printed.
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

// usageError is an error in the command line.
type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// usageArgs returns check with its errors wrapped as usage errors.
func usageArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return usageError{err}
		}
		return nil
	}
}

// printError prints err to stderr and returns its exit code.
func printError(cmd *cobra.Command, err error) int {
	if err == nil {
		return 0
	}
	exit, isExit := errors.AsType[*exitError](err)
	if isExit && exit.err == nil {
		return exit.code
	}
	// The journal gives lines without a prefix the priority info.
	prefix := ""
	if stderrIsJournal() {
		prefix = fmt.Sprintf("<%d>", journalError)
	}
	for i, line := range strings.Split(err.Error(), "\n") {
		if i == 0 {
			line = "echod: " + line
		}
		fmt.Fprintf(cmd.ErrOrStderr(), "%s%s\n", prefix, text.Printable(line))
	}
	if _, ok := errors.AsType[usageError](err); ok {
		fmt.Fprintf(cmd.ErrOrStderr(), "%sTry '%s --help'.\n", prefix, cmd.CommandPath())
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

// signalNumber returns the number that a shell adds to 128 for a process that sig has ended.
func signalNumber(sig os.Signal) int {
	if n, ok := sig.(syscall.Signal); ok {
		return int(n)
	}
	return 0
}

// notifySignals relays signals to c, except those that were ignored when the process started: nohup
// ignores SIGHUP, and a shell without job control ignores SIGINT for its background jobs. At least one
// of the signals must not be ignored.
func notifySignals(c chan<- os.Signal, signals ...os.Signal) {
	wanted := make([]os.Signal, 0, len(signals))
	for _, sig := range signals {
		if !signal.Ignored(sig) {
			wanted = append(wanted, sig)
		}
	}
	if len(wanted) > 0 { // without signals, Notify would relay all of them
		signal.Notify(c, wanted...)
	}
}

// onInterrupt calls f for each SIGINT, SIGTERM or other given signal that arrives, with its exit code, until end is called.
// end waits for a call of f in progress.
func onInterrupt(f func(*exitError), others ...os.Signal) (end func()) {
	signals := make(chan os.Signal, 2)
	notifySignals(signals, append(others, os.Interrupt, syscall.SIGTERM)...)
	done := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() {
		for {
			select {
			case sig := <-signals:
				f(&exitError{exitSignal + signalNumber(sig), errors.New("interrupted")})
			case <-done:
				return
			}
		}
	})
	return func() {
		signal.Stop(signals)
		close(done)
		watching.Wait()
	}
}

// interruptible calls f with a context that SIGINT, SIGTERM and the other signals cancel. If f returns an error after that,
// interruptible returns an error with the exit code of a process that the signal has ended.
func interruptible(ctx context.Context, f func(context.Context) error, others ...os.Signal) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(context.Canceled)
	end := onInterrupt(func(e *exitError) { cancel(e) }, others...)
	err := f(ctx)
	end()
	if interrupted, ok := errors.AsType[*exitError](context.Cause(ctx)); ok && err != nil {
		return interrupted
	}
	return err
}
