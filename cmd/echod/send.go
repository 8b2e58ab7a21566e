package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"echod/client"
)

func newSendCommand() *cobra.Command {
	var s sender
	cmd := &cobra.Command{
		Use:   "send [TEXT...]",
		Short: "Send a message, or standard input, and print what comes back",
		Long: `Send a message, or standard input line by line, and print what comes back.

What nc does, with understanding: the server's notices are said on stderr and never
mixed up with the echo. When the server announces its end, what is under way is
finished, and what was not sent is said; with --reconnect it is sent once the server, or its
successor, is back.

Exit codes: 0 everything came back, 1 something did not, 2 usage.`,
		Example: `  echod send hello
  echod send < file | cmp - file`,
		RunE: func(cmd *cobra.Command, words []string) error {
			s.in, s.out, s.err = cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr()
			return interruptible(cmd.Context(), func(ctx context.Context) error { return s.run(ctx, words) })
		},
	}
	cmd.Flags().StringVar(&s.address, "address", "127.0.0.1:9999", "server's `address`")
	cmd.Flags().DurationVar(&s.timeout, "timeout", 10*time.Second, "`time` for connecting, and for TEXT to come back;\n0 is for ever")
	cmd.Flags().BoolVar(&s.reconnect, "reconnect", false, "connect again, with growing pauses, when the server goes or is full")
	return cmd
}

// sender is one echod send.
type sender struct {
	address   string
	timeout   time.Duration
	reconnect bool
	in        io.Reader
	out, err  io.Writer
}

func (s *sender) run(ctx context.Context, words []string) error {
	if s.timeout < 0 {
		return usagef("--timeout %s: must not be negative", s.timeout)
	}
	var ending atomic.Bool // the server has announced the connection's end
	var c *client.Client
	opts := client.Options{OnNotice: func(n client.Notice) {
		fmt.Fprintf(s.err, "echod: %s\n", describeNotice(n))
		if n.Ends() {
			ending.Store(true)
			if !s.reconnect {
				_ = c.CloseWrite() // so that the echo comes to an end
			}
		}
	}}
	if s.reconnect {
		opts.Reconnect = new(client.Backoff)
	}
	bounded, cancel := s.bounded(ctx)
	defer cancel()
	c, err := client.Dial(bounded, s.address, opts)
	if err != nil {
		return err
	}
	defer c.Close()
	switch {
	case len(words) > 0:
		echo, err := c.Echo(bounded, []byte(strings.Join(words, " ")+"\n"))
		_, werr := s.out.Write(echo)
		return errors.Join(err, werr)
	case s.reconnect:
		return s.echoEach(ctx, c)
	default:
		return s.stream(ctx, c, &ending)
	}
}

func (s *sender) bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	if s.timeout == 0 {
		return ctx, func() {}
	}
	return context.WithTimeoutCause(ctx, s.timeout, fmt.Errorf("nothing within %s", s.timeout))
}

// sendPiece is how long a line may be, in bytes, before it is sent in pieces.
const sendPiece = 64 << 10

// pieces calls yield with each line of the input, newline included, until yield returns an error.
func (s *sender) pieces(yield func([]byte) error) error {
	lines := bufio.NewReaderSize(s.in, sendPiece)
	for {
		line, err := lines.ReadSlice('\n')
		if len(line) > 0 {
			if err := yield(line); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil && !errors.Is(err, bufio.ErrBufferFull):
			return fmt.Errorf("reading standard input: %w", err)
		}
	}
}

// echoEach sends one line after the other: the client takes each to its end, over as many connections
// as that needs.
func (s *sender) echoEach(ctx context.Context, c *client.Client) error {
	return s.pieces(func(line []byte) error {
		echo, err := c.Echo(ctx, line)
		if _, werr := s.out.Write(echo); werr != nil {
			return fmt.Errorf("writing what came back: %w", werr)
		}
		return err
	})
}

var errEnding = errors.New("the server ends the connection")

// stream sends the input while what comes back is printed.
func (s *sender) stream(ctx context.Context, c *client.Client, ending *atomic.Bool) error {
	fed := make(chan error, 1)
	// Reading a terminal cannot be interrupted: when the connection ends first, this goroutine stays
	// in its read until the process exits, right after.
	go func() {
		err := s.pieces(func(line []byte) error {
			if ending.Load() {
				return errEnding
			}
			return c.Send(ctx, line)
		})
		fed <- err // before the half-close, which makes receiving end
		if err == nil {
			_ = c.CloseWrite() // fails only when the connection is gone, which receiving tells
		}
	}()

	received := s.printEchoes(ctx, c)
	var input error
	select {
	case input = <-fed:
	default:
		input = errEnding // the connection has ended, and there is more to send
	}
	if errors.Is(received, io.EOF) && input == nil {
		return nil
	}
	if ending.Load() && input != nil {
		input = errEnding // whatever it was that went wrong on the way out
	}
	if input != nil && !isConnectionError(input) {
		return input
	}
	if _, noticed := errors.AsType[*client.NoticeError](received); noticed && errors.Is(received, io.EOF) {
		return fmt.Errorf("all that was sent has come back, but not all of the input was sent: %w", received)
	}
	return received
}

// printEchoes prints what comes back until the connection ends, and returns how.
func (s *sender) printEchoes(ctx context.Context, c *client.Client) error {
	buf := make([]byte, sendPiece)
	for {
		n, err := c.Receive(ctx, buf)
		if _, werr := s.out.Write(buf[:n]); werr != nil {
			_ = c.Close()
			return fmt.Errorf("writing what came back: %w", werr)
		}
		if err != nil {
			return err
		}
	}
}

// isConnectionError says that sending failed for a reason that receiving tells better.
func isConnectionError(err error) bool {
	_, noticed := errors.AsType[*client.NoticeError](err)
	_, ended := errors.AsType[*client.EndError](err)
	return noticed || ended || errors.Is(err, errEnding)
}

// describeNotice says a notice in words.
func describeNotice(n client.Notice) string {
	switch n.Kind {
	case client.Shutdown:
		return fmt.Sprintf("the server stops in %s: %s", n.Grace, n.Text)
	case client.Paused:
		return "the server is paused"
	case client.Busy:
		return "the server is at its limit"
	default:
		return "notice: " + n.Text
	}
}
