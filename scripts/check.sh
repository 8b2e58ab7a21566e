#!/bin/sh
# Runs all tests that fit in 25 minutes on two cores, including the slow ones. Checks the coverage of server and control,
# the other modules, and the packages.
set -eu
cd "$(dirname "$0")/.."

step() {
	echo "== $*"
	"$@"
}

# The slow tests. The quick ones among them run again, which takes about a minute.
step env ECHOD_TEST_SLOW=1 TIMEOUT=20m scripts/test.sh ./integration/...

# New seeds, and the histories that have failed once.
step env SEEDS=500 scripts/simulate.sh

# Coverage from each package's own tests.
least=80
mkdir -p coverage
step go test -covermode=atomic -coverprofile=coverage/profile ./server/... ./control/... | tee coverage/summary
awk -v least=$least '
	match($0, /coverage: [0-9.]+%/) && substr($0, RSTART + 10) + 0 < least { low = 1 }
	/^FAIL/ { low = 1 }
	END { if (low) { print "under " least " %, or failed; see: go tool cover -html coverage/profile"; exit 1 } }' coverage/summary

[ "$(uname)" != Linux ] || step go -C bench test ./...
# A 32-bit system, and the program of the arm64 package. 'make check-systems' runs more.
step env SYSTEMS=linux-386 scripts/check-systems.sh
step env SYSTEMS=linux-arm64 RUN=none scripts/check-systems.sh
step env MODULE=examples scripts/test.sh
step go -C packaging/kubernetes test ./...
step scripts/dist-check.sh
