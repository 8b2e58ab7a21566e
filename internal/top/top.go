package top

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	tea "charm.land/bubbletea/v2"

	"echod/control"
)

// Options says how to show a server.
type Options struct {
	Client      *control.Client
	Path        string        // of the control socket, for messages
	Interval    time.Duration // between two looks at the server; must be positive
	In, Out     *os.File      // a terminal
	Environment []string      // NAME=value: TERM and the like, which say what the terminal can do
	NoColor     bool          // no colours; bold and reverse remain where TERM has them
	ASCII       bool          // bars, arrows and the like are drawn in ASCII
}

// Run shows the server until the operator quits, which is nil, or ctx ends, whose cause it returns. The terminal is
// then as it was before, also after a panic. Without a server to begin with, the error is the client's.
func Run(ctx context.Context, opts Options) error {
	first, err := look(ctx, opts.Client)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	f := newFeed(opts.Client, opts.Interval)
	m := newModel(opts.Path, opts.Interval, opts.ASCII, f)
	m.Update(first)
	environment := slices.Clone(opts.Environment)
	if opts.NoColor {
		environment = append(environment, "NO_COLOR=1")
	}
	program := tea.NewProgram(m, tea.WithContext(ctx), tea.WithInput(opts.In), tea.WithOutput(opts.Out),
		tea.WithEnvironment(environment), tea.WithoutSignalHandler(), tea.WithFPS(framesPerSecond))
	f.send = program.Send

	var feeding sync.WaitGroup
	for _, part := range []func(context.Context){f.poll, f.list, f.follow, f.deliver, f.carry} {
		feeding.Go(func() {
			defer func() {
				if r := recover(); r != nil {
					program.Kill() // gives the terminal back, for whoever is to read what follows
					panic(r)
				}
			}()
			part(ctx)
		})
	}
	_, err = program.Run()
	ended := context.Cause(ctx)
	cancel(errQuit)
	feeding.Wait()
	switch {
	case ended != nil:
		return ended
	case errors.Is(err, io.EOF):
		return errors.New("the terminal is gone")
	case err != nil:
		return fmt.Errorf("on the terminal: %w", err)
	}
	return nil
}

// framesPerSecond bounds how often the screen is drawn, and so how late a key shows: 33 ms.
const framesPerSecond = 30

var errQuit = errors.New("the operator has quit")
