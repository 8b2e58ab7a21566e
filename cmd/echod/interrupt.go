package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"sync"
	"syscall"
)

// onInterrupt calls f with each SIGINT, SIGTERM and one of the others, as the exit that the signal asks for, until end is called.
func onInterrupt(f func(*exitError), others ...os.Signal) (end func()) {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, append(others, os.Interrupt, syscall.SIGTERM)...)
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

// interruptible calls f with a context that ends with SIGINT, SIGTERM or one of the others, whose exit code is then that
// of a process that the signal has ended.
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
