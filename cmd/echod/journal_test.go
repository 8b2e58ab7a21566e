package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// entry parses what the journal would be sent.
func entry(t *testing.T, raw []byte) map[string]string {
	t.Helper()
	fields := make(map[string]string)
	for len(raw) > 0 {
		line, rest, ok := bytes.Cut(raw, []byte("\n"))
		if !ok {
			t.Fatalf("the entry ends without a newline: %q", raw)
		}
		name, value, inline := strings.Cut(string(line), "=")
		if !inline {
			n := binary.LittleEndian.Uint64(rest)
			value, rest = string(rest[8:8+n]), rest[8+n+1:]
		}
		fields[name] = value
		raw = rest
	}
	return fields
}

func TestJournalEntriesHaveFieldsAndLevels(t *testing.T) {
	var out bytes.Buffer
	log := zap.New(zapcore.NewCore(newJournalEncoder(), zapcore.AddSync(&out), zap.DebugLevel)).With(zap.String("state", "running"))
	for _, c := range []struct {
		log  func(string, ...zap.Field)
		want string
	}{{log.Debug, "7"}, {log.Info, "6"}, {log.Warn, "4"}, {log.Error, "3"}} {
		out.Reset()
		c.log("connection closed", zap.Uint64("conn", 17), zap.Duration("duration", 1500*time.Millisecond), zap.String("message", "two\nlines"),
			zap.Error(errors.New("no luck")), zap.Strings("what", []string{"a", "b"}))
		got := entry(t, out.Bytes())
		for name, want := range map[string]string{
			"PRIORITY": c.want, "SYSLOG_IDENTIFIER": "echod", "CONN": "17", "DURATION": "1.5", "STATE": "running",
			"ECHOD_MESSAGE": "two\nlines", "ERROR": "no luck", "WHAT": `["a","b"]`,
			"MESSAGE": `connection closed  conn=17  duration=1.5  error="no luck"  message="two\nlines"  state=running  what="[\"a\",\"b\"]"`,
		} {
			if got[name] != want {
				t.Errorf("%s is %q, want %q", name, got[name], want)
			}
		}
	}
}

// Whoever restarts systemd-journald.socket makes a new socket in the place of the old one.
func TestJournalThatIsStartedAnewGetsTheEntriesThatFollow(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("there is no journal here")
	}
	path := filepath.Join(t.TempDir(), "socket")
	journal := func() *net.UnixConn {
		conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	receives := func(conn *net.UnixConn, want string) {
		t.Helper()
		_ = conn.SetReadDeadline(time.Now().Add(30 * time.Second))
		text := make([]byte, 100)
		n, err := conn.Read(text)
		if got := string(text[:n]); err != nil || got != want {
			t.Errorf("the journal has received %q, %v; want %q", got, err, want)
		}
	}
	first := journal()
	writer, err := openJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	defer writer.from.Close()
	sink := newLogSink(writer, io.Discard, func(lines int64) []byte { return fmt.Appendf(nil, "%d lost", lines) })
	_, _ = sink.Write([]byte("one"))
	receives(first, "one")
	_ = first.Close()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	_, _ = sink.Write([]byte("two"))
	_, _ = sink.Write([]byte("three"))
	for end := time.Now().Add(10 * time.Second); sink.drops.Load() < 2; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("what could not be given to the journal is not counted")
		}
	}
	second := journal()
	_, _ = sink.Write([]byte("four"))
	receives(second, "four")
	receives(second, "2 lost")
	sink.close()
}

func TestJournalEntriesAreBounded(t *testing.T) {
	var out bytes.Buffer
	log := zap.New(zapcore.NewCore(newJournalEncoder(), zapcore.AddSync(&out), zap.DebugLevel))
	log.Info("panic", zap.String("stack", strings.Repeat("x", 1<<20)))
	if out.Len() > 100<<10 {
		t.Errorf("the entry has %d bytes, which no datagram takes", out.Len())
	}
}

func TestLinesForTheJournalCarryTheirLevel(t *testing.T) {
	var out bytes.Buffer
	encoder := prioritized{zapcore.NewConsoleEncoder(zapcore.EncoderConfig{MessageKey: "m"})}
	log := zap.New(zapcore.NewCore(encoder, zapcore.AddSync(&out), zap.DebugLevel))
	log.Warn("careful")
	log.Info("all well")
	if got, want := out.String(), "<4>careful\n<6>all well\n"; got != want {
		t.Errorf("lines %q, want %q", got, want)
	}
}
