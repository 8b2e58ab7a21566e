package top

import (
	"errors"
	"strings"
	"testing"
	"time"

	"echod/control"
)

func TestHeaderTellsWhatHolds(t *testing.T) {
	r := newRig(t)
	r.expect(`^ running  echod 1\.2\.3  pid 4711  up 1h00m +\d\d:00:01$`)
	r.expect(`^listening    127\.0\.0\.1:9999, 2 waiting \(room for 4096\)$`)
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
	r.expect(`^             and 1 hold more$`)

	st = aStatus()
	until := r.at.Add(3 * time.Second)
	st.State = "draining"
	st.Drain = &control.Drain{Reason: "SIGTERM", AcceptingUntil: &until, Deadline: r.at.Add(9 * time.Second)}
	r.answers(st)
	r.expect(`^draining     SIGTERM: new clients are served for 2\.0s more, 8\.0s left in all$`)
	st.Drain.Notified, st.Drain.NoticeFailed, st.Listeners = 3, 1, nil
	r.answers(st)
	r.answers(st)
	r.expect(`^draining     SIGTERM: 6\.0s left, 3 told, 1 not to be told$`)
	r.expect(`^listening    on nothing$`)
}

func TestRatesComeFromTheCounters(t *testing.T) {
	r := newRig(t)
	st := aStatus()
	st.Accepted, st.Closed, st.BytesIn, st.BytesOut = 30, map[string]uint64{"client-closed": 10, "killed": 2}, 2_500_000, 1_000
	r.answers(st)
	r.expect(`^accepts +20/s .*max 20 +in +2\.5 MB/s .*max 2\.5 MB$`)
	r.expect(`^closes +5\.0/s .*max 5\.0 +out +1\.0 kB/s .*max 1\.0 kB$`)
	// A look right after the last would make much of little.
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
		t.Errorf("%d steps are kept of a minute", n)
	}
}

func TestConnectionsComeAndGoByEvents(t *testing.T) {
	r := newRig(t)
	r.lists(r.aConn(1, 0), r.aConn(2, 0))
	r.expectOrder(1, 2)
	r.happens(opened(r.aConn(3, 0)), closed(control.ClosedConn{ID: 1, Remote: "192.0.2.1:49999", Reason: "idle-timeout", Closed: r.at}))
	r.expectOrder(2, 3)
	r.presses("tab")
	r.expect(`^ +1 192\.0\.2\.1:49999 +idle-timeout `)

	// The list began before these events, and does not undo them.
	r.Update(listMsg{began: r.at.Add(-time.Second), at: r.at, open: []control.Conn{r.aConn(1, 0), r.aConn(2, 0)}})
	r.expectOrder(2, 3)
	// The next one began after them: what it lacks has closed in an event that was missed.
	r.at = r.at.Add(time.Second)
	r.lists(r.aConn(3, 0), r.aConn(4, 0))
	r.expectOrder(3, 4)
	if len(r.table.gone) != 0 {
		t.Errorf("%d closed connections are still remembered as such", len(r.table.gone))
	}
}

func TestClosedConnectionsAreListedOnceAndTheLatestFirst(t *testing.T) {
	r := newRig(t)
	r.presses("tab")
	at := func(id uint64) control.ClosedConn {
		return control.ClosedConn{ID: id, Remote: "192.0.2.1:1", Reason: "killed", Closed: r.at.Add(time.Duration(id) * time.Second)}
	}
	r.Update(listMsg{began: r.at, at: r.at, closed: []control.ClosedConn{at(3), at(2)}})
	r.happens(closed(at(1)), closed(at(3)), closed(at(4)))
	r.expect(` 4 192.*\n +3 192.*\n +2 192.*\n +1 192.*\n\n`)
	for id := range uint64(2 * maxClosed) {
		r.happens(closed(at(id + 10)))
	}
	if len(r.closed) != maxClosed || r.closed[0].ID != 2*maxClosed+9 {
		t.Errorf("%d are kept, the first is %d", len(r.closed), r.closed[0].ID)
	}
}

func TestTableIsBounded(t *testing.T) {
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
	r.expect(`^20,000 of 20,100 connections, of which the oldest 20,000 are looked at$`)
	for id := range uint64(maxRows + 100) {
		r.table.closed(id+1, r.at)
	}
	if len(r.table.rows) != 0 || len(r.table.gone) > maxRows {
		t.Errorf("%d rows and %d that are gone", len(r.table.rows), len(r.table.gone))
	}
}

