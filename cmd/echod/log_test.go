package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/coreos/go-systemd/v22/journal"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"echod/control"
	"echod/server"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// textCore writes the messages of entries to out, with their fields.
func textCore(out io.Writer) zapcore.Core {
	config := zapcore.EncoderConfig{MessageKey: "m", ConsoleSeparator: " "}
	return zapcore.NewCore(zapcore.NewConsoleEncoder(config), zapcore.AddSync(out), zap.DebugLevel)
}

// newTestSink returns a started sink that reports dropped entries to reports.
func newTestSink(reports io.Writer) (*logSink, map[string]int64) {
	dropped := make(map[string]int64)
	sink := newLogSink(func(cause string, entries int64) { dropped[cause] += entries })
	sink.core = textCore(reports)
	return sink.start(), dropped
}

// slowReader blocks its writers until released is closed.
type slowReader struct {
	released chan struct{}
	bytes.Buffer
}

func (r *slowReader) Write(p []byte) (int, error) {
	<-r.released
	return r.Buffer.Write(p)
}

func TestLogSink(t *testing.T) {
	t.Run("a slow reader loses entries and is told how many", func(t *testing.T) {
		out := &slowReader{released: make(chan struct{})}
		sink, dropped := newTestSink(out)
		w := sink.writer(out)
		for range logBacklog + 10 { // one more can be with the sink's goroutine
			_, _ = io.WriteString(w, "line\n")
		}
		close(out.released)
		sink.close()
		<-sink.done
		kept := strings.Count(out.String(), "line\n")
		lost := logBacklog + 10 - kept
		report := fmt.Sprintf("log entries dropped {\"cause\": \"slow-reader\", \"entries\": %d}\n", lost)
		if kept < logBacklog || kept > logBacklog+1 || !strings.Contains(out.String(), report) {
			t.Errorf("kept %d of %d; other output %q, want %q", kept, logBacklog+10, strings.ReplaceAll(out.String(), "line\n", ""), report)
		}
		if dropped[droppedBySlowness] != int64(lost) {
			t.Errorf("counted %v, want %d", dropped, lost)
		}
	})
	t.Run("entries that cannot be written are reported once writing works again", func(t *testing.T) {
		var out bytes.Buffer
		sink, dropped := newTestSink(&out)
		broken := errors.New("broken")
		sink.core = journalCore{send: func(string, journal.Priority, map[string]string) error { return broken }}
		lost := make(chan struct{})
		sink.enqueue(func() error { return broken })
		sink.enqueue(func() error { sink.core = textCore(&out); close(lost); return nil })
		<-lost
		sink.close()
		<-sink.done
		if want := "log entries dropped {\"cause\": \"slow-reader\", \"entries\": 1}\n"; out.String() != want || dropped[droppedBySlowness] != 1 {
			t.Errorf("got %q and %v, want %q", out.String(), dropped, want)
		}
	})
	t.Run("close does not wait for a blocked reader", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			out := &slowReader{released: make(chan struct{})}
			sink, _ := newTestSink(out)
			_, _ = io.WriteString(sink.writer(out), strings.Repeat("goroutine 1 [running]\n", 1000)) // stacks
			began := time.Now()
			sink.close()
			if took := time.Since(began); took > logFlush {
				t.Errorf("close took %v, want at most %v", took, logFlush)
			}
			close(out.released)
			<-sink.done
		})
	})
}

func TestSampling(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		sink, dropped := newTestSink(&out)
		defer func() {
			sink.close()
			<-sink.done
		}()
		var lines bytes.Buffer
		log := zap.New(withSampling(textCore(&lines), sink))
		const flood = logPerSecond + 250
		closed := func(reason server.Reason) {
			log.Info("connection closed", zap.Uint64("conn", 1), zap.Stringer("reason", reason))
		}
		for range flood {
			closed(server.ReasonClientClosed)
		}
		for range flood {
			closed(server.ReasonDeadline)
			closed(server.ReasonForced)
			log.Info("control request", zap.Int("uid", 1000))
			log.Info("control request of an unknown caller")
			log.Info("paused", zap.String("hold", "h1"))
			log.With(zap.String("path", "/run")).Info("control request by With")
		}
		kept := strings.Count(lines.String(), "client-closed")
		if want := logPerSecond + 250/logThereafter; kept != want {
			t.Errorf("kept %d ordinary entries, want %d", kept, want)
		}
		for _, all := range []string{"deadline", "forced", "request {", "unknown caller", "paused", "request by With"} {
			if n := strings.Count(lines.String(), all); n != flood {
				t.Errorf("%d entries with %q, want all %d", n, all, flood)
			}
		}
		time.Sleep(logLossGap)
		synctest.Wait()
		if want := fmt.Sprintf("log entries dropped {\"cause\": \"sampling\", \"entries\": %d}\n", flood-kept); out.String() != want {
			t.Errorf("reported %q, want %q", out.String(), want)
		}
		if dropped[droppedBySampling] != int64(flood-kept) {
			t.Errorf("counted %v, want %d", dropped, flood-kept)
		}
	})
}

