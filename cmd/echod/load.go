package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"echod/internal/load"
)

func newLoadCommand() *cobra.Command {
	var l loader
	cmd := &cobra.Command{
		Use:   "load",
		Short: "Put load on an echo server, and report what was lost, and how long it took",
		Long: `Put load on an echo server, and report what was lost, and how long it took.

Each message carries a number and a checksum, so that messages lost, late, broken,
repeated, out of order or misdelivered are told apart. It works against any server that
echoes (RFC 862), and heeds the notices of echod: a connection that is told SHUTDOWN
waits for what is under way, half-closes, reads to the end and connects again.

With --rate messages are sent when they are due, whether the server keeps up or not (an
open model), and latency counts from then: a server that stalls for a second shows a
second. Without, each connection waits for its echo before it sends on (a closed model),
so that a stall delays the load itself, and shows once for each connection.

Ctrl-C ends the run early, with its report; once more ends the wait for what is under
way at the end.

Exit codes: 0 all is well, 1 something was lost, corrupted, duplicated or reordered, or a
bound (--max-...) is broken, 2 usage.`,
		Example: `  echod load --conns 64 --duration 30s
  echod load --conns 200 --rate 10000 --plot rollout.svg --max-outage 1s --max-refused 0`,
		Args: takes(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			l.out, l.err = cmd.OutOrStdout(), cmd.ErrOrStderr()
			l.setBounds(cmd.Flags())
			if err := l.check(); err != nil {
				return err
			}
			return l.run(cmd.Context())
		},
	}
	l.addFlags(cmd.Flags())
	return cmd
}

func (l *loader) addFlags(f *pflag.FlagSet) {
	o := &l.opts
	f.SortFlags = false
	f.StringVar(&o.Address, "address", "127.0.0.1:9999", "server's `address`")
	f.IntVar(&o.Conns, "conns", 1, "`number` of connections at a time")
	f.Float64Var(&o.Rate, "rate", 0, "`messages` a second, over all connections, sent when they are\ndue; 0: each connection sends when it has its echo")
	f.IntVar(&o.Size, "size", load.DefaultSize, fmt.Sprintf("`bytes` of a message, at least %d", load.MinSize))
	f.DurationVar(&o.Duration, "duration", load.DefaultDuration, "`time` for which messages are sent")
	f.IntVar(&o.Pipeline, "pipeline", 0, fmt.Sprintf("most `messages` under way on a connection (default: %d, and\n%d with --rate: what is due beyond it waits, and the wait\ncounts)", load.DefaultPipeline, load.DefaultBound))
	f.DurationVar(&o.Ramp, "ramp", 0, "`time` over which connections are opened, evenly (default: all\nat once)")
	f.DurationVar(&o.Churn, "churn", 0, "`time` after which, give or take a half, a connection is\nclosed in order and made anew (default: never)")
	f.BoolVar(&l.reconnect, "reconnect", true, "connect again, with growing, random pauses of up to 2s, when\na connection ends or none can be made; if false, only\nwhat --churn closes is made again, once")
	f.DurationVar(&o.Timeout, "timeout", load.DefaultTimeout, "`time` for a connect")
	f.DurationVar(&o.Late, "late", load.DefaultLate, "`time` after which an echo counts as late")
	f.DurationVar(&o.DrainWait, "drain-wait", load.DefaultDrainWait, "`time` at the end for what is under way; what has not come\nthen is lost, and who still connects has timed out")
	f.IntVar(&o.Loops, "loops", 0, "`threads` that carry the load (default: one for four processors)")
	f.BoolVar(&l.json, "json", false, "print the report in JSON, with its time series")
	f.StringVar(&l.hdr, "hdr", "", "`file` for the latencies of echoes: an HdrHistogram log if its\nname ends in .hlog, else a table of percentiles")
	f.StringVar(&l.plot, "plot", "", "SVG `file` for a picture of latency and throughput over time")
	f.DurationVar(&l.max.p99, "max-p99", 0, "fail if more than 1 % of the echoes take longer than this `time`")
	f.DurationVar(&l.max.p999, "max-p999", 0, "fail if more than 0.1 % of the echoes take longer than this\n`time`")
	f.DurationVar(&l.max.connectP99, "max-connect-p99", 0, "fail if more than 1 % of the connects take longer than this\n`time`")
	f.Int64Var(&l.max.lost, "max-lost", 0, "fail if more than this `number` of messages are lost")
	f.Int64Var(&l.max.refused, "max-refused", 0, "fail if more than this `number` of connects are refused, turned\naway or fail otherwise")
	f.Int64Var(&l.max.disconnects, "max-disconnects", 0, "fail if more than this `number` of connections end without a\nnotice")
	f.DurationVar(&l.max.outage, "max-outage", 0, "fail if a client is without service for more than this `time`")
}

// loader is one echod load.
type loader struct {
	opts      load.Options
	reconnect bool
	json      bool
	hdr, plot string

	max struct {
		p99, p999, connectP99, outage time.Duration
		lost, refused, disconnects    int64
	}
	bounds   load.Bounds
	out, err io.Writer
}

