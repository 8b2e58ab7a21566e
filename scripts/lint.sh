#!/bin/sh
# Lints every module: formatting, go.mod, scripts, vet, go fix, staticcheck, dead code, known vulnerabilities. Cheap
# checks come first. VULNDB names a directory with a copy of the Go vulnerability database.
set -eu
cd "$(dirname "$0")/.."

root=$PWD
vulndb=${VULNDB:+file://$(cd "$VULNDB" && pwd)}

modules='. examples testing packaging/kubernetes'
[ "$(uname)" != Linux ] || modules="$modules bench" # bench runs on Linux only

# The development tools have a module of their own: their dependencies never reach users.
tool() { go tool -modfile="$root/tools/go.mod" "$@"; }

# silent runs a command, and fails if it prints anything.
silent() {
	out=$("$@") || return
	if [ -n "$out" ]; then
		echo "$out"
		return 1
	fi
}

# unreachable lists functions that nothing calls. Tests count as callers, so an exported function needs a test. Examples
# without output are compiled, but never run.
unreachable() {
	out=$(tool deadcode -test ./...) || return
	echo "$out" | grep -v '^$\|unreachable func: Example' || true
}

echo '== gofumpt (to format: go tool -modfile=tools/go.mod gofumpt -w .)'
silent tool gofumpt -l .

echo '== shellcheck'
if [ -n "${CI:-}" ] || command -v shellcheck >/dev/null; then
	find . -name '*.sh' ! -path './.git/*' -exec shellcheck .ci/run {} +
else
	echo 'skipped: shellcheck is not installed'
fi

echo '== the program with gendocs compiles'
go vet -tags gendocs ./cmd/echod

echo '== faults: all patches apply'
scripts/faults.sh --check

for module in $modules; do
	cd "$root/$module"
	echo "== $module: go mod tidy, vet, fix, staticcheck, deadcode"
	go mod tidy -diff
	systems=$(go env GOOS)
	case $module in
	bench) ;;
	testing) systems='linux darwin freebsd' ;; # it sends signals
	*) systems='linux darwin freebsd windows' ;;
	esac
	for os in $systems; do
		CGO_ENABLED=0 GOOS=$os go vet ./...
	done
	go fix -diff ./...
	tool staticcheck ./...
	silent unreachable
done
cd "$root"

# vulns checks packages of a module. Without a network there is no database: then the check is skipped, except in CI.
vulns() {
	module=$1
	shift
	echo "== $module: govulncheck"
	out=$(cd "$module" && tool govulncheck ${vulndb:+-db "$vulndb"} "$@" 2>&1) && return
	case "${CI:-}$vulndb $out" in
	' '*'fetching vulnerabilities'*) echo 'skipped: cannot reach the vulnerability database (VULNDB=DIR names a local copy)' ;;
	*)
		echo "$out"
		return 1
		;;
	esac
}

for module in $modules; do
	vulns "$module" ./...
done
vulns tools tool # the tools themselves

# "DB updated: 2026-08-21 00:00:00 +0000 UTC"
updated=$(tool govulncheck ${vulndb:+-db "$vulndb"} -version 2>/dev/null | sed -n 's/^DB updated: //p' | cut -d' ' -f1)
if [ -n "$updated" ] && age=$((($(date +%s) - $(date -d "$updated" +%s)) / 86400)) && [ "$age" -gt 30 ]; then
	echo "WARNING: the vulnerability database is $age days old ($updated): newer vulnerabilities are not known"
fi
