package server

import (
	"io"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestInTurnsRangesOverAllInOrder(t *testing.T) {
	conns := make([]*Conn, 100)
	for i := range conns {
		conns[i] = new(Conn)
	}
	if got := slices.Collect(inTurns(conns, promptTurn)); !slices.Equal(got, conns) {
		t.Error("those ranged over are not those given")
	}
	for c := range inTurns(conns, promptTurn) {
		if c != conns[0] {
			t.Error("it went on after a break")
		}
		break
	}
}

// Where there is one CPU, clients who have become ready to read do not wait for the end of what concerns all connections, and
// a rest is there for all of them, not for one.
func TestInTurnsLetsAllOthersGoFirst(t *testing.T) {
	const readers = 64
	ln := listen(t)
	var reading sync.WaitGroup
	defer reading.Wait()
	var served atomic.Int64
	var clients []io.Writer
	for range readers {
		client := dialTCP(t, ln.Addr())
		nc, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		clients = append(clients, client)
		reading.Go(func() {
			defer nc.Close()
			for buf := make([]byte, 1); ; {
				if _, err := io.ReadFull(nc, buf); err != nil {
					return
				}
				served.Add(1)
			}
		})
	}
	defer func() {
		for _, c := range clients {
			_ = c.(io.Closer).Close()
		}
	}()
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))

	const turn = time.Millisecond
	const work = 4 * turn // the scheduler would step in after 10 ms
	for _, c := range clients {
		send(t, c, "x")
	}
	began := time.Now()
	var during int64
	for range inTurns(make([]*Conn, 1000), turn) {
		for each := time.Now(); time.Since(each) < work/1000; {
		}
		during = served.Load()
	}
	if during != readers {
		t.Errorf("%d of %d readers were served in the %v that it took", during, readers, time.Since(began))
	}
}
