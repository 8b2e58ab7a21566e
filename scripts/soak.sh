#!/bin/sh
# Soaks the real program for a time, half of it with the race detector: soak.sh 1h [FLAG...]. The flags are those of
# testing/soak. The report goes to standard output; it and the server's logs are in the directory that is named first.
set -eu
cd "$(dirname "$0")/.."

time=${1:-10m}
[ $# = 0 ] || shift
exec go -C testing run ./soak -root "$PWD" -time "$time" "$@"
