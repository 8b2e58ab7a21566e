#!/bin/sh
# Runs the soak test for a time, half of it with the race detector: soak.sh 1h [FLAG...]. The flags are those of
# testing/soak. The report goes to standard output. The first line names the directory with the report and the logs.
set -eu
cd "$(dirname "$0")/.."

time=${1:-10m}
[ $# = 0 ] || shift
exec go -C testing run ./soak -root "$PWD" -time "$time" "$@"