// setBounds takes the bounds whose flags were given.
func (l *loader) setBounds(flags *pflag.FlagSet) {
	given := func(name string) bool { return flags.Changed(name) }
	if given("max-p99") {
		l.bounds.P99 = &l.max.p99
	}
	if given("max-p999") {
		l.bounds.P999 = &l.max.p999
	}
	if given("max-connect-p99") {
		l.bounds.ConnectP99 = &l.max.connectP99
	}
	if given("max-outage") {
		l.bounds.Outage = &l.max.outage
	}
	if given("max-lost") {
		l.bounds.Lost = &l.max.lost
	}
	if given("max-refused") {
		l.bounds.Refused = &l.max.refused
	}
	if given("max-disconnects") {
		l.bounds.Disconnects = &l.max.disconnects
	}
}

func (l *loader) check() error {
	if l.opts.Conns < 1 {
		return usagef("--conns %d: at least 1", l.opts.Conns)
	}
	if l.opts.Duration <= 0 {
		return usagef("--duration %s: must be more than nothing", l.opts.Duration)
	}
	if l.opts.Size < load.MinSize {
		return usagef("--size %d: a message needs room for its number and checksum: at least %d", l.opts.Size, load.MinSize)
	}
	for flag, d := range map[string]time.Duration{"timeout": l.opts.Timeout, "late": l.opts.Late, "drain-wait": l.opts.DrainWait} {
		if d == 0 {
			return usagef("--%s 0s: must be more than nothing", flag)
		}
	}
	l.opts.NoReconnect = !l.reconnect
	for flag, limit := range map[string]int64{
		"p99": int64(l.max.p99), "p999": int64(l.max.p999), "connect-p99": int64(l.max.connectP99), "outage": int64(l.max.outage),
		"lost": l.max.lost, "refused": l.max.refused, "disconnects": l.max.disconnects,
	} {
		if limit < 0 {
			return usagef("--max-%s: must not be negative", flag)
		}
	}
	if l.plot != "" && filepath.Clean(l.plot) == filepath.Clean(l.hdr) {
		return usagef("--plot and --hdr: not to the same file")
	}
	if err := l.opts.Validate(); err != nil {
		return usageError{err}
	}
	return nil
}

func (l *loader) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(context.Canceled)
	hurry := make(chan struct{})
	endOnce := sync.OnceFunc(func() { close(hurry) })
	end := onInterrupt(func(e *exitError) {
		if ctx.Err() == nil {
			cancel(e)
		} else {
			endOnce()
		}
	})
	defer end()
	l.opts.Hurry = hurry
	return l.load(ctx)
}

// load does the run, and says what came of it.
func (l *loader) load(ctx context.Context) error {
	files, err := l.openFiles()
	if err != nil {
		return err
	}
	live := newLive(l.err, l.opts.Duration)
	l.opts.OnProgress = live.show
	report, err := load.Run(ctx, l.opts)
	live.end()
	if err != nil {
		return errors.Join(err, files.close())
	}
	why := report.Judge(l.bounds)
	if l.json {
		err = writeJSON(l.out, report, why)
	} else {
		err = writeReport(l.out, report, why)
	}
	if err := errors.Join(err, files.write(report)); err != nil {
		return err
	}
	if len(why) > 0 {
		return &exitError{exitFailed, errors.New(strings.Join(why, "; "))}
	}
	return nil
}

func writeJSON(out io.Writer, report *load.Report, why []string) error {
	if why == nil {
		why = []string{}
	}
	enc := json.NewEncoder(out)
	enc.SetIndent("", "  ")
	err := enc.Encode(struct {
		*load.Report
		Failed []string `json:"failed"`
	}{report, why})
	if err != nil {
		return fmt.Errorf("writing the report: %w", err)
	}
	return nil
}

// loadFiles are the files that a report goes to, opened before the run: it would be a pity if they could not be
// written after it.
type loadFiles struct{ hdr, plot *os.File }

func (l *loader) openFiles() (f loadFiles, err error) {
	for _, file := range []struct {
		path string
		to   **os.File
	}{{l.hdr, &f.hdr}, {l.plot, &f.plot}} {
		if file.path == "" {
			continue
		}
		if *file.to, err = os.Create(file.path); err != nil {
			return f, errors.Join(err, f.close())
		}
	}
	return f, nil
}

func (f loadFiles) close() error {
	var errs []error
	for _, file := range []*os.File{f.hdr, f.plot} {
		if file != nil {
			errs = append(errs, file.Close())
		}
	}
	return errors.Join(errs...)
}

func (f loadFiles) write(report *load.Report) error {
	var errs []error
	if f.hdr != nil {
		form := report.WritePercentiles
		if strings.HasSuffix(f.hdr.Name(), ".hlog") {
			form = report.WriteHistogramLog
		}
		errs = append(errs, form(f.hdr))
	}
	if f.plot != nil {
		errs = append(errs, report.WritePlot(f.plot))
	}
	return errors.Join(append(errs, f.close())...)
}
