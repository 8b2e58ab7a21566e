package top

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	tea "charm.land/bubbletea/v2"
	"charm.land/lipgloss/v2"
	"github.com/dustin/go-humanize"

	"echod/control"
	"echod/internal/text"
)

// The styles use the terminal's 16 colours, which suit its background. No information is in the colour alone.
var (
	bold     = lipgloss.NewStyle().Bold(true)
	reverse  = lipgloss.NewStyle().Reverse(true)
	headline = lipgloss.NewStyle().Bold(true).Underline(true)
	barStyle = lipgloss.NewStyle().Foreground(lipgloss.Cyan)
	alarm    = lipgloss.NewStyle().Bold(true).Foreground(lipgloss.Red)

	stateStyles = map[string]lipgloss.Style{
		"running":  bold.Reverse(true).Foreground(lipgloss.Green),
		"paused":   bold.Reverse(true).Foreground(lipgloss.Yellow),
		"draining": bold.Reverse(true).Foreground(lipgloss.Magenta),
	}
	stateGone = bold.Reverse(true).Foreground(lipgloss.Red)
)

// glyphs are the characters for drawing.
type glyphs struct {
	bars            []rune // lowest first; each one cell wide
	rising, falling string
	ellipsis        string // at the end of shortened text
}

var (
	unicodeGlyphs = glyphs{[]rune("▁▂▃▄▅▆▇█"), "▲", "▼", "…"}
	asciiGlyphs   = glyphs{[]rune("_.-:=+*#"), "^", "v", "~"}
)

// layout divides the lines of the screen.
type layout struct {
	header []string
	rows   int // of the table, without its heading
	recent int // of the closed connections below the table; 0 is none
	bottom []string
}

// Heights of the screen from which on it also shows the rates, and a table of closed connections.
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
		lines[i] = clip(line, m.width, m.glyphs.ellipsis)
	}
	if e, ok := m.dialog.(*entry); ok {
		at := lipgloss.Width(e.prompt + m.visibleInput(e))
		v.Cursor = tea.NewCursor(min(at, m.width-1), max(0, m.height-2))
	}
	v.SetContent(strings.Join(lines, "\n"))
	return v
}

// padded appends empty lines, up to n lines.
func padded(lines []string, n int) []string {
	return append(lines, make([]string, max(0, n-len(lines)))...)
}

// header returns the lines about the server as a whole.
func (m *model) header() []string {
	st := m.status
	lines := []string{m.title()}
	row := func(name, format string, args ...any) {
		name = bold.Render(cell(text.Printable(name), 13, false, ""))
		lines = append(lines, name+text.Printable(fmt.Sprintf(format, args...)))
	}
	roomy := m.height >= heightForRates
	switch d := st.Drain; {
	case m.lost != nil:
		row(m.unreachableState(), "%s", m.unreachableText())
	case d != nil && d.AcceptingUntil != nil && m.now.Before(*d.AcceptingUntil):
		newClients := "are served"
		if len(st.Holds) > 0 {
			newClients = "wait"
		}
		row("draining", "%s: new clients %s for %s more, %s left in total",
			d.Reason, newClients, span(d.AcceptingUntil.Sub(m.now)), span(d.Deadline.Sub(m.now)))
	case d != nil:
		row("draining", "%s: %s left, %s notified, %d failed",
			d.Reason, span(d.Deadline.Sub(m.now)), humanize.Comma(int64(d.Notified)), d.NoticeFailed)
	}
	holds := st.Holds
	if m.disconnected() {
		holds = nil
	}
	for i, h := range holds {
		if most := 1 + (m.height-heightForRates)/4; i >= max(1, most) {
			row("", "%s more", text.Count(len(holds)-i, "hold"))
			break
		}
		row("hold "+h.ID, "%s", m.describeHold(h))
	}
	if !m.disconnected() {
		for _, l := range st.LimitsReached {
			row("full", "%s", l)
		}
	}
	if roomy {
		row("listening", "%s", m.listeners())
	}
	row("connections", "%s", m.counts())
	if roomy {
		lines = append(lines, m.charts()...)
		lines = append(lines, "")
	}
	return lines
}

// unreachableText describes a server that does not answer.
func (m *model) unreachableText() string {
	since := span(m.now.Sub(m.lostSince))
	switch d := m.status.Drain; {
	case !m.disconnected():
		return fmt.Sprintf("for %s; the values below are old: %v", since, m.lost)
	case m.stopped && d != nil:
		return fmt.Sprintf("the server stopped %s ago (%s); waiting for the next one", since, d.Reason)
	case m.stopped:
		return fmt.Sprintf("the server stopped %s ago; waiting for the next one", since)
	default:
		return fmt.Sprintf("connection lost %s ago; reconnecting to %s", since, m.path)
	}
}

