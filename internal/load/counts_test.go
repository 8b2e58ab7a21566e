package load

import (
	"bytes"
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// integerFields returns pointers to all integers in a struct, by their path.
func integerFields(v reflect.Value, path string) map[string]*int64 {
	all := make(map[string]*int64)
	for f, field := range v.Fields() {
		name := strings.TrimPrefix(path+"."+f.Name, ".")
		if field.Kind() == reflect.Struct {
			maps.Copy(all, integerFields(field, name))
			continue
		}
		all[name] = field.Addr().Interface().(*int64)
	}
	return all
}

// distinctCounts returns counts whose fields all differ.
func distinctCounts() (c Counts) {
	for i, leaf := range integersInOrder(&c) {
		*leaf = int64(i + 1)
	}
	return c
}

func integersInOrder(c *Counts) (all []*int64) {
	for _, group := range reflect.ValueOf(c).Elem().Fields() {
		if group.Kind() != reflect.Struct {
			all = append(all, group.Addr().Interface().(*int64))
			continue
		}
		for _, field := range group.Fields() {
			all = append(all, field.Addr().Interface().(*int64))
		}
	}
	return all
}

// No field is forgotten when counts are summed up, on any of the ways that they take.
func TestCountsAdd(t *testing.T) {
	want := distinctCounts()
	for _, leaf := range integersInOrder(&want) {
		*leaf *= 3
	}
	t.Run("every field", func(t *testing.T) {
		sum, c := distinctCounts(), distinctCounts()
		sum.add(&c)
		sum.add(&c)
		expect(t, "sum", sum, want)
	})
	t.Run("from workers into the run and its points", func(t *testing.T) {
		r := &run{began: time.Now(), step: window}
		for i := range 3 {
			w := &worker{run: r, tally: newTally()}
			w.tally.Counts = distinctCounts()
			r.collect(w, time.Duration(i)*window)
			expect(t, "what is left", w.tally.Counts, Counts{})
		}
		expect(t, "total", r.total, want)
		points := halved(halved(r.points))
		expect(t, "points", points[0].Counts, want)
	})
	t.Run("sums include every kind", func(t *testing.T) {
		for _, tt := range []struct {
			sum     func(*Counts) int64
			summand []string
		}{
			{
				func(c *Counts) int64 { return c.Connects.Missed() },
				[]string{
					"Connects.Refused", "Connects.Reset", "Connects.TimedOut", "Connects.Failed",
					"Connects.TurnedAway", "Connects.NoHandshake",
				},
			},
			{
				func(c *Counts) int64 { return c.Ends.Unannounced() },
				[]string{"Ends.Closed", "Ends.Reset", "Ends.Failed"},
			},
			{
				func(c *Counts) int64 { return c.Notices.Seen() },
				[]string{"Notices.Shutdown", "Notices.Paused", "Notices.Busy", "Notices.Messages"},
			},
			{
				func(c *Counts) int64 { return -c.open() },
				[]string{"Ends.Left", "Ends.Noticed", "Ends.Closed", "Ends.Reset", "Ends.Failed"},
			},
		} {
			var names Counts
			for name := range integerFields(reflect.ValueOf(&names).Elem(), "") {
				var c Counts
				*integerFields(reflect.ValueOf(&c).Elem(), "")[name] = 5
				want := int64(0)
				for _, s := range tt.summand {
					if s == name {
						want = 5
					}
				}
				if got := tt.sum(&c); got != want && !(name == "Connects.Made" && got == -5) {
					t.Errorf("the sum of %v is %d with only %s, want %d", tt.summand, got, name, want)
				}
			}
		}
	})
}

// After a stall the percentiles of later windows are those of the later windows.
func TestSlowThenFast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var last Progress
		var log bytes.Buffer
		r := runInMemory(t, Options{
			Dial: inMemory(t, faults{10: delay(500 * time.Millisecond)}.serve), Stages: at(100, 5*time.Second),
			HistogramLog: &log, OnProgress: func(p Progress) { last = p },
		})
		slow := 0
		for _, p := range r.Series {
			if p.Max > 0.1 {
				slow++
			}
			if p.At >= 0.8 && p.Max > 0.01 {
				t.Errorf("after %v s: p50 %v, p99 %v, max %v s, though the stall was over", p.At, p.P50,
					p.P99, p.Max)
			}
		}
		if slow == 0 {
			t.Error("the stall is not in the series")
		}
		if last.P99 > 10*time.Millisecond || last.Rate < 75 || last.Rate > 125 {
			t.Errorf("progress at the end: p99 %v, %v/s", last.P99, last.Rate)
		}
		seconds := readLog(t, &log, "echo")
		if len(seconds) < 5 || seconds[0].Max() < int64(400*time.Millisecond) {
			t.Fatalf("%d intervals in the log, the first with a maximum of %v", len(seconds),
				time.Duration(seconds[0].Max()))
		}
		total := int64(0)
		for i, h := range seconds {
			total += h.TotalCount()
			if i > 0 && h.Max() > int64(10*time.Millisecond) {
				t.Errorf("second %d has a maximum of %v", i, time.Duration(h.Max()))
			}
		}
		if total != 500 {
			t.Errorf("%d echoes in the log, want 500", total)
		}
	})
}

