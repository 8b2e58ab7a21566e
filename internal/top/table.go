package top

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"time"

	"echod/control"
)

const (
	maxRows   = 20_000 // connections that are known at a time: the memory that a crowd may take
	maxClosed = 200    // closed connections that are remembered
)

// row is an open connection.
type row struct {
	control.Conn
	addr netip.AddrPort // Remote, where it is an address and a port
	seen time.Time      // when it was first heard of
	rate float64        // bytes per second in both directions, between two lists
	base uint64         // what the next rate is counted from: bytes in both directions,
	at   time.Time      // at this time
}

// table knows the open connections, and which of them are shown in which order.
type table struct {
	least time.Duration // between two lists that are compared
	rows  map[uint64]*row
	gone  map[uint64]time.Time // closed since the last list began, which may still have them

	by       column
	reversed bool
	filter   string // lower case
	shown    []*row

	selected uint64 // an id; 0 is none
	offset   int    // of the first row on the screen
}

func newTable(least time.Duration) *table {
	return &table{least: least, rows: map[uint64]*row{}, gone: map[uint64]time.Time{}, by: byRate}
}

func (t *table) clear() {
	clear(t.rows)
	clear(t.gone)
	t.arrange()
}

func newRow(c control.Conn, at time.Time) *row {
	c.Remote, c.Local, c.State = printable(c.Remote), printable(c.Local), printable(c.State)
	r := &row{Conn: c, seen: at, base: c.BytesIn + c.BytesOut, at: at}
	r.addr, _ = netip.ParseAddrPort(c.Remote) // what is no address is sorted before those that are
	return r
}

// list takes all that the server has listed. What events have told since the list began is newer.
func (t *table) list(msg listMsg) {
	listed := make(map[uint64]bool, len(msg.open))
	for _, c := range msg.open {
		if _, gone := t.gone[c.ID]; gone {
			continue
		}
		listed[c.ID] = true
		now := newRow(c, msg.at)
		if was := t.rows[c.ID]; was != nil {
			now.seen = was.seen
			if passed := now.at.Sub(was.at); passed >= t.least {
				now.rate = float64(max(now.base, was.base)-was.base) / passed.Seconds()
			} else {
				now.rate, now.base, now.at = was.rate, was.base, was.at
			}
		}
		t.rows[c.ID] = now
	}
	for id, r := range t.rows {
		if !listed[id] && r.seen.Before(msg.began) {
			delete(t.rows, id)
		}
	}
	for id, when := range t.gone {
		if when.Before(msg.began) {
			delete(t.gone, id)
		}
	}
	t.arrange()
}

func (t *table) opened(c control.Conn, at time.Time) {
	if len(t.rows) < maxRows && t.rows[c.ID] == nil {
		t.rows[c.ID] = newRow(c, at)
	}
}

func (t *table) closed(id uint64, at time.Time) {
	delete(t.rows, id)
	if len(t.gone) < maxRows {
		t.gone[id] = at
	}
}

// matches says whether text has what is filtered for.
func (t *table) matches(text ...string) bool {
	return t.filter == "" || strings.Contains(strings.ToLower(strings.Join(text, " ")), t.filter)
}

// arrange sorts and filters what is shown. Equal ones are in the order in which they came.
func (t *table) arrange() {
	t.shown = t.shown[:0]
	for _, r := range t.rows {
		if t.matches(r.Remote, r.State) {
			t.shown = append(t.shown, r)
		}
	}
	compare := columns[t.by].compare
	direction := 1
	if t.reversed {
		direction = -1
	}
	slices.SortFunc(t.shown, func(a, b *row) int {
		return cmp.Or(direction*compare(a, b), cmp.Compare(a.ID, b.ID))
	})
	clear(t.shown[len(t.shown):cap(t.shown)]) // forgets those that were shown
}

// index is where the selected connection is, or -1.
func (t *table) index() int {
	if t.selected == 0 {
		return -1
	}
	return slices.IndexFunc(t.shown, func(r *row) bool { return r.ID == t.selected })
}

// move selects the connection n rows further down, on a page of height rows. From none, a step leads to the first.
func (t *table) move(n, height int) {
	if len(t.shown) == 0 {
		return
	}
	to := min(max(0, t.index()+n), len(t.shown)-1)
	t.selected = t.shown[to].ID
	t.scroll(height)
}

// scroll brings the selected row, or else the first, into a page of height rows.
func (t *table) scroll(height int) {
	at := t.index()
	switch {
	case at < 0:
		t.offset = 0
	case at < t.offset:
		t.offset = at
	case at >= t.offset+height:
		t.offset = at - height + 1
	}
	t.offset = min(t.offset, max(0, len(t.shown)-height))
}

// page is what fits into height rows.
func (t *table) page(height int) []*row {
	t.scroll(height)
	return t.shown[t.offset:min(len(t.shown), t.offset+height)]
}
