package server

import (
	"iter"
	"time"
)

// turn is how long something may go on that concerns all connections, before whoever else is ready
// has his turn. Left alone the scheduler takes the CPU away after 10 ms, and looks no sooner who has become ready:
// where there is one CPU, that is what clients would wait.
const turn = time.Millisecond

// inTurns ranges over conns, and has others go first about every turn.
func inTurns(conns []*Conn) iter.Seq[*Conn] {
	const between = 16 // looks at the clock
	return func(yield func(*Conn) bool) {
		began := time.Now()
		for i, c := range conns {
			if i%between == between-1 && time.Since(began) >= turn {
				time.Sleep(time.Microsecond) // after runtime.Gosched it would be its turn again before the poller's
				began = time.Now()
			}
			if !yield(c) {
				return
			}
		}
	}
}
