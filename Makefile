# For GNU make. Long recipes are in scripts/. The variables of a target are next to it.

.DEFAULT_GOAL := help
.PHONY: build run test check check-long check-systems lint fuzz simulate faults soak bench bench-quick bench-upgrade bench-rollouts pictures dist install module clean help

# --git-dir=.git: an unpacked archive inside another repository must not take that repository's version.
VERSION = $(shell git --git-dir=.git describe --tags --always --dirty 2>/dev/null || echo devel)

build: ## build bin/echod
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-X main.version=$(VERSION)' -o bin/echod ./cmd/echod

bin/echod: go.mod go.sum $(shell find . -name '*.go' ! -name '*_test.go' ! -path './bench/*' ! -path './examples/*' ! -path './integration/*' ! -path './testing/*')
	@$(MAKE) --no-print-directory build

run: build ## build and run bin/echod; ARGS='--listen :7' are its arguments
	@exec bin/echod $(ARGS)

# 'go test' runs as many packages at a time as there are CPUs, in this order. The longest come first.
test: ## run the quick tests, under the race detector if there is a C compiler
	scripts/test.sh ./integration ./server ./...

check: ## run the slow tests, and check coverage, the other modules and the packages: up to 25 minutes
	scripts/check.sh

check-long: ## run the longest tests, before a release: fuzzing, hostile clients, long loads, soak, faults
	scripts/check-long.sh

# check-systems reads SYSTEMS, RUN and TIMEOUT from the environment.
export RUN TIMEOUT
check-systems: ## run tests and program for linux/386, arm64, s390x and windows/amd64, under emulators; SYSTEMS='linux-arm64'
	scripts/check-systems.sh

lint: ## check formatting, scripts, vet, staticcheck, dead code, vulnerabilities (VULNDB=DIR: a local database)
	VULNDB='$(VULNDB)' scripts/lint.sh

fuzz: ## run each fuzz target for FUZZTIME (30s)
	scripts/fuzz.sh $(FUZZTIME)

simulate: ## run random histories against a model: SEEDS (1000) in memory, SOCKETS (24) on loopback, or only SEED
	SEEDS='$(SEEDS)' SOCKETS='$(SOCKETS)' SEED='$(SEED)' SOCKETSEED='$(SOCKETSEED)' HISTORY='$(HISTORY)' SAVE='$(SAVE)' \
		scripts/simulate.sh

faults: ## plant each fault of testing/faults in a copy, and report which the tests catch: half an hour
	scripts/faults.sh

TIME = 10m
soak: ## run the real program under clients, operators and faults for TIME (10m), and report
	scripts/soak.sh '$(TIME)'

bench: ## compare echod with other echo servers, for half an hour on a quiet machine; writes docs/benchmarks.md
	scripts/bench.sh

bench-quick: ## the same in two minutes, into bench/out
	scripts/bench.sh -quick

bench-upgrade: ## measure upgrades under 9,000 connections, for two minutes; writes docs/benchmarks-upgrade.md
	scripts/bench.sh -upgrade

bench-rollouts: ## compare what clients see in a rollout with nginx, HAProxy and others; writes docs/comparison.md
	scripts/bench-rollouts.sh

pictures: ## make the pictures of README and docs from the real program
	scripts/pictures.sh

# dist reads DIST (directory), SYSTEMS (such as 'linux-amd64 linux-arm64'; all), PACKAGES (deb rpm; none) and MAINTAINER
# ('Name <address>') from the environment.
export DIST SYSTEMS PACKAGES MAINTAINER
dist: ## build a binary, SBOM, .deb and .rpm package for this system into dist/; SYSTEMS=all: for all
	VERSION='$(VERSION)' scripts/dist.sh

# It depends on bin/echod, not on build: under sudo there may be no go command.
PREFIX = /usr/local
install: bin/echod ## install bin/echod into PREFIX/bin (/usr/local/bin); honours DESTDIR
	install -d '$(DESTDIR)$(PREFIX)/bin'
	install -m 755 bin/echod '$(DESTDIR)$(PREFIX)/bin/echod'

module: ## rename the Go module everywhere: MODULE=example.org/you/echod
	scripts/module.sh '$(MODULE)'

clean: ## remove the files that the other targets have made
	rm -rf bin coverage bench/out dist

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
