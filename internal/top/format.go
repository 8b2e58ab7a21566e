package top

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
	"unicode"

	"charm.land/lipgloss/v2"
	"github.com/dustin/go-humanize"
)

// printable makes text of others fit to be drawn: whatever could move the cursor, change colours or hide
// other text (control characters, escape sequences by their first, marks of direction) becomes a dot.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) || r == unicode.ReplacementChar {
			return '.'
		}
		return r
	}, s)
}

// clip shortens s to width cells. Text in styles keeps them.
func clip(s string, width int, mark string) string {
	if lipgloss.Width(s) <= width {
		return s
	}
	if width < lipgloss.Width(mark)+1 {
		return lipgloss.NewStyle().MaxWidth(max(0, width)).Render(s)
	}
	return lipgloss.NewStyle().MaxWidth(width-lipgloss.Width(mark)).Render(s) + mark
}

// cell makes s exactly width cells wide.
func cell(s string, width int, right bool, mark string) string {
	s = clip(s, width, mark)
	padding := strings.Repeat(" ", max(0, width-lipgloss.Width(s)))
	if right {
		return padding + s
	}
	return s + padding
}

// span shows a duration in at most six cells, to a precision that a person can read.
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

// bytes shows an amount as the other commands do, such as 1.2 MB.
func bytes(n uint64) string { return humanize.Bytes(n) }

// perSecond shows a rate of bytes in at most eight cells.
func perSecond(rate float64) string { return bytes(uint64(rate)) + "/s" }

// figure shows a rate of events in at most five cells.
func figure(n float64) string {
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

func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return humanize.Comma(int64(n)) + " " + noun + "s"
}
