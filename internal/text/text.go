// Package text formats what people read.
package text

import (
	"strings"
	"unicode"

	"github.com/dustin/go-humanize"
)

// Printable makes the text of others safe for a terminal. Control characters, escape sequences, direction
// marks and invalid UTF-8 could move the cursor or hide other text: each such character becomes U+FFFD,
// and a tab a space.
func Printable(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\t':
			return ' '
		case !unicode.IsPrint(r):
			return unicode.ReplacementChar
		default:
			return r
		}
	}, s)
}

// Count formats a number with its noun, such as 1 hold or 2,000 holds.
func Count[N int | int64 | uint64](n N, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return humanize.Comma(int64(n)) + " " + noun + "s"
}