// readLog returns the intervals of a histogram log that have a tag.
func readLog(t *testing.T, log io.Reader, tag string) (all []*hdrhistogram.Histogram) {
	t.Helper()
	reader := hdrhistogram.NewHistogramLogReader(log)
	for {
		h, err := reader.NextIntervalHistogram()
		if err != nil {
			t.Fatal(err)
		}
		if h == nil {
			return all
		}
		if h.Tag() == tag {
			all = append(all, h)
		}
	}
}

func TestHistogramLog(t *testing.T) {
	inBubble(t, "there is an interval for each second, even without echoes, from all workers",
		func(t *testing.T) {
			var log bytes.Buffer
			began := time.Now()
			r := runInMemory(t, Options{
				Dial: inMemory(t, faults{}.serve), Conns: 6, Threads: 3, HistogramLog: &log,
				Stages: []Stage{{300, 2 * time.Second}, {0, 2 * time.Second}, {600, 1500 * time.Millisecond}},
			})
			text := log.String()
			var counts []int64
			for i, h := range readLog(t, strings.NewReader(text), "echo") {
				counts = append(counts, h.TotalCount())
				if start := time.UnixMilli(h.StartTimeMs()); start.Sub(began).Round(time.Millisecond) != time.Duration(i)*time.Second {
					t.Errorf("interval %d begins after %v", i, start.Sub(began))
				}
			}
			if fmt.Sprint(counts[2]) != "0" || len(counts) != 6 {
				t.Errorf("echoes by second: %v, want 6 seconds and none in the third", counts)
			}
			total := int64(0)
			for _, n := range counts {
				total += n
			}
			if total != r.Echoes.Returned || r.Echo.Count != total {
				t.Errorf("%d echoes in the log, %d in the histogram, %d returned", total, r.Echo.Count,
					r.Echoes.Returned)
			}
			if connects := readLog(t, strings.NewReader(text), "connect"); len(connects) != 1 ||
				connects[0].TotalCount() != 6 {
				t.Errorf("%d intervals of connects", len(connects))
			}
		})
	inBubble(t, "an error of its writer is returned with the report", func(t *testing.T) {
		broken := errors.New("disk full")
		r, err := Run(t.Context(),
			Options{
				Address: "in memory", Dial: inMemory(t, faults{}.serve), Stages: at(10, time.Second),
				HistogramLog: brokenWriter{broken},
			})
		if !errors.Is(err, broken) || r == nil {
			t.Errorf("report %v, error %v", r, err)
		}
	})
}

type brokenWriter struct{ err error }

