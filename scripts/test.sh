#!/bin/sh
# Runs 'go test' with the given arguments (default ./...) in the directory MODULE (default .). It uses the race detector if
# a C compiler with its headers is installed: it tries to build a package that needs them.
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
