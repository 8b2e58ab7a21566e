// Nettls is a textbook echo server over TLS: package crypto/tls, with a goroutine per connection. Its arguments are the
// address, the files of the certificate and of its key, and buffer or copy: a buffer of 4 KiB per connection, or io.Copy.
package main

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os"
)

func echo(c net.Conn) {
	defer c.Close()
	buf := make([]byte, 4096)
	for {
		n, err := c.Read(buf)
		if err != nil {
			return
		}
		if _, err := c.Write(buf[:n]); err != nil {
			return
		}
	}
}

func echoCopy(c net.Conn) {
	defer c.Close()
	_, _ = io.Copy(c, c)
}

func main() {
	cert, err := tls.LoadX509KeyPair(os.Args[2], os.Args[3])
	fail(err)
	ln, err := tls.Listen("tcp", os.Args[1], &tls.Config{Certificates: []tls.Certificate{cert}})
	fail(err)
	serve := echo
	if os.Args[4] == "copy" {
		serve = echoCopy
	}
	for {
		c, err := ln.Accept()
		fail(err)
		go serve(c)
	}
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
