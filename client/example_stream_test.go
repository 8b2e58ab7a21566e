package client_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"log"
	"net"
	"strings"
	"time"

	"echod/client"
)

// lines is a source of the lines of a text. Their numbers are the keys.
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

// Everything comes back in order, over as many connections as are asked for (one here, since this server serves one at a time).
func ExampleStream() {
	address, stop := startServer(echo)
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()

	for r, err := range client.Stream(ctx, address, lines("one\ntwo\nthree\n"), client.StreamOptions{Conns: 1, Ordered: true}) {
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

// Who has seen enough breaks off: the source is no longer asked, connections are closed, and nothing stays behind.
func ExampleStream_break() {
	address, stop := startServer(echo)
	defer stop()
	endless := func(yield func(client.Item[int], error) bool) {
		for i := 0; yield(client.Item[int]{Key: i, Data: []byte("again\n")}, nil); i++ {
		}
	}
	n := 0
	for _, err := range client.Stream(context.Background(), address, endless, client.StreamOptions{Conns: 1, InFlight: 10}) {
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

// An item whose echo differs has an error of its own; the others go on over a new connection.
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
	opts := client.StreamOptions{Conns: 1, Ordered: true, Reconnect: &client.Backoff{Min: time.Millisecond}}
	for r, err := range client.Stream(context.Background(), address, lines("one\ntwo\nthree\n"), opts) {
		if err != nil {
			log.Fatal(err)
		}
		if _, corrupt := errors.AsType[*client.CorruptionError](r.Err); corrupt {
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

// A server that restarts costs nothing: what had not come back is sent again.
func ExampleStream_reconnect() {
	first := true
	address, stop := startServer(func(conn net.Conn) {
		if first { // and gone in the middle of an echo
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

// Items may come from another goroutine.
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
	for r, err := range client.Stream(ctx, address, client.FromChannel(ctx, items), client.StreamOptions{Conns: 1}) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s: %s", r.Key, r.Data)
	}
	// Output:
	// ada: hello ada
	// grace: hello grace
}
