package top

import (
	"context"
	"fmt"
	"io/fs"
	"regexp"
	"strings"
	"testing"
	"time"

	tea "charm.land/bubbletea/v2"

	"echod/control"
)

// rig is a model on a screen of 80x24, with a clock of the test's, and a server that only remembers what it was to do.
type rig struct {
	*model
	t       *testing.T
	at      time.Time
	asked   []action
	engaged bool // takes no action
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{t: t, at: time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)}
	r.model = newModel("/run/c", time.Second, false, r)
	r.Update(tea.WindowSizeMsg{Width: 80, Height: 24})
	r.answers(aStatus())
	return r
}

func (r *rig) do(a action) bool {
	if !r.engaged {
		r.asked = append(r.asked, a)
	}
	return !r.engaged
}

func aStatus() control.Status {
	queue, room := 2, 4096
	return control.Status{
		State: "running", PID: 4711, Version: "1.2.3", Started: time.Date(2026, 11, 23, 11, 0, 0, 0, time.UTC), UptimeSeconds: 3600,
		Listeners:   []control.Listener{{Address: "127.0.0.1:9999", AcceptQueue: &queue, AcceptQueueLimit: &room}},
		Connections: 3, Phases: map[string]int{"serving": 3}, Accepted: 10, Closed: map[string]uint64{"client-closed": 7},
		GraceSeconds: 5,
	}
}

// answers gives the status a second later.
func (r *rig) answers(st control.Status) {
	r.at = r.at.Add(time.Second)
	r.Update(statusMsg{r.at, st})
}

// aConn is a connection opened so many seconds before the test began.
func (r *rig) aConn(id uint64, bytes uint64) control.Conn {
	return control.Conn{
		ID: id, Remote: fmt.Sprintf("192.0.2.%d:%d", id, 50_000-id), Local: "127.0.0.1:9999", State: "serving",
		Opened: r.at.Add(-time.Duration(id) * time.Minute), IdleSeconds: float64(id), BytesIn: bytes, BytesOut: bytes,
	}
}

// lists gives a list that began a second ago.
func (r *rig) lists(open ...control.Conn) {
	began := r.at
	r.at = r.at.Add(time.Second)
	r.Update(listMsg{began: began, at: r.at, open: open})
}

// happens gives events.
func (r *rig) happens(events ...control.Event) { r.Update(eventsMsg{r.at, events}) }

func opened(c control.Conn) control.Event { return control.Event{Type: "opened", Conn: &c} }

func closed(c control.ClosedConn) control.Event { return control.Event{Type: "closed", Closed: &c} }

// presses presses keys, and types what is longer than a character and no key's name.
func (r *rig) presses(keys ...string) {
	special := map[string]rune{"enter": tea.KeyEnter, "esc": tea.KeyEscape, "tab": tea.KeyTab, "backspace": tea.KeyBackspace, "down": tea.KeyDown, "up": tea.KeyUp}
	for _, key := range keys {
		if code, ok := special[key]; ok {
			r.Update(tea.KeyPressMsg{Code: code})
			continue
		}
		for _, char := range key {
			r.Update(tea.KeyPressMsg{Code: char, Text: string(char)})
		}
	}
}

var styling = regexp.MustCompile("\x1b\\[[0-9;]*m")

// shows is the screen without its styles, its lines without the spaces at their ends.
func (r *rig) shows() string {
	lines := strings.Split(styling.ReplaceAllString(r.View().Content, ""), "\n")
	for i, line := range lines {
		lines[i] = strings.TrimRight(line, " ")
	}
	return strings.Join(lines, "\n")
}

// expect checks that the screen shows a line that matches pattern, and expectNot that it shows none.
func (r *rig) expect(pattern string) {
	r.t.Helper()
	if !regexp.MustCompile(`(?m)` + pattern).MatchString(r.shows()) {
		r.t.Fatalf("the screen shows no %s:\n%s", pattern, r.shows())
	}
}

func (r *rig) expectNot(pattern string) {
	r.t.Helper()
	if regexp.MustCompile(`(?m)` + pattern).MatchString(r.shows()) {
		r.t.Fatalf("the screen shows %s:\n%s", pattern, r.shows())
	}
}

// expectOrder checks which connections the table shows.
func (r *rig) expectOrder(ids ...uint64) {
	r.t.Helper()
	var got []uint64
	for _, row := range r.table.shown {
		got = append(got, row.ID)
	}
	if fmt.Sprint(got) != fmt.Sprint(ids) {
		r.t.Fatalf("shown are %v, want %v:\n%s", got, ids, r.shows())
	}
}

// gone is what a client says when there is no server.
func gone() error { return &control.UnreachableError{Path: "/run/c", Err: fs.ErrNotExist} }

// failing is an action that fails.
func failing(err error) action {
	return func(context.Context, *control.Client) (string, error) { return "", err }
}