// TestAuditIsNotSampled floods a control plane whose callers are unknown, because the system does not tell who they
// are.
func TestAuditIsNotSampled(t *testing.T) {
	var lines, reports bytes.Buffer
	sink, _ := newTestSink(&reports)
	log := zap.New(withSampling(textCore(&lines), sink))
	srv, err := server.New(server.Echo, server.Options{})
	if err != nil {
		t.Fatal(err)
	}
	plane := control.New(srv, control.Options{Logger: log})
	const flood = logPerSecond + 250
	for i := range flood {
		request := httptest.NewRequest(http.MethodPost, fmt.Sprintf("/v1/junk/%d", i), nil)
		plane.ServeHTTP(httptest.NewRecorder(), request)
	}
	sink.close()
	<-sink.done
	if n := strings.Count(lines.String(), "control request"); n != flood {
		t.Errorf("%d requests are in the audit, want all %d", n, flood)
	}
	if strings.Contains(lines.String(), "uid") {
		t.Error("the callers are known: want unknown ones")
	}
	if reports.Len() > 0 {
		t.Errorf("the log reports %q", reports.String())
	}
}

// TestConsoleLinesArePrintable logs what a client could send in the console format.
func TestConsoleLinesArePrintable(t *testing.T) {
	var out bytes.Buffer
	log := zap.New(zapcore.NewCore(newConsoleEncoder(), zapcore.AddSync(&out), zap.DebugLevel))
	const evil = "\x1b[2J\u009b31m\u202e\nforged\x9b"
	log.With(zap.String("with", evil)).Info(evil, zap.String("text", evil), zap.Error(errors.New(evil)),
		zap.Any("labels", map[string]string{"user": evil}))
	line, ok := strings.CutSuffix(out.String(), "\n")
	if !ok || strings.ContainsFunc(line, unicode.IsControl) || strings.ContainsRune(line, '\u202e') || !utf8.ValidString(line) {
		t.Errorf("logged %q", out.String())
	}
	if n := strings.Count(line, `\u009b31m\u202e\nforged`); n != 5 {
		t.Errorf("logged %q: want the text five times, escaped", line)
	}
}

func TestJournal(t *testing.T) {
	var message string
	var priority journal.Priority
	var vars map[string]string
	core := journalCore{LevelEnabler: zap.DebugLevel, send: func(m string, p journal.Priority, v map[string]string) error {
		message, priority, vars = m, p, v
		return nil
	}}
	log := zap.New(core).With(zap.String("state", "running"))

	t.Run("entries have fields and priorities", func(t *testing.T) {
		for _, c := range []struct {
			log  func(string, ...zap.Field)
			want journal.Priority
		}{{log.Debug, journal.PriDebug}, {log.Info, journal.PriInfo}, {log.Warn, journal.PriWarning}, {log.Error, journal.PriErr}} {
			c.log("connection closed", zap.Uint64("conn", 17), zap.Duration("duration", 1500*time.Millisecond),
				zap.String("message", "two\nlines"), zap.Error(errors.New("no luck")), zap.Strings("what", []string{"a", "b"}))
			if priority != c.want {
				t.Errorf("priority %d, want %d", priority, c.want)
			}
			want := map[string]string{
				"SYSLOG_IDENTIFIER": "echod", "CONN": "17", "DURATION": "1.5s", "STATE": "running",
				"ECHOD_MESSAGE": "two\nlines", "ERROR": "no luck", "WHAT": `["a","b"]`,
			}
			if diff := cmp.Diff(want, vars); diff != "" {
				t.Errorf("fields (-want +got):\n%s", diff)
			}
			if want := `connection closed  conn=17  duration=1.5s  error="no luck"  message="two\nlines"  state=running  what="[\"a\",\"b\"]"`; message != want {
				t.Errorf("message %q, want %q", message, want)
			}
		}
	})
	t.Run("fields are bounded", func(t *testing.T) {
		log.Info("panic", zap.String("stack", strings.Repeat("x", 1<<20)))
		if n := len(vars["STACK"]); n != maxJournalValue {
			t.Errorf("the field has %d bytes, want %d", n, maxJournalValue)
		}
	})
	t.Run("field names are valid", func(t *testing.T) {
		log.Info("x", zap.Int("drain-delay", 1), zap.Int("_1st", 1), zap.Int("priority", 1))
		got := slices.Sorted(maps.Keys(vars))
		if want := []string{"DRAIN_DELAY", "ECHOD_PRIORITY", "ST", "STATE", "SYSLOG_IDENTIFIER"}; !slices.Equal(got, want) {
			t.Errorf("names %q, want %q", got, want)
		}
	})
	t.Run("lines carry their priority", func(t *testing.T) {
		var out bytes.Buffer
		encoder := priorityEncoder{zapcore.NewConsoleEncoder(zapcore.EncoderConfig{MessageKey: "m"})}
		log := zap.New(zapcore.NewCore(encoder, zapcore.AddSync(&out), zap.DebugLevel))
		log.Warn("careful")
		log.Info("all well")
		if got, want := out.String(), "<4>careful\n<6>all well\n"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}
