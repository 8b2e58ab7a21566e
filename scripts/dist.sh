#!/bin/sh
# Builds what a release consists of: binaries for all systems, each with an SBOM (CycloneDX), man pages, completions, and
# .deb and .rpm packages. Two builds of a commit have the same bytes: version and date come from the commit alone.
#
# Environment: VERSION as git describes it, DIST (directory), SYSTEMS ('linux-amd64 darwin-arm64', or all; without it
# only this machine's), PACKAGES (deb, rpm, or none), MAINTAINER, SOURCE_DATE_EPOCH.
# 'dist.sh package-version' prints the version that packages get.
set -eu
cd "$(dirname "$0")/.."

VERSION=${VERSION:-devel}
DIST=${DIST:-dist}
SYSTEMS=${SYSTEMS:-$(go env GOOS)-$(go env GOARCH)}
[ "$SYSTEMS" != all ] || SYSTEMS='linux-amd64 linux-arm64 darwin-amd64 darwin-arm64 windows-amd64'
PACKAGES=${PACKAGES:-deb rpm}
[ "$PACKAGES" != none ] || PACKAGES=
MAINTAINER=${MAINTAINER:-The echod authors <maintainers@echod.invalid>}
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git --git-dir=.git log -1 --format=%ct 2>/dev/null || echo 0)}
export DIST MAINTAINER SOURCE_DATE_EPOCH

# What git describes, as packages sort it: v3 is 3.0.0; two commits later is 3.0.0+2.gHASH, which is newer; v3.0.0-rc.1
# is older. Without a tag it is 0.0.0+HASH.
package_version=$(echo "$VERSION" | sed -E \
	-e 's/^v([0-9]+)(-|$)/\1.0.0\2/; s/^v([0-9]+\.[0-9]+)(-|$)/\1.0\2/; s/^v([0-9])/\1/; s/-([0-9]+)-(g[0-9a-f]+)/+\1.\2/' \
	-e '/^[0-9]+\.[0-9]+\.[0-9]+([-+]|$)/!s/^/0.0.0+/; s/(\+.*)-dirty$/\1.dirty/; s/-dirty$/+dirty/')
if [ "${1:-}" = package-version ]; then
	echo "$package_version"
	exit
fi

# -trimpath: the SBOM has the hash of the tool that wrote it.
tool() { GOFLAGS=-trimpath go tool -modfile=tools/go.mod "$@"; }
ldflags="-s -w -X main.version=$VERSION"

rm -rf "$DIST"
mkdir -p "$DIST/docs" "$DIST/package" "$DIST/sbom"
for system in $SYSTEMS; do
	os=${system%-*}
	arch=${system#*-}
	binary=echod-$system
	[ "$os" != windows ] || binary=$binary.exe
	echo "$DIST/$binary"
	CGO_ENABLED=0 GOOS=$os GOARCH=$arch go build -trimpath -buildvcs=false -ldflags "$ldflags" -o "$DIST/$binary" ./cmd/echod
	tool cyclonedx-gomod bin -json -noserial -notimestamp -version "$package_version" \
		-output "$DIST/sbom/echod-$system.cdx.json" "$DIST/$binary" 2>"$DIST/sbom/log" || {
		cat "$DIST/sbom/log" >&2
		exit 1
	}
done
rm -f "$DIST/sbom/log"

go run -tags gendocs -trimpath -buildvcs=false -ldflags "$ldflags" ./cmd/echod gendocs "$DIST/docs"
gzip -9n "$DIST"/docs/man/*.1
gzip -9nc CHANGELOG.md >"$DIST/docs/CHANGELOG.md.gz"
printf 'echod (%s) unstable; urgency=medium\n\n  * See CHANGELOG.md.gz beside this file.\n\n -- %s  %s\n' \
	"$(echo "$package_version" | tr - '~')" "$MAINTAINER" "$(LC_ALL=C date -u -R -d "@$SOURCE_DATE_EPOCH")" |
	gzip -9n >"$DIST/docs/changelog.gz"

for system in $SYSTEMS; do
	[ "${system%-*}" = linux ] || continue
	arch=${system#*-}
	cp "$DIST/echod-$system" "$DIST/package/echod"
	for kind in $PACKAGES; do
		ARCH=$arch VERSION=$package_version tool nfpm package --config packaging/nfpm.yaml --packager "$kind" --target "$DIST/"
	done
done
rm -r "$DIST/package"
cd "$DIST"
sha256sum echod* sbom/* >SHA256SUMS
