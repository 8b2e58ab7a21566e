package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"sync"
	"syscall"
)

// onInterrupt calls f with each SIGINT and SIGTERM, as the exit that the signal asks for, until end is called.
func onInterrupt(f func(*exitError)) (end func()) {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
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

// interruptible calls f with a context that ends with SIGINT or SIGTERM, whose exit code is then that
// of a process that the signal has ended.
func interruptible(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(context.Canceled)
	end := onInterrupt(func(e *exitError) { cancel(e) })
	err := f(ctx)
	end()
	if interrupted, ok := errors.AsType[*exitError](context.Cause(ctx)); ok && err != nil {
		return interrupted
	}
	return err
}
