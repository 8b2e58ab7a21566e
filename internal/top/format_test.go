package top

import (
	"testing"
	"time"
)

func TestPrintableLeavesNothingThatATerminalObeys(t *testing.T) {
	for text, want := range map[string]string{
		"127.0.0.1:99":              "127.0.0.1:99",
		"\x1b[31mred\x1b[0m":        ".[31mred.[0m",
		"\x1b]0;title\x07":          ".]0;title.",
		"a\r\nb\tc\x00\x7f\u0085":   "a..b.c...",
		"\u202ereversed\u200bzero":  ".reversed.zero",
		"日本 ü":                      "日本 ü",
		"broken \xff utf-8 \x9b31m": "broken . utf-8 .31m",
	} {
		if got := printable(text); got != want {
			t.Errorf("printable(%q) is %q, want %q", text, got, want)
		}
	}
}

func TestFiguresAreShort(t *testing.T) {
	for n, want := range map[float64]string{
		0: "0", 0.04: "0.0", 1: "1.0", 9.94: "9.9", 9.95: "10", 999.4: "999", 999.6: "1.0k", 9949: "9.9k", 9950: "10k", 999_400: "999k", 1_234_567: "1.2M",
	} {
		if got := figure(n); got != want {
			t.Errorf("figure(%v) is %q, want %q", n, got, want)
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

func TestSparklines(t *testing.T) {
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

// TestPartsOfAMinute: each shows what passed in its own time, and stays what it was while the next goes on.
func TestPartsOfAMinute(t *testing.T) {
	begin := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	r := rates{}
	st := aStatus()
	for second := range 61 {
		r.add(begin.Add(time.Duration(second)*time.Second), st)
		st.Accepted += uint64(second / 15 * 10)
	}
	got := r.minute(accepts, 4, begin.Add(time.Minute))
	for i, want := range []float64{10, 20, 30, -1} { // the last has only begun
		if got[i] != want {
			t.Errorf("parts %v, want 10 20 30 -1", got)
			break
		}
	}
}
