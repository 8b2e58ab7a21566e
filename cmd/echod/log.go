package main

import (
	"fmt"
	"io"
	"os"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/term"
)

// Of lines with the same message, so many are logged in a second, and of the rest each so-maniest: a
// flood of connections must not become a flood of writes.
const (
	logPerSecond  = 200
	logThereafter = 100
)

// destination chooses the format where none is asked for, and where the log goes: to stderr, or to the journal by its socket.
func destination(format, journal string) (chosen string, out io.Writer, err error) {
	chosen = format
	if format == "" {
		switch {
		case term.IsTerminal(int(os.Stderr.Fd())):
			chosen = "console"
		case underJournal():
			chosen = "journal"
		default:
			chosen = "json"
		}
	}
	if chosen != "journal" {
		return chosen, os.Stderr, nil
	}
	out, err = openJournal(journal)
	switch {
	case err == nil:
		return chosen, out, nil
	case format == "":
		return "json", os.Stderr, nil // which the journal reads too, such as from where its socket is not to be seen
	default:
		return "", nil, fmt.Errorf("--log-format journal: %w", err)
	}
}

// newLogger logs in format "console", "json" or "journal"; empty means console on a terminal, journal where stderr leads there,
// and else json. The caller closes the sink.
func newLogger(level, format string) (*zap.Logger, *logSink, error) {
	least, err := zapcore.ParseLevel(level)
	if err != nil {
		return nil, nil, usagef("--log-level %q: want debug, info, warn or error", level)
	}
	format, out, err := destination(format, journalSocket)
	if err != nil {
		return nil, nil, err
	}
	var encoder zapcore.Encoder
	switch format {
	case "json":
		config := zap.NewProductionEncoderConfig()
		config.TimeKey = "time"
		config.EncodeTime = zapcore.RFC3339NanoTimeEncoder
		config.EncodeDuration = zapcore.SecondsDurationEncoder
		encoder = zapcore.NewJSONEncoder(config)
	case "console":
		config := zap.NewDevelopmentEncoderConfig()
		config.EncodeTime = zapcore.TimeEncoderOfLayout("15:04:05.000")
		config.ConsoleSeparator = "  "
		encoder = zapcore.NewConsoleEncoder(config)
	case "journal":
		encoder = newJournalEncoder()
	default:
		return nil, nil, usagef("--log-format %q: want console, json or journal", format)
	}
	if format != "journal" && underJournal() {
		encoder = prioritized{encoder}
	}
	sink := newLogSink(out, os.Stderr, func(lines int64) []byte {
		line, err := encoder.Clone().EncodeEntry(
			zapcore.Entry{Level: zapcore.WarnLevel, Time: time.Now(), Message: "log lines dropped: their reader was too slow, or away"},
			[]zap.Field{zap.Int64("lines", lines)})
		if err != nil {
			return nil
		}
		return line.Bytes()
	})
	core := zapcore.NewCore(encoder, sink, least)
	return zap.New(zapcore.NewSamplerWithOptions(core, time.Second, logPerSecond, logThereafter)), sink, nil
}
