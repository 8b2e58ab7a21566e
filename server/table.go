package server

import (
	"cmp"
	"iter"
	"slices"
	"time"
)

// table holds the open connections, oldest first. Ids grow, so adding a connection appends it, and the table stays
// sorted. A listing holds the lock only while it copies the table. A map would take four times the memory, and each
// listing would have to sort.
type table struct {
	rows []row // ordered by id; a closed connection leaves an empty row behind
	open int
}

type row struct {
	id uint64
	c  *Conn // nil when closed
}

// add appends c, whose id must be the highest so far.
func (t *table) add(c *Conn) {
	t.rows = append(t.rows, row{c.id, c})
	t.open++
}

// get returns the open connection with that id, or nil.
func (t *table) get(id uint64) *Conn {
	if i, ok := t.find(id); ok {
		return t.rows[i].c
	}
	return nil
}

// remove removes a connection, and reports whether it was in the table. It compacts the table when most rows are
// empty, so a removal takes amortised constant time.
func (t *table) remove(id uint64) bool {
	i, ok := t.find(id)
	if !ok || t.rows[i].c == nil {
		return false
	}
	t.rows[i].c = nil
	t.open--
	if 2*t.open < len(t.rows) {
		t.rows = slices.DeleteFunc(t.rows, func(r row) bool { return r.c == nil })
		if cap(t.rows) > 4*len(t.rows)+64 {
			t.rows = slices.Clip(slices.Clone(t.rows))
		}
	}
	return true
}

func (t *table) find(id uint64) (int, bool) {
	return slices.BinarySearchFunc(t.rows, id, func(r row, id uint64) int { return cmp.Compare(r.id, id) })
}

func (t *table) len() int { return t.open }

// all returns the open connections, oldest first.
func (t *table) all() []*Conn {
	return t.appendAll(make([]*Conn, 0, t.open))
}

// appendAll appends the open connections to all, oldest first.
func (t *table) appendAll(all []*Conn) []*Conn {
	for _, r := range t.rows {
		if r.c != nil {
			all = append(all, r.c)
		}
	}
	return all
}

// ring keeps the last size values.
type ring[T any] struct {
	size   int
	values []T
	next   int
	added  int // how many values were added in all
}

func (r *ring[T]) add(v T) {
	r.added++
	if len(r.values) < r.size {
		r.values = append(r.values, v)
		return
	}
	r.values[r.next] = v
	r.next = (r.next + 1) % r.size
}

// newestFirst returns a copy, the last added value first.
func (r *ring[T]) newestFirst() []T {
	out := slices.Concat(r.values[r.next:], r.values[:r.next])
	slices.Reverse(out)
	return out
}

// Work on all connections is done in bursts with pauses, so that clients need not wait until it is done. Go's scheduler
// preempts a goroutine only after 10 ms. runtime.Gosched or a shorter pause does not help, because the same goroutine
// runs again.
const (
	promptBurst     = 2 * time.Millisecond   // where clients wait for the work
	backgroundBurst = 200 * time.Microsecond // where none does: half of what 64 busy clients wait for an echo
	burstPause      = 1 * time.Millisecond
)

// paced ranges over all, and sleeps for a rest after each turn.
func paced[T any](all []T, turn time.Duration) iter.Seq[T] {
	const between = 16 // looks at the clock
	return func(yield func(T) bool) {
		began := time.Now()
		for i, v := range all {
			if i%between == between-1 && time.Since(began) >= turn {
				time.Sleep(burstPause)
				began = time.Now()
			}
			if !yield(v) {
				return
			}
		}
	}
}
