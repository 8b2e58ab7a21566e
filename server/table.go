package server

import (
	"cmp"
	"slices"
)

// table holds the open connections, oldest first. Ids are given out in order, so adding appends and
// nothing is ever sorted: a listing costs a copy, which is what the lock is held for. A map would take
// four times the memory, and a listing the sorting of it.
type table struct {
	rows []row // ordered by id; rows without a connection are left behind by those that closed
	open int
}

type row struct {
	id uint64
	c  *Conn
}

// add puts in c, whose id is the highest so far.
func (t *table) add(c *Conn) {
	t.rows = append(t.rows, row{c.id, c})
	t.open++
}

// get returns the open connection of that id, or nil.
func (t *table) get(id uint64) *Conn {
	if i, ok := t.find(id); ok {
		return t.rows[i].c
	}
	return nil
}

// remove takes out a connection. It reports whether that was in. Once most rows are empty they are
// done away with, so that a removal costs the same in the long run, however many there are.
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
	all := make([]*Conn, 0, t.open)
	for _, r := range t.rows {
		if r.c != nil {
			all = append(all, r.c)
		}
	}
	return all
}
