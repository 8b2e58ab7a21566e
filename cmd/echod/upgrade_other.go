//go:build !linux

package main

import (
	"context"
	"errors"
	"os"

	"go.uber.org/zap"

	"echod/server"
)

type process struct{ pid int }

func (process) kill()    {}
func (process) release() {}

var errNoUpgrade = errors.New("upgrades are supported on Linux only")

func startSuccessor(context.Context) (p process, link server.Link, err error) {
	return p, nil, errNoUpgrade
}

func internalRole() (code int, done bool) { return 0, false }

func predecessorLink() (server.Link, error) { return nil, nil }

func tellKeeper(int) {}

func keeperActor(*server.Server, *zap.Logger) (execute func() error, interrupt func(error)) {
	return nil, nil
}

func awaitSupervisor(context.Context) {}

func tellSupervisor(process) {}

func isUnit() bool { return false }

func signalServing(os.Signal) {}

func setSuccessor(int) {}

func notifyUpgrade(chan<- os.Signal) {}

func keepIfUpgraded(chan os.Signal) error { return nil }
