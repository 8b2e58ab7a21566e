package main

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"echod/server"
)

// run runs a test in a bubble with a server and a client. drain begins a drain, and returns the server's report when it
// has ended.
func run(t *testing.T, name string, test func(t *testing.T, c client, drain func() server.Report)) {
	t.Run(name, func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			// Everything that has to do with the server is made inside the bubble, and ends there.
			srv, err := server.New(server.HandlerFunc(timer), server.Options{})
			if err != nil {
				t.Fatal(err)
			}
			ln := newPipeListener()
			ctx, cancel := context.WithCancel(t.Context())
			served := make(chan error, 1)
			go func() { served <- serve(ctx, srv, ln) }()
			nc, err := ln.Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}

			drain := func() server.Report {
				cancel()
				<-srv.Done()
				report, _ := srv.Report()
				return report
			}
			test(t, client{t, nc, bufio.NewReader(nc)}, drain)
			drain()
			if err := <-served; err != nil {
				t.Errorf("serve: %v", err)
			}
			if err := nc.Close(); err != nil {
				t.Error(err)
			}
		})
	})
}

func TestTimer(t *testing.T) {
	run(t, "an egg is ready on time", func(t *testing.T, c client, _ func() server.Report) {
		began := time.Now()
		c.send("3h30m\n")
		c.expect("ready\n")
		if got := time.Since(began); got != 3*time.Hour+30*time.Minute {
			t.Errorf("took %v", got)
		}
		c.send("soon\n")
		c.expect("time: invalid duration \"soon\"\n")
	})
	run(t, "a silent client is let go after a minute", func(t *testing.T, c client, _ func() server.Report) {
		began := time.Now()
		c.expect("no duration in a minute: bye\n")
		c.expectEOF()
		if got := time.Since(began); got < patience || got > patience+time.Second {
			t.Errorf("took %v, want %v", got, patience)
		}
	})
	run(t, "a drain ends while an egg boils", func(t *testing.T, c client, drain func() server.Report) {
		c.send("3h\n")
		synctest.Wait() // until the timer runs
		go drain()
		c.expect("not ready, but the server stops\n")
		c.expectEOF()
	})
	run(t, "a drain lets an idle client go at once", func(t *testing.T, c client, drain func() server.Report) {
		synctest.Wait() // until the handler reads
		if report := drain(); report.Left != 1 || report.Took >= time.Second {
			t.Errorf("%+v, want that the client left at once", report)
		}
		c.expectEOF()
	})
	run(t, "a drain ends though a client does not read", func(t *testing.T, c client, drain func() server.Report) {
		c.send("1s\n")
		time.Sleep(2 * time.Second) // in the bubble: the handler is writing now
		report := drain()
		if report.AtDeadline != 1 {
			t.Errorf("%+v, want that the client was closed at the deadline", report)
		}
		if took := report.Took; took < server.DefaultGrace || took > server.DefaultGrace+2*time.Second {
			t.Errorf("took %v, want the grace period and at most 2 s", took)
		}
	})
}

type client struct {
	t *testing.T
	net.Conn
	r *bufio.Reader
}

func (c client) send(text string) {
	c.t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		c.t.Fatal(err)
	}
}

func (c client) expect(want string) {
	c.t.Helper()
	if got, err := c.r.ReadString('\n'); got != want {
		c.t.Fatalf("got %q (%v), want %q", got, err, want)
	}
}

func (c client) expectEOF() {
	c.t.Helper()
	if b, err := c.r.ReadByte(); !errors.Is(err, io.EOF) {
		c.t.Errorf("got %q, %v, want an end of stream", b, err)
	}
}
