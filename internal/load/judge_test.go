package load

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

// TestJudgeLooksAtWhatABoundIsFor: each is broken by its own figure alone, and kept by one that is as it says.
func TestJudgeLooksAtWhatABoundIsFor(t *testing.T) {
	second, two := new(time.Second), new(int64(2))
	for _, tt := range []struct {
		bounds Bounds
		exceed func(r *Report, by float64)
		want   string
	}{
		{Bounds{P99: second}, func(r *Report, by float64) { r.Echo.P99 += by }, "p99 of echoes is 2s: more than 1s"},
		{Bounds{P999: second}, func(r *Report, by float64) { r.Echo.P999 += by }, "p99.9 of echoes is 2s: more than 1s"},
		{Bounds{ConnectP99: second}, func(r *Report, by float64) { r.Connect.P99 += by }, "p99 of connects is 2s: more than 1s"},
		{Bounds{Outage: second}, func(r *Report, by float64) { r.Outage.Max += by }, "longest time without service is 2s: more than 1s"},
		{Bounds{Lost: two}, func(r *Report, by float64) { r.Echoes.Lost += int64(by) }, "3 messages lost: more than 2"},
		{Bounds{Refused: two}, func(r *Report, by float64) { r.Connects.TimedOut += int64(by) }, "no service: 3, more than 2"},
		{Bounds{Disconnects: two}, func(r *Report, by float64) { r.Ends.Closed += int64(by) }, "without a notice: 3, more than 2"},
	} {
		r := &Report{Counts: Counts{Echoes: Echoes{Sent: 100, Returned: 100}}}
		r.Echo.P99, r.Echo.P999, r.Connect.P99, r.Outage.Max = 1, 1, 1, 1
		if tt.bounds.Lost != nil {
			r.Echoes.Lost = 2
		}
		r.Connects.Refused, r.Ends.Reset = 2, 2
		if why := r.Judge(tt.bounds); why != nil {
			t.Errorf("%s: judged %q at the bound", tt.want, why)
		}
		tt.exceed(r, 1)
		if why := r.Judge(tt.bounds); len(why) != 1 || !strings.Contains(why[0], tt.want) {
			t.Errorf("judged %q, want %q", why, tt.want)
		}
	}
}

// TestOutageMedian is that of all clients, and neither the least nor the most.
func TestOutageMedian(t *testing.T) {
	r := &run{opts: Options{}.withDefaults(), began: time.Now(), step: window}
	l := &loop{run: r, tally: newTally()}
	for _, without := range []time.Duration{9 * time.Second, 0, 2 * time.Second} {
		l.users = append(l.users, &user{outages: outages{without: without}})
	}
	expect(t, "outage", r.report([]*loop{l}).Outage, Outage{Clients: 2, Median: 2, Max: 9})
}

// TestPercentilesAreInMilliseconds, as the plotters expect.
func TestPercentilesAreInMilliseconds(t *testing.T) {
	r := &Report{histogram: histogram{echo: newHistogram(), connect: newHistogram()}}
	record(r.histogram.echo, 5*time.Millisecond)
	var b bytes.Buffer
	if err := r.WritePercentiles(&b); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(b.String(), " 5.00") {
		t.Errorf("no 5.00 ms in\n%s", b.String())
	}
}
