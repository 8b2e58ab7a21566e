package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/buffer"
	"go.uber.org/zap/zapcore"
	"golang.org/x/term"

	"echod/internal/text"
	"echod/server"
)

// Sampling, so that a flood of connections does not become a flood of log lines. In each second, the first
// logPerSecond entries with the same message are logged, and then every logThereafter-th.
const (
	logPerSecond  = 200
	logThereafter = 100
)

// Causes for which log entries are dropped.
const (
	droppedBySampling = "sampling"
	droppedBySlowness = "slow-reader"
)

// chooseFormat returns the log format to use when format is empty: console on a terminal, journal when
// stderr is connected to it, and json otherwise.
func chooseFormat(format string) string {
	switch {
	case format != "":
		return format
	case term.IsTerminal(int(os.Stderr.Fd())):
		return "console"
	case stderrIsJournal() && journalEnabled():
		return "journal"
	default:
		return "json" // the journal reads it too, where its socket cannot be reached
	}
}

func parseLevel(level string) (zap.AtomicLevel, error) {
	enabled, err := zap.ParseAtomicLevel(level)
	if err != nil {
		err = usagef("--log-level %q: want debug, info, warn or error", level)
	}
	return enabled, err
}

// newLogger returns a logger that never blocks its caller. format is console, json, journal, or empty to choose one by
// the kind of stderr. onDropped, if not nil, is called with the number of dropped entries and the cause. The caller must
// close the sink.
func newLogger(enabled zapcore.LevelEnabler, format string, onDropped func(cause string, entries int64),
) (*zap.Logger, *logSink, error) {
	sink := newLogSink(onDropped)
	var encoder zapcore.Encoder
	switch format = chooseFormat(format); format {
	case "json":
		config := zap.NewProductionEncoderConfig()
		config.TimeKey = "time"
		config.EncodeTime = zapcore.RFC3339NanoTimeEncoder
		config.EncodeDuration = zapcore.StringDurationEncoder
		encoder = zapcore.NewJSONEncoder(config)
	case "console":
		encoder = newConsoleEncoder()
	case "journal":
		if !journalEnabled() {
			return nil, nil, errors.New("--log-format journal: cannot reach the systemd journal")
		}
	default:
		return nil, nil, usagef("--log-format %q: want console, json or journal", format)
	}
	if format == "journal" {
		sink.core = journalCore{send: sendToJournal}
		core := journalCore{LevelEnabler: enabled, send: sink.queueSend(sendToJournal)}
		return zap.New(withSampling(core, sink)), sink.start(), nil
	}
	if stderrIsJournal() {
		encoder = priorityEncoder{encoder}
	}
	sink.core = zapcore.NewCore(encoder, zapcore.AddSync(os.Stderr), zapcore.DebugLevel)
	core := zapcore.NewCore(encoder, zapcore.AddSync(sink.writer(os.Stderr)), enabled)
	return zap.New(withSampling(core, sink)), sink.start(), nil
}

func newConsoleEncoder() zapcore.Encoder {
	config := zap.NewDevelopmentEncoderConfig()
	config.EncodeTime = zapcore.TimeEncoderOfLayout("15:04:05.000")
	config.ConsoleSeparator = "  "
	return printableEncoder{zapcore.NewConsoleEncoder(config)}
}

// printableEncoder makes each entry one line that is safe for a terminal. The console encoder alone leaves newlines in
// messages, and C1 control characters and direction marks in fields.
type printableEncoder struct{ zapcore.Encoder }

func (e printableEncoder) Clone() zapcore.Encoder { return printableEncoder{e.Encoder.Clone()} }

func (e printableEncoder) EncodeEntry(entry zapcore.Entry, fields []zapcore.Field) (*buffer.Buffer, error) {
	encoded, err := e.Encoder.EncodeEntry(entry, fields)
	if err != nil {
		return nil, err
	}
	line := text.Printable(strings.TrimSuffix(encoded.String(), zapcore.DefaultLineEnding))
	encoded.Reset()
	encoded.AppendString(line + zapcore.DefaultLineEnding)
	return encoded, nil
}

// samplingCore samples entries about single connections, because clients can cause any number of them. It logs all other
// entries, and all about connections that the server ended, so that a flood cannot hide them.
type samplingCore struct {
	zapcore.Core
	sampler zapcore.Core // samples entries, and passes the rest to Core
}

func withSampling(core zapcore.Core, sink *logSink) zapcore.Core {
	count := zapcore.SamplerHook(func(_ zapcore.Entry, decision zapcore.SamplingDecision) {
		if decision&zapcore.LogDropped != 0 {
			sink.countSampled()
		}
	})
	sampler := zapcore.NewSamplerWithOptions(core, time.Second, logPerSecond, logThereafter, count)
	return samplingCore{Core: core, sampler: sampler}
}

func (c samplingCore) With(fields []zapcore.Field) zapcore.Core {
	return samplingCore{c.Core.With(fields), c.sampler.With(fields)}
}

