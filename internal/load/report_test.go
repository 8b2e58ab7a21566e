package load

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"
)

// Each limit is exceeded by its own figure alone, and kept by a figure that equals it.
func TestLimits(t *testing.T) {
	second, two := new(time.Second), new(int64(2))
	tests := []struct {
		limits Limits
		exceed func(r *Report, by float64)
		want   string
	}{
		{
			Limits{P99: second},
			func(r *Report, by float64) { r.Echo.P99 += by },
			"p99 of echoes is 2s: more than 1s",
		},
		{
			Limits{P999: second},
			func(r *Report, by float64) { r.Echo.P999 += by },
			"p99.9 of echoes is 2s: more than 1s",
		},
		{
			Limits{ConnectP99: second},
			func(r *Report, by float64) { r.Connect.P99 += by },
			"p99 of connects is 2s: more than 1s",
		},
		{
			Limits{Outage: second},
			func(r *Report, by float64) { r.Outage.Max += by },
			"longest time without service is 2s: more than 1s",
		},
		{
			Limits{Lost: two},
			func(r *Report, by float64) { r.Echoes.Lost += int64(by) },
			"3 messages lost: more than 2",
		},
		{
			Limits{Refused: two},
			func(r *Report, by float64) { r.Connects.TimedOut += int64(by) },
			"3 connects failed or were turned away: more than 2",
		},
		{
			Limits{Disconnects: two},
			func(r *Report, by float64) { r.Ends.Closed += int64(by) },
			"3 connections ended without a notice: more than 2",
		},
	}
	if n := reflect.TypeFor[Limits]().NumField(); n != len(tests) {
		t.Errorf("%d limits, %d tested", n, len(tests))
	}
	for _, tt := range tests {
		r := &Report{Counts: Counts{Echoes: Echoes{Sent: 100, Returned: 100}}}
		r.Echo.P99, r.Echo.P999, r.Connect.P99, r.Outage.Max = 1, 1, 1, 1
		if tt.limits.Lost != nil {
			r.Echoes.Lost = 2
		}
		r.Connects.Refused, r.Ends.Reset = 2, 2
		if f := r.Failures(tt.limits); f != nil {
			t.Errorf("%s: failures %q at the limit", tt.want, f)
		}
		tt.exceed(r, 1)
		if f := r.Failures(tt.limits); len(f) != 1 || !strings.Contains(f[0], tt.want) {
			t.Errorf("failures %q, want %q", f, tt.want)
		}
	}
}

func TestFailuresWithoutLimits(t *testing.T) {
	for _, name := range []string{
		"Corrupted", "Unexpected", "Duplicated", "Reordered", "Foreign", "Unsent",
		"Lost",
	} {
		r := &Report{Counts: Counts{Echoes: Echoes{Sent: 100, Returned: 100}}}
		reflect.ValueOf(&r.Echoes).Elem().FieldByName(name).SetInt(1)
		if f := r.Failures(Limits{}); len(f) != 1 || !strings.HasPrefix(f[0], "1 message ") {
			t.Errorf("one message %s: failures %q", name, f)
		}
	}
}

// WritePercentiles is in milliseconds, as plotters expect.
func TestWritePercentiles(t *testing.T) {
	r := &Report{histograms: newInterval()}
	record(r.histograms.echo, 5*time.Millisecond)
	var b bytes.Buffer
	if err := r.WritePercentiles(&b); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(b.String(), " 5.00") {
		t.Errorf("no 5.00 ms in\n%s", b.String())
	}
}

func TestCompare(t *testing.T) {
	before := &Report{
		Address: "a:1", Conns: 5, Sizes: "64", Rate: 100, PerSecond: 100, Planned: 10,
		Echo: Latency{
			P50: 1, P90: 2, P99: 3, P999: 4,
			Max: 5,
		}, Connect: Latency{P99: 6}, Outage: Outage{Max: 7},
		Counts: Counts{
			Echoes: Echoes{Lost: 8, Corrupted: 9}, Connects: Connects{Refused: 10},
			Ends: Ends{Reset: 11},
		},
	}
	var text bytes.Buffer
	if err := json.NewEncoder(&text).Encode(before); err != nil {
		t.Fatal(err)
	}
	read, err := ReadReport(&text)
	if err != nil {
		t.Fatal(err)
	}
	after := *before
	t.Run("the same", func(t *testing.T) {
		c := after.Compare(read)
		if len(c.Differences) != 0 {
			t.Errorf("differences %q", c.Differences)
		}
		for i, f := range c.Figures {
			want := []float64{100, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}[i]
			if f.Before != want || f.After != want || f.Change == nil || *f.Change != 0 {
				t.Errorf("%+v, want %v twice", f, want)
			}
		}
	})
	t.Run("another", func(t *testing.T) {
		after.Conns, after.Rate, after.PerSecond, after.Echoes.Lost = 10, 200, 150, 4
		c := after.Compare(read)
		expect(t, "differences", c.Differences, []string{"conns: 10, was 5", "load: 200/s, was 100/s"})
		for _, f := range c.Figures {
			switch f.Name {
			case "echoes_per_second":
				expect(t, f.Name, *f.Change, 0.5)
			case "lost":
				expect(t, f.Name, *f.Change, -0.5)
			}
		}
	})
	t.Run("what is not a report is refused", func(t *testing.T) {
		for _, text := range []string{
			"", "{}", "[]", "x", `{"echoes":{},"echo_latency":{}}`,
			`{"echoes":{"lost":-1},"echo_latency":{},"echoes_per_second":1}`, `{"echoes":{"lost":"1"},"echo_latency":{},"echoes_per_second":1}`,
		} {
			if _, err := ReadReport(strings.NewReader(text)); err == nil {
				t.Errorf("%s is accepted", text)
			}
		}
	})
}
