#!/bin/sh
# Runs 'go test' with these arguments, ./... without any, in the directory MODULE (.). It uses the race detector if that
# works: it needs a C compiler with its headers, and building the package that needs them is the surest way to find out.
set -eu
cd "$(dirname "$0")/../${MODULE:-.}"

race=-race
if ! go build -race runtime/cgo 2>/dev/null; then
	race=
	echo 'no working C compiler: testing without the race detector'
fi
[ $# -gt 0 ] || set -- ./...
set -x
exec go test $race -shuffle=on -timeout "${TIMEOUT:-10m}" "$@"