// unreachableState is shown instead of the state of a server that does not answer.
func (m *model) unreachableState() string {
	switch {
	case m.disconnected() && m.stopped:
		return "stopped"
	case m.disconnected():
		return "gone"
	default:
		return "no answer"
	}
}

// title returns the first line: the state, and which server it is.
func (m *model) title() string {
	st := m.status
	state, style := st.State, stateStyles[st.State]
	if m.lost != nil {
		state, style = m.unreachableState(), stateGone
	}
	state = style.Render(" " + text.Printable(state) + " ")
	process := fmt.Sprintf("  pid %d  up %s", st.PID, span(seconds(st.UptimeSeconds)))
	left := state + " " + bold.Render("echod "+text.Printable(st.Version)) + process
	right := m.now.Format(time.TimeOnly)
	if gap := m.width - lipgloss.Width(left) - len(right); gap > 1 {
		return left + strings.Repeat(" ", gap) + right
	}
	return state + process
}

func (m *model) describeHold(h control.Hold) string {
	words := []string{}
	if h.Reason != "" {
		words = append(words, fmt.Sprintf("%q", h.Reason))
	}
	if h.Mode != "hold" {
		words = append(words, "mode "+h.Mode)
	}
	words = append(words, "for "+span(m.now.Sub(h.Since)))
	if h.Expires != nil {
		words = append(words, "expires in "+span(h.Expires.Sub(m.now)))
	}
	if h.UID != nil && h.PID != nil {
		by := fmt.Sprintf("uid %d, pid %d", *h.UID, *h.PID)
		if h.User != "" {
			by = fmt.Sprintf("%s (%s)", h.User, by)
		}
		words = append(words, "by "+by)
	}
	return strings.Join(words, ", ")
}

func (m *model) listeners() string {
	if len(m.status.Listeners) == 0 || m.disconnected() {
		return "no"
	}
	var all []string
	for _, l := range m.status.Listeners {
		one := l.Address
		if l.AcceptQueue != nil && l.AcceptQueueLimit != nil {
			one += fmt.Sprintf(", %s of %d in the accept queue", humanize.Comma(int64(*l.AcceptQueue)),
				*l.AcceptQueueLimit)
		}
		all = append(all, one)
	}
	return firstFew(all, max(1, (m.width-13)/60))
}

func (m *model) counts() string {
	st := m.status
	if m.disconnected() {
		return fmt.Sprintf("%s accepted", humanize.Comma(int64(st.Accepted)))
	}
	text := humanize.Comma(int64(st.Connections)) + " open"
	var phases []string
	for _, phase := range slices.Sorted(maps.Keys(st.Phases)) {
		if phase != "serving" {
			phases = append(phases, humanize.Comma(int64(st.Phases[phase]))+" "+phase)
		}
	}
	if len(phases) > 0 {
		text += " (" + strings.Join(phases, ", ") + ")"
	}
	return text + ", " + humanize.Comma(int64(st.Accepted)) + " accepted"
}

// charts returns the lines with the rates, two charts side by side.
func (m *model) charts() []string {
	half := min(m.width/2, 96)
	until := m.rates.last.at
	if m.lost != nil {
		until = m.now // the chart moves on, without new values
	}
	current := func(s series, show func(float64) string) string {
		if m.lost != nil {
			return "-"
		}
		return show(m.rates.now(s))
	}
	one := func(name string, s series, show func(float64) string) string {
		label := bold.Render(cell(name, 7, false, "")) + cell(current(s, show), 10, true, "") + " "
		peak := " max " + strings.TrimSuffix(show(m.rates.peak(s, until)), "/s")
		room := min(60, half-lipgloss.Width(label)-len(" max 123 MB  "))
		if room < 6 {
			return cell(label, half, false, "")
		}
		return cell(label+barStyle.Render(sparkline(m.rates.minute(s, room, until), m.glyphs.bars))+peak,
			half, false, "")
	}
	each := func(n float64) string { return eventRate(n) + "/s" }
	return []string{
		one("accepts", accepts, each) + one("in", bytesIn, perSecond),
		one("closes", closes, each) + one("out", bytesOut, perSecond),
	}
}

// bottom returns the lines below the tables: the dialog, or the note, or else what the table shows; and the
// keys.
func (m *model) bottom() []string {
	var lines []string
	switch d := m.dialog.(type) {
	case *entry:
		lines = []string{bold.Render(d.prompt) + m.visibleInput(d)}
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
			text = "waiting for the server's answer"
		case text == "":
			text = m.summary()
		}
		for _, line := range m.wrapped(text) {
			lines = append(lines, style.Render(line))
		}
	}
	return append(lines, m.keys())
}

