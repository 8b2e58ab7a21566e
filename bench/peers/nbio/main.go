// Nbio is an echo server on github.com/lesismal/nbio with its defaults, level-triggered with a read buffer of 64 KiB,
// but with a poller per CPU instead of a quarter as many.
package main

import (
	"fmt"
	"os"
	"runtime"

	"github.com/lesismal/nbio"
	"github.com/lesismal/nbio/logging"
)

func main() {
	logging.SetLevel(logging.LevelError)
	engine := nbio.NewEngine(nbio.Config{
		Network: "tcp",
		Addrs:   []string{os.Args[1]},
		NPoller: runtime.GOMAXPROCS(0),
	})
	engine.OnData(func(c *nbio.Conn, data []byte) {
		_, _ = c.Write(data) // copies what it cannot send at once, and closes c when that fails
	})
	if err := engine.Start(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	select {}
}
