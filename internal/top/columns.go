package top

import (
	"cmp"
	"strconv"
	"time"
)

// column is one of the table, and what to sort by.
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

// columns says what each shows, and how it sorts.
var columns = [nColumns]struct {
	title    string
	width    int
	right    bool // its cells are figures
	falling  bool // the greatest comes first
	dispense int  // the higher, the sooner it is left out for want of room; 0 is never
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

// fitting chooses the columns that fit into width cells beside the marker, and gives their widths, that of the ids at
// least ids. What is left over the remote addresses get, up to their longest; the column that sorts stays.
func fitting(width int, sorting column, ids int) (chosen []column, widths [nColumns]int) {
	room := width - len(marker)
	for c := range nColumns {
		chosen = append(chosen, c)
		if widths[c] = columns[c].width; c == byID {
			widths[c] = max(widths[c], ids)
		}
		room -= widths[c] + 1
	}
	for room < -1 { // the last needs no gap
		drop := -1
		for i, c := range chosen {
			if columns[c].dispense > 0 && c != sorting && (drop < 0 || columns[c].dispense > columns[chosen[drop]].dispense) {
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

// marker stands before the selected row.
const marker = "> "
