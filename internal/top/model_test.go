package top

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"strings"
	"testing"
	"time"

	tea "charm.land/bubbletea/v2"
	"go.uber.org/goleak"

	"echod/control"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// rig is a model on a screen of 80x24, with its own clock. It records the actions that it should run.
type rig struct {
	*model
	t       *testing.T
	at      time.Time
	actions []action
	refuse  bool // actions
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
	if !r.refuse {
		r.actions = append(r.actions, a)
	}
	return !r.refuse
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

// answers passes a status to the model, a second later.
func (r *rig) answers(st control.Status) {
	r.at = r.at.Add(time.Second)
	r.Update(statusMsg{r.at, st})
}

// aConn returns a connection that was opened id minutes ago.
func (r *rig) aConn(id uint64, bytes uint64) control.Conn {
	return control.Conn{
		ID: id, Remote: fmt.Sprintf("192.0.2.%d:%d", id, 50_000-id), Local: "127.0.0.1:9999", State: "serving",
		Opened: r.at.Add(-time.Duration(id) * time.Minute), IdleSeconds: float64(id), BytesIn: bytes, BytesOut: bytes,
	}
}

// lists passes a list to the model that began a second ago.
func (r *rig) lists(open ...control.Conn) {
	began := r.at
	r.at = r.at.Add(time.Second)
	r.Update(listMsg{began: began, at: r.at, open: open})
}

// happens passes events to the model.
func (r *rig) happens(events ...control.Event) { r.Update(eventsMsg{r.at, events}) }

func openedEvent(c control.Conn) control.Event { return control.Event{Type: "opened", Conn: &c} }

func closedEvent(c control.ClosedConn) control.Event {
	return control.Event{Type: "closed", Closed: &c}
}

// presses presses the named keys, and types other texts.
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

// shows returns the screen without styles and without trailing spaces.
func (r *rig) shows() string {
	lines := strings.Split(styling.ReplaceAllString(r.View().Content, ""), "\n")
	for i, line := range lines {
		lines[i] = strings.TrimRight(line, " ")
	}
	return strings.Join(lines, "\n")
}

// expect checks that a line of the screen matches pattern, and expectNot that none does.
func (r *rig) expect(pattern string) {
	r.t.Helper()
	if !regexp.MustCompile(`(?m)` + pattern).MatchString(r.shows()) {
		r.t.Fatalf("the screen does not show %s:\n%s", pattern, r.shows())
	}
}

func (r *rig) expectNot(pattern string) {
	r.t.Helper()
	if regexp.MustCompile(`(?m)` + pattern).MatchString(r.shows()) {
		r.t.Fatalf("the screen shows %s:\n%s", pattern, r.shows())
	}
}

// expectOrder checks which connections the table shows, in order.
func (r *rig) expectOrder(ids ...uint64) {
	r.t.Helper()
	var got []uint64
	for _, row := range r.table.shown {
		got = append(got, row.ID)
	}
	if fmt.Sprint(got) != fmt.Sprint(ids) {
		r.t.Fatalf("shows %v, want %v:\n%s", got, ids, r.shows())
	}
}

// gone returns a client's error for a server that is away.
func gone() error { return &control.UnreachableError{Path: "/run/c", Err: fs.ErrNotExist} }

// failing returns an action that fails.
func failing(err error) action {
	return func(context.Context, *control.Client) (string, error) { return "", err }
}

func TestHeader(t *testing.T) {
	r := newRig(t)
	r.expect(`^ running  echod 1\.2\.3  pid 4711  up 1h00m +\d\d:00:01$`)
	r.expect(`^listening    127\.0\.0\.1:9999, 2 of 4096 in the accept queue$`)
	r.expect(`^connections  3 open, 10 accepted$`)

	st := aStatus()
	expires := r.at.Add(10 * time.Minute)
	uid, pid := 0, 812
	st.State, st.Phases = "paused", map[string]int{"serving": 2, "waiting": 1}
	st.Holds = []control.Hold{
		{ID: "h1", Reason: "backup", Mode: "hold", Since: r.at.Add(-time.Minute), Expires: &expires, UID: &uid, PID: &pid},
		{ID: "h2", Mode: "reject", Since: r.at},
		{ID: "h3", Mode: "hold", Since: r.at},
		{ID: "h4", Mode: "hold", Since: r.at},
	}
	r.answers(st)
	r.expect(`^ paused  echod`)
	r.expect(`^hold h1      "backup", for 1m01s, expires in 9m59s, by uid 0, pid 812$`)
	r.expect(`^hold h2      mode reject, for 1\.0s$`)
	r.expect(`^connections  3 open \(1 waiting\), 10 accepted$`)
	r.expectNot(`hold h4`)
	r.expect(`^             1 hold more$`)

	st = aStatus()
	until := r.at.Add(3 * time.Second)
	st.State = "draining"
	st.Drain = &control.Drain{Reason: "SIGTERM", AcceptingUntil: &until, Deadline: r.at.Add(9 * time.Second)}
	r.answers(st)
	r.expect(`^draining     SIGTERM: new clients are served for 2\.0s more, 8\.0s left in total$`)
	st.Drain.Notified, st.Drain.NoticeFailed, st.Listeners = 3, 1, nil
	r.answers(st)
	r.answers(st)
	r.expect(`^draining     SIGTERM: 6\.0s left, 3 notified, 1 failed$`)
	r.expect(`^listening    no$`)
}

func TestRates(t *testing.T) {
	r := newRig(t)
	st := aStatus()
	st.Accepted, st.Closed, st.BytesIn, st.BytesOut = 30, map[string]uint64{"client-closed": 10, "killed": 2}, 2_500_000, 1_000
	r.answers(st)
	r.expect(`^accepts +20/s .*max 20 +in +2\.5 MB/s .*max 2\.5 MB$`)
	r.expect(`^closes +5\.0/s .*max 5\.0 +out +1\.0 kB/s .*max 1\.0 kB$`)
	// A status right after the last one would give noise.
	st.Accepted++
	r.Update(statusMsg{r.at.Add(time.Millisecond), st})
	r.expect(`^accepts +20/s `)
	st.Accepted++
	r.answers(st)
	r.expect(`^accepts +2\.0/s .*max 20`)
	for range 70 {
		r.answers(st)
	}
	r.expect(`^accepts +0/s .*max 0 `)
	if n := len(r.rates.steps); n > 61 {
		t.Errorf("%d steps for a minute", n)
	}
}

func TestConnectionEvents(t *testing.T) {
	r := newRig(t)
	r.lists(r.aConn(1, 0), r.aConn(2, 0))
	r.expectOrder(1, 2)
	r.happens(openedEvent(r.aConn(3, 0)), closedEvent(control.ClosedConn{ID: 1, Remote: "192.0.2.1:49999", Reason: "idle-timeout", Closed: r.at}))
	r.expectOrder(2, 3)
	r.presses("tab")
	r.expect(`^ +1 192\.0\.2\.1:49999 +idle-timeout `)

	// This list began before the events, and does not undo them.
	r.Update(listMsg{began: r.at.Add(-time.Second), at: r.at, open: []control.Conn{r.aConn(1, 0), r.aConn(2, 0)}})
	r.expectOrder(2, 3)
	// The next one began after them: a connection that it lacks has closed in a missed event.
	r.at = r.at.Add(time.Second)
	r.lists(r.aConn(3, 0), r.aConn(4, 0))
	r.expectOrder(3, 4)
	if len(r.table.gone) != 0 {
		t.Errorf("%d closed connections are still remembered", len(r.table.gone))
	}
}

func TestNewConnectionsDoNotSeemToWait(t *testing.T) {
	r := newRig(t)
	c := r.aConn(5, 0)
	c.State = "waiting"
	r.happens(openedEvent(c))
	r.expect(` +5 192.* new `)
	r.lists(c)
	r.expect(` +5 192.* waiting `)
}

func TestClosedConnections(t *testing.T) {
	r := newRig(t)
	r.presses("tab")
	at := func(id uint64) control.ClosedConn {
		return control.ClosedConn{ID: id, Remote: "192.0.2.1:1", Reason: "killed", Closed: r.at.Add(time.Duration(id) * time.Second)}
	}
	r.Update(listMsg{began: r.at, at: r.at, closed: []control.ClosedConn{at(3), at(2)}})
	r.happens(closedEvent(at(1)), closedEvent(at(3)), closedEvent(at(4)))
	r.expect(` 4 192.*\n +3 192.*\n +2 192.*\n +1 192.*\n\n`)
	for id := range uint64(2 * maxClosed) {
		r.happens(closedEvent(at(id + 10)))
	}
	if len(r.closed) != maxClosed || r.closed[0].ID != 2*maxClosed+9 {
		t.Errorf("%d are kept, the first is %d", len(r.closed), r.closed[0].ID)
	}
}

func TestTableLimit(t *testing.T) {
	r := newRig(t)
	for id := range uint64(maxRows + 100) {
		r.table.opened(r.aConn(id+1, 0), r.at)
	}
	r.table.arrange()
	if len(r.table.rows) != maxRows {
		t.Errorf("%d rows, want %d", len(r.table.rows), maxRows)
	}
	st := aStatus()
	st.Connections = maxRows + 100
	r.answers(st)
	r.expect(`^20,000 of 20,100 connections; only the oldest 20,000 are considered$`)
	for id := range uint64(maxRows + 100) {
		r.table.closed(id+1, r.at)
	}
	if len(r.table.rows) != 0 || len(r.table.gone) > maxRows {
		t.Errorf("%d rows and %d that are gone", len(r.table.rows), len(r.table.gone))
	}
}

func TestSort(t *testing.T) {
	r := newRig(t)
	r.lists(r.aConn(1, 100), r.aConn(2, 0), r.aConn(10, 50))
	r.lists(r.aConn(1, 200), r.aConn(2, 400), r.aConn(10, 50))
	closing := r.aConn(3, 1000)
	closing.State = "closing"
	r.happens(openedEvent(closing))
	r.expect(` RATE▼$`)
	r.expectOrder(2, 1, 3, 10) // 800 B/s, 200, unknown, 0
	for _, next := range []struct {
		title string
		order []uint64
	}{
		{"ID▲", []uint64{1, 2, 3, 10}},
		{"REMOTE▲", []uint64{1, 2, 3, 10}}, // as numbers, not as text
		{"LOCAL▲", []uint64{1, 2, 3, 10}},
		{"PHASE▲", []uint64{3, 1, 2, 10}},
		{"AGE▼", []uint64{10, 3, 2, 1}},
		{"IDLE▼", []uint64{10, 3, 2, 1}},
		{"IN▼", []uint64{3, 2, 1, 10}},
		{"OUT▼", []uint64{3, 2, 1, 10}},
		{"RATE▼", []uint64{2, 1, 3, 10}},
	} {
		r.presses("s")
		r.expect(next.title)
		r.expectOrder(next.order...)
	}
	r.presses("r")
	r.expect(`RATE▲`)
	r.expectOrder(3, 10, 1, 2)
	r.presses("S")
	r.expect(`OUT▼`)
}

func TestFilter(t *testing.T) {
	r := newRig(t)
	closing := r.aConn(3, 0)
	closing.State = "closing"
	r.lists(r.aConn(1, 0), r.aConn(21, 0), closing)
	r.presses("/")
	r.expect(`^Filter by address or phase:$`)
	r.presses("192.0.2.2")
	r.expectOrder(21)
	r.presses("backspace")
	r.expectOrder(1, 3, 21)
	r.presses("esc")
	r.expectOrder(1, 3, 21)
	r.presses("/", "CLOSING", "enter")
	r.expectOrder(3)
	r.expect(`^1 of 3 connections, filtered by "closing" \(esc: all\)$`)
	r.happens(openedEvent(r.aConn(4, 0)))
	r.expectOrder(3)
	r.presses("/", "esc") // cancels the dialog, and keeps the filter
	r.expectOrder(3)
	r.presses("esc")
	r.expectOrder(1, 3, 4, 21)
}

func TestSelection(t *testing.T) {
	r := newRig(t)
	var all []control.Conn
	for id := range uint64(40) {
		all = append(all, r.aConn(id+1, 0))
	}
	r.lists(all...)
	r.expectNot(`^>`)
	r.presses("down", "j", "j", "up")
	r.expect(`^> +2 192`)
	all[1].BytesIn, all[0].BytesIn = 1, 1000
	all[30].BytesIn = 5000
	r.lists(all...)
	r.expect(`^ +31 192.*\n +1 192.*\n> +2 192`)
	r.presses("G")
	r.expect(`^> +40 192`)
	r.expectNot(`^ +31 192`)
	r.presses("g")
	r.expect(`RATE▼\n> +31 192`)
	r.happens(closedEvent(control.ClosedConn{ID: 31}))
	r.expectNot(`^>`)
}

func TestKill(t *testing.T) {
	r := newRig(t)
	r.lists(r.aConn(1, 0), r.aConn(2, 0))
	r.presses("x")
	r.expect(`^select an open connection first`)
	r.presses("j", "j", "x")
	r.expect(`^Close connection 2 from 192\.0\.2\.2:49998, open for 2m01s\? It gets what was read\nback first\. y/N$`)
	r.presses("enter")
	r.expect(`^cancelled$`)
	r.presses("x", "y")
	r.expect(`^waiting for the server's answer$`)
	if len(r.actions) != 1 {
		t.Fatalf("%d actions, want 1", len(r.actions))
	}
	r.presses("x")
	r.expect(`^waiting for the server's answer$`)
	r.Update(doneMsg{result: "killed connection 2"})
	r.expect(`^killed connection 2$`)
	r.presses("k")
	r.expectNot(`killed`)
}

func TestQuestions(t *testing.T) {
	r := newRig(t)
	ask := func(want string, keys ...string) {
		t.Helper()
		r.presses(keys...)
		if got := strings.ReplaceAll(r.shows(), "\n", " "); !strings.Contains(got, want) {
			t.Errorf("asked for %q:\n%s", want, r.shows())
		}
		r.presses("n")
	}
	ask("Pause the server (disk swap)? New clients wait until it is resumed; the 3 connections continue. y/N", "p", "disk swap", "enter")
	ask("Pause the server? New clients", "p", "enter")
	ask("nothing to resume: the server is running", "u")
	ask("Drain the server? It notifies 3 clients, gives them 5s to finish, and stops. y/N", "D")

	st := aStatus()
	st.Connections, st.GraceSeconds, st.DrainDelaySeconds = 1, 0, 2
	r.answers(st)
	ask("Drain the server? For 2s new clients are served; then it notifies 1 client, closes them at once, and stops. y/N", "D")
	st.Holds = []control.Hold{{ID: "h1", Reason: strings.Repeat("disk ", 30)}}
	r.answers(st)
	ask("Drain the server? For 2s the server stays paused; then it notifies 1 client and all waiting ones, closes them at once, and stops. y/N", "D")
	ask("Resume the server? This releases 1 hold (h1 disk disk disk disk disk disk…). y/N", "u")
	st.Drain = &control.Drain{Reason: "SIGTERM", Deadline: r.at.Add(10 * time.Second), AcceptingUntil: new(r.at.Add(3 * time.Second))}
	r.answers(st)
	r.expect(`^draining     SIGTERM: new clients wait for 2.0s more, 9.0s left in total$`)
	st.Drain = nil
	st.State, st.Holds = "paused", []control.Hold{{ID: "h1", Reason: "a"}, {ID: "h2"}, {ID: "h3"}, {ID: "h4"}}
	r.answers(st)
	ask("Resume the server? This releases 4 holds (h1 a, h2, h3 and 1 more). y/N", "u")
	st.State, st.Drain = "draining", &control.Drain{Deadline: r.at.Add(10 * time.Second)}
	r.answers(st)
	ask("End the drain? This closes 1 connection now, 9.0s before the deadline. y/N", "D")
	if len(r.actions) > 0 {
		t.Errorf("%d actions ran, all were cancelled", len(r.actions))
	}
}

func TestNotes(t *testing.T) {
	r := newRig(t)
	r.Update(doneMsg{err: &control.Problem{Title: "The server is draining", Detail: "the server is draining until noon"}})
	r.expect(`^the server refused: the server is draining until noon$`)
	r.Update(doneMsg{err: errors.New("no answer within 10s\n\x1b[2Jboo")})
	r.expect(`^no answer within 10s\\n\\x1b\[2Jboo$`)
	r.Update(troubleMsg{"reading events", &control.Problem{Detail: "too many streams"}})
	r.expect(`^reading events: too many streams$`)
	for range 11 {
		r.answers(aStatus())
	}
	r.expectNot(`streams`)
	r.refuse = true
	r.presses("D", "y")
	r.expect(`^the server has not answered the last request yet$`)
}

func TestServerThat(t *testing.T) {
	t.Run("has gone: its connections are dropped, and a new server is announced", func(t *testing.T) {
		r := newRig(t)
		r.lists(r.aConn(1, 0))
		r.presses("D") // the dialog ends with the server
		r.Update(lostMsg{r.at, gone()})
		r.at = r.at.Add(12 * time.Second)
		r.Update(lostMsg{r.at, gone()})
		r.expect(`^ gone  echod 1\.2\.3  pid 4711`)
		r.expect(`^gone         connection lost 12s ago; reconnecting to /run/c$`)
		r.expect(`^0 connections$`)
		r.expectOrder()
		r.presses("p")
		r.expect(`^the server does not answer$`)
		r.lists(r.aConn(1, 0)) // was on its way
		r.expectOrder()

		st := aStatus()
		st.PID, st.Accepted = 5000, 1
		r.answers(st)
		r.expect(`^ running  echod 1\.2\.3  pid 5000`)
		r.expect(`^a new server answers: pid 5000$`)
		r.expect(`^accepts +0/s +max 0 `)
		r.lists(r.aConn(1, 0))
		r.expectOrder(1)
	})
	t.Run("has stopped: the reason remains", func(t *testing.T) {
		r := newRig(t)
		st := aStatus()
		st.State, st.Drain = "draining", &control.Drain{Reason: "SIGTERM", Deadline: r.at}
		r.answers(st)
		r.happens(control.Event{Type: "state", State: "stopped"})
		r.answers(st) // was on its way
		r.Update(lostMsg{r.at, gone()})
		r.expect(`^ stopped  echod`)
		r.expect(`^stopped      the server stopped 0\.0s ago \(SIGTERM\); waiting for the next one$`)
	})
	t.Run("has gone: its rates, notes and holds disappear", func(t *testing.T) {
		r := newRig(t)
		st := aStatus()
		st.Accepted += 100
		st.Holds = []control.Hold{{ID: "h1"}}
		r.answers(st)
		r.Update(doneMsg{result: "the server is draining until 12:00:00 at the latest"})
		r.expect(`^accepts +100/s .* max 100 `)
		r.expect(`^hold h1 `)
		r.expect(`^the server is draining`)
		r.Update(lostMsg{r.at, gone()})
		r.expect(`^accepts +- .* max 100 `)
		r.expectNot(`^the server is draining|hold h1`)
		r.presses("p")
		r.at = r.at.Add(30 * time.Second)
		r.Update(lostMsg{r.at, gone()})
		r.expect(`^the server does not answer$`) // a note of the last key
		r.expect(`^accepts +- +\S+ +max 100 `)   // half a minute ago
		r.at = r.at.Add(time.Minute)
		r.Update(lostMsg{r.at, gone()})
		r.expect(`^accepts +- +max 0 `)
	})
	t.Run("hangs: its connections remain", func(t *testing.T) {
		r := newRig(t)
		r.lists(r.aConn(1, 0))
		r.Update(lostMsg{r.at, errors.New("no answer within 2s")})
		r.expect(`^ no answer  echod`)
		r.expect(`^no answer    for 0\.0s; the values below are old: no answer within 2s$`)
		r.expectOrder(1)
		r.answers(aStatus())
		r.expect(`^ running `)
		r.expect(`^the server answers again, after 1\.0s$`)
	})
}
