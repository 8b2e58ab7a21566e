package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	humanize "github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"echod/internal/load"
)

func newLoadCommand() *cobra.Command {
	var l loader
	cmd := &cobra.Command{
		Use:   "load",
		Short: "Put load on an echo server and account for every message",
		Long: `Put load on an echo server, and report latencies and what became of each message.

Every message has a number and a checksum. The report tells apart messages that were
lost, late, corrupted, duplicated, out of order or misdelivered. Any server that echoes
(RFC 862) will do. The notices of echod are understood: after SHUTDOWN a connection waits
for its echoes, half-closes, reads to the end and connects again. Over TLS the report
shows how long handshakes took, how many resumed a session, and how many failed.

With --rate or --stages, messages are sent when they are due, whether or not the server
keeps up (open model). Latency counts from then, so a server that stalls for a second
shows a second. Without them, each connection waits for its echo before it sends again
(closed model). Then a stall also stalls the load, and shows once per connection.

Files, ports and addresses are checked before the run. Ctrl-C ends the run early, with a
report. A second Ctrl-C ends the wait for messages in flight. Messages in flight take
hardly any memory. While a connection receives broken echoes, it takes up to three times
the size of a message.

Exit status: 0 if all is well, 1 if messages were lost, corrupted, duplicated or
reordered, or if a limit (--max-...) was exceeded, 2 for usage errors.`,
		Example: `  echod load --conns 64 --duration 30s
  echod load --conns 200 --rate 10000 --plot run.svg --max-outage 1s --max-refused 0
  echod load --conns 50 --stages 100:30s,500:1m --size 64:90,1024-4096:9,65536:1
  echod load --json > before.json; echod load --compare before.json`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			l.out, l.err = cmd.OutOrStdout(), cmd.ErrOrStderr()
			if err := l.check(cmd.Flags()); err != nil {
				return err
			}
			return l.run(cmd.Context())
		},
	}
	l.addFlags(cmd.Flags())
	cmd.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	return cmd
}

func (l *loader) addFlags(f *pflag.FlagSet) {
	o := &l.opts
	f.SortFlags = false
	f.StringVar(&o.Address, "address", "127.0.0.1:9999",
		"`address` of the server: host:port, tls://host:port or\n"+
			"unix:///path; connections are spread over all IP addresses\nof the host")
	l.tls.add(f)
	f.BoolVar(&l.resume, "tls-resume", true,
		"resume TLS sessions when connections are replaced; if false,\nevery handshake is a full one")
	f.IntVar(&o.Conns, "conns", 1, "`number` of connections at a time")
	f.Float64Var(&l.rate, "rate", 0,
		"`messages` per second, over all connections (default: each\nconnection sends when it has its echo)")
	f.StringVar(&l.stages, "stages", "",
		"`list` of rates and times, such as 100:30s,500:1m, instead of\n--rate and --duration")
	f.StringVar(&l.size, "size", "64",
		fmt.Sprintf("`bytes` of a message, at least %d: a number, a range (64-1024),\n"+
			"or both with weights (64:90,1024-4096:9,65536:1)", load.MinSize))
	f.DurationVar(&o.Duration, "duration", load.DefaultDuration, "`time` for which messages are sent")
	f.StringVar(&l.think, "think", "",
		"`time`, or range of times (50ms-200ms), that a connection waits\n"+
			"after an echo (default: none); not with --rate or --stages")
	f.IntVar(&o.Pipeline, "pipeline", 0,
		fmt.Sprintf("most `messages` in flight on a connection (default: %d; with\n"+
			"--rate %d: messages due beyond that wait, and the wait\ncounts)",
			load.DefaultPipeline, load.DefaultOpenPipeline))
	f.DurationVar(&o.Ramp, "ramp", 0, "`time` over which connections are opened (default: all at once)")
	f.DurationVar(&o.Churn, "churn", 0,
		"`time`, plus or minus half, after which a connection is closed\nand replaced (default: never)")
	f.BoolVar(&l.reconnect, "reconnect", true,
		"replace connections that end or cannot be made, after a random\n"+
			"time of up to 2s; if false, only --churn\nreplaces them")
	f.BoolVar(&o.IgnoreNotices, "ignore-notices", false,
		"go on after a notice, as clients do that do not know notices")
	f.DurationVar(&o.Timeout, "timeout", load.DefaultTimeout, "`time` for a connect")
	f.DurationVar(&o.Late, "late", load.DefaultLate, "`time` after which an echo is late")
	f.DurationVar(&o.DrainWait, "drain-wait", load.DefaultDrainWait,
		"`time` to wait for messages in flight at the end; then they\nare lost, and connects have timed out")
	f.IntVar(&o.Threads, "loops", 0,
		"`threads` that generate the load (default: one for each four\nprocessors)")
	f.BoolVar(&l.json, "json", false, "print the report as JSON, with its time series")
	f.StringVar(&l.compare, "compare", "", "`file` with the --json report of an earlier run, to compare with")
	f.StringVar(&l.files[plotFile], "plot", "", "`file` for an SVG picture of latency and throughput over time")
	f.StringVar(&l.files[percentilePlotFile], "plot-percentiles", "",
		"`file` for an SVG picture of latency by percentile")
	f.StringVar(&l.files[hdrFile], "hdr", "",
		"`file` for the latencies: an HdrHistogram log with one interval\n"+
			"a second if its name ends in .hlog, else a table of percentiles")
	f.StringVar(&l.files[csvFile], "csv", "", "`file` for the time series as CSV")
	f.StringVar(&l.files[prometheusFile], "prometheus", "", "`file` for the report in Prometheus' text format")
	f.DurationVar(&l.max.p99, "max-p99", 0, "fail if more than 1 % of the echoes take longer than this `time`")
	f.DurationVar(&l.max.p999, "max-p999", 0,
		"fail if more than 0.1 % of the echoes take longer than this\n`time`")
	f.DurationVar(&l.max.connectP99, "max-connect-p99", 0,
		"fail if more than 1 % of the connects take longer than this\n`time`")
	f.Int64Var(&l.max.lost, "max-lost", 0, "fail if more than this `number` of messages are lost")
	f.Int64Var(&l.max.refused, "max-refused", 0,
		"fail if more than this `number` of connects are refused, turned\naway or fail otherwise")
	f.Int64Var(&l.max.disconnects, "max-disconnects", 0,
		"fail if more than this `number` of connections end without a\nnotice")
	f.DurationVar(&l.max.outage, "max-outage", 0,
		"fail if a client is without service for more than this `time`")
}

