package load

import (
	"context"
	"errors"
	"math"
	"testing"
	"testing/synctest"
	"time"
)

// TestSeries: fine at first, whatever was planned, and coarser when there is much of it; nothing is left out.
func TestSeries(t *testing.T) {
	for _, tt := range []struct {
		planned, after time.Duration // when it is interrupted; zero for never
		points         int
		step           float64
	}{
		{time.Second, 0, 10, 0.1},
		{time.Hour, 4 * time.Second, 41, 0.1},
		{119 * time.Second, 0, 1190, 0.1},
		{5 * time.Minute, 0, 750, 0.4},
	} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			if tt.after > 0 {
				time.AfterFunc(tt.after+time.Millisecond, func() { cancel(errors.New("enough")) })
			}
			r, err := Run(ctx, Options{Address: "in memory", Dial: inMemory(t, faults{}.serve), Rate: 20, Duration: tt.planned})
			if err != nil {
				t.Fatal(err)
			}
			if got := len(r.Series); got != tt.points || r.step() != tt.step {
				t.Errorf("%v of %v: %d points of %v s, want %d of %v", tt.after, tt.planned, got, r.step(), tt.points, tt.step)
			}
			sum := 0.0
			for i, p := range r.Series {
				if math.Abs(p.At-float64(i)*tt.step) > 1e-9 {
					t.Fatalf("point %d begins at %v s", i, p.At)
				}
				if i < len(r.Series)-1 && math.Abs(p.PerSecond-20) > 11 {
					t.Errorf("%v of %v: %v echoes/s at %v s, want about 20", tt.after, tt.planned, p.PerSecond, p.At)
				}
				sum += p.PerSecond * min(tt.step, r.Lasted-p.At)
			}
			if math.Abs(sum-float64(r.Echoes.Returned)) > 0.05*float64(r.Echoes.Returned) {
				t.Errorf("%v of %v: the points have %v echoes, want %d", tt.after, tt.planned, sum, r.Echoes.Returned)
			}
		})
	}
}

// TestHalvedKeepsWhatHappened, latencies too, and when one of two has none.
func TestHalvedKeepsWhatHappened(t *testing.T) {
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
	if half[0].Reconnects != 2 || half[2].Reconnects != 1 {
		t.Errorf("%d and %d reconnects", half[0].Reconnects, half[2].Reconnects)
	}
}

// TestRateOfManyLoops, each of which counts by a clock of its own.
func TestRateOfManyLoops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &run{began: time.Now(), step: window}
		for at := time.Duration(0); at < 3*time.Second; at += window {
			for i := range 20 {
				l := &loop{run: r, tally: newTally()}
				for range 5 {
					l.tally.echo(time.Millisecond)
				}
				r.absorb(l, at+time.Duration(i)*time.Millisecond)
			}
		}
		if got := r.progress().Rate; got != 1000 {
			t.Errorf("%v echoes/s, want 1000", got)
		}
	})
}
