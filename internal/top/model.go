package top

import (
	"errors"
	"fmt"
	"slices"
	"time"

	tea "charm.land/bubbletea/v2"

	"echod/control"
)

// server is what the model may ask of the feed.
type server interface {
	do(a action) bool
}

// model is what the screen shows. It is bubbletea's: one goroutine calls its methods.
type model struct {
	path    string
	server  server
	glyphs  glyphs
	now     time.Time // of the last message that says the time
	width   int
	height  int
	help    bool // shown instead of the table
	history bool // the closed connections are shown instead of the open ones

	status control.Status // the last that was got
	rates  rates
	table  *table
	closed []control.ClosedConn // the latest first

	lost      error // why the server does not answer; nil while it does
	lostSince time.Time
	stopped   bool // its events said that it has

	dialog dialog // what is being asked of the operator; nil is nothing
	busy   bool   // an action is under way
	note   note
}

// note is a line that says what has happened, until a key is pressed or noteLasts is over.
type note struct {
	text string
	bad  bool
	at   time.Time
}

const noteLasts = 10 * time.Second

func newModel(path string, interval time.Duration, ascii bool, s server) *model {
	least := interval / 2
	m := &model{path: path, server: s, glyphs: fancy, rates: rates{least: least}, table: newTable(least), now: time.Now()}
	if ascii {
		m.glyphs = plain
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
		m.answered(msg)
	case lostMsg:
		m.lose(msg)
	case listMsg:
		m.now = msg.at
		if m.lost == nil {
			m.table.list(msg)
			m.closed = msg.closed
		}
	case eventsMsg:
		m.now = msg.at
		m.happened(msg)
	case troubleMsg:
		m.say(fmt.Sprintf("no %s: %v", msg.of, msg.err), true)
	case doneMsg:
		m.busy = false
		if msg.err != nil {
			m.say(inWords(msg.err), true)
		} else {
			m.say(msg.said, false)
		}
	}
	return m, nil
}

func (m *model) say(text string, bad bool) { m.note = note{printable(text), bad, m.now} }

// inWords says what became of an action that failed.
func inWords(err error) string {
	if _, ok := errors.AsType[*control.Problem](err); ok {
		return "the server refuses: " + err.Error()
	}
	return err.Error()
}

// answered takes a status, of the same server as before or of another one.
func (m *model) answered(msg statusMsg) {
	m.now = msg.at
	before := m.status
	m.status = msg.status
	switch {
	case before.PID == 0: // the first
	case before.PID != msg.status.PID || !before.Started.Equal(msg.status.Started):
		m.forget()
		m.stopped = false
		m.rates, m.closed = rates{least: m.rates.least}, nil
		m.say(fmt.Sprintf("another server answers now: pid %d", msg.status.PID), false)
	case m.lost != nil:
		m.say(fmt.Sprintf("the server answers again, after %s", span(m.now.Sub(m.lostSince))), false)
	}
	m.lost = nil
	m.rates.add(msg.at, msg.status)
	if m.note.at.Add(noteLasts).Before(m.now) {
		m.note = note{}
	}
}

// lose takes that the server did not answer. Where it is not there, neither are its connections; where it is
// but is stuck, they are.
func (m *model) lose(msg lostMsg) {
	m.now = msg.at
	if m.lost == nil {
		m.lostSince = msg.at
	}
	before := m.away()
	m.lost = msg.err
	if m.away() {
		m.forget()
		if !before { // it was about the server that was there
			m.note = note{}
		}
	}
}

// away says that there is no server on the socket.
func (m *model) away() bool {
	_, away := errors.AsType[*control.UnreachableError](m.lost)
	return away
}

// forget drops what is true of a server that is there only.
func (m *model) forget() {
	m.table.clear()
	m.dialog = nil
}

// happened takes events.
func (m *model) happened(msg eventsMsg) {
	for _, e := range msg.events {
		switch {
		case e.Conn != nil:
			m.table.opened(*e.Conn, msg.at)
		case e.Closed != nil:
			m.table.closed(e.Closed.ID, msg.at)
			m.remember(*e.Closed)
		case e.State != "":
			m.stopped = m.stopped || e.State == "stopped"
		}
	}
	slices.SortStableFunc(m.closed, func(a, b control.ClosedConn) int { return b.Closed.Compare(a.Closed) })
	clear(m.closed[min(maxClosed, len(m.closed)):])
	m.closed = m.closed[:min(maxClosed, len(m.closed))]
	m.table.arrange()
}

// remember adds a closed connection to those remembered, unless the list has had it already.
func (m *model) remember(c control.ClosedConn) {
	if !slices.ContainsFunc(m.closed, func(known control.ClosedConn) bool { return known.ID == c.ID }) {
		m.closed = append(m.closed, c)
	}
}
