// Netcopy is the shortest echo server that Go knows: package net, and an io.Copy per connection. From one *net.TCPConn to another
// that is splice(2) on Linux, so that no byte passes through the process.
package main

import (
	"fmt"
	"io"
	"net"
	"os"
)

func main() {
	ln, err := net.Listen("tcp", os.Args[1])
	fail(err)
	for {
		c, err := ln.Accept()
		fail(err)
		go func() {
			defer c.Close()
			_, _ = io.Copy(c, c)
		}()
	}
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
