# For GNU make, Go and git. Variables to set on the command line stand beside the target that reads them.

.DEFAULT_GOAL := help
.PHONY: build run test lint fuzz bench bench-quick bench-go bench-test cover dist dist-check install clean help

# The development tools have a module of their own, so that their dependencies never reach users.
TOOL := go tool -modfile=tools/go.mod

# --git-dir keeps a tree unpacked inside somebody else's repository from taking that one's version.
VERSION = $(shell git --git-dir=.git describe --tags --always --dirty 2>/dev/null || echo devel)

# The version says which commit it is; Go's own stamp would differ with GOFLAGS and fail in a borrowed checkout.
build: ## build bin/echod
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-X main.version=$(VERSION)' -o bin/echod ./cmd/echod

bin/echod: go.mod go.sum $(shell find . -name '*.go' ! -name '*_test.go' ! -path './bench/*' ! -path './integration/*')
	@$(MAKE) --no-print-directory build

run: build ## build and run bin/echod; ARGS='--listen :7' are its arguments
	@exec bin/echod $(ARGS)

# The race detector needs a C compiler with its headers; building the package that needs them says whether they are there.
TIMEOUT = 10m
test: ## run all tests, with the race detector where there is a C compiler
	@if go build -race runtime/cgo 2>/dev/null; then race=-race; \
	else race=; echo 'no working C compiler here: testing without the race detector'; fi; \
	set -x; go test $$race -shuffle=on -timeout $(TIMEOUT) ./...

# Cheap checks come first.
LINTS := lint-format lint-tidy lint-shell lint-vet lint-fix lint-static lint-dead lint-bench lint-vulns
.PHONY: $(LINTS)
lint: $(LINTS) ## check formatting, go.mod, scripts, vet, staticcheck, dead code, vulnerabilities (VULNDB=DIR: a local database)

# silent runs a command that reports by printing, and fails when it has printed something.
silent = out=$$($(1)) && test -z "$$out" || { echo "$$out"; exit 1; }

lint-format:
	@echo '== gofumpt (to format: $(TOOL) gofumpt -w .)'
	@$(call silent,$(TOOL) gofumpt -l .)

lint-tidy:
	@echo '== go mod tidy'
	@go mod tidy -diff

