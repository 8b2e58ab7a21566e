// Package text formats what people read.
package text

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/dustin/go-humanize"
)

// Printable makes text from elsewhere safe for a terminal and for a line of a log: it returns one line that shows
// every character of s. Control characters, newlines, escape sequences, direction marks, invisible characters and
// invalid UTF-8 could move the cursor, hide text or add lines. They become Go's escapes, such as \x1b and \u202e; a
// tab becomes a space. Everything that echod prints for people goes through it.
func Printable(s string) string {
	if !strings.ContainsFunc(s, isUnsafe) {
		return s
	}
	var out strings.Builder
	for s != "" {
		r, size := utf8.DecodeRuneInString(s)
		switch {
		case r == utf8.RuneError && size == 1:
			fmt.Fprintf(&out, `\x%02x`, s[0])
		case r == '\t':
			out.WriteByte(' ')
		case isUnsafe(r) && r != utf8.RuneError:
			quoted := strconv.QuoteRuneToASCII(r)
			out.WriteString(quoted[1 : len(quoted)-1])
		default:
			out.WriteRune(r)
		}
		s = s[size:]
	}
	return out.String()
}

// isUnsafe reports whether Printable may have to change r. U+FFFD may represent an invalid byte.
func isUnsafe(r rune) bool {
	return r == utf8.RuneError || !unicode.IsPrint(r) && !unicode.Is(unicode.Zs, r)
}

// Count formats a number with its noun, such as 1 hold or 2,000 holds.
func Count[N int | int64 | uint64](n N, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return humanize.Comma(int64(n)) + " " + noun + "s"
}
