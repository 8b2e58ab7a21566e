//go:build !linux

package main

import (
	"context"
	"errors"
	"os"

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

func reportOwnership() {}

func tellSupervisor(process) {}

func becomeKeeperOf(process) {}

func passOn(os.Signal) {}

func notifyUpgrade(chan<- os.Signal) {}

func keepIfUpgraded(chan os.Signal) error { return nil }
