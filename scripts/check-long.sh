#!/bin/sh
# Runs what a release needs and 'make check' has no time for: the long tests, and each fuzz target for two minutes.
set -eu
cd "$(dirname "$0")/.."

ECHOD_TEST_SLOW=1 ECHOD_TEST_LONG=1 TIMEOUT=60m scripts/test.sh ./...
scripts/fuzz.sh 2m