// The files that a report can be written to.
const (
	plotFile = iota
	percentilePlotFile
	hdrFile
	csvFile
	prometheusFile
	loadFileCount
)

// loadFileFlags names the flags of the files.
var loadFileFlags = [loadFileCount]string{"plot", "plot-percentiles", "hdr", "csv", "prometheus"}

// loader is one run of echod load.
type loader struct {
	opts      load.Options
	rate      float64
	reconnect bool
	json      bool

	stages, size, think string
	compare             string
	tls                 clientTLS
	resume              bool
	files               [loadFileCount]string

	max struct {
		p99, p999, connectP99, outage time.Duration
		lost, refused, disconnects    int64
	}
	limits   load.Limits
	out, err io.Writer
}

// setLimits sets the limits whose flags were given.
func (l *loader) setLimits(flags *pflag.FlagSet) error {
	for flag, limit := range map[string]int64{
		"max-p99": int64(l.max.p99), "max-p999": int64(l.max.p999), "max-connect-p99": int64(l.max.connectP99),
		"max-outage": int64(l.max.outage), "max-lost": l.max.lost, "max-refused": l.max.refused,
		"max-disconnects": l.max.disconnects,
	} {
		if limit < 0 {
			return usagef("--%s: must not be negative", flag)
		}
	}
	given := flags.Changed
	if given("max-p99") {
		l.limits.P99 = &l.max.p99
	}
	if given("max-p999") {
		l.limits.P999 = &l.max.p999
	}
	if given("max-connect-p99") {
		l.limits.ConnectP99 = &l.max.connectP99
	}
	if given("max-outage") {
		l.limits.Outage = &l.max.outage
	}
	if given("max-lost") {
		l.limits.Lost = &l.max.lost
	}
	if given("max-refused") {
		l.limits.Refused = &l.max.refused
	}
	if given("max-disconnects") {
		l.limits.Disconnects = &l.max.disconnects
	}
	return nil
}