// visibleInput returns the end of the input, as much as fits beside the prompt and the cursor.
func (m *model) visibleInput(e *entry) string {
	text := string(e.text)
	room := m.width - lipgloss.Width(e.prompt) - 1
	if lipgloss.Width(text) <= room {
		return text
	}
	rest := e.text
	for len(rest) > 0 && lipgloss.Width(m.glyphs.ellipsis+string(rest)) > room {
		rest = rest[1:]
	}
	return m.glyphs.ellipsis + string(rest)
}

// wrapped breaks text into lines. A screen that is too small shows the last ones.
func (m *model) wrapped(text string) []string {
	return strings.Split(lipgloss.Wrap(text, max(1, m.width), " "), "\n")
}

// summary says how many connections the table shows, and why not all.
func (m *model) summary() string {
	t := m.table
	if m.history {
		return "latest first; 'echod ctl closed' lists more" + m.filtered()
	}
	open := max(len(t.rows), m.status.Connections)
	if m.disconnected() {
		open = 0
	}
	text := text.Count(open, "connection")
	if len(t.shown) != open {
		text = humanize.Comma(int64(len(t.shown))) + " of " + text
	}
	if len(t.rows) >= maxRows {
		text += "; only the oldest " + humanize.Comma(maxRows) + " are considered"
	}
	return text + m.filtered()
}

func (m *model) filtered() string {
	if m.table.filter == "" {
		return ""
	}
	return fmt.Sprintf(", filtered by %q (esc: all)", m.table.filter)
}

// hints are the keys shown in the last line, as many as fit.
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
		return keyHint("enter", "accept") + "  " + keyHint("esc", "cancel")
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

// helpText fits 80 columns and 24 lines.
var helpText = []string{
	"",
	"  up down j k     select a connection     pgup pgdn g G   scroll",
	"  s S             sort by another column  r               reverse the order",
	"  /               filter by text          esc             unselect, unfilter",
	"  tab             show the closed connections, and why they closed",
	"",
	"  p               pause: accept no new clients until resumed",
	"  u               resume: release all holds",
	"  x               close the selected connection",
	"  D               drain: notify all clients, give them time, and stop",
	"                  during a drain: close everything now",
	"                  Each of these asks first; only y confirms.",
	"",
	"  AGE is the time since opening, IDLE since the last byte. IN and OUT are bytes",
	"  from and to the client, RATE both per second. The bars show the last minute.",
	"",
	"  q or Ctrl-C quits, Ctrl-Z suspends. Any key closes this page.",
}

// clip shortens s, which may be styled, to width cells.
func clip(s string, width int, ellipsis string) string {
	if lipgloss.Width(s) <= width {
		return s
	}
	if width < lipgloss.Width(ellipsis)+1 {
		return lipgloss.NewStyle().MaxWidth(max(0, width)).Render(s)
	}
	return lipgloss.NewStyle().MaxWidth(width-lipgloss.Width(ellipsis)).Render(s) + ellipsis
}

// cell pads or shortens s to exactly width cells.
func cell(s string, width int, right bool, ellipsis string) string {
	s = clip(s, width, ellipsis)
	padding := strings.Repeat(" ", max(0, width-lipgloss.Width(s)))
	if right {
		return padding + s
	}
	return s + padding
}

// span formats a duration in at most six cells.
func span(d time.Duration) string {
	d = max(0, d)
	s := int(d / time.Second)
	switch {
	case d < 10*time.Second:
		return strconv.FormatFloat(math.Floor(d.Seconds()*10)/10, 'f', 1, 64) + "s"
	case s < 60:
		return fmt.Sprintf("%ds", s)
	case s < 3600:
		return fmt.Sprintf("%dm%02ds", s/60, s%60)
	case s < 86400:
		return fmt.Sprintf("%dh%02dm", s/3600, s/60%60)
	case s < 100*86400:
		return fmt.Sprintf("%dd%02dh", s/86400, s/3600%24)
	default:
		return fmt.Sprintf("%dd", s/86400)
	}
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// bytes formats a number of bytes, such as 1.2 MB.
func bytes(n uint64) string { return humanize.Bytes(n) }

// perSecond formats a rate of bytes in at most eight cells.
func perSecond(rate float64) string { return bytes(uint64(rate)) + "/s" }

// eventRate formats a rate of events in at most five cells.
func eventRate(n float64) string {
	switch {
	case n == 0:
		return "0"
	case n < 9.95:
		return strconv.FormatFloat(n, 'f', 1, 64)
	case n < 999.5:
		return strconv.FormatFloat(n, 'f', 0, 64)
	case n < 9950:
		return strconv.FormatFloat(n/1e3, 'f', 1, 64) + "k"
	case n < 999_500:
		return strconv.FormatFloat(n/1e3, 'f', 0, 64) + "k"
	default:
		return strconv.FormatFloat(n/1e6, 'f', 1, 64) + "M"
	}
}
