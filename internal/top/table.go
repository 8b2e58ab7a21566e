package top

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"echod/control"
	"echod/internal/text"
)

const (
	maxRows   = 20_000 // open connections in the table; bounds the memory
	maxClosed = 200    // closed connections
)

// row is an open connection.
type row struct {
	control.Conn
	addr netip.AddrPort // Remote, if it is an address and a port
	seen time.Time      // the first time
	rate float64        // bytes per second in both directions, between two lists
	base uint64         // bytes in both directions at the time at, for the next rate
	at   time.Time
}

// table holds the open connections, and which of them are shown in which order.
type table struct {
	minGap time.Duration // between two lists that are compared
	rows   map[uint64]*row
	gone   map[uint64]time.Time // closed since the last list began, which may still contain them

	by       column
	reversed bool
	filter   string // lower case
	shown    []*row

	selected uint64 // an id; 0 is none
	offset   int    // of the first row on the screen
}

func newTable(minGap time.Duration) *table {
	return &table{minGap: minGap, rows: map[uint64]*row{}, gone: map[uint64]time.Time{}, by: byRate}
}

func (t *table) clear() {
	clear(t.rows)
	clear(t.gone)
	t.arrange()
}

func newRow(c control.Conn, at time.Time) *row {
	c.Remote, c.Local, c.State = text.Printable(c.Remote), text.Printable(c.Local), text.Printable(c.State)
	r := &row{Conn: c, seen: at, base: c.BytesIn + c.BytesOut, at: at}
	r.addr, _ = netip.ParseAddrPort(c.Remote) // an invalid address sorts first
	return r
}

// list takes a list of the server's. Events since it began are newer.
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
			if passed := now.at.Sub(was.at); passed >= t.minGap {
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
		// An event shows a connection before it is admitted. Where connections come and go faster than the lists, all
		// would seem to wait.
		if c.State == "waiting" {
			c.State = "new"
		}
		t.rows[c.ID] = newRow(c, at)
	}
}

func (t *table) closed(id uint64, at time.Time) {
	delete(t.rows, id)
	if len(t.gone) < maxRows {
		t.gone[id] = at
	}
}

// matches reports whether the texts contain the filter.
func (t *table) matches(text ...string) bool {
	return t.filter == "" || strings.Contains(strings.ToLower(strings.Join(text, " ")), t.filter)
}

// arrange filters and sorts the rows. Equal ones are in the order of their ids.
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
	clear(t.shown[len(t.shown):cap(t.shown)]) // for the garbage collector
}

// index returns the position of the selected connection, or -1.
func (t *table) index() int {
	if t.selected == 0 {
		return -1
	}
	return slices.IndexFunc(t.shown, func(r *row) bool { return r.ID == t.selected })
}

// move selects the connection n rows further down, on a page of height rows. Without a selection, one step
// leads to the first.
func (t *table) move(n, height int) {
	if len(t.shown) == 0 {
		return
	}
	to := min(max(0, t.index()+n), len(t.shown)-1)
	t.selected = t.shown[to].ID
	t.scroll(height)
}

// scroll moves the page, of height rows, to the selected row, or else to the first.
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

// page returns the rows on a page of height rows.
func (t *table) page(height int) []*row {
	t.scroll(height)
	return t.shown[t.offset:min(len(t.shown), t.offset+height)]
}

// column is a column of the table. The table is sorted by one of them.
type column int

const (
	byID column = iota
	byRemote
	byLocal
	byPhase
	byAge
	byIdle
	byIn
	byOut
	byRate
	nColumns
)

// columns defines what each column shows and how it sorts.
var columns = [nColumns]struct {
	title    string
	width    int
	right    bool // aligned to the right
	falling  bool // greatest first
	dropRank int  // the higher, the sooner it is left out on a narrow screen; 0 is never
	text     func(r *row, now time.Time) string
	compare  func(a, b *row) int
}{
	byID: {
		"ID", 6, true, false, 0, func(r *row, _ time.Time) string { return strconv.FormatUint(r.ID, 10) },
		func(a, b *row) int { return cmp.Compare(a.ID, b.ID) },
	},
	byRemote: {
		"REMOTE", 21, false, false, 0, func(r *row, _ time.Time) string { return r.Remote },
		func(a, b *row) int { return cmp.Or(a.addr.Compare(b.addr), cmp.Compare(a.Remote, b.Remote)) },
	},
	byLocal: {
		"LOCAL", 21, false, false, 9, func(r *row, _ time.Time) string { return r.Local },
		func(a, b *row) int { return cmp.Compare(a.Local, b.Local) },
	},
	byPhase: {
		"PHASE", 9, false, false, 4, func(r *row, _ time.Time) string { return r.State },
		func(a, b *row) int { return cmp.Compare(a.State, b.State) },
	},
	byAge: {
		"AGE", 6, true, true, 5, func(r *row, now time.Time) string { return span(now.Sub(r.Opened)) },
		func(a, b *row) int { return a.Opened.Compare(b.Opened) },
	},
	byIdle: {
		"IDLE", 6, true, true, 6, func(r *row, _ time.Time) string { return span(seconds(r.IdleSeconds)) },
		func(a, b *row) int { return cmp.Compare(b.IdleSeconds, a.IdleSeconds) },
	},
	byIn: {
		"IN", 7, true, true, 8, func(r *row, _ time.Time) string { return bytes(r.BytesIn) },
		func(a, b *row) int { return cmp.Compare(b.BytesIn, a.BytesIn) },
	},
	byOut: {
		"OUT", 7, true, true, 7, func(r *row, _ time.Time) string { return bytes(r.BytesOut) },
		func(a, b *row) int { return cmp.Compare(b.BytesOut, a.BytesOut) },
	},
	byRate: {
		"RATE", 9, true, true, 3, func(r *row, _ time.Time) string { return perSecond(r.rate) },
		func(a, b *row) int { return cmp.Compare(b.rate, a.rate) },
	},
}

