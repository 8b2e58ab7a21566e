package top

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	tea "charm.land/bubbletea/v2"
	"charm.land/lipgloss/v2"

	"echod/control"
)

func TestTextOfOthersIsPrintable(t *testing.T) {
	r := newRig(t)
	c := r.aConn(1, 0)
	c.Remote = "evil\x1b[2J\u202e:1"
	r.lists(c)
	r.happens(closedEvent(control.ClosedConn{ID: 2, Remote: c.Remote, Reason: "client-closed", Closed: r.at}))
	st := aStatus()
	st.Holds = []control.Hold{{ID: "h1\u202e", Reason: "disk\x1b[2J\u202e"}}
	r.answers(st)
	r.expect(`evil\\x1b\[2J\\u202e:1`)
	for _, keys := range []string{"u", "n", "tab"} {
		r.presses(keys)
		if screen := r.View().Content; strings.Contains(screen, "\x1b[2J") || strings.Contains(screen, "\u202e") {
			t.Errorf("after %s the screen shows %q", keys, screen)
		}
		if keys == "u" {
			r.expect(`h1\\u202e disk\\x1b\[2J\\u202e`)
		}
	}
}

func TestLongInputShowsItsEnd(t *testing.T) {
	r := newRig(t)
	r.presses("p", strings.Repeat("long ", 20)+"the end")
	r.expect(`^Reason for the pause: ….*long the end$`)
	if c := r.View().Cursor; c == nil || c.X != 79 {
		t.Errorf("the cursor is at %+v, want it at the end of the line", c)
	}
}

func TestAllScreenSizesFit(t *testing.T) {
	r := newRig(t)
	for id := range uint64(100) {
		r.table.opened(r.aConn(id+1, 1<<(id%60)), r.at)
	}
	strange := r.aConn(101, 0)
	strange.Remote = "[2001:db8:ffff:ffff:ffff:ffff:ffff:ffff%日本]:65535"
	r.happens(openedEvent(strange), closedEvent(control.ClosedConn{ID: 12_345_678, Remote: strange.Remote, Reason: "rejected-unidentified", Closed: r.at}))
	paused := aStatus()
	for i := range 9 {
		paused.Holds = append(paused.Holds, control.Hold{ID: fmt.Sprintf("h%d", i), Reason: strings.Repeat("long ", 30)})
	}
	scenes := []func(){
		func() { r.answers(paused) },
		func() { r.presses("j", "x") },
		func() { r.presses("n", "p", strings.Repeat("why ", 60)) },
		func() { r.presses("enter") },
		func() { r.presses("n", "tab") },
		func() { r.presses("?") },
		func() { r.Update(lostMsg{r.at, gone()}) },
	}
	// Each width with some heights, and each height with some widths.
	someWidths, someHeights := []int{0, 1, 20, 60, 80, 200}, []int{0, 1, 5, 16, 24, 36}
	for i, scene := range scenes {
		scene()
		for _, width := range []int{0, 1, 2, 3, 7, 13, 20, 29, 40, 41, 59, 60, 79, 80, 81, 97, 120, 200} {
			for _, height := range []int{0, 1, 2, 3, 4, 5, 7, 10, 15, 16, 24, 35, 36, 37, 60} {
				if !slices.Contains(someWidths, width) && !slices.Contains(someHeights, height) {
					continue
				}
				r.Update(tea.WindowSizeMsg{Width: width, Height: height})
				view := r.View()
				lines := strings.Split(view.Content, "\n")
				if len(lines) != max(1, height) && width > 0 {
					t.Fatalf("scene %d: %d lines on a screen of %dx%d", i, len(lines), width, height)
				}
				for _, line := range lines {
					if lipgloss.Width(line) > width {
						t.Fatalf("scene %d: %d columns on a screen of %dx%d: %q", i, lipgloss.Width(line), width, height, line)
					}
				}
				if c := view.Cursor; c != nil && (c.X >= max(1, width) || c.Y >= max(1, height) || c.X < 0 || c.Y < 0) {
					t.Fatalf("scene %d: the cursor is at %d, %d on a screen of %dx%d", i, c.X, c.Y, width, height)
				}
			}
		}
	}
}

func TestHelp(t *testing.T) {
	r := newRig(t)
	r.presses("?")
	for _, line := range helpText {
		if len(line) > 80 || !strings.Contains(r.shows(), line) {
			t.Errorf("the help does not show %q", line)
		}
	}
	r.presses("x")
	r.expectNot(`Ctrl-Z suspends`)
}

func TestShortFormats(t *testing.T) {
	for n, want := range map[float64]string{
		0: "0", 0.04: "0.0", 1: "1.0", 9.94: "9.9", 9.95: "10", 999.4: "999", 999.6: "1.0k", 9949: "9.9k", 9950: "10k", 999_400: "999k", 1_234_567: "1.2M",
	} {
		if got := eventRate(n); got != want {
			t.Errorf("eventRate(%v) is %q, want %q", n, got, want)
		}
	}
	const day = 24 * time.Hour
	for d, want := range map[time.Duration]string{
		-time.Second: "0.0s", 99 * time.Millisecond: "0.0s", 9999 * time.Millisecond: "9.9s", 10 * time.Second: "10s", 59_999 * time.Millisecond: "59s",
		time.Minute: "1m00s", time.Hour - 1: "59m59s", time.Hour: "1h00m", day - 1: "23h59m", day: "1d00h", 100*day - 1: "99d23h", 1000 * day: "1000d",
	} {
		if got := span(d); got != want || len(got) > 6 {
			t.Errorf("span(%v) is %q, want %q", d, got, want)
		}
	}
}

func TestSparkline(t *testing.T) {
	bars := []rune("_123")
	for _, line := range []struct {
		values []float64
		want   string
	}{
		{nil, ""},
		{[]float64{-1, 0, 0}, " __"},
		{[]float64{0, 0.1, 5, 10}, "_123"},
		{[]float64{7}, "3"},
	} {
		if got := sparkline(line.values, bars); got != line.want {
			t.Errorf("sparkline(%v) is %q, want %q", line.values, got, line.want)
		}
	}
}

func TestRatesOfAMinute(t *testing.T) {
	begin := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	r := rates{}
	st := aStatus()
	for second := range 61 {
		r.add(begin.Add(time.Duration(second)*time.Second), st)
		st.Accepted += uint64(second / 15 * 10)
	}
	got := r.minute(accepts, 4, begin.Add(time.Minute))
	for i, want := range []float64{10, 20, 30, -1} { // the last part has only begun
		if got[i] != want {
			t.Errorf("parts %v, want 10 20 30 -1", got)
			break
		}
	}
}
