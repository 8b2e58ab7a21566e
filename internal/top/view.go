package top

import (
	"strings"

	tea "charm.land/bubbletea/v2"
	"charm.land/lipgloss/v2"
)

// The styles use the terminal's own 16 colours, so that they go with its background. What they say, words say too.
var (
	bold     = lipgloss.NewStyle().Bold(true)
	reverse  = lipgloss.NewStyle().Reverse(true)
	headline = lipgloss.NewStyle().Bold(true).Underline(true)
	drawn    = lipgloss.NewStyle().Foreground(lipgloss.Cyan)
	alarm    = lipgloss.NewStyle().Bold(true).Foreground(lipgloss.Red)

	stateStyles = map[string]lipgloss.Style{
		"running":  bold.Reverse(true).Foreground(lipgloss.Green),
		"paused":   bold.Reverse(true).Foreground(lipgloss.Yellow),
		"draining": bold.Reverse(true).Foreground(lipgloss.Magenta),
	}
	stateGone = bold.Reverse(true).Foreground(lipgloss.Red)
)

// glyphs are the characters of which pictures are made.
type glyphs struct {
	bars            []rune // the lowest first; all of one width
	rising, falling string
	cut             string // at the end of what was shortened
}

var (
	fancy = glyphs{[]rune("▁▂▃▄▅▆▇█"), "▲", "▼", "…"}
	plain = glyphs{[]rune("_.-:=+*#"), "^", "v", "~"}
)

// layout is how the lines of the screen are shared out.
type layout struct {
	header []string
	rows   int // of the table, below its own head
	recent int // of the closed connections below that; 0 is none
	bottom []string
}

// From these heights on there is room for more: for the rates, and for a table of closed connections.
const (
	heightForRates  = 16
	heightForRecent = 36
	recentRows      = 8
)

func (m *model) layout() layout {
	l := layout{header: m.header(), bottom: m.bottom()}
	if m.height >= heightForRecent && !m.history {
		l.recent = recentRows
	}
	l.rows = m.height - len(l.header) - len(l.bottom) - 1
	if l.recent > 0 {
		l.rows -= l.recent + 2
	}
	l.rows = max(0, l.rows)
	return l
}

// View is tea.Model's.
func (m *model) View() tea.View {
	v := tea.NewView("")
	v.AltScreen = true
	if m.width == 0 || m.height == 0 {
		return v
	}
	l := m.layout()
	lines := l.header
	switch {
	case m.help:
		lines = append(lines[:1], helpText...)
	case m.history:
		lines = append(lines, m.recent(l.rows)...)
	default:
		below := len(lines) + 1 + l.rows
		lines = append(lines, m.connections(l.rows)...)
		if l.recent > 0 {
			lines = append(padded(lines, below+1), m.recent(l.recent)...)
		}
	}
	middle := max(0, m.height-len(l.bottom))
	lines = append(padded(lines, middle)[:middle], l.bottom...)
	lines = lines[max(0, len(lines)-m.height):]
	for i, line := range lines {
		lines[i] = clip(line, m.width, m.glyphs.cut)
	}
	if e, ok := m.dialog.(*entry); ok {
		at := lipgloss.Width(e.prompt + m.typedSoFar(e))
		v.Cursor = tea.NewCursor(min(at, m.width-1), max(0, m.height-2))
	}
	v.SetContent(strings.Join(lines, "\n"))
	return v
}

// padded adds empty lines up to n.
func padded(lines []string, n int) []string {
	return append(lines, make([]string, max(0, n-len(lines)))...)
}
