package server

import (
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

func TestNewRefusesEachOptionThatMakesNoSense(t *testing.T) {
	s, err := New(Echo, Options{Limits: Limits{MaxConns: -2, MaxConnsPerIP: -2, AtLimit: 7}, Timeouts: Timeouts{Idle: -time.Second}, Drain: DrainOptions{Delay: -time.Second}})
	if s != nil {
		t.Error("New returned a server beside its error")
	}
	for _, want := range []string{"Limits.MaxConns: -2", "Limits.MaxConnsPerIP: -2", "Timeouts.Idle: -1s", "Limits.AtLimit: unknown value 7", "delay -1s is negative"} {
		wantErrText(t, "New", err, want)
	}
}

func TestZeroOptionsMeanTheDefaults(t *testing.T) {
	s, err := New(Echo, Options{})
	if err != nil {
		t.Fatal(err)
	}
	o := s.opts
	if o.Drain.Grace != DefaultGrace || o.Timeouts.Stall != DefaultStallTimeout || o.Logger == nil {
		t.Errorf("resolved options %+v", o)
	}
	def, err := ParseLineNotifier(DefaultNoticeTemplate)
	if err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "notifier", *DefaultLineNotifier() == *def, true)
}

func TestMaxConnsLeavesAReserveOfFiles(t *testing.T) {
	limit, ok := openFilesLimit()
	if !ok {
		t.Skip("the system has no limit on open files")
	}
	core, logs := observer.New(zap.WarnLevel)
	for asked, want := range map[int]int{0: limit - min(160, limit/2), 7: 7, limit: limit - min(160, limit/2)} {
		s, err := New(Echo, Options{Limits: Limits{MaxConns: asked}, Logger: zap.New(core)})
		if err != nil {
			t.Fatal(err)
		}
		wantEqual(t, "MaxConns", s.opts.Limits.MaxConns, want)
	}
	wantEqual(t, "warnings, of who asked for too many", logs.Len(), 1)
}

func TestHandlersAreNamedForTheLog(t *testing.T) {
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
