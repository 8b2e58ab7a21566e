package text

import (
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

func TestPrintable(t *testing.T) {
	for s, want := range map[string]string{
		"":                           "",
		"127.0.0.1:99":               "127.0.0.1:99",
		"plain, ünïcode, 日本\u3000☃ ": "plain, ünïcode, 日本\u3000☃ ",
		"\x1b[31mred\x1b[0m":         `\x1b[31mred\x1b[0m`,
		"\x1b]0;title\x07":           `\x1b]0;title\a`,
		"a\r\nb\tc\x00\x7f\u0085":    `a\r\nb c\x00\x7f\u0085`,
		"\u202ereversed\u2066":       `\u202ereversed\u2066`,
		"zero\u200bwidth\ufeff":      `zero\u200bwidth\ufeff`,
		"line\u2028separator\u2029":  `line\u2028separator\u2029`,
		"tag \U000e0041":             `tag \U000e0041`,
		"broken \xff utf-8 \x9b31m":  `broken \xff utf-8 \x9b31m`,
		"C1 \u009b31m":               `C1 \u009b31m`,
		"replaced by others: \ufffd": "replaced by others: \ufffd",
	} {
		if got := Printable(s); got != want {
			t.Errorf("Printable(%q) is %q, want %q", s, got, want)
		}
	}
}

// FuzzPrintable checks that every text becomes one line of printable characters, and stays as it is the second time.
func FuzzPrintable(f *testing.F) {
	for _, s := range []string{"plain", "\x1b[2J", "\xff\u202e\n", "\ufffd\t"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got := Printable(s)
		if !utf8.ValidString(got) || strings.ContainsFunc(got, func(r rune) bool {
			return !unicode.IsPrint(r) && !unicode.Is(unicode.Zs, r)
		}) {
			t.Errorf("Printable(%q) is %q", s, got)
		}
		if again := Printable(got); again != got {
			t.Errorf("Printable(%q) is %q", got, again)
		}
	})
}

func TestCount(t *testing.T) {
	for n, want := range map[int]string{0: "0 holds", 1: "1 hold", 2: "2 holds", 12345: "12,345 holds"} {
		if got := Count(n, "hold"); got != want {
			t.Errorf("Count(%d) is %q, want %q", n, got, want)
		}
	}
}
