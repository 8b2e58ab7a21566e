package server

import (
	"maps"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// A table is a map that is listed in the order of ids. It keeps no room for closed connections.
func TestTable(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var tab table
		model := map[uint64]*Conn{}
		last := uint64(0)
		for range rapid.IntRange(0, 300).Draw(t, "steps") {
			if rapid.Bool().Draw(t, "add") {
				last++
				c := &Conn{id: last}
				tab.add(c)
				model[last] = c
			} else {
				id := rapid.Uint64Range(0, last+1).Draw(t, "id")
				_, in := model[id]
				if got := tab.remove(id); got != in {
					t.Fatalf("remove(%d) = %t, want %t", id, got, in)
				}
				delete(model, id)
			}
			var want []*Conn
			for _, id := range slices.Sorted(maps.Keys(model)) {
				want = append(want, model[id])
			}
			if got := tab.all(); !slices.Equal(got, want) || tab.len() != len(want) {
				t.Fatalf("%d listed, %d counted, want %d in the order of ids", len(got), tab.len(), len(want))
			}
			for id := range last + 2 {
				if tab.get(id) != model[id] {
					t.Fatalf("get(%d) is another connection", id)
				}
			}
			if len(tab.rows) > 2*len(model)+1 {
				t.Fatalf("%d rows for %d connections", len(tab.rows), len(model))
			}
		}
	})
}

func TestRing(t *testing.T) {
	r := ring[int]{size: 3}
	for n, want := range [][]int{{0}, {1, 0}, {2, 1, 0}, {3, 2, 1}, {4, 3, 2}} {
		r.add(n)
		wantEqual(t, "newest first", r.newestFirst(), want)
	}
}
