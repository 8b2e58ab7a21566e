package server

import (
	"io"
	"net"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"
)

func TestInTurnsRangesOverAllInOrder(t *testing.T) {
	conns := make([]*Conn, 100)
	for i := range conns {
		conns[i] = new(Conn)
	}
	if got := slices.Collect(inTurns(conns)); !slices.Equal(got, conns) {
		t.Error("those ranged over are not those given")
	}
	for c := range inTurns(conns) {
		if c != conns[0] {
			t.Error("it went on after a break")
		}
		break
	}
}

// Where there is one CPU, who has become ready to read does not wait for the end of what concerns all connections.
func TestInTurnsLetsOthersGoFirst(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	ln, err := Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	client := dialTCP(t, ln.Addr())
	served, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer served.Close()
	var wasServed atomic.Bool
	reading := make(chan struct{})
	done := make(chan struct{})
	go func(nc net.Conn) {
		defer close(done)
		close(reading)
		_, _ = io.ReadFull(nc, make([]byte, 1))
		wasServed.Store(true)
	}(served)
	<-reading

	const work = 4 * turn // and less than after what the scheduler steps in
	inBetween := false
	send(t, client, "x")
	began := time.Now()
	for range inTurns(make([]*Conn, 1000)) {
		for each := time.Now(); time.Since(each) < work/1000; {
		}
		inBetween = inBetween || wasServed.Load()
	}
	<-done
	if !inBetween {
		t.Errorf("a reader was not served in the %v that it took", time.Since(began))
	}
}
