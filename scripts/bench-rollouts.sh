#!/bin/sh
# Runs the comparison of rollouts; see rollouts -help for the arguments. Without arguments it takes six minutes, and copies the
# page and its picture to docs/. The raw results stay in bench/out.
set -eu
cd "$(dirname "$0")/../bench"

if [ "$(uname)" != Linux ]; then
	echo 'the comparison of rollouts runs on Linux only' >&2
	exit 1
fi
go run ./rollouts "$@"
if [ $# -eq 0 ]; then
	cp out/comparison.md out/comparison.svg ../docs/
fi
