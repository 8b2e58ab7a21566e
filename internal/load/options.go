package load

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"time"

	"echod/client"
)

// The zero values of [Options].
const (
	DefaultSize      = 64
	DefaultDuration  = 10 * time.Second
	DefaultTimeout   = 5 * time.Second
	DefaultLate      = time.Second
	DefaultDrainWait = 5 * time.Second
	DefaultPipeline  = 1    // in the closed model
	DefaultBound     = 1000 // in the open one
)

// MaxRate is the greatest [Options].Rate: more than any machine can do.
const MaxRate = 10_000_000

// Options says what load to put on a server.
type Options struct {
	Address string // the server's host and port

	// Dial makes a connection to Address; nil means TCP, which on Linux costs the
	// least. Half-closing needs a connection with the method CloseWrite() error.
	Dial func(ctx context.Context, address string) (net.Conn, error)

	Conns int // connections at a time; zero means one
	Size  int // of a message, in bytes; zero means 64, the least is [MinSize]

	// Rate is how many messages are sent in a second, by all connections together,
	// each when it is due, whether the server keeps up or not: the open model. Zero
	// means the closed model, where each connection sends when it has its echo.
	Rate float64

	// Pipeline is how many messages may be under way on a connection. In the open
	// model, what is due beyond it waits, and the waiting counts. Zero means one,
	// and 1,000 in the open model. Messages that are late hold up no others, as long
	// as all together are less than twice as many, or 4 MiB.
	Pipeline int

	Duration time.Duration // zero means 10 s
	Ramp     time.Duration // over which connections are opened, evenly; zero: all at once
	Churn    time.Duration // after which, give or take a half, a connection is made anew; zero: never

	NoReconnect bool           // connections that end, or cannot be made, are not made again
	Backoff     client.Backoff // before they are; Retries is not heeded; zero Max means 2 s

	Timeout   time.Duration // for a connect; zero means 5 s
	Late      time.Duration // after which an echo is late; zero means 1 s
	DrainWait time.Duration // at the end, for what is under way, connects too; zero means 5 s

	// Loops is how many goroutines carry the load, on a thread each on Linux. Zero
	// means one for each four processors, at least one.
	Loops int

	// Hurry, when closed, ends the wait at the end. Nil: only DrainWait does.
	Hurry <-chan struct{}

	// OnProgress, if not nil, is called by Run's goroutine about every 200 ms.
	OnProgress func(Progress)
}

// withDefaults returns o with its zero values replaced.
func (o Options) withDefaults() Options {
	bound := DefaultPipeline
	if o.Rate > 0 {
		bound = DefaultBound
	}
	o.Conns = cmp.Or(o.Conns, 1)
	o.Size = cmp.Or(o.Size, DefaultSize)
	o.Pipeline = cmp.Or(o.Pipeline, bound)
	o.Duration = cmp.Or(o.Duration, DefaultDuration)
	o.Timeout = cmp.Or(o.Timeout, DefaultTimeout)
	o.Late = cmp.Or(o.Late, DefaultLate)
	o.DrainWait = cmp.Or(o.DrainWait, DefaultDrainWait)
	o.Backoff.Min = cmp.Or(o.Backoff.Min, 100*time.Millisecond)
	o.Backoff.Max = max(o.Backoff.Min, cmp.Or(o.Backoff.Max, 2*time.Second))
	o.Loops = min(o.Conns, cmp.Or(o.Loops, max(1, runtime.GOMAXPROCS(0)/4)))
	return o
}

// Validate says what makes no sense.
func (o Options) Validate() error {
	if o.Address == "" {
		return errors.New("no address")
	}
	if o.Dial == nil {
		if _, port, err := net.SplitHostPort(o.Address); err != nil {
			return err
		} else if port == "" {
			return fmt.Errorf("address %s: no port", o.Address)
		}
	}
	if size := cmp.Or(o.Size, DefaultSize); size < MinSize {
		return fmt.Errorf("a message of %d bytes has no room for its number and checksum: at least %d", size, MinSize)
	}
	if !(o.Rate >= 0 && o.Rate <= MaxRate) { // which no number that is none passes
		return fmt.Errorf("a rate of %g: from 0 to %d", o.Rate, MaxRate)
	}
	for _, n := range []struct {
		name  string
		value int
	}{{"connections", o.Conns}, {"messages under way", o.Pipeline}, {"loops", o.Loops}} {
		if n.value < 0 {
			return fmt.Errorf("%d %s: must not be negative", n.value, n.name)
		}
	}
	for _, d := range []struct {
		name  string
		value time.Duration
	}{
		{"duration", o.Duration},
		{"ramp", o.Ramp},
		{"churn", o.Churn},
		{"timeout", o.Timeout},
		{"time after which an echo is late", o.Late},
		{"wait at the end", o.DrainWait},
		{"backoff", o.Backoff.Min},
		{"backoff", o.Backoff.Max},
	} {
		if d.value < 0 {
			return fmt.Errorf("%s %s: must not be negative", d.name, d.value)
		}
	}
	return nil
}
