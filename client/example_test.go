package client_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"time"

	"echod/client"
)

// startServer stands in for echod: it handles one connection after the other.
func startServer(handle func(net.Conn)) (address string, stop func()) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			handle(conn)
			conn.Close()
		}
	}()
	return listener.Addr().String(), func() { listener.Close(); <-done }
}

func echo(conn net.Conn) { io.Copy(conn, conn) }

func ExampleClient_EchoLine() {
	address, stop := startServer(echo)
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()

	c, err := client.Dial(ctx, address, client.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	line, err := c.EchoLine(ctx, "hello, world")
	fmt.Println(line, err)
	// Output: hello, world <nil>
}

// Raw bytes: everything is sent, then the sending side closed, then everything
// received. More data than fits in the buffers on the way needs a goroutine that
// sends meanwhile, or Echo.
func ExampleClient_Receive() {
	address, stop := startServer(echo)
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()

	c, err := client.Dial(ctx, address, client.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	if err := c.Send(ctx, []byte{0, 1, 2, 0xff}); err != nil {
		log.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		log.Fatal(err)
	}

	var got bytes.Buffer
	buf := make([]byte, 4096)
	for {
		n, err := c.Receive(ctx, buf)
		got.Write(buf[:n])
		if errors.Is(err, io.EOF) {
			break // everything has come back
		}
		if err != nil {
			log.Fatal(err)
		}
	}
	fmt.Println(got.Bytes())
	// Output: [0 1 2 255]
}

// A server that shuts down says so, here in the middle of an echo.
func ExampleNoticeError() {
	address, stop := startServer(func(conn net.Conn) {
		io.ReadFull(conn, make([]byte, len("hello\n")))
		io.WriteString(conn, "hel"+"\nSHUTDOWN 5 SIGTERM\n"+"lo\n")
		io.Copy(io.Discard, conn)
	})
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()

	c, err := client.Dial(ctx, address, client.Options{
		OnNotice: func(n client.Notice) { fmt.Println("notice:", n.Kind, n.Grace, n.Text) },
	})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	line, err := c.EchoLine(ctx, "hello")
	fmt.Println(line, err)

	_, err = c.EchoLine(ctx, "more")
	if told, ok := errors.AsType[*client.NoticeError](err); ok {
		fmt.Println(told)
	}
	// Output:
	// notice: SHUTDOWN 5s SIGTERM
	// hello <nil>
	// server is shutting down (SIGTERM)
}

// With Reconnect, a message survives a server that is restarted.
func ExampleBackoff() {
	first := true
	address, stop := startServer(func(conn net.Conn) {
		if first {
			first = false
			io.ReadFull(conn, make([]byte, len("hello\n")))
			io.WriteString(conn, "hel\nSHUTDOWN 0 SIGTERM\n")
			return
		}
		echo(conn)
	})
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()

	c, err := client.Dial(ctx, address, client.Options{
		OnNotice:  func(n client.Notice) { fmt.Println(n) },
		Reconnect: &client.Backoff{Min: time.Millisecond},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	line, err := c.EchoLine(ctx, "hello")
	fmt.Println(line, err)
	// Output:
	// SHUTDOWN 0 SIGTERM
	// hello <nil>
}
