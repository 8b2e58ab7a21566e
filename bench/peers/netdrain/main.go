// Netdrain is an echo server on package net with a drain written by hand, as many programs have: on SIGTERM it closes the
// listener, waits up to five seconds for its connections, and exits.
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
)

func main() {
	ln, err := net.Listen("tcp", os.Args[1])
	fail(err)
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	go func() {
		<-stop
		ln.Close()
	}()
	var open sync.WaitGroup
	for {
		c, err := ln.Accept()
		if err != nil {
			break
		}
		open.Go(func() {
			defer c.Close()
			io.Copy(c, c)
		})
	}
	ended := make(chan struct{})
	go func() {
		open.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(5 * time.Second):
	}
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
