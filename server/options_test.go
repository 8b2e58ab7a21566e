package server

import (
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

func TestNewRefusesEachOptionThatMakesNoSense(t *testing.T) {
	if _, err := New(nil, Options{}); err == nil {
		t.Error("New took a nil handler")
	}
	s, err := New(Echo, Options{MaxConns: -1, MaxConnsPerIP: -2, IdleTimeout: -time.Second, AtLimit: 7})
	if s != nil {
		t.Error("New returned a server beside its error")
	}
	for _, want := range []string{"MaxConns: -1", "MaxConnsPerIP: -2", "IdleTimeout: -1s", "AtLimit: unknown value 7"} {
		wantErrText(t, "New", err, want)
	}
}

func TestZeroOptionsMeanTheDefaults(t *testing.T) {
	s, err := New(Echo, Options{})
	if err != nil {
		t.Fatal(err)
	}
	o := s.opts
	if o.Grace != DefaultGrace || o.StallTimeout != DefaultStallTimeout || o.Logger == nil {
		t.Errorf("resolved options %+v", o)
	}
	def, err := ParseNotice(DefaultNotice)
	if err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "notice", *o.Notice == *def, true)
}

func TestMaxConnsLeavesAReserveOfFiles(t *testing.T) {
	limit, ok := openFilesLimit()
	if !ok {
		t.Skip("the system has no limit on open files")
	}
	core, logs := observer.New(zap.WarnLevel)
	for asked, want := range map[int]int{0: limit - min(fileReserve, limit/2), 7: 7, limit: limit - min(fileReserve, limit/2)} {
		s, err := New(Echo, Options{MaxConns: asked, Logger: zap.New(core)})
		if err != nil {
			t.Fatal(err)
		}
		wantEqual(t, "MaxConns", s.opts.MaxConns, want)
	}
	wantEqual(t, "warnings, of who asked for too many", logs.Len(), 1)
}

func TestHandlersAreNamedForTheLog(t *testing.T) {
	for want, h := range map[string]Handler{
		"echod/server.echo":           Echo,
		"*server.namedHandler":        &namedHandler{},
		"server.namedHandler":         namedHandler{},
		"echod/server.stubborn.func2": stubborn(t),
	} {
		wantEqual(t, "name", handlerName(h), want)
	}
}

type namedHandler struct{ Handler }
