package top

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"charm.land/lipgloss/v2"
	"github.com/dustin/go-humanize"

	"echod/control"
)

// header says what holds for the whole server.
func (m *model) header() []string {
	st := m.status
	lines := []string{m.title()}
	row := func(name, format string, args ...any) {
		lines = append(lines, bold.Render(cell(printable(name), 13, false, ""))+printable(fmt.Sprintf(format, args...)))
	}
	roomy := m.height >= heightForRates
	switch d := st.Drain; {
	case m.lost != nil:
		row(m.trouble(), "%s", m.known())
	case d != nil && d.AcceptingUntil != nil && m.now.Before(*d.AcceptingUntil):
		newcomers := "are served"
		if len(st.Holds) > 0 {
			newcomers = "wait"
		}
		row("draining", "%s: new clients %s for %s more, %s left in all",
			d.Reason, newcomers, span(d.AcceptingUntil.Sub(m.now)), span(d.Deadline.Sub(m.now)))
	case d != nil:
		row("draining", "%s: %s left, %s told, %d not to be told", d.Reason, span(d.Deadline.Sub(m.now)), humanize.Comma(int64(d.Notified)), d.NoticeFailed)
	}
	holds := st.Holds
	if m.away() {
		holds = nil
	}
	for i, h := range holds {
		if most := 1 + (m.height-heightForRates)/4; i >= max(1, most) {
			row("", "and %s more", count(len(holds)-i, "hold"))
			break
		}
		row("hold "+h.ID, "%s", m.describeHold(h))
	}
	if roomy {
		row("listening", "%s", m.listeners())
	}
	row("connections", "%s", m.counts())
	if roomy {
		lines = append(lines, m.pictures()...)
		lines = append(lines, "")
	}
	return lines
}

// known says what is known of a server that does not answer.
func (m *model) known() string {
	since := span(m.now.Sub(m.lostSince))
	switch d := m.status.Drain; {
	case !m.away():
		return fmt.Sprintf("for %s, what follows is from before: %v", since, m.lost)
	case m.stopped && d != nil:
		return fmt.Sprintf("the server has stopped, %s ago (%s); waiting for another", since, d.Reason)
	case m.stopped:
		return fmt.Sprintf("the server has stopped, %s ago; waiting for another", since)
	default:
		return fmt.Sprintf("connection lost %s ago, trying again on %s", since, m.path)
	}
}

// trouble is the state of a server that does not answer.
func (m *model) trouble() string {
	switch {
	case m.away() && m.stopped:
		return "stopped"
	case m.away():
		return "gone"
	default:
		return "no answer"
	}
}

// title is the state, and which server it is of.
func (m *model) title() string {
	st := m.status
	state, style := st.State, stateStyles[st.State]
	if m.lost != nil {
		state, style = m.trouble(), stateGone
	}
	state = style.Render(" " + printable(state) + " ")
	process := fmt.Sprintf("  pid %d  up %s", st.PID, span(seconds(st.UptimeSeconds)))
	left := state + " " + bold.Render("echod "+printable(st.Version)) + process
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
		words = append(words, fmt.Sprintf("by uid %d, pid %d", *h.UID, *h.PID))
	}
	return strings.Join(words, ", ")
}

func (m *model) listeners() string {
	if len(m.status.Listeners) == 0 || m.away() {
		return "on nothing"
	}
	var all []string
	for _, l := range m.status.Listeners {
		one := l.Address
		if l.AcceptQueue != nil && l.AcceptQueueLimit != nil {
			one += fmt.Sprintf(", %s waiting (room for %d)", humanize.Comma(int64(*l.AcceptQueue)), *l.AcceptQueueLimit)
		}
		all = append(all, one)
	}
	return listed(all, max(1, (m.width-13)/50))
}

func (m *model) counts() string {
	st := m.status
	if m.away() {
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

// pictures are the rates, two beside each other.
func (m *model) pictures() []string {
	half := min(m.width/2, 96)
	until := m.rates.last.at
	if m.lost != nil {
		until = m.now // the last minute goes on, and nothing is known of its end
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
		return cell(label+drawn.Render(sparkline(m.rates.minute(s, room, until), m.glyphs.bars))+peak, half, false, "")
	}
	each := func(n float64) string { return figure(n) + "/s" }
	return []string{
		one("accepts", accepts, each) + one("in", bytesIn, perSecond),
		one("closes", closes, each) + one("out", bytesOut, perSecond),
	}
}
