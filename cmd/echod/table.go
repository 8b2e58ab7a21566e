package main

import (
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"

	"echod/internal/text"
)

// tableWidth is the maximum width of a table in columns. A terminal usually has at least as many.
const tableWidth = 80

// A table is printed in columns. Columns whose head ends in ~ are shortened until the table fits into tableWidth.
type table struct {
	heads   []string
	shrinks []bool
	rows    [][]string
}

// newTable makes a table from heads that are separated by tabs.
func newTable(heads string) *table {
	t := &table{}
	for head := range strings.SplitSeq(heads, "\t") {
		name, shrinks := strings.CutSuffix(head, "~")
		t.heads, t.shrinks = append(t.heads, name), append(t.shrinks, shrinks)
	}
	t.rows = [][]string{t.heads}
	return t
}

// row adds a row. It makes texts from the server printable.
func (t *table) row(cells ...any) {
	texts := make([]string, len(cells))
	for i, cell := range cells {
		texts[i] = text.Printable(fmt.Sprint(cell))
	}
	t.rows = append(t.rows, texts)
}

// print writes the table. With wide nothing is shortened.
func (t *table) print(out io.Writer, wide bool) error {
	widths := make([]int, len(t.heads))
	total := 2 * (len(widths) - 1)
	for i := range widths {
		for _, row := range t.rows {
			widths[i] = max(widths[i], utf8.RuneCountInString(row[i]))
		}
		total += widths[i]
	}
	for ; total > tableWidth && !wide; total-- {
		widest := -1
		for i, shrinks := range t.shrinks {
			if shrinks && widths[i] > len(t.heads[i]) && (widest < 0 || widths[i] > widths[widest]) {
				widest = i
			}
		}
		if widest < 0 {
			break
		}
		widths[widest]--
	}
	for _, row := range t.rows {
		var line strings.Builder
		for i, cell := range row {
			fmt.Fprintf(&line, "%-*s  ", widths[i], shorten(widths[i], cell))
		}
		if _, err := fmt.Fprintln(out, strings.TrimRight(line.String(), " ")); err != nil {
			return err
		}
	}
	return nil
}

// shorten cuts a text to a number of characters.
func shorten(most int, s string) string {
	if r := []rune(s); len(r) > most {
		return string(r[:max(0, most-1)]) + "…"
	}
	return s
}

// age formats a duration in at most six characters.
func age(d time.Duration) string {
	const day = 24 * time.Hour
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%.1fs", d.Truncate(100*time.Millisecond).Seconds())
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", d/time.Minute, d%time.Minute/time.Second)
	case d < 2*day:
		return fmt.Sprintf("%dh%02dm", d/time.Hour, d%time.Hour/time.Minute)
	default:
		return fmt.Sprintf("%dd%02dh", d/day, d%day/time.Hour)
	}
}

func ageOf(seconds float64) string { return age(time.Duration(seconds * float64(time.Second))) }
