package top

import (
	"fmt"
	"strings"

	"charm.land/lipgloss/v2"
	"github.com/dustin/go-humanize"
)

// bottom is what stands below the tables: what is being asked or was said, else what the table shows; and the keys.
func (m *model) bottom() []string {
	var lines []string
	switch d := m.dialog.(type) {
	case *entry:
		lines = []string{bold.Render(d.prompt) + m.typedSoFar(d)}
	case *confirmation:
		for _, line := range m.wrapped(d.question) {
			lines = append(lines, bold.Render(line))
		}
	default:
		style := lipgloss.NewStyle()
		text := m.note.text
		if m.note.bad {
			style = alarm
		}
		switch {
		case m.busy:
			text = "waiting for the server to answer"
		case text == "":
			text = m.position()
		}
		for _, line := range m.wrapped(text) {
			lines = append(lines, style.Render(line))
		}
	}
	return append(lines, m.keys())
}

// typedSoFar is the end of what was typed, as far as there is room beside the prompt and the cursor.
func (m *model) typedSoFar(e *entry) string {
	text := string(e.text)
	room := m.width - lipgloss.Width(e.prompt) - 1
	if lipgloss.Width(text) <= room {
		return text
	}
	rest := e.text
	for len(rest) > 0 && lipgloss.Width(m.glyphs.cut+string(rest)) > room {
		rest = rest[1:]
	}
	return m.glyphs.cut + string(rest)
}

// wrapped breaks text into lines, of which a small screen shows the last that fit.
func (m *model) wrapped(text string) []string {
	return strings.Split(lipgloss.Wrap(text, max(1, m.width), " "), "\n")
}

// position says what part of the connections the table shows, and why.
func (m *model) position() string {
	t := m.table
	if m.history {
		return "latest first; more: echod ctl closed" + m.filtered()
	}
	open := max(len(t.rows), m.status.Connections)
	if m.away() {
		open = 0
	}
	text := count(open, "connection")
	if len(t.shown) != open {
		text = humanize.Comma(int64(len(t.shown))) + " of " + text
	}
	if len(t.rows) >= maxRows {
		text += ", of which the oldest " + humanize.Comma(maxRows) + " are looked at"
	}
	return text + m.filtered()
}

func (m *model) filtered() string {
	if m.table.filter == "" {
		return ""
	}
	return fmt.Sprintf(", with %q (esc: all)", m.table.filter)
}

// hints are the keys in the last line. Where there is no room for all, the last ones before help are left out.
var hints = []struct{ key, does string }{
	{"?", "help"},
	{"q", "quit"},
	{"p", "pause"},
	{"u", "resume"},
	{"x", "kill"},
	{"D", "drain"},
	{"s", "sort"},
	{"/", "filter"},
	{"tab", "closed"},
}

func (m *model) keys() string {
	if _, asking := m.dialog.(*confirmation); asking {
		return keyHint("y", "yes") + "  " + keyHint("any other key", "no")
	}
	if m.dialog != nil {
		return keyHint("enter", "accept") + "  " + keyHint("esc", "give up")
	}
	line := ""
	for i, h := range hints {
		does := h.does
		if h.key == "tab" && m.history {
			does = "open"
		}
		next := keyHint(h.key, does)
		if i > 0 {
			next = "  " + next
		}
		if lipgloss.Width(line+next) > m.width {
			break
		}
		line += next
	}
	return line
}

func keyHint(key, does string) string { return bold.Render(key) + " " + does }

// helpText is for 80 columns and 24 lines.
var helpText = []string{
	"",
	"  up down j k     select a connection     pgup pgdn g G   go further",
	"  s S             sort by another column  r               the other way round",
	"  /               filter by text          esc             filter, select nothing",
	"  tab             the connections that were closed last, and why",
	"",
	"  p               pause: admit nobody new, until resumed",
	"  u               resume: release all holds",
	"  x               end the selected connection",
	"  D               drain: tell all clients, give them time, and stop",
	"                  while it drains: close everything now",
	"                  Each of these says what will happen, and does it on y only.",
	"",
	"  AGE since it was opened, IDLE since a byte moved, IN and OUT bytes from and to",
	"  the client, RATE of both per second. The bars are the last minute.",
	"",
	"  q or Ctrl-C quits, Ctrl-Z suspends. Any key leaves this page.",
}
