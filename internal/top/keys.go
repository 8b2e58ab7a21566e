package top

import (
	"strings"

	tea "charm.land/bubbletea/v2"
)

// press takes a key.
func (m *model) press(key tea.KeyPressMsg) tea.Cmd {
	if key.String() == "ctrl+c" {
		return tea.Quit
	}
	if key.String() == "ctrl+z" {
		return tea.Suspend
	}
	m.note = note{}
	if m.dialog != nil {
		m.dialog = m.dialog.press(m, key)
		return nil
	}
	if m.help {
		m.help = false
		return nil
	}
	page := m.layout().rows
	switch key.String() {
	case "q":
		return tea.Quit
	case "?", "h":
		m.help = true
	case "up", "k":
		m.table.move(-1, page)
	case "down", "j":
		m.table.move(1, page)
	case "pgup", "ctrl+b":
		m.table.move(-page, page)
	case "pgdown", "ctrl+f", "space":
		m.table.move(page, page)
	case "home", "g":
		m.table.move(-len(m.table.shown), page)
	case "end", "G":
		m.table.move(len(m.table.shown), page)
	case "esc":
		m.table.selected = 0
		m.table.filter = ""
		m.table.arrange()
	case "tab":
		m.history = !m.history
	case "s", "right":
		m.sortBy((m.table.by + 1) % nColumns)
	case "S", "left":
		m.sortBy((m.table.by + nColumns - 1) % nColumns)
	case "r":
		m.table.reversed = !m.table.reversed
		m.table.arrange()
	case "/":
		m.dialog = m.askFilter()
	case "p":
		m.ask(m.askPause)
	case "u":
		m.ask(m.askResume)
	case "x":
		m.ask(m.askKill)
	case "D":
		m.ask(m.askDrain)
	}
	return nil
}

func (m *model) sortBy(c column) {
	m.table.by, m.table.reversed = c, false
	m.table.arrange()
}

// ask begins a dialog about something that the server has to do.
func (m *model) ask(about func() dialog) {
	switch {
	case m.lost != nil:
		m.say("the server does not answer", true)
	case m.busy:
		m.say("the server has not answered to what was asked before", true)
	default:
		m.dialog = about()
	}
}

// askFilter filters while it is typed.
func (m *model) askFilter() dialog {
	before := m.table.filter
	filter := func(text string) {
		m.table.filter = strings.ToLower(text)
		m.table.arrange()
	}
	return &entry{
		prompt: "Show which addresses or phases? ", text: []rune(before), typed: filter,
		accept: func(string) dialog { return nil },
		cancel: func() { filter(before) },
	}
}
