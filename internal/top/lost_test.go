package top

import (
	"errors"
	"testing"
	"time"

	"echod/control"
)

func TestServerThatHasGone(t *testing.T) {
	r := newRig(t)
	r.lists(r.aConn(1, 0))
	r.presses("D") // whose question has then become pointless
	r.Update(lostMsg{r.at, gone()})
	r.at = r.at.Add(12 * time.Second)
	r.Update(lostMsg{r.at, gone()})
	r.expect(`^ gone  echod 1\.2\.3  pid 4711`)
	r.expect(`^gone         connection lost 12s ago, trying again on /run/c$`)
	r.expect(`^0 connections$`)
	r.expectOrder()
	r.presses("p")
	r.expect(`^the server does not answer$`)
	r.lists(r.aConn(1, 0)) // which was under way
	r.expectOrder()

	st := aStatus()
	st.PID, st.Accepted = 5000, 1
	r.answers(st)
	r.expect(`^ running  echod 1\.2\.3  pid 5000`)
	r.expect(`^another server answers now: pid 5000$`)
	r.expect(`^accepts +0/s +max 0 `)
	r.lists(r.aConn(1, 0))
	r.expectOrder(1)
}

func TestServerThatHasStopped(t *testing.T) {
	r := newRig(t)
	st := aStatus()
	st.State, st.Drain = "draining", &control.Drain{Reason: "SIGTERM", Deadline: r.at}
	r.answers(st)
	r.happens(control.Event{Type: "state", State: "stopped"})
	r.answers(st) // which was under way
	r.Update(lostMsg{r.at, gone()})
	r.expect(`^ stopped  echod`)
	r.expect(`^stopped      the server has stopped, 0\.0s ago \(SIGTERM\); waiting for another$`)
}

// TestOfAServerThatHasStoppedNothingGoesOn: neither its rates, nor what it said last, nor what held it.
func TestOfAServerThatHasStoppedNothingGoesOn(t *testing.T) {
	r := newRig(t)
	st := aStatus()
	st.Accepted += 100
	st.Holds = []control.Hold{{ID: "h1"}}
	r.answers(st)
	r.Update(doneMsg{said: "the server is draining, until 12:00:00 at the latest"})
	r.expect(`^accepts +100/s .* max 100 `)
	r.expect(`^hold h1 `)
	r.expect(`^the server is draining`)
	r.Update(lostMsg{r.at, gone()})
	r.expect(`^accepts +- .* max 100 `)
	r.expectNot(`^the server is draining|hold h1`)
	r.presses("p")
	r.at = r.at.Add(30 * time.Second)
	r.Update(lostMsg{r.at, gone()})
	r.expect(`^the server does not answer$`) // which was said since
	r.expect(`^accepts +- +\S+ +max 100 `)   // half a minute ago
	r.at = r.at.Add(time.Minute)
	r.Update(lostMsg{r.at, gone()})
	r.expect(`^accepts +- +max 0 `)
}

func TestServerThatDoesNotAnswerKeepsItsConnections(t *testing.T) {
	r := newRig(t)
	r.lists(r.aConn(1, 0))
	r.Update(lostMsg{r.at, errors.New("no answer within 2s")})
	r.expect(`^ no answer  echod`)
	r.expect(`^no answer    for 0\.0s, what follows is from before: no answer within 2s$`)
	r.expectOrder(1)
	r.answers(aStatus())
	r.expect(`^ running `)
	r.expect(`^the server answers again, after 1\.0s$`)
}
