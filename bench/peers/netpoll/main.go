// Netpoll is an echo server on github.com/cloudwego/netpoll, with its nocopy reader and writer. As in netpoll's own
// benchmark, requests run on plain goroutines instead of its pool. It has the default number of pollers, one for 20
// CPUs.
package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/cloudwego/netpoll"
)

func echo(_ context.Context, c netpoll.Connection) error {
	r, w := c.Reader(), c.Writer()
	data, err := r.Next(r.Len())
	if err != nil {
		return err
	}
	if _, err := w.WriteBinary(data); err != nil {
		return err
	}
	if err := w.Flush(); err != nil {
		return err
	}
	return r.Release() // only now: until Flush returns, the writer refers to data
}

func init() {
	fail(netpoll.Configure(netpoll.Config{
		Runner:       func(_ context.Context, task func()) { go task() },
		LoggerOutput: io.Discard, // a line for each reset connection
	}))
}

func main() {
	ln, err := netpoll.CreateListener("tcp", os.Args[1])
	fail(err)
	loop, err := netpoll.NewEventLoop(echo)
	fail(err)
	fail(loop.Serve(ln))
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
