// Netcopy is the shortest echo server in Go: package net, with an io.Copy per connection. On Linux, io.Copy between two
// *net.TCPConn uses splice(2), so no byte passes through the process.
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
