package server

import (
	"math"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

func TestOptions(t *testing.T) {
	for want, o := range map[string]Options{
		"Limits.MaxConns: -2 is negative":                          {Limits: Limits{MaxConns: -2}},
		"Limits.MaxConnsPerIP: -2 is negative":                     {Limits: Limits{MaxConnsPerIP: -2}},
		"Limits.IPv6Prefix: -1 is negative, and it cannot be off":  {Limits: Limits{IPv6Prefix: Off}},
		"Limits.IPv6Prefix: 129":                                   {Limits: Limits{IPv6Prefix: 129}},
		"Limits.MaxHandshakes: -1 is negative":                     {Limits: Limits{MaxHandshakes: Off}},
		"Limits.ReservedFiles: -1 is negative":                     {Limits: Limits{ReservedFiles: Off}},
		"Limits.AtLimit: unknown value 7":                          {Limits: Limits{AtLimit: 7}},
		"Timeouts.Idle: -1s is negative":                           {Timeouts: Timeouts{Idle: -time.Second}},
		"Timeouts.Stall: -1s is negative":                          {Timeouts: Timeouts{Stall: -time.Second}},
		"Timeouts.Handshake: -1ns is negative, and it cannot be o": {Timeouts: Timeouts{Handshake: Off}},
		"Drain: grace -1s is negative":                             {Drain: DrainOptions{Grace: -time.Second}},
		"Drain: delay -1s is negative":                             {Drain: DrainOptions{Delay: -time.Second}},
		"Drain: reason":                                            {Drain: DrainOptions{Reason: "two\nlines"}},
	} {
		t.Run("are refused: "+want, func(t *testing.T) {
			s, err := New(Echo, o)
			wantErrText(t, "New", err, want)
			if s != nil {
				t.Error("New returned a server beside its error")
			}
		})
	}

	t.Run("the error names every invalid option", func(t *testing.T) {
		_, err := New(Echo, Options{Limits: Limits{MaxConns: -2}, Timeouts: Timeouts{Idle: -time.Second}})
		wantErrText(t, "New", err, "Limits.MaxConns")
		wantErrText(t, "New", err, "Timeouts.Idle")
	})

	t.Run("zero means the default", func(t *testing.T) {
		s, err := New(Echo, Options{})
		if err != nil {
			t.Fatal(err)
		}
		o := s.opts
		wantEqual(t, "timeouts", o.Timeouts, Timeouts{Stall: DefaultStallTimeout, Handshake: DefaultHandshakeTimeout})
		wantEqual(t, "drain", o.Drain, DrainOptions{Grace: DefaultGrace, Reason: "shutdown"})
		wantEqual(t, "IPv6 prefix", o.Limits.IPv6Prefix, DefaultIPv6Prefix)
		wantEqual(t, "connections per address", o.Limits.MaxConnsPerIP, 0)
		if o.Logger == nil || o.Notifier.Notice(Notice{Kind: NoticeDrain}) != nil {
			t.Errorf("logger %v, notice %q; want a logger, and no notice", o.Logger, o.Notifier.Notice(Notice{Kind: NoticeDrain}))
		}
	})

	t.Run("Off disables", func(t *testing.T) {
		s, err := New(Echo, Options{
			Limits: Limits{MaxConns: Off, MaxConnsPerIP: Off}, Timeouts: Timeouts{Idle: Off, Stall: Off},
			Drain: DrainOptions{Grace: Off, Delay: Off},
		})
		if err != nil {
			t.Fatal(err)
		}
		o := s.opts
		wantEqual(t, "limits", [2]int{o.Limits.MaxConns, o.Limits.MaxConnsPerIP}, [2]int{math.MaxInt, 0})
		wantEqual(t, "timeouts", o.Timeouts, Timeouts{Handshake: DefaultHandshakeTimeout})
		wantEqual(t, "drain", o.Drain, DrainOptions{Reason: "shutdown"})
		wantEqual(t, "MaxConns in the status", s.Status().MaxConns, 0)
	})

	t.Run("MaxConns leaves files in reserve", func(t *testing.T) {
		limit, ok := openFilesLimit()
		if !ok {
			t.Skip("the system has no limit on open files")
		}
		core, logs := observer.New(zap.WarnLevel)
		reserve := min(160, limit/2)
		for asked, want := range map[int]int{0: limit - reserve, 7: 7, limit: limit - reserve} {
			s, err := New(Echo, Options{Limits: Limits{MaxConns: asked}, Logger: zap.New(core)})
			if err != nil {
				t.Fatal(err)
			}
			wantEqual(t, "MaxConns", s.activeSettings().limits.MaxConns, want)
		}
		wantEqual(t, "warnings about a lowered limit", logs.Len(), 1)
		s, err := New(Echo, Options{Limits: Limits{ReservedFiles: limit - 10}})
		if err != nil {
			t.Fatal(err)
		}
		wantEqual(t, "MaxConns with another reserve", s.activeSettings().limits.MaxConns, 10)
	})
}

func TestHandlerName(t *testing.T) {
	for want, h := range map[string]Handler{
		"server.echoHandler":          Echo,
		"*server.namedHandler":        &namedHandler{},
		"server.namedHandler":         namedHandler{},
		"echod/server.stubborn.func2": stubborn(t),
	} {
		wantEqual(t, "name", handlerName(h), want)
	}
}

type namedHandler struct{ Handler }