// check checks the flags, and sets the options.
func (l *loader) check(flags *pflag.FlagSet) error {
	if l.opts.Conns < 1 {
		return usagef("--conns %d: must be at least 1", l.opts.Conns)
	}
	if l.opts.Duration <= 0 {
		return usagef("--duration %s: must be longer than 0", l.opts.Duration)
	}
	for flag, d := range map[string]time.Duration{
		"timeout": l.opts.Timeout, "late": l.opts.Late,
		"drain-wait": l.opts.DrainWait,
	} {
		if d == 0 {
			return usagef("--%s 0s: must be longer than 0", flag)
		}
	}
	var err error
	if l.opts.Sizes, err = load.ParseSizes(l.size); err != nil {
		return usagef("--size: %w", err)
	}
	if l.think != "" {
		if l.opts.Think, err = load.ParseRange(l.think); err != nil {
			return usagef("--think: %w", err)
		}
	}
	switch {
	case l.stages != "" && (flags.Changed("rate") || flags.Changed("duration")):
		return usagef("--stages: gives rates and times, so --rate and --duration must not be given")
	case l.stages != "":
		if l.opts.Stages, err = load.ParseStages(l.stages); err != nil {
			return usagef("--stages: %w", err)
		}
	case l.rate != 0:
		l.opts.Stages = []load.Stage{{Rate: l.rate, Duration: l.opts.Duration}}
	}
	l.opts.NoReconnect = !l.reconnect
	if err := l.setLimits(flags); err != nil {
		return err
	}
	for i, path := range l.files {
		for j := range i {
			if path != "" && filepath.Clean(path) == filepath.Clean(l.files[j]) {
				return usagef("--%s and --%s: must not be the same file", loadFileFlags[j], loadFileFlags[i])
			}
		}
	}
	if err := l.opts.Validate(); err != nil {
		return usageError{err}
	}
	return nil
}

// run runs the command. The first interrupt ends the run. The second one ends the
// wait for messages in flight.
func (l *loader) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(context.Canceled)
	skip := make(chan struct{})
	skipDrain := sync.OnceFunc(func() { close(skip) })
	end := onInterrupt(func(e *exitError) {
		if ctx.Err() == nil {
			cancel(e)
		} else {
			skipDrain()
		}
	})
	defer end()
	l.opts.SkipDrain = skip
	return l.load(ctx)
}

// load runs the load and writes the results.
func (l *loader) load(ctx context.Context) error {
	before, err := l.readBefore()
	if err != nil {
		return err
	}
	if l.opts.Address, err = l.tls.address(l.opts.Address); err != nil {
		return err
	}
	if l.opts.TLS, err = l.tls.config(l.err); err != nil {
		return err
	}
	if l.resume {
		l.opts.TLS = cmp.Or(l.opts.TLS, &tls.Config{MinVersion: tls.VersionTLS12})
		l.opts.TLS.ClientSessionCache = tls.NewLRUClientSessionCache(0)
	}
	files, err := l.openFiles()
	if err != nil {
		return err
	}
	if l.writesLog() {
		l.opts.HistogramLog = files[hdrFile]
	}
	progress := newLoadProgress(l.err, l.opts)
	l.opts.OnProgress = progress.show
	report, err := load.Run(ctx, l.opts)
	progress.end()
	if report == nil {
		return errors.Join(err, files.close())
	}
	failures := report.Failures(l.limits)
	var comparison *load.Comparison
	if before != nil {
		comparison = report.Compare(before)
	}
	if l.json {
		err = errors.Join(err, writeLoadJSON(l.out, report, failures, comparison))
	} else {
		err = errors.Join(err, writeLoadReport(l.out, report, failures, comparison))
	}
	if err := errors.Join(err, l.writeFiles(files, report, before), files.close()); err != nil {
		return err
	}
	if len(failures) > 0 {
		return &exitError{exitFailed, errors.New(strings.Join(failures, "; "))}
	}
	return nil
}

// readBefore reads the report to compare with. It returns nil if there is none.
func (l *loader) readBefore() (*load.Report, error) {
	if l.compare == "" {
		return nil, nil
	}
	f, err := os.Open(l.compare)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	report, err := load.ReadReport(f)
	if err != nil {
		return nil, fmt.Errorf("--compare %s: %w", l.compare, err)
	}
	return report, nil
}

// writesLog reports whether --hdr asks for a log, which is written during the run.
func (l *loader) writesLog() bool { return strings.HasSuffix(l.files[hdrFile], ".hlog") }

// loadFiles are the files that a report is written to; nil if there is none. They are
// opened before the run, so that a wrong path is reported at once.
type loadFiles [loadFileCount]*outputFile

func (l *loader) openFiles() (files loadFiles, err error) {
	for i, path := range l.files {
		if path == "" {
			continue
		}
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o666)
		if err != nil {
			return files, errors.Join(err, files.close())
		}
		files[i] = &outputFile{File: f}
	}
	return files, nil
}

