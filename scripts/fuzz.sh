#!/bin/sh
# Runs each fuzz target of the module for a time (30s).
set -eu
cd "$(dirname "$0")/.."

list=$(go test -list '^Fuzz' ./...) || {
	echo "$list"
	exit 1
}
echo "$list" | awk '/^Fuzz/ { name[n++] = $1 } $1 == "ok" { while (n) print name[--n], $2 }' |
	while read -r name package; do
		echo "== $name in $package"
		go test -run '^$' -fuzz "^$name\$" -fuzztime "${1:-30s}" "$package" </dev/null || exit 1
	done