func (w brokenWriter) Write([]byte) (int, error) { return 0, w.err }

// The series has short intervals at first, for any planned duration, and longer ones when the run is long.
// Nothing is left out.
func TestSeries(t *testing.T) {
	for _, tt := range []struct {
		planned, cancelled time.Duration // zero means not cancelled
		points             int
		step               float64
	}{
		{time.Second, 0, 10, 0.1},
		{time.Hour, 4 * time.Second, 41, 0.1},
		{119 * time.Second, 0, 1190, 0.1},
		{5 * time.Minute, 0, 750, 0.4},
	} {
		inBubble(t, tt.planned.String(), func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			if tt.cancelled > 0 {
				time.AfterFunc(tt.cancelled+time.Millisecond, func() { cancel(errors.New("enough")) })
			}
			r, err := Run(ctx,
				Options{Address: "in memory", Dial: inMemory(t, faults{}.serve), Stages: at(20, tt.planned)})
			if err != nil {
				t.Fatal(err)
			}
			if got := len(r.Series); got != tt.points || r.step() != tt.step {
				t.Errorf("%d points of %v s, want %d of %v", got, r.step(), tt.points, tt.step)
			}
			sum := 0.0
			for i, p := range r.Series {
				if math.Abs(p.At-float64(i)*tt.step) > 1e-9 {
					t.Fatalf("point %d begins at %v s", i, p.At)
				}
				if i < len(r.Series)-1 && math.Abs(p.PerSecond-20) > 11 || p.Offered != 20 {
					t.Errorf("%v echoes/s of %v at %v s, want about 20", p.PerSecond, p.Offered, p.At)
				}
				sum += p.PerSecond * min(tt.step, r.Lasted-p.At)
			}
			if math.Abs(sum-float64(r.Echoes.Returned)) > 0.05*float64(r.Echoes.Returned) {
				t.Errorf("the points have %v echoes, want %d", sum, r.Echoes.Returned)
			}
		})
	}
}

// Each percentile is in its place, in points and in the report.
func TestPercentiles(t *testing.T) {
	tally := newTally()
	for i := range 100_000 {
		tally.echo(time.Duration(i+1) * time.Microsecond)
	}
	p := point{}
	p.add(tally)
	got := series([]point{p}, time.Second, time.Second, time.Second,
		func(time.Duration) float64 { return 0 })[0]
	l := latencyOf(tally.second.echo)
	for _, tt := range []struct {
		name      string
		got, want float64
	}{
		{"point, p50", got.P50, 0.05},
		{"point, p99", got.P99, 0.099},
		{"point, max", got.Max, 0.1},
		{"mean", l.Mean, 0.05},
		{"p50", l.P50, 0.05},
		{"p90", l.P90, 0.09},
		{"p99", l.P99, 0.099},
		{"p99.9", l.P999, 0.0999},
		{"p99.99", l.P9999, 0.09999},
		{"max", l.Max, 0.1},
	} {
		precision := 0.0007 // of the histogram
		if strings.HasPrefix(tt.name, "point") {
			precision = 0.007
		}
		if math.Abs(tt.got/tt.want-1) > precision {
			t.Errorf("%s is %v s, want %v", tt.name, tt.got, tt.want)
		}
	}
	if l.Count != 100_000 {
		t.Errorf("count %d", l.Count)
	}
}

func TestHalvedKeepsLatencies(t *testing.T) {
	var points []point
	for i := range 5 {
		tally := newTally()
		tally.Reconnects = 1
		for range i {
			tally.echo(time.Duration(i) * time.Millisecond)
		}
		points = append(points, point{})
		points[i].add(tally)
	}
	half := halved(points)
	if len(half) != 3 {
		t.Fatalf("%d points of 5", len(half))
	}
	for i, want := range []int64{1, 5, 4} {
		if got := half[i].latencies.TotalCount(); got != want || half[i].Echoes.Returned != want {
			t.Errorf("point %d has %d latencies of %d echoes, want %d", i, got, half[i].Echoes.Returned, want)
		}
	}
}

func TestProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		opts := Options{Stages: at(250, time.Hour)}.withDefaults()
		r := &run{opts: opts, schedule: newSchedule(&opts), began: time.Now(), step: window, total: distinctCounts()}
		time.Sleep(time.Minute)
		c := distinctCounts()
		expect(t, "progress", r.progress(), Progress{
			Elapsed: time.Minute, Open: int(c.open()), Sent: c.Echoes.Sent, Returned: c.Echoes.Returned, Lost: c.Echoes.Lost,
			Corrupted: c.Echoes.Corrupted, Notices: c.Notices.Seen(), Reconnects: c.Reconnects, Offered: 250,
		})
	})
}

// The rate in Progress is that of all workers, each of which counts by its own clock.
func TestProgressRateOfManyWorkers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &run{began: time.Now(), step: window}
		for at := time.Duration(0); at < 3*time.Second; at += window {
			for i := range 20 {
				w := &worker{run: r, tally: newTally()}
				for range 5 {
					w.tally.echo(time.Millisecond)
				}
				r.collect(w, at+time.Duration(i)*time.Millisecond)
			}
		}
		if got := r.progress().Rate; got != 1000 {
			t.Errorf("%v echoes/s, want 1000", got)
		}
	})
}

func TestWriteCSV(t *testing.T) {
	r := &Report{Series: []Point{{At: 0.1, Offered: 5, PerSecond: 1.5, P50: 1e-4, Lost: 3}, {}}}
	var b bytes.Buffer
	if err := r.WriteCSV(&b); err != nil {
		t.Fatal(err)
	}
	rows, err := csv.NewReader(&b).ReadAll()
	if err != nil || len(rows) != 3 {
		t.Fatalf("%d rows, %v", len(rows), err)
	}
	expect(t, "header", strings.Join(rows[0], ","),
		"at_seconds,offered_per_second,echoes_per_second,p50_seconds,p99_seconds,max_seconds,open,lost,notices,disconnects,refused,reconnects")
	expect(t, "row", strings.Join(rows[1], ","), "0.1,5,1.5,0.0001,0,0,0,3,0,0,0,0")
}

// Every count is a separate metric.
func TestWritePrometheus(t *testing.T) {
	r := &Report{
		Address: "a\"b\\c\n\xff:1", Counts: distinctCounts(), PerSecond: 123.5, Took: 7, OfferedPerSecond: 200, Started: time.UnixMilli(1500),
		Echo: Latency{Count: 10, Mean: 0.5, P50: 0.4, P99: 0.9, Max: 1}, Outage: Outage{
			Clients: 2,
			Median:  0.1, Max: 0.2,
		},
	}
	var b bytes.Buffer
	if err := r.WritePrometheus(&b); err != nil {
		t.Fatal(err)
	}
	text := b.String()
	for _, want := range []string{
		`address="a\"b\\c\n` + "\uFFFD" + `:1"`, "echod_load_echoes_per_second 123.5", "echod_load_duration_seconds 7", "echod_load_offered_messages_per_second 200",
		`echod_load_echo_latency_seconds{quantile="0.99"} 0.9`, "echod_load_echo_latency_seconds_sum 5\n", "echod_load_echo_latency_seconds_count 10\n",
		"echod_load_without_service_clients 2", "echod_load_without_service_max_seconds 0.2", "echod_load_start_time_seconds 1.5",
		"# TYPE echod_load_connects_total counter",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("lacks %q:\n%s", want, text)
		}
	}
	counts := distinctCounts()
	for name, leaf := range integerFields(reflect.ValueOf(&counts).Elem(), "") {
		if !strings.Contains(text, fmt.Sprintf(" %d\n", *leaf)) {
			t.Errorf("no metric has the value of %s, %d", name, *leaf)
		}
	}
}
