#!/usr/bin/env bash
# Runs the tests of server, control and client as built for other systems: linux-386 natively, linux-arm64 and
# linux-s390x (big-endian) under qemu-user, and windows-amd64 under wine. For linux it runs the program too; on arm64 the
# one in the .deb. docs/testing.md has the results.
#
# Environment: SYSTEMS, as above; RUN, a pattern of tests, or none for the program only; TIMEOUT of each package's tests.
# A system without its emulator is skipped; with ECHOD_TEST_REQUIRE=1 it fails. Debian: qemu-user, wine64, gcc-mingw-w64-x86-64.
set -euo pipefail
cd "$(dirname "$0")/.."

systems=${SYSTEMS:-linux-386 linux-arm64 linux-s390x windows-amd64}
packages='server control client'
export ECHOD_TEST_EMULATED=1 # fewer clients where cryptography takes long
tmp=$(mktemp -d)
failed=
running= # process of the program

end() {
	[ -z "$running" ] || kill "$running" 2>/dev/null || true
	[ ! -d "$tmp/wine" ] || "$(dirname "$wine")/wineserver64" -k 2>/dev/null || true
	rm -rf "$tmp"
}
trap end EXIT

# emulator prints the command that runs programs of a system. It prints nothing if the processor runs them natively.
emulator() {
	case $1 in
	linux-386) [ "$(uname -m)" = x86_64 ] || command -v qemu-i386 ;;
	linux-arm64) command -v qemu-aarch64 ;;
	linux-s390x) command -v qemu-s390x ;;
	windows-amd64) command -v wine64 || ls /usr/lib/wine/wine64 2>/dev/null ;;
	esac
}

# prepare_wine makes a wine prefix for these tests. Wine before 8.10 lacks the library that gives Go's runtime random numbers.
prepare_wine() {
	export WINEPREFIX=$tmp/wine WINEDEBUG=-all WINEDLLOVERRIDES='mscoree,mshtml='
	mkdir "$WINEPREFIX"
	"$wine" wineboot -i >/dev/null 2>&1
	local library=$WINEPREFIX/drive_c/windows/system32/bcryptprimitives.dll
	[ -e "$library" ] || x86_64-w64-mingw32-gcc -shared -o "$library" -x c - -ladvapi32 <<'SOURCE'
#include <windows.h>
BOOLEAN NTAPI SystemFunction036(PVOID, ULONG);
__declspec(dllexport) BOOL WINAPI ProcessPrng(PBYTE data, SIZE_T size) { return SystemFunction036(data, (ULONG)size); }
SOURCE
}

# wine_overlay prints the flag that makes os.RemoveAll work as on older versions of Windows. Wine 8 lacks
# FileDispositionInformationEx, and reports that with an error that package os does not expect.
wine_overlay() {
	local file
	file=$(go env GOROOT)/src/internal/syscall/windows/at_windows.go
	sed 's/^\(var TestDeleteatFallback\) bool$/\1 = true/' "$file" >"$tmp/at_windows.go"
	if cmp -s "$file" "$tmp/at_windows.go"; then
		echo "no TestDeleteatFallback in $file" >&2
		return 1
	fi
	printf '{"Replace": {"%s": "%s"}}' "$file" "$tmp/at_windows.go" >"$tmp/overlay.json"
	echo "-overlay=$tmp/overlay.json"
}

# run_tests builds and runs the tests of all packages.
run_tests() {
	local system=$1 flags=() skip='^$' package status=0
	shift
	if [ "$system" = windows-amd64 ]; then
		flags=("$(wine_overlay)")
		skip='^Example' # they use Unix sockets, and cannot skip themselves
	fi
	for package in $packages; do
		go test -c "${flags[@]}" -o "$tmp/$system/$package.exe" "./$package"
	done
	for package in $packages; do
		echo "== $system: $package"
		(cd "$package" && "$@" "$tmp/$system/$package.exe" -test.timeout "${TIMEOUT:-10m}" -test.run "${RUN:-.}" -test.skip "$skip") || status=1
	done
	return $status
}

# run_program runs a server, and an echo, a status and a drain through it.
run_program() {
	local system=$1 program=$tmp/$1/echod
	shift
	echo "== $system: the program"
	if [ "$system" = linux-arm64 ]; then
		DIST=$tmp/dist SYSTEMS=$system PACKAGES=deb VERSION=devel GOOS='' GOARCH='' scripts/dist.sh >"$tmp/dist.log" 2>&1 ||
			{ cat "$tmp/dist.log" && return 1; }
		dpkg-deb -x "$tmp"/dist/*.deb "$tmp/deb"
		program=$tmp/deb/usr/bin/echod
	else
		go build -o "$program" ./cmd/echod
	fi
	local server=("$@" "$program") dir=$tmp/$system/run code=0
	mkdir -m 700 "$dir"
	"${server[@]}" serve --listen "unix://$dir/echo" --control "$dir/control" 2>"$dir/log" &
	running=$!
	for _ in $(seq 300); do
		[ ! -S "$dir/control" ] || break
		sleep 0.1
	done
	{
		cat server/*.go >"$dir/sent"
		"${server[@]}" send -a "unix://$dir/echo" <"$dir/sent" >"$dir/received" 2>>"$dir/log" &&
			cmp "$dir/sent" "$dir/received" &&
			"${server[@]}" ctl --control "$dir/control" status --json >"$dir/status" &&
			grep '"state": *"running"' "$dir/status" >/dev/null
	} || code=$?
	kill -TERM "$running"
	wait "$running" || code=$?
	running=
	if [ $code != 0 ]; then
		cat "$dir/log"
		return 1
	fi
	tail -n 1 "$dir/log"
}

for system in $systems; do
	case $system in
	linux-386 | linux-arm64 | linux-s390x | windows-amd64) ;;
	*)
		echo "SYSTEMS: unknown system $system" >&2
		exit 2
		;;
	esac
	export GOOS=${system%-*} GOARCH=${system#*-} CGO_ENABLED=0
	if ! with=$(emulator "$system"); then
		echo "== $system: skipped: no emulator"
		[ "${ECHOD_TEST_REQUIRE:-}" != 1 ] || failed="$failed $system"
		continue
	fi
	if [ "$GOOS" = windows ]; then
		wine=$with
		prepare_wine
		echo "== $system: what wine lacks"
		go build -C testing -o "$tmp/lacks.exe" ./wine
		"$wine" "$tmp/lacks.exe"
	fi
	if [ "$GOOS" = linux ] && [ -n "$with" ]; then
		echo "== $system: what qemu-user gets wrong"
		go build -C testing -o "$tmp/wrong" ./qemu
		"$with" "$tmp/wrong"
	fi
	mkdir "$tmp/$system"
	if [ "${RUN:-}" != none ]; then
		# shellcheck disable=SC2086 # $with is a path, or nothing
		run_tests "$system" $with || failed="$failed $system"
	fi
	if [ "$GOOS" = linux ]; then
		# shellcheck disable=SC2086
		run_program "$system" $with || failed="$failed $system:program"
	fi
done
if [ -n "$failed" ]; then
	echo "failed:$failed"
	exit 1
fi
