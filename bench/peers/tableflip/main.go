// Tableflip is an echo server on github.com/cloudflare/tableflip, which replaces its program on SIGHUP. The old process stops
// accepting when the new one is ready, and waits up to five seconds for its connections, as tableflip's README suggests.
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/cloudflare/tableflip"
)

func main() {
	upg, err := tableflip.New(tableflip.Options{})
	fail(err)
	defer upg.Stop()
	go func() {
		hup := make(chan os.Signal, 1)
		signal.Notify(hup, syscall.SIGHUP)
		for range hup {
			if err := upg.Upgrade(); err != nil {
				fmt.Fprintln(os.Stderr, "upgrade:", err)
			}
		}
	}()
	ln, err := upg.Listen("tcp", os.Args[1])
	fail(err)
	var open sync.WaitGroup
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			open.Go(func() {
				defer c.Close()
				io.Copy(c, c.(*net.TCPConn))
			})
		}
	}()
	fail(upg.Ready())
	<-upg.Exit()
	ln.Close()
	time.AfterFunc(5*time.Second, func() { os.Exit(0) })
	open.Wait()
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
