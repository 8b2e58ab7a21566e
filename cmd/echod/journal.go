package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/journal"
	"go.uber.org/zap/buffer"
	"go.uber.org/zap/zapcore"
)

// stderrIsJournal reports whether stderr is connected to the systemd journal.
func stderrIsJournal() bool {
	is, err := journal.StderrIsJournalStream()
	return err == nil && is // an error means a malformed $JOURNAL_STREAM
}

// journalEnabled reports whether the journal's socket accepts entries with fields.
func journalEnabled() bool { return journal.Enabled() }

const journalError = int(journal.PriErr)

var priorities = map[zapcore.Level]journal.Priority{
	zapcore.DebugLevel:  journal.PriDebug,
	zapcore.InfoLevel:   journal.PriInfo,
	zapcore.WarnLevel:   journal.PriWarning,
	zapcore.ErrorLevel:  journal.PriErr,
	zapcore.DPanicLevel: journal.PriCrit,
	zapcore.PanicLevel:  journal.PriCrit,
	zapcore.FatalLevel:  journal.PriCrit,
}

// priorityEncoder prefixes each line with its priority; see sd-daemon(3).
type priorityEncoder struct{ zapcore.Encoder }

var buffers = buffer.NewPool()

func (e priorityEncoder) Clone() zapcore.Encoder { return priorityEncoder{e.Encoder.Clone()} }

func (e priorityEncoder) EncodeEntry(entry zapcore.Entry, fields []zapcore.Field) (*buffer.Buffer, error) {
	line, err := e.Encoder.EncodeEntry(entry, fields)
	if err != nil {
		return nil, err
	}
	prefixed := buffers.Get()
	fmt.Fprintf(prefixed, "<%d>", priorities[entry.Level])
	_, _ = prefixed.Write(line.Bytes())
	line.Free()
	return prefixed, nil
}

// sendFunc sends an entry to the journal, like journal.Send.
type sendFunc func(message string, priority journal.Priority, vars map[string]string) error

// sendToJournal sends an entry to the journal. It blocks while the journal's queue is full.
func sendToJournal(message string, priority journal.Priority, vars map[string]string) error {
	return journal.Send(message, priority, vars)
}

// queueSend returns a sendFunc that queues the entry in the sink, which calls send.
func (s *logSink) queueSend(send sendFunc) sendFunc {
	return func(message string, priority journal.Priority, vars map[string]string) error {
		s.enqueue(func() error { return send(message, priority, vars) })
		return nil
	}
}

// journalCore logs to the journal. Each field of an entry becomes a field in the journal, so that journalctl CONN=17 finds
// it.
type journalCore struct {
	zapcore.LevelEnabler
	with []zapcore.Field
	send sendFunc
}

func (c journalCore) With(fields []zapcore.Field) zapcore.Core {
	c.with = append(c.with[:len(c.with):len(c.with)], fields...)
	return c
}

func (c journalCore) Check(entry zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(entry.Level) {
		return ce.AddCore(entry, c)
	}
	return ce
}

func (c journalCore) Write(entry zapcore.Entry, fields []zapcore.Field) error {
	values := zapcore.NewMapObjectEncoder()
	for _, list := range [][]zapcore.Field{c.with, fields} {
		for _, f := range list {
			f.AddTo(values)
		}
	}
	vars := map[string]string{"SYSLOG_IDENTIFIER": "echod"}
	var message strings.Builder
	message.WriteString(entry.Message)
	for _, name := range slices.Sorted(maps.Keys(values.Fields)) {
		value := journalValue(values.Fields[name])
		vars[journalName(name)] = value
		message.WriteString("  " + name + "=" + quoteIfNeeded(value))
	}
	return c.send(message.String(), priorities[entry.Level], vars)
}

func (c journalCore) Sync() error { return nil }

// journalName converts a field's name to one that the journal accepts. Names that the journal uses itself get a prefix.
func journalName(name string) string {
	upper := strings.ToUpper(name)
	switch upper {
	case "PRIORITY", "MESSAGE", "SYSLOG_IDENTIFIER":
		return "ECHOD_" + upper
	}
	return strings.TrimLeft(strings.Map(func(r rune) rune {
		if r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
			return r
		}
		return '_'
	}, upper), "_0123456789")
}

// maxJournalValue bounds a field in bytes. The longest fields are stacks.
const maxJournalValue = 32 << 10

// journalValue formats a field as text. Values that are text in the JSON log look the same here.
func journalValue(v any) string {
	text := ""
	switch v := v.(type) {
	case string:
		text = v
	case []byte:
		text = string(v)
	case time.Duration:
		text = v.String()
	case time.Time:
		text = v.Format(time.RFC3339Nano)
	default:
		if encoded, err := json.Marshal(v); err == nil {
			text = string(encoded)
		} else {
			text = fmt.Sprint(v)
		}
	}
	return text[:min(len(text), maxJournalValue)]
}

func quoteIfNeeded(value string) string {
	if value == "" || strings.ContainsAny(value, " \"\n\t=") {
		short := value[:min(len(value), 200)]
		return fmt.Sprintf("%q", short)
	}
	return value
}
