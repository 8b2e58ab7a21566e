// Tcpserver is an echo server on github.com/maurice2k/tcpserver, like its example: io.Copy between two *net.TCPConn,
// which uses splice. Everything else is the default: four accept loops, SO_REUSEPORT.
package main

import (
	"fmt"
	"io"
	"net"
	"os"

	"github.com/maurice2k/tcpserver"
)

func echo(c tcpserver.Connection) {
	conn := c.(*tcpserver.TCPConn).Conn.(*net.TCPConn) // io.Copy splices only between these
	_, _ = io.Copy(conn, conn)
}

func main() {
	srv, err := tcpserver.NewServer(os.Args[1])
	fail(err)
	srv.SetRequestHandler(echo)
	fail(srv.Listen())
	fail(srv.Serve())
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