SCRIPTS := .ci/run $(wildcard *.sh */*.sh */*/*.sh)
lint-shell:
	@echo '== shellcheck'
	@if [ -z '$(CI)' ] && ! command -v shellcheck >/dev/null; then echo 'skipped: shellcheck is not installed'; \
	else shellcheck $(SCRIPTS); fi

lint-vet:
	@for os in linux darwin freebsd windows; do \
		echo "== go vet, $$os"; CGO_ENABLED=0 GOOS=$$os go vet ./... || exit 1; done

lint-fix:
	@echo '== go fix (to apply: go fix ./...)'
	@go fix -diff ./...

lint-static:
	@echo '== staticcheck'
	@$(TOOL) staticcheck ./...

# Tests and examples count as callers: what the library exports is alive when one of them uses it.
lint-dead:
	@echo '== deadcode'
	@$(call silent,$(TOOL) deadcode -test ./...)

lint-bench:
	@echo '== the same for bench'
	@if [ "$$(uname)" != Linux ]; then echo 'skipped: it is for Linux only'; \
	else cd bench && go mod tidy -diff && go vet ./... && go fix -diff ./... && \
		go tool -modfile=../tools/go.mod staticcheck ./... && $(call silent,go tool -modfile=../tools/go.mod deadcode -test ./...); fi

# Without network there is no database: no reason to keep a person from working, but CI must not pass unchecked.
lint-vulns:
	@echo '== govulncheck'
	@out=$$($(TOOL) govulncheck $(if $(VULNDB),-db 'file://$(abspath $(VULNDB))') ./... 2>&1) && exit; \
	case "$(CI)$(VULNDB) $$out" in \
	' '*'fetching vulnerabilities'*) echo 'skipped: the vulnerability database is out of reach (VULNDB=DIR names a local one)' ;; \
	*) echo "$$out"; exit 1 ;; esac

FUZZTIME = 30s
fuzz: ## run each fuzz target for FUZZTIME (30s)
	@list=$$(go test -list '^Fuzz' ./...) || { echo "$$list"; exit 1; }; \
	echo "$$list" | awk '/^Fuzz/ { name[n++] = $$1 } $$1 == "ok" { while (n) print name[--n], $$2 }' | \
	while read -r name package; do \
		echo "== $$name in $$package"; \
		go test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) "$$package" </dev/null || exit 1; \
	done

# The benchmark beside other servers has a module of its own: what those need never reaches users.
ON_LINUX = @[ "$$(uname)" = Linux ] || { echo 'the benchmark beside other servers runs on Linux only'; exit 1; }
bench: ## measure echod beside other echo servers and write docs/benchmarks.md: half an hour on a quiet machine
	$(ON_LINUX)
	cd bench && go run . -out ../docs

bench-quick: ## the same in two minutes, into bench/out
	$(ON_LINUX)
	cd bench && go run . -quick

bench-test: ## test that benchmark: build every server in it, and measure each for a moment
	$(ON_LINUX)
	cd bench && go test ./...

BENCH = .
bench-go: ## run the Go benchmarks of the hot paths, for benchstat; BENCH=REGEXP chooses
	go test -run '^$$' -bench '$(BENCH)' ./...

# Raw coverage data, because it merges what several test binaries reached in one package.
COVER_MIN = 85
cover: ## measure what all tests reach of server and control; fails under 85 % (COVER_MIN) of either
	@rm -rf coverage && mkdir coverage
	go test -covermode=atomic -coverpkg=./server/...,./control/... ./... -args -test.gocoverdir='$(CURDIR)/coverage'
	@go tool covdata textfmt -i=coverage -o coverage/profile
	@go tool covdata percent -i=coverage | awk '{ print $$1, $$3 } $$3 ~ /%/ && $$3 + 0 < $(COVER_MIN) { low = 1 } \
		END { if (low) { print "under $(COVER_MIN)%; see it with: go tool cover -html coverage/profile"; exit 1 } }'

# The date of the last commit, and the version, are all that a build takes from the day and the machine: two builds of a commit
# have the same bytes.
EPOCH = $(shell git --git-dir=.git log -1 --format=%ct 2>/dev/null || echo 0)
# What git describes, as packages sort it: v3 is 3.0.0, two commits later is 3.0.0+2.gHASH, which is newer, and v3.0.0-rc.1 is older. Without
# a tag it is 0.0.0+HASH.
PACKAGE_VERSION = $(shell echo '$(VERSION)' | sed -E \
	-e 's/^v([0-9]+)(-|$$)/\1.0.0\2/; s/^v([0-9]+\.[0-9]+)(-|$$)/\1.0\2/; s/^v([0-9])/\1/; s/-([0-9]+)-(g[0-9a-f]+)/+\1.\2/' \
	-e '/^[0-9]+\.[0-9]+\.[0-9]+([-+]|$$)/!s/^/0.0.0+/; s/(\+.*)-dirty$$/\1.dirty/; s/-dirty$$/+dirty/')
SYSTEMS = linux-amd64 linux-arm64 darwin-amd64 darwin-arm64 windows-amd64
PACKAGES = deb rpm
MAINTAINER = The echod authors <maintainers@echod.invalid>
STRIPPED = -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)'
DIST = dist
dist: ## build binaries for all SYSTEMS, and .deb and .rpm packages, into dist/ (DIST=DIR; MAINTAINER='Name <address>')
	rm -rf '$(DIST)' && mkdir -p '$(DIST)/docs' '$(DIST)/package'
	@set -e; for system in $(SYSTEMS); do \
		os=$${system%-*}; arch=$${system#*-}; ext=; [ $$os != windows ] || ext=.exe; echo "$(DIST)/echod-$$system$$ext"; \
		CGO_ENABLED=0 GOOS=$$os GOARCH=$$arch go build $(STRIPPED) -o "$(DIST)/echod-$$system$$ext" ./cmd/echod; done
	SOURCE_DATE_EPOCH=$(EPOCH) go run -tags gendocs $(STRIPPED) ./cmd/echod gendocs '$(DIST)/docs'
	gzip -9n '$(DIST)'/docs/man/*.1 && gzip -9nc CHANGELOG.md >'$(DIST)/docs/CHANGELOG.md.gz'
	@printf 'echod (%s) unstable; urgency=medium\n\n  * See CHANGELOG.md.gz beside this file.\n\n -- %s  %s\n' \
		'$(subst -,~,$(PACKAGE_VERSION))' '$(MAINTAINER)' "$$(LC_ALL=C date -u -R -d @$(EPOCH))" | gzip -9n >'$(DIST)/docs/changelog.gz'
	@set -e; for arch in $(patsubst linux-%,%,$(filter linux-%,$(SYSTEMS))); do \
		cp "$(DIST)/echod-linux-$$arch" '$(DIST)/package/echod'; for kind in $(PACKAGES); do \
		ARCH=$$arch DIST='$(DIST)' MAINTAINER='$(MAINTAINER)' VERSION='$(PACKAGE_VERSION)' SOURCE_DATE_EPOCH=$(EPOCH) \
			$(TOOL) nfpm package --config packaging/nfpm.yaml --packager $$kind --target '$(DIST)/'; done; done
	rm -r '$(DIST)/package' && cd '$(DIST)' && sha256sum echod* >SHA256SUMS

# What a packager would object to, and whether the same commit makes the same bytes again.
dist-check: dist ## check the packages: lintian, mandoc, and that a second build has the same bytes
	lintian --fail-on error dist/*.deb
	@for page in dist/docs/man/*.gz; do gzip -dc "$$page" | mandoc -T lint -W error || exit 1; done
	@set -e; elsewhere=$$(mktemp -d); trap 'chmod -R u+w "$$elsewhere"; rm -rf "$$elsewhere"' EXIT; \
	echo "== the same in a copy elsewhere, and a binary with nothing from the cache"; \
	tar -cf - --exclude=./.git --exclude=./bin --exclude=./dist . | tar -xf - -C "$$elsewhere"; \
	$(MAKE) --no-print-directory -C "$$elsewhere" dist VERSION='$(VERSION)' EPOCH='$(EPOCH)'; \
	cmp dist/SHA256SUMS "$$elsewhere/dist/SHA256SUMS"; \
	cd "$$elsewhere"; system=$(firstword $(SYSTEMS)); \
	CGO_ENABLED=0 GOOS=$${system%-*} GOARCH=$${system#*-} GOCACHE="$$elsewhere/cache" go build $(STRIPPED) -o again ./cmd/echod; \
	cmp again "dist/echod-$$system"

# From the file and not from build: under sudo there may be no go, and nothing to build.
PREFIX = /usr/local
install: bin/echod ## install bin/echod into PREFIX/bin (/usr/local/bin); honours DESTDIR
	install -d '$(DESTDIR)$(PREFIX)/bin'
	install -m 755 bin/echod '$(DESTDIR)$(PREFIX)/bin/echod'

clean: ## remove what the other targets made
	rm -rf bin coverage bench/out dist

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
