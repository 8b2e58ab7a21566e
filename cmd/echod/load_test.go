package main

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"

	"echod/internal/load"
)

// parseLoad returns a loader as the command line sets it up.
func parseLoad(t *testing.T, args ...string) (*loader, error) {
	t.Helper()
	var l loader
	f := pflag.NewFlagSet("load", pflag.ContinueOnError)
	l.addFlags(f)
	if err := f.Parse(args); err != nil {
		t.Fatal(err)
	}
	return &l, l.check(f)
}

// Each flag sets what it is named for.
func TestLoadFlags(t *testing.T) {
	l, err := parseLoad(t, "--address", "there:1", "--conns", "2", "--rate", "3.5", "--size", "104",
		"--duration", "5s", "--pipeline", "6",
		"--ramp", "7s", "--churn", "8s", "--reconnect=false", "--timeout", "9s", "--late", "10s", "--drain-wait", "11s", "--loops", "12",
		"--max-p99", "13s", "--max-p999", "14s", "--max-connect-p99", "15s", "--max-lost", "16", "--max-refused", "17",
		"--max-disconnects", "18", "--max-outage", "19s", "--plot", "p.svg", "--plot-percentiles", "q.svg", "--hdr", "h.hlog",
		"--csv", "c.csv", "--prometheus", "m.prom", "--compare", "b.json", "--tls-ca", "ca.pem", "--json")
	if err != nil {
		t.Fatal(err)
	}
	want := load.Options{
		Address: "there:1", Conns: 2, Stages: []load.Stage{{
			Rate:     3.5,
			Duration: 5 * time.Second,
		}}, Sizes: load.FixedSize(104),
		Duration: 5 * time.Second, Pipeline: 6, Ramp: 7 * time.Second, Churn: 8 * time.Second, NoReconnect: true,
		Timeout: 9 * time.Second, Late: 10 * time.Second, DrainWait: 11 * time.Second, Threads: 12,
	}
	if !reflect.DeepEqual(l.opts, want) {
		t.Errorf("options\n%+v, want\n%+v", l.opts, want)
	}
	limits := load.Limits{
		P99: new(13 * time.Second), P999: new(14 * time.Second), ConnectP99: new(15 * time.Second),
		Lost: new(int64(16)), Refused: new(int64(17)), Disconnects: new(int64(18)), Outage: new(19 * time.Second),
	}
	if diff := cmp.Diff(limits, l.limits); diff != "" {
		t.Errorf("limits (-want +got):\n%s", diff)
	}
	files := [loadFileCount]string{
		plotFile: "p.svg", percentilePlotFile: "q.svg", hdrFile: "h.hlog",
		csvFile: "c.csv", prometheusFile: "m.prom",
	}
	if l.files != files || !l.json || l.compare != "b.json" || l.tls.ca != "ca.pem" {
		t.Errorf("files %q, json %v, compare %q, tls-ca %q", l.files, l.json, l.compare, l.tls.ca)
	}
	if l, err = parseLoad(t); err != nil || l.limits != (load.Limits{}) || l.opts.NoReconnect ||
		l.opts.Stages != nil || l.opts.Think != (load.Range{}) {
		t.Errorf("without flags: %+v, %v", l, err)
	}
	l, err = parseLoad(t, "--think", "1s-2s", "--size", "64-100")
	if err != nil || l.opts.Think != (load.Range{Min: time.Second, Max: 2 * time.Second}) ||
		l.opts.Sizes.String() != "64-100" {
		t.Errorf("think time %v, sizes %v, %v", l.opts.Think, l.opts.Sizes, err)
	}
	l, err = parseLoad(t, "--stages", "1:2s,3:4s")
	if err != nil || len(l.opts.Stages) != 2 ||
		l.opts.Stages[1] != (load.Stage{Rate: 3, Duration: 4 * time.Second}) {
		t.Errorf("stages %v, %v", l.opts.Stages, err)
	}
}

func TestLoadUsageErrors(t *testing.T) {
	for _, tt := range []struct{ flags, want string }{
		{"--max-p99 -1s", "--max-p99: must not be negative"},
		{"--max-p999 -1s", "--max-p999: "},
		{"--max-connect-p99 -1s", "--max-connect-p99: "},
		{"--max-outage -1s", "--max-outage: "},
		{"--max-lost -1", "--max-lost: "},
		{"--max-refused -1", "--max-refused: "},
		{"--max-disconnects -1", "--max-disconnects: "},
		{"--plot x --hdr ./x", "--plot and --hdr: must not be the same file"},
		{"--csv x --prometheus x", "--csv and --prometheus: "},
		{"--address foo", "missing port"},
		{"--size 10", "at least 38"},
		{"--size 64-", "--size: "},
		{"--stages 100", "--stages: "},
		{"--stages 1:1s --rate 5", "--rate and --duration must not be given"},
		{"--stages 1:1s --duration 5s", "--rate and --duration must not be given"},
		{"--think x", "--think: "},
		{"--think 1s --rate 5", "think time: not possible with a fixed rate"},
		{"--late 0s", "--late 0s: must be longer than 0"},
	} {
		_, err := parseLoad(t, strings.Fields(tt.flags)...)
		if _, usage := errors.AsType[usageError](err); !usage || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.flags, err, tt.want)
		}
	}
}

func TestLoadFiles(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	t.Run("a run that fails leaves the old content", func(t *testing.T) {
		if err := os.WriteFile(path("p.svg"), []byte("old"), 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := parseLoad(t, "--address", "127.0.0.1:99", "--plot", path("p.svg"), "--conns", "1000000000")
		if err != nil {
			t.Fatal(err)
		}
		if err := l.load(t.Context()); err == nil {
			t.Error("a billion connections are accepted")
		}
		if text, _ := os.ReadFile(path("p.svg")); string(text) != "old" {
			t.Errorf("the file contains %q", text)
		}
	})
	t.Run("a file that was longer is replaced", func(t *testing.T) {
		if err := os.WriteFile(path("x"), []byte("much longer than that"), 0o600); err != nil {
			t.Fatal(err)
		}
		l := loader{}
		l.files[csvFile] = path("x")
		files, err := l.openFiles()
		if err != nil {
			t.Fatal(err)
		}
		_, err = files[csvFile].Write([]byte("a"))
		_, err2 := files[csvFile].Write([]byte("b"))
		if err := errors.Join(err, err2, files.close()); err != nil {
			t.Fatal(err)
		}
		if text, _ := os.ReadFile(path("x")); string(text) != "ab" {
			t.Errorf("the file contains %q, want ab", text)
		}
	})
	t.Run("files to read are checked before the run", func(t *testing.T) {
		if err := os.WriteFile(path("empty"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, tt := range []struct{ flag, file, want string }{
			{"--compare", "none", "no such file"},
			{"--compare", "empty", "reading a report"},
			{"--tls-ca", "none", "no such file"},
			{"--tls-ca", "empty", "no certificate in PEM"},
			{"--plot", "none/p.svg", "no such file"},
		} {
			l, err := parseLoad(t, "--duration", "1h", tt.flag, path(tt.file))
			if err != nil {
				t.Fatal(err)
			}
			if err := l.load(t.Context()); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%s %s: %v, want %q", tt.flag, tt.file, err, tt.want)
			}
		}
	})
}
