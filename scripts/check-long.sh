#!/bin/sh
# Runs the tests for a release that take too long for 'make check': the long tests, each fuzz target for two minutes, ten
# minutes of soak, and the trial of the planted faults.
set -eu
cd "$(dirname "$0")/.."

ECHOD_TEST_SLOW=1 ECHOD_TEST_LONG=1 TIMEOUT=60m scripts/test.sh ./...
scripts/fuzz.sh 2m
scripts/soak.sh 10m
scripts/faults.sh
