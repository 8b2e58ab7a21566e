#!/bin/sh
# Runs all tests that fit in 25 minutes on two cores, those that 'make test' leaves out included, and checks the coverage
# of server and control, the other modules, and the packages.
set -eu
cd "$(dirname "$0")/.."

step() {
	echo "== $*"
	"$@"
}

# Raw coverage data: it merges what several test binaries, and the programs that they run, reached in one package.
rm -rf coverage
mkdir coverage
step env ECHOD_TEST_SLOW=1 TIMEOUT=20m scripts/test.sh -covermode=atomic -coverpkg=./server/...,./control/... ./... \
	-args -test.gocoverdir="$PWD/coverage"
go tool covdata textfmt -i=coverage -o coverage/profile
go tool covdata percent -i=coverage | awk -v least="${COVER_MIN:-85}" '
	{ print $1, $3 }
	$3 ~ /%/ && $3 + 0 < least { low = 1 }
	END { if (low) { print "under " least " %; see: go tool cover -html coverage/profile"; exit 1 } }'

[ "$(uname)" != Linux ] || step go -C bench test ./...
step env MODULE=examples scripts/test.sh
step scripts/dist-check.sh
