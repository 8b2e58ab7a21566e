package text

import "testing"

func TestPrintable(t *testing.T) {
	for s, want := range map[string]string{
		"127.0.0.1:99":              "127.0.0.1:99",
		"\x1b[31mred\x1b[0m":        "\ufffd[31mred\ufffd[0m",
		"\x1b]0;title\x07":          "\ufffd]0;title\ufffd",
		"a\r\nb\tc\x00\x7f\u0085":   "a\ufffd\ufffdb c\ufffd\ufffd\ufffd",
		"\u202ereversed\u200bzero":  "\ufffdreversed\ufffdzero",
		"line\u2028separator":       "line\ufffdseparator",
		"日本 ü":                      "日本 ü",
		"broken \xff utf-8 \x9b31m": "broken \ufffd utf-8 \ufffd31m",
	} {
		if got := Printable(s); got != want {
			t.Errorf("Printable(%q) is %q, want %q", s, got, want)
		}
	}
}

func TestCount(t *testing.T) {
	for n, want := range map[int]string{0: "0 holds", 1: "1 hold", 2: "2 holds", 12345: "12,345 holds"} {
		if got := Count(n, "hold"); got != want {
			t.Errorf("Count(%d) is %q, want %q", n, got, want)
		}
	}
}
