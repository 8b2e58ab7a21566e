#!/bin/sh
# Runs what a release needs and 'make check' has no time for: the long tests, each fuzz target for two minutes, ten
# minutes of soak, and the trial of the planted faults.
set -eu
cd "$(dirname "$0")/.."

ECHOD_TEST_SLOW=1 ECHOD_TEST_LONG=1 TIMEOUT=60m scripts/test.sh ./...
scripts/fuzz.sh 2m
scripts/soak.sh 10m
scripts/faults.sh
