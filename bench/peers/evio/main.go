// Evio is an echo server on github.com/tidwall/evio with an event loop per CPU. Connections go to the loops in turn;
// by default one loop may get all of them. They share their loop's input buffer, which saves a copy.
package main

import (
	"fmt"
	"os"
	"runtime"

	"github.com/tidwall/evio"
)

func main() {
	err := evio.Serve(evio.Events{
		NumLoops:    runtime.GOMAXPROCS(0),
		LoadBalance: evio.RoundRobin,
		Opened: func(evio.Conn) (out []byte, opts evio.Options, action evio.Action) {
			opts.ReuseInputBuffer = true
			return
		},
		Data: func(_ evio.Conn, in []byte) (out []byte, action evio.Action) {
			return in, evio.None
		},
	}, "tcp://"+os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
