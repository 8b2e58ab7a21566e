// Package top shows a running server on a terminal and controls it with keys. It gets all that it shows
// through the control socket.
//
// The model holds what the screen shows. It changes by messages only: from the terminal, and from the
// goroutines that talk to the server.
//
// # Goroutines
//
// Bubbletea has its own goroutines, which draw and read keys. Besides, Run starts five, ends them by
// their context, and waits for them:
//
//   - poll asks for the status at each interval,
//   - list asks for the connections, with pauses so that the load on the server stays small,
//   - follow reads events into a queue,
//   - deliver sends the events to the model in batches, so that thousands a second are drawn at once,
//   - act runs the operator's actions, one at a time.
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

// Options configures Run. Client, Interval, In and Out are required.
type Options struct {
	Client      *control.Client
	Path        string        // of the control socket; appears in messages
	Interval    time.Duration // between two status requests
	In, Out     *os.File      // a terminal
	Environment []string      // NAME=value; TERM and others describe the terminal
	NoColor     bool          // use no colours, only bold and reverse
	ASCII       bool          // draw with ASCII characters only
}

// Run shows the server until the operator quits, and then returns nil. If ctx ends first, it returns its
// cause. If the server does not answer at the start, it returns the client's error. Run restores the
// terminal, also after a panic.
func Run(ctx context.Context, opts Options) error {
	first, err := getStatus(ctx, opts.Client)
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
	for _, part := range []func(context.Context){f.poll, f.list, f.follow, f.deliver, f.act} {
		feeding.Go(func() {
			defer func() {
				if r := recover(); r != nil {
					program.Kill() // restores the terminal, so that the panic can be read
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
		return errors.New("the terminal was closed")
	case err != nil:
		return fmt.Errorf("terminal: %w", err)
	}
	return nil
}

// framesPerSecond limits how often the screen is drawn. A key shows after at most 33 ms.
const framesPerSecond = 30

var errQuit = errors.New("the operator quit")