// fitting chooses the columns that fit into width cells beside the marker, and returns their widths. The ids
// get at least ids cells, the remote addresses what is left over. The column that sorts always stays.
func fitting(width int, sorting column, ids int) (chosen []column, widths [nColumns]int) {
	room := width - len(marker)
	for c := range nColumns {
		chosen = append(chosen, c)
		if widths[c] = columns[c].width; c == byID {
			widths[c] = max(widths[c], ids)
		}
		room -= widths[c] + 1
	}
	for room < -1 { // the last column needs no gap
		drop := -1
		for i, c := range chosen {
			if columns[c].dropRank > 0 && c != sorting &&
				(drop < 0 || columns[c].dropRank > columns[chosen[drop]].dropRank) {
				drop = i
			}
		}
		if drop < 0 {
			break
		}
		room += widths[chosen[drop]] + 1
		chosen = append(chosen[:drop], chosen[drop+1:]...)
	}
	const longestRemote = 47 // [xxxx:xxxx:xxxx:xxxx:xxxx:xxxx:xxxx:xxxx]:xxxxx
	widths[byRemote] = min(longestRemote, max(1, widths[byRemote]+room+1))
	return chosen, widths
}

// marker precedes the selected row.
const marker = "> "

// connections draws the table of open connections: a heading and up to rows rows.
func (m *model) connections(rows int) []string {
	t := m.table
	longest := len(strconv.FormatUint(m.status.Accepted, 10)) // ids count up
	chosen, widths := fitting(m.width, t.by, longest)
	line := func(mark string, text func(c column) string) string {
		cells := make([]string, len(chosen))
		for i, c := range chosen {
			cells[i] = cell(text(c), widths[c], columns[c].right, m.glyphs.ellipsis)
		}
		return mark + strings.Join(cells, " ")
	}
	lines := []string{headline.Render(line(strings.Repeat(" ", len(marker)), func(c column) string {
		switch {
		case c != t.by:
			return columns[c].title
		case columns[c].falling != t.reversed:
			return columns[c].title + m.glyphs.falling
		default:
			return columns[c].title + m.glyphs.rising
		}
	}))}
	for _, r := range t.page(rows) {
		text := func(c column) string { return columns[c].text(r, m.now) }
		if r.ID == t.selected {
			lines = append(lines, reverse.Render(line(marker, text)))
		} else {
			lines = append(lines, line(strings.Repeat(" ", len(marker)), text))
		}
	}
	return lines
}

// recent draws the closed connections that match the filter, latest first.
func (m *model) recent(rows int) []string {
	widths := []int{len(marker) + 6, 21, 17, 8, 6, 7, 7}
	room := m.width
	for _, w := range widths {
		room -= w + 1
	}
	for len(widths) > 3 && room < -1 {
		room += widths[len(widths)-1] + 1
		widths = widths[:len(widths)-1]
	}
	widths[1] = min(47, max(7, widths[1]+room+1))
	line := func(texts ...string) string {
		var cells []string
		for i, w := range widths {
			cells = append(cells, cell(texts[i], w, i == 0 || i > 2, m.glyphs.ellipsis))
		}
		return strings.Join(cells, " ")
	}
	lines := []string{headline.Render(line("ID", "REMOTE", "CLOSED", "AT", "AFTER", "IN", "OUT"))}
	for _, c := range m.closed {
		if len(lines) > rows {
			break
		}
		if m.table.matches(c.Remote, c.Reason) {
			lines = append(lines, line(strconv.FormatUint(c.ID, 10), text.Printable(c.Remote), text.Printable(c.Reason),
				c.Closed.Local().Format(time.TimeOnly), span(seconds(c.DurationSeconds)), bytes(c.BytesIn),
				bytes(c.BytesOut)))
		}
	}
	return lines
}
