package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"echod/client"
)

func newPingCommand() *cobra.Command {
	var p pinger
	cmd := &cobra.Command{
		Use:   "ping",
		Short: "Connect, send a message and wait for its echo: is the server well?",
		Long: `Connect, send a message and wait for its echo, and say how long it took.

Each ping is a connection of its own, as a new client's would be. A server that is
paused, full or shutting down says so, and the ping has failed. Ctrl-C ends the pings,
with their summary.

Exit codes: 0 every echo came back, 1 one did not, 2 usage, 128 and the signal's number
if that came before the first ping was done.`,
		Example: `  echod ping --quiet                         in a health check, for its exit code
  echod ping --count 0 --interval 200ms      until Ctrl-C`,
		Args: takes(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			p.out = cmd.OutOrStdout()
			if err := p.check(); err != nil {
				return err
			}
			return toItsEnd(cmd.Context(), p.run)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&p.address, "address", "127.0.0.1:9999", "server's `address`")
	f.IntVar(&p.count, "count", 1, "`number` of pings; 0 is until Ctrl-C")
	f.DurationVar(&p.interval, "interval", time.Second, "`time` from one to the next")
	f.DurationVar(&p.timeout, "timeout", 5*time.Second, "`time` for a ping to be back")
	f.IntVar(&p.size, "size", 64, "`bytes` of the message, its newline included")
	f.BoolVar(&p.quiet, "quiet", false, "print nothing but why a ping has failed, on stderr")
	return cmd
}

// toItsEnd calls f with a context that ends with SIGINT or SIGTERM, after which f still has something to say: its error
// is the outcome, and not that it was interrupted.
func toItsEnd(ctx context.Context, f func(context.Context) error) error {
	var outcome error
	_ = interruptible(ctx, func(ctx context.Context) error {
		outcome = f(ctx)
		return nil
	})
	return outcome
}

// pinger is one echod ping.
type pinger struct {
	address           string
	count, size       int
	interval, timeout time.Duration
	quiet             bool
	out               io.Writer

	sent     int
	connects []time.Duration
	echoes   []time.Duration
}

func (p *pinger) check() error {
	switch {
	case p.count < 0:
		return usagef("--count %d: must not be negative", p.count)
	case p.size < 1:
		return usagef("--size %d: at least 1", p.size)
	case p.interval < 0:
		return usagef("--interval %s: must not be negative", p.interval)
	case p.timeout <= 0:
		return usagef("--timeout %s: must be more than nothing", p.timeout)
	}
	return nil
}

func (p *pinger) run(ctx context.Context) error {
	if p.quiet {
		p.out = io.Discard
	}
	began := time.Now()
	var failed error
	ticker := time.NewTicker(max(p.interval, time.Nanosecond))
	defer ticker.Stop()
	for ctx.Err() == nil {
		seq := p.sent + 1
		connect, echo, err := p.ping(ctx)
		if err != nil && ctx.Err() != nil {
			break // this one does not count
		}
		p.sent++
		if err != nil {
			failed = err
			if p.count == 1 {
				break // it is said once, on stderr
			}
			fmt.Fprintf(p.out, "from %s: seq=%d: %v\n", p.address, seq, err)
		} else {
			p.connects, p.echoes = append(p.connects, connect), append(p.echoes, echo)
			fmt.Fprintf(p.out, "%d bytes from %s: seq=%d connect=%s echo=%s\n", p.size, p.address, seq, latency(connect.Seconds()), latency(echo.Seconds()))
		}
		if p.sent == p.count {
			break
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
		}
	}
	if p.sent == 0 {
		return context.Cause(ctx)
	}
	if p.count != 1 {
		p.summary(time.Since(began))
	}
	switch {
	case failed == nil:
		return nil
	case p.quiet || p.count == 1:
		return fmt.Errorf("ping %s: %w", p.address, failed)
	default:
		return &exitError{code: exitFailed} // all has been said
	}
}

// ping makes one connection and one echo.
func (p *pinger) ping(ctx context.Context) (connect, echo time.Duration, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, p.timeout, fmt.Errorf("nothing within %s", p.timeout))
	defer cancel()
	began := time.Now()
	c, err := client.Dial(ctx, p.address, client.Options{})
	if err != nil {
		return 0, 0, cause(err)
	}
	defer c.Close()
	connect = time.Since(began)
	began = time.Now()
	_, err = c.Echo(ctx, []byte(strings.Repeat("p", p.size-1)+"\n"))
	return connect, time.Since(began), cause(err)
}

// cause takes the address off an error, which has been said, and says in words what was no echo.
func cause(err error) error {
	if wrong, ok := errors.AsType[*client.CorruptionError](err); ok {
		return fmt.Errorf("got %q, which is no echo", wrong.Got)
	}
	if inner := errors.Unwrap(err); inner != nil {
		return inner
	}
	return err
}

// summary says how it went, in the manner of ping(8).
func (p *pinger) summary(took time.Duration) {
	lost := 100 * float64(p.sent-len(p.echoes)) / float64(p.sent)
	if len(p.echoes) > 0 {
		lost = min(lost, 99.9) // not rounded to all
	}
	fmt.Fprintf(p.out, "\n--- %s echod ping statistics ---\n%d sent, %d returned, %.3g%% lost, time %s\n", p.address, p.sent, len(p.echoes), lost, span(took))
	if len(p.echoes) > 0 {
		fmt.Fprintf(p.out, "connect min/avg/max/mdev = %s\n   echo min/avg/max/mdev = %s\n", spread(p.connects), spread(p.echoes))
	}
}

// spread is the least, mean and greatest of some times, and their standard deviation, which ping(8) calls mdev.
func spread(times []time.Duration) string {
	least, most, sum, squares := math.Inf(1), 0.0, 0.0, 0.0
	for _, t := range times {
		ms := float64(t) / float64(time.Millisecond)
		least, most, sum, squares = min(least, ms), max(most, ms), sum+ms, squares+ms*ms
	}
	n := float64(len(times))
	mean := sum / n
	return fmt.Sprintf("%.3f/%.3f/%.3f/%.3f ms", least, mean, most, math.Sqrt(max(0, squares/n-mean*mean)))
}
