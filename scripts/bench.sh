#!/bin/sh
# Runs the comparison with other echo servers; see bench -help for the arguments. Without arguments it takes half an
# hour, and copies the report and its plots to docs/. The raw results stay in bench/out.
set -eu
cd "$(dirname "$0")/../bench"

if [ "$(uname)" != Linux ]; then
	echo 'the comparison with other servers runs on Linux only' >&2
	exit 1
fi
go run . "$@"
if [ "$*" = -upgrade ]; then
	cp out/benchmarks-upgrade.md ../docs/
fi
if [ $# -eq 0 ]; then
	mkdir -p ../docs/benchmarks
	cp out/benchmarks.md ../docs/
	cp out/benchmarks/*.svg ../docs/benchmarks/
fi