func (c samplingCore) Check(entry zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(entry.Level) {
		return ce.AddCore(entry, c)
	}
	return ce
}

func (c samplingCore) Write(entry zapcore.Entry, fields []zapcore.Field) error {
	if !isPerConn(fields) || endedByServer(fields) {
		return c.Core.Write(entry, fields)
	}
	if ce := c.sampler.Check(entry, nil); ce != nil {
		ce.Write(fields...)
	}
	return nil
}

// endedByServer reports whether fields say that the server ended the connection.
func endedByServer(fields []zapcore.Field) bool {
	return slices.ContainsFunc(fields, func(f zapcore.Field) bool {
		reason, ok := f.Interface.(server.Reason)
		return ok && (reason == server.ReasonDeadline || reason == server.ReasonForced)
	})
}

// isPerConn reports whether fields belong to an entry about one connection.
func isPerConn(fields []zapcore.Field) bool {
	return slices.ContainsFunc(fields, func(f zapcore.Field) bool { return f.Key == "conn" })
}

const (
	logBacklog = 4096                   // entries that wait for a slow reader
	logFlush   = 250 * time.Millisecond // time for the reader to read them when the process ends
	logLossGap = time.Second            // between two reports of entries dropped by sampling
)

// logSink writes the log without blocking its callers. Stderr may be a terminal that is stopped with
// Ctrl-S, or a pipe whose reader hangs, and neither may block the server. Entries are dropped if the queue is full or if
// they cannot be written. When the reader continues, a log entry says how many were dropped.
//
// start starts the sink's goroutine, and close ends it. If stderr blocks it, it ends with the process.
type logSink struct {
	queue      chan func() error
	core       zapcore.Core // writes entries about dropped entries, without the queue
	onDropped  func(cause string, entries int64)
	bySampling atomic.Int64
	bySlowness atomic.Int64
	wake       chan struct{} // holds a token when sampling has dropped an entry
	quit       chan struct{}
	done       chan struct{}
}

func newLogSink(onDropped func(cause string, entries int64)) *logSink {
	return &logSink{
		queue: make(chan func() error, logBacklog), wake: make(chan struct{}, 1),
		onDropped: onDropped, quit: make(chan struct{}), done: make(chan struct{}),
	}
}

func (s *logSink) start() *logSink {
	go s.run()
	return s
}

// enqueue queues a write. It never blocks.
func (s *logSink) enqueue(write func() error) {
	select {
	case s.queue <- write:
	default:
		s.bySlowness.Add(1)
	}
}

// countSampled counts an entry that sampling has dropped.
func (s *logSink) countSampled() {
	if s.bySampling.Add(1) > 1 {
		return // the first one has woken the goroutine, which costs more than all else about a dropped entry
	}
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// writer returns a writer that queues its writes to out. Its Write never fails and never blocks.
func (s *logSink) writer(out io.Writer) io.Writer { return queuedWriter{s, out} }

type queuedWriter struct {
	sink *logSink
	out  io.Writer
}

func (w queuedWriter) Write(p []byte) (int, error) {
	text := bytes.Clone(p)
	w.sink.enqueue(func() error {
		_, err := w.out.Write(text)
		return err
	})
	return len(p), nil
}

func (s *logSink) run() {
	defer close(s.done)
	var due <-chan time.Time
	for {
		select {
		case write := <-s.queue:
			s.write(write)
		case <-s.wake:
			if due == nil {
				due = time.After(logLossGap)
			}
		case <-due:
			due = nil
			s.reportDropped(droppedBySampling, &s.bySampling)
			if s.bySampling.Load() > 0 { // the entry could not be written, or more were dropped in the meantime
				due = time.After(logLossGap)
			}
		case <-s.quit:
			for len(s.queue) > 0 {
				s.write(<-s.queue)
			}
			s.reportDropped(droppedBySampling, &s.bySampling)
			return
		}
	}
}

func (s *logSink) write(write func() error) {
	if write() != nil {
		s.bySlowness.Add(1)
	}
	s.reportDropped(droppedBySlowness, &s.bySlowness)
}

// reportDropped logs how many entries were dropped. If that fails, the next report includes them.
func (s *logSink) reportDropped(cause string, counter *atomic.Int64) {
	n := counter.Swap(0)
	if n == 0 {
		return
	}
	entry := zapcore.Entry{Level: zapcore.WarnLevel, Time: time.Now(), Message: "log entries dropped"}
	if s.core.Write(entry, []zapcore.Field{zap.String("cause", cause), zap.Int64("entries", n)}) != nil {
		counter.Add(n)
		return
	}
	if s.onDropped != nil {
		s.onDropped(cause, n)
	}
}

// close ends the sink when all entries are written, or after logFlush.
func (s *logSink) close() {
	close(s.quit)
	select {
	case <-s.done:
	case <-time.After(logFlush):
	}
}
