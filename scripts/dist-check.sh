#!/bin/sh
# Builds the release in dist/ and checks it: lintian on the packages, mandoc on the man pages, and that a build in another
# directory, and one with an empty cache, have the same bytes.
set -eu
cd "$(dirname "$0")/.."

DIST=dist
VERSION=${VERSION:-$(git --git-dir=.git describe --tags --always --dirty 2>/dev/null || echo devel)}
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git --git-dir=.git log -1 --format=%ct 2>/dev/null || echo 0)}
SYSTEMS=all
export DIST VERSION SOURCE_DATE_EPOCH SYSTEMS
scripts/dist.sh

echo '== lintian, mandoc'
lintian --fail-on error dist/*.deb
for page in dist/docs/man/*.gz; do
	gzip -dc "$page" | mandoc -T lint -W error
done

echo '== the same bytes from a copy elsewhere'
copy=$(mktemp -d)
trap 'chmod -R u+w "$copy"; rm -rf "$copy"' EXIT
tar -cf - --exclude=./.git --exclude=./bin --exclude=./dist --exclude=./coverage . | tar -xf - -C "$copy"
(cd "$copy" && scripts/dist.sh)
cmp dist/SHA256SUMS "$copy/dist/SHA256SUMS"

echo '== the same bytes with an empty cache'
GOCACHE=$copy/cache CGO_ENABLED=0 GOOS=linux GOARCH=amd64 go build -trimpath -buildvcs=false \
	-ldflags "-s -w -X main.version=$VERSION" -o "$copy/again" ./cmd/echod
cmp "$copy/again" dist/echod-linux-amd64
