package client

import (
	"context"
	"net"
	"testing"
)

// BenchmarkLines compares ways to have many short lines echoed over loopback: one after the other over one
// connection, and as a stream over 16.
func BenchmarkLines(b *testing.B) {
	line := []byte("a line of some sixty bytes, as a row of a table may well have\n")
	b.Run("loop", func(b *testing.B) {
		c, err := Dial(b.Context(), benchServer(b), Options{})
		if err != nil {
			b.Fatal(err)
		}
		defer c.Close()
		b.SetBytes(int64(len(line)))
		for b.Loop() {
			if _, err := c.Echo(b.Context(), line); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("stream", func(b *testing.B) {
		address := benchServer(b)
		b.SetBytes(int64(len(line)))
		b.ReportAllocs()
		source := func(yield func(Item[int], error) bool) {
			for b.Loop() {
				if !yield(Item[int]{Data: line}, nil) {
					return
				}
			}
		}
		for r, err := range Stream(context.Background(), address, source, StreamOptions{Conns: 16, Ordered: true}) {
			if err != nil || r.Err != nil {
				b.Fatal(err, r.Err)
			}
		}
	})
}

// benchServer is an echo server like any other.
func benchServer(b *testing.B) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				echoes(conn)
			}()
		}
	}()
	return l.Addr().String()
}
