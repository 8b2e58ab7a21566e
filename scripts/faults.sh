#!/usr/bin/env bash
# Plants known faults, one at a time, and reports which of them the tests catch. Each is a patch in testing/faults. Its
# header says what harm the fault does to users, and which tests have to catch it:
#
#   Harm: a client that echoes every 100 ms is closed after --idle-timeout 1s
#   Tests: ./server -run TestIdleTimeout
#
# Tests are arguments of 'go test'. Without that line all tests run. The faults are planted in a copy of the tree.
#
#   scripts/faults.sh [NAME...]     runs all faults, or these
#   scripts/faults.sh --check       checks only that all patches still apply, in a second
#
# The trial fails if fewer than nine in ten faults are caught, if a patch does not apply or does not compile, or if its
# tests hang until their time limit instead of failing.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD

if [ "${1:-}" = --check ]; then
	for patch in testing/faults/*.patch; do
		if ! grep -q '^Harm: .' "$patch" || ! git apply --check "$patch"; then
			echo "$patch: does not apply, or has no Harm line: update it together with the code"
			stale=1
		fi
	done
	exit "${stale:-0}"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
copy=$work/tree
mkdir "$copy"
git ls-files --cached --others --exclude-standard | while read -r file; do
	[ ! -e "$file" ] || echo "$file"
done >"$work/files"
tar -cf - -T "$work/files" | tar -xf - -C "$copy"
cd "$copy"

# -trimpath lets builds of the copy use the build cache. The time limit is short, because a test that waits for ever must
# fail by itself. git must not use a repository that contains the copy.
export GOFLAGS="${GOFLAGS:-} -trimpath" ECHOD_TEST_SLOW=1 GIT_CEILING_DIRECTORIES=$work
run() { # TESTS OUTPUT
	local -a args
	eval "args=($1)"
	go test -vet=off -failfast -timeout 4m "${args[@]}" >"$2" 2>&1
}

names=("$@")
if [ ${#names[@]} = 0 ]; then
	for patch in "$root"/testing/faults/*.patch; do names+=("$(basename "$patch" .patch)"); done
fi
declare -A healthy
total=0 caught=0 failed=0
for name in "${names[@]}"; do
	patch=$root/testing/faults/$name.patch
	tests=$(sed -n 's/^Tests: //p' "$patch")
	tests=${tests:-./...}
	began=$SECONDS
	if [ -z "${healthy[$tests]:-}" ]; then
		if ! run "$tests" "$work/healthy"; then
			echo "without a fault, these tests fail: $tests"
			tail -n 40 "$work/healthy"
			exit 1
		fi
		healthy[$tests]=yes
	fi
	total=$((total + 1)) result=caught
	if ! git apply "$patch" 2>"$work/out"; then
		result=STALE
	elif run "$tests" "$work/out"; then
		result=SURVIVED
	elif grep -q '\[build failed\]\|\[setup failed\]' "$work/out"; then
		result='DOES NOT COMPILE'
	elif grep -q '^panic: test timed out' "$work/out"; then
		result='HANGS'
	else
		caught=$((caught + 1))
	fi
	printf '%-16s %-46s %3d s  %s\n' "$result" "$name" $((SECONDS - began)) "$(sed -n 's/^Harm: //p' "$patch")"
	case $result in
	caught | SURVIVED) ;;
	*)
		failed=1
		tail -n 20 "$work/out"
		;;
	esac
	[ "$result" = STALE ] || git apply -R "$patch"
done
echo "$caught of $total faults were caught"
[ "$failed" = 0 ] && [ $((10 * caught)) -ge $((9 * total)) ]
