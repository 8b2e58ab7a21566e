package top

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	tea "charm.land/bubbletea/v2"

	"echod/control"
	"echod/internal/text"
)

// doer runs actions. The feed is one.
type doer interface {
	do(a action) bool // false: another action is still waiting
}

// model is the tea.Model: what the screen shows. Bubbletea calls its methods from one goroutine.
type model struct {
	path    string
	doer    doer
	glyphs  glyphs
	now     time.Time // of the last message that carries a time
	width   int
	height  int
	help    bool // the help is shown instead of the table
	history bool // the closed connections are shown instead of the open ones

	status control.Status // the last one received
	rates  rates
	table  *table
	closed []control.ClosedConn // latest first

	lost      error // why the server does not answer; nil if it does
	lostSince time.Time
	stopped   bool // an event said that the server has stopped

	dialog dialog // nil without one
	busy   bool   // an action is running
	note   note
}

// note is a line about what has happened. It disappears with the next key or after noteTimeout.
type note struct {
	text string
	bad  bool
	at   time.Time
}

const noteTimeout = 10 * time.Second

func newModel(path string, interval time.Duration, ascii bool, d doer) *model {
	minGap := interval / 2
	m := &model{
		path: path, doer: d, glyphs: unicodeGlyphs,
		rates: rates{minGap: minGap}, table: newTable(minGap), now: time.Now(),
	}
	if ascii {
		m.glyphs = asciiGlyphs
	}
	return m
}

// Init is tea.Model's.
func (m *model) Init() tea.Cmd { return nil }

// Update is tea.Model's.
func (m *model) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		m.width, m.height = msg.Width, msg.Height
	case tea.KeyPressMsg:
		return m, m.press(msg)
	case tea.PasteMsg:
		if e, ok := m.dialog.(*entry); ok {
			e.insert(msg.Content)
			m.typed(e)
		}
	case statusMsg:
		m.setStatus(msg)
	case lostMsg:
		m.setLost(msg)
	case listMsg:
		m.now = msg.at
		if m.lost == nil {
			m.table.list(msg)
			m.closed = msg.closed
		}
	case eventsMsg:
		m.now = msg.at
		m.addEvents(msg)
	case troubleMsg:
		m.say(fmt.Sprintf("%s: %v", msg.what, msg.err), true)
	case doneMsg:
		m.busy = false
		if msg.err != nil {
			m.say(describeError(msg.err), true)
		} else {
			m.say(msg.result, false)
		}
	}
	return m, nil
}

// say shows a note.
func (m *model) say(s string, bad bool) { m.note = note{text.Printable(s), bad, m.now} }

func describeError(err error) string {
	if _, ok := errors.AsType[*control.Problem](err); ok {
		return "the server refused: " + err.Error()
	}
	return err.Error()
}

// setStatus takes a new status, of the same server or of another one.
func (m *model) setStatus(msg statusMsg) {
	m.now = msg.at
	before := m.status
	m.status = msg.status
	switch {
	case before.PID == 0: // the first
	case before.PID != msg.status.PID || !before.Started.Equal(msg.status.Started):
		m.clear()
		m.stopped = false
		m.rates, m.closed = rates{minGap: m.rates.minGap}, nil
		m.say(fmt.Sprintf("a new server answers: pid %d", msg.status.PID), false)
	case m.lost != nil:
		m.say(fmt.Sprintf("the server answers again, after %s", span(m.now.Sub(m.lostSince))), false)
	}
	m.lost = nil
	m.rates.add(msg.at, msg.status)
	if m.note.at.Add(noteTimeout).Before(m.now) {
		m.note = note{}
	}
}

// setLost notes that the server did not answer. If it is away, so are its connections. If it hangs, they
// remain.
func (m *model) setLost(msg lostMsg) {
	m.now = msg.at
	if m.lost == nil {
		m.lostSince = msg.at
	}
	before := m.disconnected()
	m.lost = msg.err
	if m.disconnected() {
		m.clear()
		if !before { // the note was about the previous server
			m.note = note{}
		}
	}
}

// disconnected reports whether there is no server on the socket.
func (m *model) disconnected() bool {
	_, away := errors.AsType[*control.UnreachableError](m.lost)
	return away
}

// clear drops everything that belongs to the previous server.
func (m *model) clear() {
	m.table.clear()
	m.dialog = nil
}

// addEvents takes new events.
func (m *model) addEvents(msg eventsMsg) {
	for _, e := range msg.events {
		switch {
		case e.Conn != nil:
			m.table.opened(*e.Conn, msg.at)
		case e.Closed != nil:
			m.table.closed(e.Closed.ID, msg.at)
			m.addClosed(*e.Closed)
		case e.State != "":
			m.stopped = m.stopped || e.State == "stopped"
		}
	}
	slices.SortStableFunc(m.closed, func(a, b control.ClosedConn) int { return b.Closed.Compare(a.Closed) })
	clear(m.closed[min(maxClosed, len(m.closed)):])
	m.closed = m.closed[:min(maxClosed, len(m.closed))]
	m.table.arrange()
}

// addClosed adds a closed connection, unless the list had it already.
func (m *model) addClosed(c control.ClosedConn) {
	if !slices.ContainsFunc(m.closed, func(known control.ClosedConn) bool { return known.ID == c.ID }) {
		m.closed = append(m.closed, c)
	}
}

// press handles a key.
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

// ask opens the dialog for an action of the server.
func (m *model) ask(open func() dialog) {
	switch {
	case m.lost != nil:
		m.say("the server does not answer", true)
	case m.busy:
		m.say("the server has not answered the last request yet", true)
	default:
		m.dialog = open()
	}
}

// askFilter opens the dialog for the filter, which applies while it is typed.
func (m *model) askFilter() dialog {
	before := m.table.filter
	filter := func(text string) {
		m.table.filter = strings.ToLower(text)
		m.table.arrange()
	}
	return &entry{
		prompt: "Filter by address or phase: ", text: []rune(before), typed: filter,
		accept: func(string) dialog { return nil },
		cancel: func() { filter(before) },
	}
}
