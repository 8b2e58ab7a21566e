package client_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"iter"
	"log"
	"net"
	"os"
	"strings"
	"time"

	"echod/client"
)

// startServer starts a small echo server. It serves one connection at a time.
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

// A server whose certificate was issued by a private certificate authority.
func ExampleDial_tls() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()

	pem, err := os.ReadFile("ca.pem")
	if err != nil {
		log.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	c, err := client.Dial(ctx, "tls://echo.example.org:9999", client.Options{
		TLSConfig: &tls.Config{RootCAs: roots},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	line, err := c.EchoLine(ctx, "hello")
	fmt.Println(line, err)
}

// Raw bytes: send, half-close, and receive until the end of the stream. If the data
// does not fit into the buffers on the way, send in another goroutine or use Echo.
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
			break // the whole echo was received
		}
		if err != nil {
			log.Fatal(err)
		}
	}
	fmt.Println(got.Bytes())
	// Output: [0 1 2 255]
}

// A server announces its shutdown, here in the middle of an echo.
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
	if notice, ok := errors.AsType[*client.NoticeError](err); ok {
		fmt.Println(notice)
	}
	// Output:
	// notice: SHUTDOWN 5s SIGTERM
	// hello <nil>
	// server is shutting down (SIGTERM)
}

// With Reconnect, Echo survives the restart of a server.
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

// lines is a source of the lines of a text. Their keys are the line numbers.
func lines(text string) iter.Seq2[client.Item[int], error] {
	return func(yield func(client.Item[int], error) bool) {
		number := 0
		for line := range strings.Lines(text) {
			number++
			if !yield(client.Item[int]{Key: number, Data: []byte(line)}, nil) {
				return
			}
		}
	}
}

// Results come in the order of the items. The example server serves one connection
// at a time, so the examples use one.
func ExampleStream() {
	address, stop := startServer(echo)
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()

	opts := client.StreamOptions{Conns: 1, Ordered: true}
	for r, err := range client.Stream(ctx, address, lines("one\ntwo\nthree\n"), opts) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%d %q %v\n", r.Key, r.Data, r.Err)
	}
	// Output:
	// 1 "one\n" <nil>
	// 2 "two\n" <nil>
	// 3 "three\n" <nil>
}

// When the consumer breaks out of the loop, Stream stops the source, closes its
// connections, and leaves no goroutine behind.
func ExampleStream_break() {
	address, stop := startServer(echo)
	defer stop()
	endless := func(yield func(client.Item[int], error) bool) {
		for i := 0; yield(client.Item[int]{Key: i, Data: []byte("again\n")}, nil); i++ {
		}
	}
	n := 0
	opts := client.StreamOptions{Conns: 1, InFlight: 10}
	for _, err := range client.Stream(context.Background(), address, endless, opts) {
		if err != nil {
			log.Fatal(err)
		}
		if n++; n == 1000 {
			break
		}
	}
	fmt.Println(n)
	// Output: 1000
}

// If the echo of an item differs, only that item fails. The others continue on a new
// connection.
func ExampleStream_errors() {
	first := true
	address, stop := startServer(func(conn net.Conn) {
		if first {
			first = false
			io.ReadFull(conn, make([]byte, len("one\ntwo\nthree\n")))
			io.WriteString(conn, "one\ntoo\n")
			io.Copy(io.Discard, conn)
			return
		}
		echo(conn)
	})
	defer stop()
	opts := client.StreamOptions{
		Conns: 1, Ordered: true,
		Reconnect: &client.Backoff{Min: time.Millisecond},
	}
	for r, err := range client.Stream(context.Background(), address, lines("one\ntwo\nthree\n"), opts) {
		if err != nil {
			log.Fatal(err)
		}
		if _, ok := errors.AsType[*client.CorruptionError](r.Err); ok {
			fmt.Println(r.Key, "came back changed")
			continue
		}
		fmt.Println(r.Key, r.Err)
	}
	// Output:
	// 1 <nil>
	// 2 came back changed
	// 3 <nil>
}

// After the restart of a server, Stream sends again what had not come back.
func ExampleStream_reconnect() {
	first := true
	address, stop := startServer(func(conn net.Conn) {
		if first { // close in the middle of an echo
			first = false
			io.ReadFull(conn, make([]byte, len("one\n")))
			io.WriteString(conn, "on")
			return
		}
		echo(conn)
	})
	defer stop()
	opts := client.StreamOptions{
		Conns: 1, Ordered: true,
		Reconnect: &client.Backoff{Min: time.Millisecond, MaxElapsed: time.Minute},
	}
	for r, err := range client.Stream(context.Background(), address, lines("one\ntwo\n"), opts) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%q %v\n", r.Data, r.Err)
	}
	// Output:
	// "one\n" <nil>
	// "two\n" <nil>
}

// Items can come from another goroutine.
func ExampleFromChannel() {
	address, stop := startServer(echo)
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()

	items := make(chan client.Item[string])
	go func() {
		defer close(items)
		for _, name := range []string{"ada", "grace"} {
			select {
			case items <- client.Item[string]{Key: name, Data: []byte("hello " + name + "\n")}:
			case <-ctx.Done():
				return
			}
		}
	}()
	opts := client.StreamOptions{Conns: 1}
	for r, err := range client.Stream(ctx, address, client.FromChannel(ctx, items), opts) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s: %s", r.Key, r.Data)
	}
	// Output:
	// ada: hello ada
	// grace: hello grace
}
