// Gnet is an echo server on github.com/panjf2000/gnet with an event loop per CPU, each locked to a thread as in
// gnet's own benchmark. Build it with -tags poll_opt, like that benchmark. Buffers have gnet's default size, 64 KiB.
package main

import (
	"fmt"
	"os"
	"runtime"

	"github.com/panjf2000/gnet/v2"
	"github.com/panjf2000/gnet/v2/pkg/logging"
)

type echo struct{ gnet.BuiltinEventEngine }

func (*echo) OnTraffic(c gnet.Conn) gnet.Action {
	data, err := c.Next(-1)
	if err != nil {
		return gnet.Close
	}
	if _, err := c.Write(data); err != nil {
		return gnet.Close
	}
	return gnet.None
}

// quiet drops what gnet logs at its start.
type quiet struct{ logging.Logger }

func (quiet) Infof(string, ...any) {}

func main() {
	err := gnet.Run(&echo{}, "tcp://"+os.Args[1],
		gnet.WithNumEventLoop(runtime.GOMAXPROCS(0)),
		gnet.WithLockOSThread(true),
		gnet.WithReuseAddr(true), // as package net does, to be started again at once
		gnet.WithLogger(quiet{logging.GetDefaultLogger()}))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
