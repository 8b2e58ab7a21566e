package main

import (
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

// newLogger logs to stderr, in format "console" or "json"; empty means console on a terminal. The caller
// closes the sink.
func newLogger(level, format string) (*zap.Logger, *logSink, error) {
	least, err := zapcore.ParseLevel(level)
	if err != nil {
		return nil, nil, usagef("--log-level %q: want debug, info, warn or error", level)
	}
	if format == "" {
		format = "json"
		if term.IsTerminal(int(os.Stderr.Fd())) {
			format = "console"
		}
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
	default:
		return nil, nil, usagef("--log-format %q: want console or json", format)
	}
	sink := newLogSink(os.Stderr, func(lines int64) []byte {
		line, err := encoder.Clone().EncodeEntry(
			zapcore.Entry{Level: zapcore.WarnLevel, Time: time.Now(), Message: "log lines dropped: their reader is too slow"},
			[]zap.Field{zap.Int64("lines", lines)})
		if err != nil {
			return nil
		}
		return line.Bytes()
	})
	core := zapcore.NewCore(encoder, sink, least)
	return zap.New(zapcore.NewSamplerWithOptions(core, time.Second, logPerSecond, logThereafter)), sink, nil
}
