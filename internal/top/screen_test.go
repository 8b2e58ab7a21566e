package top

import (
	"fmt"
	"strings"
	"testing"

	tea "charm.land/bubbletea/v2"
	"charm.land/lipgloss/v2"

	"echod/control"
)

// TestNothingOfOthersMovesTheCursor: neither an address nor a reason.
func TestNothingOfOthersMovesTheCursor(t *testing.T) {
	r := newRig(t)
	c := r.aConn(1, 0)
	c.Remote = "evil\x1b[2J\u202e:1"
	r.lists(c)
	r.happens(closed(control.ClosedConn{ID: 2, Remote: c.Remote, Reason: "client-closed", Closed: r.at}))
	st := aStatus()
	st.Holds = []control.Hold{{ID: "h1", Reason: "disk\x1b[2J\u202e"}}
	r.answers(st)
	r.expect(`evil\.\[2J\.:1`)
	for _, keys := range []string{"u", "n", "tab"} {
		r.presses(keys)
		if screen := r.View().Content; strings.Contains(screen, "\x1b[2J") || strings.Contains(screen, "\u202e") {
			t.Errorf("after %s the screen shows %q", keys, screen)
		}
		if keys == "u" {
			r.expect(`h1 disk\.\[2J\.`)
		}
	}
}

// TestWhatIsTypedIsSeen: the end of it, when there is no room for all.
func TestWhatIsTypedIsSeen(t *testing.T) {
	r := newRig(t)
	r.presses("p", strings.Repeat("long ", 20)+"the end")
	r.expect(`^Pause, for what reason\? ….*long the end$`)
	if c := r.View().Cursor; c == nil || c.X != 79 {
		t.Errorf("the cursor is at %+v, want it at the end of the line", c)
	}
}

// TestScreensOfAllSizes: whatever is shown, it fits.
func TestScreensOfAllSizes(t *testing.T) {
	r := newRig(t)
	for id := range uint64(100) {
		r.table.opened(r.aConn(id+1, 1<<(id%60)), r.at)
	}
	strange := r.aConn(101, 0)
	strange.Remote = "[2001:db8:ffff:ffff:ffff:ffff:ffff:ffff%日本]:65535"
	r.happens(opened(strange), closed(control.ClosedConn{ID: 12_345_678, Remote: strange.Remote, Reason: "rejected-unidentified", Closed: r.at}))
	paused := aStatus()
	for i := range 9 {
		paused.Holds = append(paused.Holds, control.Hold{ID: fmt.Sprintf("h%d", i), Reason: strings.Repeat("long ", 30)})
	}
	situations := []func(){
		func() { r.answers(paused) },
		func() { r.presses("j", "x") },
		func() { r.presses("n", "p", strings.Repeat("why ", 60)) },
		func() { r.presses("enter") },
		func() { r.presses("n", "tab") },
		func() { r.presses("?") },
		func() { r.Update(lostMsg{r.at, gone()}) },
	}
	for i, situation := range situations {
		situation()
		for _, width := range []int{0, 1, 2, 3, 7, 13, 20, 29, 40, 41, 59, 60, 79, 80, 81, 97, 120, 200} {
			for _, height := range []int{0, 1, 2, 3, 4, 5, 7, 10, 15, 16, 24, 35, 36, 37, 60} {
				r.Update(tea.WindowSizeMsg{Width: width, Height: height})
				view := r.View()
				lines := strings.Split(view.Content, "\n")
				if len(lines) != max(1, height) && width > 0 {
					t.Fatalf("situation %d: %d lines on a screen of %dx%d", i, len(lines), width, height)
				}
				for _, line := range lines {
					if lipgloss.Width(line) > width {
						t.Fatalf("situation %d: %d columns on a screen of %dx%d: %q", i, lipgloss.Width(line), width, height, line)
					}
				}
				if c := view.Cursor; c != nil && (c.X >= max(1, width) || c.Y >= max(1, height) || c.X < 0 || c.Y < 0) {
					t.Fatalf("situation %d: the cursor is at %d, %d on a screen of %dx%d", i, c.X, c.Y, width, height)
				}
			}
		}
	}
}

func TestHelpFitsAndAnyKeyLeavesIt(t *testing.T) {
	r := newRig(t)
	r.presses("?")
	for _, line := range helpText {
		if len(line) > 80 || !strings.Contains(r.shows(), line) {
			t.Errorf("the help shows no %q", line)
		}
	}
	r.presses("x")
	r.expectNot(`Ctrl-Z suspends`)
}
