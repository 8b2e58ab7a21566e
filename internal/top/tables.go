package top

import (
	"strconv"
	"strings"
	"time"
)

// connections draws the open ones: a head, and as many rows as there is room for.
func (m *model) connections(rows int) []string {
	t := m.table
	longest := len(strconv.FormatUint(m.status.Accepted, 10)) // ids count up
	chosen, widths := fitting(m.width, t.by, longest)
	line := func(mark string, text func(c column) string) string {
		cells := make([]string, len(chosen))
		for i, c := range chosen {
			cells[i] = cell(text(c), widths[c], columns[c].right, m.glyphs.cut)
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

// recent draws the closed ones that match, the latest first.
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
			cells = append(cells, cell(texts[i], w, i == 0 || i > 2, m.glyphs.cut))
		}
		return strings.Join(cells, " ")
	}
	lines := []string{headline.Render(line("ID", "REMOTE", "CLOSED", "AT", "AFTER", "IN", "OUT"))}
	for _, c := range m.closed {
		if len(lines) > rows {
			break
		}
		if m.table.matches(c.Remote, c.Reason) {
			lines = append(lines, line(strconv.FormatUint(c.ID, 10), printable(c.Remote), printable(c.Reason),
				c.Closed.Local().Format(time.TimeOnly), span(seconds(c.DurationSeconds)), bytes(c.BytesIn), bytes(c.BytesOut)))
		}
	}
	return lines
}
