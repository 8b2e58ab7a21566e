package main

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap/buffer"
	"go.uber.org/zap/zapcore"
)

// journalSocket takes entries with fields, see systemd's "Native Journal Protocol".
const journalSocket = "/run/systemd/journal/socket"

// underJournal reports whether stderr leads to systemd's journal, as systemd.exec(5) says that $JOURNAL_STREAM
// tells.
func underJournal() bool {
	info, err := os.Stderr.Stat()
	return err == nil && os.Getenv("JOURNAL_STREAM") == deviceAndInode(info)
}

// openJournal opens the way for entries with fields, if there is one.
func openJournal(socket string) (journalWriter, error) {
	to := &net.UnixAddr{Name: socket, Net: "unixgram"}
	there, err := net.DialUnix("unixgram", nil, to)
	if err != nil {
		return journalWriter{}, err
	}
	_ = there.Close()
	from, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram"})
	return journalWriter{from, to}, err
}

// priorities are syslog's, as sd-daemon(3) has them.
var priorities = map[zapcore.Level]int{
	zapcore.DebugLevel: 7, zapcore.InfoLevel: 6, zapcore.WarnLevel: 4, zapcore.ErrorLevel: 3,
	zapcore.DPanicLevel: 2, zapcore.PanicLevel: 2, zapcore.FatalLevel: 2,
}

// prioritized puts before each line what tells the journal its level.
type prioritized struct{ zapcore.Encoder }

func (e prioritized) Clone() zapcore.Encoder { return prioritized{e.Encoder.Clone()} }

func (e prioritized) EncodeEntry(entry zapcore.Entry, fields []zapcore.Field) (*buffer.Buffer, error) {
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

var buffers = buffer.NewPool()

// journalEncoder writes entries for the journal: each field becomes one of the journal's own, so that
// journalctl CONN=17 finds it.
type journalEncoder struct{ *zapcore.MapObjectEncoder }

func newJournalEncoder() journalEncoder { return journalEncoder{zapcore.NewMapObjectEncoder()} }

// Clone is zapcore.Encoder's.
func (e journalEncoder) Clone() zapcore.Encoder {
	clone := newJournalEncoder()
	maps.Copy(clone.Fields, e.Fields)
	return clone
}

// EncodeEntry is zapcore.Encoder's.
func (e journalEncoder) EncodeEntry(entry zapcore.Entry, fields []zapcore.Field) (*buffer.Buffer, error) {
	all := e.Clone().(journalEncoder)
	for _, f := range fields {
		f.AddTo(all)
	}
	out := buffers.Get()
	appendField(out, "SYSLOG_IDENTIFIER", "echod")
	appendField(out, "PRIORITY", fmt.Sprint(priorities[entry.Level]))
	names := make([]string, 0, len(all.Fields))
	var message strings.Builder
	message.WriteString(entry.Message)
	for name := range all.Fields {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		value := journalValue(all.Fields[name])
		appendField(out, journalName(name), value)
		message.WriteString("  " + name + "=" + quoteIfNeeded(value))
	}
	appendField(out, "MESSAGE", message.String())
	return out, nil
}

// maxJournalValue bounds a field, so that an entry always fits into a datagram. Stacks are the longest there are.
const maxJournalValue = 32 << 10

// appendField writes one field. A value with a newline is written with its length.
func appendField(out *buffer.Buffer, name, value string) {
	value = value[:min(len(value), maxJournalValue)]
	out.AppendString(name)
	if strings.ContainsRune(value, '\n') {
		out.AppendByte('\n')
		_, _ = out.Write(binary.LittleEndian.AppendUint64(nil, uint64(len(value))))
	} else {
		out.AppendByte('=')
	}
	out.AppendString(value)
	out.AppendByte('\n')
}

// journalName makes a field's name one that the journal takes. What has a meaning there already gets another.
func journalName(name string) string {
	upper := strings.ToUpper(name)
	switch upper {
	case "PRIORITY", "MESSAGE":
		return "ECHOD_" + upper
	}
	return strings.TrimLeft(strings.Map(func(r rune) rune {
		if r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
			return r
		}
		return '_'
	}, upper), "_0123456789")
}

// journalValue gives a field's value as text, as the JSON log does where that is text.
func journalValue(v any) string {
	switch v := v.(type) {
	case string:
		return v
	case []byte:
		return string(v)
	case time.Duration:
		return fmt.Sprint(v.Seconds())
	case time.Time:
		return v.Format(time.RFC3339Nano)
	}
	if text, err := json.Marshal(v); err == nil {
		return string(text)
	}
	return fmt.Sprint(v)
}

func quoteIfNeeded(value string) string {
	if value == "" || strings.ContainsAny(value, " \"\n\t=") {
		short := value[:min(len(value), 200)]
		return fmt.Sprintf("%q", short)
	}
	return value
}

// journalWriter sends each write as an entry, to whoever has the journal's socket then: a journal that is started anew has another
// one. What comes when there is none is lost, since a log never holds up the server.
type journalWriter struct {
	from *net.UnixConn
	to   *net.UnixAddr
}

func (w journalWriter) Write(p []byte) (int, error) { return w.from.WriteToUnix(p, w.to) }
