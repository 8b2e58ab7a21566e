package server

import (
	"iter"
	"time"
)

// What concerns all connections gives way after each turn for as long as the rest. Left alone the scheduler takes the CPU
// away after 10 ms, and looks no sooner who has become ready: where there is one CPU, that is what clients would wait.
// After runtime.Gosched, or a rest that is shorter than what the scheduler does first, it would be the same one's turn again.
const (
	promptTurn = 2 * time.Millisecond   // where clients wait for it
	quietTurn  = 200 * time.Microsecond // where nobody is in a hurry: half of what 64 busy clients wait for their echo
	rest       = 1 * time.Millisecond
)

// inTurns ranges over conns, and gives way to others after each turn.
func inTurns(conns []*Conn, turn time.Duration) iter.Seq[*Conn] {
	const between = 16 // looks at the clock
	return func(yield func(*Conn) bool) {
		began := time.Now()
		for i, c := range conns {
			if i%between == between-1 && time.Since(began) >= turn {
				time.Sleep(rest)
				began = time.Now()
			}
			if !yield(c) {
				return
			}
		}
	}
}
