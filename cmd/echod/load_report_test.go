package main

import (
	"strings"
	"testing"
	"unicode/utf8"

	"echod/internal/load"
)

func reported(t *testing.T, r *load.Report, why ...string) string {
	t.Helper()
	var b strings.Builder
	if err := writeReport(&b, r, why); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestReportDoesNotPraiseLoss: that all has come back is said only when it has.
func TestReportDoesNotPraiseLoss(t *testing.T) {
	const praise = "All that was sent has come back"
	for _, tt := range []struct {
		report load.Report
		why    []string
		want   string // empty: neither this nor praise
	}{
		{load.Report{Counts: load.Counts{Echoes: load.Echoes{Sent: 9, Returned: 9}}}, nil, praise + ", once and in order.\n"},
		{
			load.Report{Conns: 4, Outage: load.Outage{Clients: 2, Max: 1.5}, Counts: load.Counts{Echoes: load.Echoes{Sent: 9, Returned: 9}}},
			nil, praise + ", once and in order.\n2 of 4 clients had to do without service for a while, for 1.50 s at most.\n",
		},
		{
			load.Report{Counts: load.Counts{Echoes: load.Echoes{Sent: 1900, Returned: 1725, Lost: 11, TurnedAway: 164}}},
			nil, "Not all has come back, but no bound is broken: 11 lost, 164 turned away.\n",
		},
		{load.Report{Counts: load.Counts{Echoes: load.Echoes{Sent: 9, Returned: 8, Lost: 1}}}, []string{"1 message lost"}, ""},
	} {
		got := reported(t, &tt.report, tt.why...)
		if !strings.HasSuffix(got, "\n"+tt.want) || strings.Contains(got, praise) != strings.HasPrefix(tt.want, praise) {
			t.Errorf("want %q at the end of\n%s", tt.want, got)
		}
	}
}

// TestReportFitsATerminal of 80 columns, even where much has happened.
func TestReportFitsATerminal(t *testing.T) {
	const n = 123_456
	r := load.Report{
		Address: "127.0.0.1:9999", Lasted: 30, Conns: 1000, Size: 64, Pipeline: 1,
		Counts: load.Counts{
			Connects: load.Connects{Tried: n, Made: n, Refused: n, Reset: n, TimedOut: n, Failed: n, TurnedAway: n},
			Echoes: load.Echoes{
				Sent: 1000 * n, Returned: 1000 * n, Late: n, Reordered: n, Duplicated: n, Lost: n,
				Corrupted: n, Unexpected: n, Foreign: n, TurnedAway: n, Unsent: n,
			},
			Notices: load.Notices{Shutdown: n, Paused: n, Busy: n, Messages: n, Heeded: n},
			Ends:    load.Ends{Left: n, Noticed: n, Closed: n, Reset: n, Failed: n},
		},
		Echo: load.Latency{P50: 0.0123, P90: 0.0234, P99: 0.0345, P999: 0.0456, P9999: 0.0567, Max: 0.0678},
	}
	got := reported(t, &r)
	for line := range strings.Lines(got) {
		if utf8.RuneCountInString(strings.TrimRight(line, "\n")) > 80 {
			t.Errorf("too long: %s", line)
		}
	}
	for _, want := range []string{" 123,456 unexpected", "\n                 123,456 turned away", "12.3 ms  23.4 ms  34.5 ms  45.6 ms  56.7 ms  67.8 ms"} {
		if !strings.Contains(got, want) {
			t.Errorf("lacks %q:\n%s", want, got)
		}
	}
	t.Log("\n" + got)
}

// TestReportTellsMedianFromMaximum, as with any two that stand beside each other.
func TestReportTellsMedianFromMaximum(t *testing.T) {
	got := reported(t, &load.Report{Conns: 3, Outage: load.Outage{Clients: 2, Median: 0.5, Max: 1.5}})
	if want := "2 of 3 clients, median 500 ms, max 1.50 s\n"; !strings.Contains(got, want) {
		t.Errorf("lacks %q:\n%s", want, got)
	}
}

func TestLatencyToThreeDigits(t *testing.T) {
	for seconds, want := range map[float64]string{
		0: "-", 1e-6: "1.00 µs", 0.000_999_4: "999 µs", 0.000_999_9: "1.00 ms", 0.0123: "12.3 ms", 0.9996: "1.00 s", 12.34: "12.3 s",
	} {
		if got := latency(seconds); got != want {
			t.Errorf("%v s is %q, want %q", seconds, got, want)
		}
	}
}