func (files loadFiles) close() error {
	var errs []error
	for _, f := range files {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

// An outputFile is truncated at the first write. If the run fails before that, it keeps
// its content.
type outputFile struct {
	*os.File
	written bool
}

func (f *outputFile) Write(p []byte) (int, error) {
	if !f.written {
		f.written = true
		_ = f.Truncate(0) // fails for pipes and devices, which have no old content
	}
	return f.File.Write(p)
}

func (l *loader) writeFiles(files loadFiles, report, before *load.Report) error {
	writers := [loadFileCount]func(io.Writer) error{
		plotFile:           report.WritePlot,
		percentilePlotFile: func(w io.Writer) error { return report.WritePercentilePlot(w, before) },
		hdrFile:            report.WritePercentiles,
		csvFile:            report.WriteCSV,
		prometheusFile:     report.WritePrometheus,
	}
	var errs []error
	for i, f := range files {
		if f != nil && (i != hdrFile || !l.writesLog()) {
			errs = append(errs, writers[i](f))
		}
	}
	return errors.Join(errs...)
}

// progressEvery is how often progress is printed without a terminal.
const progressEvery = 5 * time.Second

// loadProgress shows the progress of a run. On a terminal it updates one line. Otherwise
// it prints a new line every progressEvery.
type loadProgress struct {
	out      io.Writer
	terminal bool
	width    func() int
	duration time.Duration
	printed  time.Duration // when the last line was printed, from the start of the run
	shown    int           // columns of the line on the terminal
}

func newLoadProgress(out io.Writer, opts load.Options) *loadProgress {
	v := &loadProgress{out: out, duration: opts.Duration}
	for i, s := range opts.Stages {
		if i == 0 {
			v.duration = 0
		}
		v.duration += s.Duration
	}
	if file, ok := out.(*os.File); ok && term.IsTerminal(int(file.Fd())) && os.Getenv("TERM") != "dumb" {
		v.terminal = true
		v.width = func() int {
			width, _, err := term.GetSize(int(file.Fd()))
			if err != nil || width == 0 {
				return 80
			}
			return width
		}
	}
	return v
}

func (v *loadProgress) show(p load.Progress) {
	if !v.terminal {
		if p.Elapsed-v.printed < progressEvery {
			return
		}
		v.printed = p.Elapsed
		fmt.Fprintln(v.out, strings.Join(v.fields(p), fieldGap))
		return
	}
	line := joinWithin(v.fields(p), v.width()-1)
	columns := utf8.RuneCountInString(line)
	fmt.Fprintf(v.out, "\r%s%s", line, strings.Repeat(" ", max(0, v.shown-columns)))
	v.shown = columns
}

// end removes the line from the terminal.
func (v *loadProgress) end() {
	if v.shown > 0 {
		fmt.Fprintf(v.out, "\r%s\r", strings.Repeat(" ", v.shown))
	}
}

// fields returns the fields to show, the most important first.
func (v *loadProgress) fields(p load.Progress) []string {
	when := fmt.Sprintf("%.0f/%s", min(p.Elapsed, v.duration).Seconds(), v.duration)
	if p.Draining {
		when = "waiting for echoes"
	}
	fields := []string{when, "lost " + humanize.Comma(p.Lost)}
	if p.Corrupted > 0 {
		fields = append(fields, "corrupted "+humanize.Comma(p.Corrupted))
	}
	rate := humanize.Comma(int64(p.Rate+0.5)) + "/s"
	if p.Offered > 0 && !p.Draining {
		rate += " of " + humanize.Commaf(p.Offered)
	}
	return append(fields, "notices "+humanize.Comma(p.Notices), "reconnects "+humanize.Comma(p.Reconnects),
		humanize.Comma(int64(p.Open))+" open", rate,
		"p99 "+formatLatency(p.P99.Seconds()), "p50 "+formatLatency(p.P50.Seconds()))
}

const fieldGap = "  "

// joinWithin joins as many fields as fit into width. The first one is cut if necessary.
func joinWithin(fields []string, width int) string {
	first := []rune(fields[0])
	line := string(first[:min(len(first), max(0, width))])
	for _, field := range fields[1:] {
		longer := line + fieldGap + field
		if utf8.RuneCountInString(longer) > width {
			break
		}
		line = longer
	}
	return line
}

// writeLoadJSON prints a report as JSON, with the failures and the comparison.
func writeLoadJSON(out io.Writer, report *load.Report, failures []string, comparison *load.Comparison) error {
	if failures == nil {
		failures = []string{}
	}
	enc := json.NewEncoder(out)
	enc.SetIndent("", "  ")
	err := enc.Encode(struct {
		*load.Report
		Failed     []string         `json:"failed"`
		Comparison *load.Comparison `json:"comparison,omitempty"`
	}{report, failures, comparison})
	if err != nil {
		return fmt.Errorf("writing the report: %w", err)
	}
	return nil
}
