package main

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"

	"echod/internal/load"
)

// given is a loader as a command line sets it up.
func given(t *testing.T, args ...string) (*loader, error) {
	t.Helper()
	var l loader
	f := pflag.NewFlagSet("load", pflag.ContinueOnError)
	l.addFlags(f)
	if err := f.Parse(args); err != nil {
		t.Fatal(err)
	}
	l.setBounds(f)
	return &l, l.check()
}

// TestLoadFlags: each sets what it is named for.
func TestLoadFlags(t *testing.T) {
	l, err := given(t, "--address", "there:1", "--conns", "2", "--rate", "3.5", "--size", "104", "--duration", "5s", "--pipeline", "6",
		"--ramp", "7s", "--churn", "8s", "--reconnect=false", "--timeout", "9s", "--late", "10s", "--drain-wait", "11s", "--loops", "12",
		"--max-p99", "13s", "--max-p999", "14s", "--max-connect-p99", "15s", "--max-lost", "16", "--max-refused", "17",
		"--max-disconnects", "18", "--max-outage", "19s", "--plot", "p.svg", "--hdr", "h.hlog", "--json")
	if err != nil {
		t.Fatal(err)
	}
	want := load.Options{
		Address: "there:1", Conns: 2, Rate: 3.5, Size: 104, Duration: 5 * time.Second, Pipeline: 6,
		Ramp: 7 * time.Second, Churn: 8 * time.Second, NoReconnect: true,
		Timeout: 9 * time.Second, Late: 10 * time.Second, DrainWait: 11 * time.Second, Loops: 12,
	}
	if diff := cmp.Diff(want, l.opts); diff != "" {
		t.Errorf("options (-want +got):\n%s", diff)
	}
	bounds := load.Bounds{
		P99: new(13 * time.Second), P999: new(14 * time.Second), ConnectP99: new(15 * time.Second),
		Lost: new(int64(16)), Refused: new(int64(17)), Disconnects: new(int64(18)), Outage: new(19 * time.Second),
	}
	if diff := cmp.Diff(bounds, l.bounds); diff != "" {
		t.Errorf("bounds (-want +got):\n%s", diff)
	}
	if l.plot != "p.svg" || l.hdr != "h.hlog" || !l.json {
		t.Errorf("plot %q, hdr %q, json %v", l.plot, l.hdr, l.json)
	}
	if l, err = given(t); err != nil || l.bounds != (load.Bounds{}) || l.opts.NoReconnect {
		t.Errorf("without flags: %+v, %v", l, err)
	}
}

func TestLoadFlagsThatMakeNoSense(t *testing.T) {
	for _, tt := range []struct{ flags, want string }{
		{"--max-p99 -1s", "--max-p99: must not be negative"},
		{"--max-p999 -1s", "--max-p999: "},
		{"--max-connect-p99 -1s", "--max-connect-p99: "},
		{"--max-outage -1s", "--max-outage: "},
		{"--max-lost -1", "--max-lost: "},
		{"--max-refused -1", "--max-refused: "},
		{"--max-disconnects -1", "--max-disconnects: "},
		{"--plot x --hdr ./x", "--plot and --hdr: not to the same file"},
		{"--address foo", "missing port"},
	} {
		_, err := given(t, strings.Fields(tt.flags)...)
		if _, usage := errors.AsType[usageError](err); !usage || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.flags, err, tt.want)
		}
	}
}

// TestLiveLine: on a terminal it is one that fits, with what matters first; else there is one now and then.
func TestLiveLine(t *testing.T) {
	var b strings.Builder
	v := newLive(&b, 30*time.Second)
	p := load.Progress{
		Elapsed: 4 * time.Second, Open: 60, Lost: 1234, Notices: 80, Reconnects: 79, Rate: 6000,
		P50: 122 * time.Microsecond, P99: 1640 * time.Microsecond,
	}
	v.show(p)
	p.Elapsed = 6 * time.Second
	v.show(p)
	p.Elapsed, p.Corrupted = 8*time.Second, 5
	v.show(p)
	if want := "6/30s  lost 1,234  notices 80  reconnects 79  60 open  6,000/s  p99 1.64 ms  p50 122 µs\n"; b.String() != want {
		t.Errorf("without a terminal:\n%s\nwant\n%s", b.String(), want)
	}

	v.terminal = true
	for width, want := range map[int]string{
		120: "8/30s  lost 1,234  corrupted 5  notices 80  reconnects 79  60 open  6,000/s  p99 1.64 ms  p50 122 µs",
		80:  "8/30s  lost 1,234  corrupted 5  notices 80  reconnects 79  60 open  6,000/s",
		20:  "8/30s  lost 1,234",
		4:   "8/3",
	} {
		b.Reset()
		v.shown, v.width = 0, func() int { return width }
		if v.show(p); b.String() != "\r"+want {
			t.Errorf("%d columns: %q, want %q", width, b.String(), want)
		}
	}
	b.Reset()
	v.shown, v.width = 10, func() int { return 4 }
	v.show(p)
	v.end()
	if want := "\r8/3       \r   \r"; b.String() != want {
		t.Errorf("%q, want %q: a line that was longer is wiped out", b.String(), want)
	}
}