func TestSorting(t *testing.T) {
	r := newRig(t)
	r.lists(r.aConn(1, 100), r.aConn(2, 0), r.aConn(10, 50))
	r.lists(r.aConn(1, 200), r.aConn(2, 400), r.aConn(10, 50))
	closing := r.aConn(3, 1000)
	closing.State = "closing"
	r.happens(opened(closing))
	r.expect(` RATE▼$`)
	r.expectOrder(2, 1, 3, 10) // 800 B/s, 200, not known, 0
	for _, next := range []struct {
		title string
		order []uint64
	}{
		{"ID▲", []uint64{1, 2, 3, 10}},
		{"REMOTE▲", []uint64{1, 2, 3, 10}}, // by number, not by letter
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

func TestFilterWorksWhileItIsTyped(t *testing.T) {
	r := newRig(t)
	closing := r.aConn(3, 0)
	closing.State = "closing"
	r.lists(r.aConn(1, 0), r.aConn(21, 0), closing)
	r.presses("/")
	r.expect(`^Show which addresses or phases\?$`)
	r.presses("192.0.2.2")
	r.expectOrder(21)
	r.presses("backspace")
	r.expectOrder(1, 3, 21)
	r.presses("esc")
	r.expectOrder(1, 3, 21)
	r.presses("/", "CLOSING", "enter")
	r.expectOrder(3)
	r.expect(`^1 of 3 connections, with "closing" \(esc: all\)$`)
	r.happens(opened(r.aConn(4, 0)))
	r.expectOrder(3)
	r.presses("/", "esc") // which gives up what was typed, and not the filter
	r.expectOrder(3)
	r.presses("esc")
	r.expectOrder(1, 3, 4, 21)
}

func TestSelectionStaysWithItsConnection(t *testing.T) {
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
	r.happens(closed(control.ClosedConn{ID: 31}))
	r.expectNot(`^>`)
}

func TestKillAsksAboutTheSelectedConnection(t *testing.T) {
	r := newRig(t)
	r.lists(r.aConn(1, 0), r.aConn(2, 0))
	r.presses("x")
	r.expect(`^select an open connection first`)
	r.presses("j", "j", "x")
	r.expect(`^Kill connection 2 from 192\.0\.2\.2:49998, open for 2m01s: what was read of it is\nwritten back, then it is closed\. y/N$`)
	r.presses("enter")
	r.expect(`^nothing was done$`)
	r.presses("x", "y")
	r.expect(`^waiting for the server to answer$`)
	if len(r.asked) != 1 {
		t.Fatalf("%d actions were asked for", len(r.asked))
	}
	r.presses("x")
	r.expect(`^waiting for the server to answer$`)
	r.Update(doneMsg{said: "killed connection 2"})
	r.expect(`^killed connection 2$`)
	r.presses("k")
	r.expectNot(`killed`)
}

func TestEachQuestionSaysWhatWillHappen(t *testing.T) {
	r := newRig(t)
	ask := func(want string, keys ...string) {
		t.Helper()
		r.presses(keys...)
		if got := strings.ReplaceAll(r.shows(), "\n", " "); !strings.Contains(got, want) {
			t.Errorf("asked for %q:\n%s", want, r.shows())
		}
		r.presses("n")
	}
	ask("Pause the server (disk swap): new clients wait until it is resumed; who is connected (3) notices nothing. y/N", "p", "disk swap", "enter")
	ask("Pause the server: new clients", "p", "enter")
	ask("nothing to resume: the server is running", "u")
	ask("Drain the server: 3 clients are told and given 5s to finish; then it stops. y/N", "D")

	st := aStatus()
	st.Connections, st.GraceSeconds, st.DrainDelaySeconds = 1, 0, 2
	r.answers(st)
	ask("Drain the server: new clients are served for 2s more, then 1 client is told and closed at once; then it stops. y/N", "D")
	st.Holds = []control.Hold{{ID: "h1", Reason: strings.Repeat("disk ", 30)}}
	r.answers(st)
	ask("Drain the server: it stays paused for 2s more, then 1 client and all who wait are told and closed at once; then it stops. y/N", "D")
	ask("Resume the server: 1 hold is released (h1 disk disk disk disk disk disk…), and new clients are served. y/N", "u")
	st.Drain = &control.Drain{Reason: "SIGTERM", Deadline: r.at.Add(10 * time.Second), AcceptingUntil: new(r.at.Add(3 * time.Second))}
	r.answers(st)
	r.expect(`^draining     SIGTERM: new clients wait for 2.0s more, 9.0s left in all$`)
	st.Drain = nil
	st.State, st.Holds = "paused", []control.Hold{{ID: "h1", Reason: "a"}, {ID: "h2"}, {ID: "h3"}, {ID: "h4"}}
	r.answers(st)
	ask("Resume the server: 4 holds are released (h1 a, h2, h3 and 1 more), and new clients are served. y/N", "u")
	st.State, st.Drain = "draining", &control.Drain{Deadline: r.at.Add(10 * time.Second)}
	r.answers(st)
	ask("End the drain: 1 client is closed now, 9.0s before their time is up; then the server stops. y/N", "D")
	if len(r.asked) > 0 {
		t.Errorf("%d actions were asked for, all were declined", len(r.asked))
	}
}

func TestRefusalsAndFailuresAreSaidInALine(t *testing.T) {
	r := newRig(t)
	r.Update(doneMsg{err: &control.Problem{Title: "The server is draining", Detail: "the server is draining until noon"}})
	r.expect(`^the server refuses: the server is draining until noon$`)
	r.Update(doneMsg{err: errors.New("no answer within 10s\n\x1b[2Jboo")})
	r.expect(`^no answer within 10s\.\.\[2Jboo$`)
	r.Update(troubleMsg{"events", &control.Problem{Detail: "too many streams"}})
	r.expect(`^no events: too many streams$`)
	for range 11 {
		r.answers(aStatus())
	}
	r.expectNot(`streams`)
	r.engaged = true
	r.presses("D", "y")
	r.expect(`^the server has not answered to what was asked before$`)
}
