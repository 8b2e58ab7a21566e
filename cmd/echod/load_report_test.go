package main

import (
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"echod/internal/load"
)

func loadReport(t *testing.T, r *load.Report, failures ...string) string {
	t.Helper()
	var b strings.Builder
	if err := writeLoadReport(&b, r, failures, nil); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// A report says that all messages came back only if they did.
func TestLoadConclusion(t *testing.T) {
	const all = "All messages came back"
	for _, tt := range []struct {
		report   load.Report
		failures []string
		want     string // empty: no conclusion
	}{
		{
			load.Report{Counts: load.Counts{Echoes: load.Echoes{Sent: 9, Returned: 9}}},
			nil,
			all + ", once and in order.\n",
		},
		{
			load.Report{
				Conns: 4, Outage: load.Outage{Clients: 2, Max: 1.5},
				Counts: load.Counts{Echoes: load.Echoes{Sent: 9, Returned: 9}},
			},
			nil, all + ", once and in order.\n2 of 4 clients were without service for a while, at most 1.50 s.\n",
		},
		{
			load.Report{Counts: load.Counts{Echoes: load.Echoes{
				Sent: 1900, Returned: 1725, Lost: 11,
				TurnedAway: 164,
			}}},
			nil, "Some messages did not come back, but no limit was exceeded: 11 lost, 164 turned away.\n",
		},
		{
			load.Report{Counts: load.Counts{Echoes: load.Echoes{Sent: 9, Returned: 8, Lost: 1}}},
			[]string{"1 message lost"},
			"",
		},
	} {
		got := loadReport(t, &tt.report, tt.failures...)
		if !strings.HasSuffix(got, "\n"+tt.want) ||
			strings.Contains(got, all) != strings.HasPrefix(tt.want, all) {
			t.Errorf("want %q at the end of\n%s", tt.want, got)
		}
	}
}

func TestLoadReport(t *testing.T) {
	t.Run("a long report fits 80 columns", func(t *testing.T) {
		const n = 123_456
		r := load.Report{
			Address: "127.0.0.1:9999", Lasted: 30, Took: 123, Conns: 1000, Sizes: "64:90,1024-4096:9,65536:1", Rate: 1,
			OfferedPerSecond: 1e6, PerSecond: 1e6,
			Counts: load.Counts{
				Connects: load.Connects{
					Tried: n, Made: n, Refused: n, Reset: n, TimedOut: n, NoPort: n,
					Failed: n, TurnedAway: n, NoHandshake: n, Resumed: n,
				},
				Echoes: load.Echoes{
					Sent: 1000 * n, Returned: 1000 * n, Late: n, Reordered: n, Duplicated: n, Lost: n,
					Corrupted: n, Unexpected: n, Foreign: n, TurnedAway: n, Unsent: n,
				},
				Notices: load.Notices{Shutdown: n, Paused: n, Busy: n, Messages: n, Heeded: n},
				Ends:    load.Ends{Left: n, Noticed: n, Closed: n, Reset: n, Failed: n},
			},
			Addresses: []load.TargetCount{
				{Address: "[2001:db8::1234:5678]:9999", Made: n, Failed: n},
				{Address: "192.0.2.1:9999"},
			},
			Echo: load.Latency{
				P50: 0.0123, P90: 0.0234, P99: 0.0345, P999: 0.0456, P9999: 0.0567,
				Max: 0.0678,
			},
		}
		for range 9 {
			r.Stages = append(r.Stages, load.ReportedStage{Rate: 123_456, Seconds: 90})
		}
		got := loadReport(t, &r)
		for line := range strings.Lines(got) {
			if utf8.RuneCountInString(strings.TrimRight(line, "\n")) > 80 {
				t.Errorf("too long: %s", line)
			}
		}
		for _, want := range []string{
			" 123,456 unexpected", " 123,456 without a local port",
			"12.3 ms  23.4 ms  34.5 ms  45.6 ms  56.7 ms  67.8 ms", "192.0.2.1:9999 0 connects", "123,456/s for 1m30s",
		} {
			if !strings.Contains(got, want) {
				t.Errorf("lacks %q:\n%s", want, got)
			}
		}
		t.Log("\n" + got)
	})
	t.Run("figures side by side are not mixed up", func(t *testing.T) {
		got := loadReport(t, &load.Report{
			Conns: 3, Rate: 500, Lasted: 4, Took: 10, OfferedPerSecond: 500, PerSecond: 200,
			Outage: load.Outage{Clients: 2, Median: 0.5, Max: 1.5},
		})
		for _, want := range []string{
			"2 of 3 clients, median 500 ms, max 1.50 s\n",
			"200 echoes/s over 10s, 500/s offered over 4s\n",
		} {
			if !strings.Contains(got, want) {
				t.Errorf("lacks %q:\n%s", want, got)
			}
		}
	})
	t.Run("a comparison shows both runs, and what differs", func(t *testing.T) {
		before := &load.Report{
			PerSecond: 1000, Conns: 5, Sizes: "64\x1b[2J", // a file may hold anything
			Echo: load.Latency{P99: 0.001, P999: 0.001},
		}
		now := &load.Report{
			PerSecond: 1500, Conns: 6, Sizes: "64",
			Echo: load.Latency{P99: 0.002, P999: 1.5}, Counts: load.Counts{Echoes: load.Echoes{Lost: 3}},
		}
		var b strings.Builder
		if err := writeLoadReport(&b, now, []string{"bad"}, now.Compare(before)); err != nil {
			t.Fatal(err)
		}
		got := strings.Join(strings.Fields(b.String()), " ")
		for _, want := range []string{
			"echoes/s 1,000 1,500 +50.0 %", "echo p99 1.00 ms 2.00 ms +100.0 %",
			"echo p99.9 1.00 ms 1.50 s x 1500", "lost 0 3 -", "corrupted 0 0 same", "conns: 6, was 5",
			`was 64\x1b[2J`,
		} {
			if !strings.Contains(got, want) {
				t.Errorf("lacks %q:\n%s", want, b.String())
			}
		}
	})
}

func TestLatencyFormat(t *testing.T) {
	for seconds, want := range map[float64]string{
		0: "-", 1e-6: "1.00 µs", 0.000_999_4: "999 µs", 0.000_999_9: "1.00 ms", 0.0123: "12.3 ms", 0.9996: "1.00 s", 12.34: "12.3 s",
	} {
		if got := formatLatency(seconds); got != want {
			t.Errorf("%v s is %q, want %q", seconds, got, want)
		}
	}
}

func TestLoadProgress(t *testing.T) {
	var b strings.Builder
	v := newLoadProgress(&b, load.Options{Duration: 30 * time.Second})
	p := load.Progress{
		Elapsed: 4 * time.Second, Open: 60, Lost: 1234, Notices: 80, Reconnects: 79, Rate: 5999.6, Offered: 6000,
		P50: 122 * time.Microsecond, P99: 1640 * time.Microsecond,
	}
	t.Run("without a terminal it prints a line at intervals", func(t *testing.T) {
		v.show(p)
		p.Elapsed = 6 * time.Second
		v.show(p)
		p.Elapsed, p.Corrupted = 8*time.Second, 5
		v.show(p)
		if want := "6/30s  lost 1,234  notices 80  reconnects 79  60 open  6,000/s of 6,000  p99 1.64 ms  p50 122 µs\n"; b.String() != want {
			t.Errorf("got %q, want %q", b.String(), want)
		}
	})
	t.Run("on a terminal there is one line that fits, the most important first", func(t *testing.T) {
		v.terminal = true
		for width, want := range map[int]string{
			120: "8/30s  lost 1,234  corrupted 5  notices 80  reconnects 79  60 open  6,000/s of 6,000  p99 1.64 ms  p50 122 µs",
			90:  "8/30s  lost 1,234  corrupted 5  notices 80  reconnects 79  60 open  6,000/s of 6,000",
			20:  "8/30s  lost 1,234",
			4:   "8/3",
		} {
			b.Reset()
			v.shown, v.width = 0, func() int { return width }
			if v.show(p); b.String() != "\r"+want {
				t.Errorf("%d columns: %q, want %q", width, b.String(), want)
			}
		}
	})
	t.Run("a longer line is erased", func(t *testing.T) {
		b.Reset()
		v.shown, v.width = 10, func() int { return 4 }
		v.show(p)
		v.end()
		if want := "\r8/3       \r   \r"; b.String() != want {
			t.Errorf("got %q, want %q", b.String(), want)
		}
	})
	t.Run("stages are as long as all of them", func(t *testing.T) {
		v := newLoadProgress(&b,
			load.Options{
				Duration: time.Hour,
				Stages:   []load.Stage{{Duration: time.Second}, {Duration: 2 * time.Second}},
			})
		if v.duration != 3*time.Second {
			t.Errorf("%v, want 3 s", v.duration)
		}
	})
}
