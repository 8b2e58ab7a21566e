#!/bin/sh
# Runs random histories of servers, clients and operators against a model (docs/testing.md): SEEDS in memory and SOCKETS
# on loopback, and those that have failed once. To run only one, set SEED (in memory), SOCKETSEED (on loopback) or HISTORY
# (a file). SAVE names a directory for histories that fail.
set -eu
cd "$(dirname "$0")/.."

run='^Test'
[ -z "${SEED:-}${HISTORY:-}" ] || run='^TestSimulation$'
[ -z "${SOCKETSEED:-}" ] || run='^TestSockets$'
[ -z "${HISTORY:-}" ] || HISTORY=$(realpath "$HISTORY")
[ -z "${SAVE:-}" ] || SAVE=$(realpath "$SAVE")
exec go test ./internal/simulate -count=1 -v -run "$run" -timeout "${TIMEOUT:-60m}" \
	-seeds "${SEEDS:-1000}" -seed "${SEED:-0}" -sockets "${SOCKETS:-24}" -socketseed "${SOCKETSEED:-0}" \
	-history "${HISTORY:-}" -save "${SAVE:-}"
