# Needs Go, git and make; the targets for containers and CI say what else.
# VERSION is empty or semantic with a leading v: make release VERSION=v1.2.3

VERSION  ?=
FUZZTIME ?= 10s
GO       ?= go

# The race detector needs a C compiler.
CC_FOUND := $(shell command -v "$$($(GO) env CC)" 2>/dev/null)
RACE     := $(if $(CC_FOUND),-race)

.DEFAULT_GOAL := help
.PHONY: help build release vendor docker demo dev test check unit e2e bench fuzz lint

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## Build the plugin for this machine into bin/
	@VERSION='$(VERSION)' scripts/build bin/vault-plugin-secrets-openai

release: ## Build all platforms, sums, SBOM and licences into dist/ (VERSION=v1.2.3)
	@scripts/release '$(VERSION)'

vendor: ## Make the source archive with vendored modules in dist/, for air-gapped sites
	@scripts/vendor '$(VERSION)'

docker: ## Build the container image for this machine's architecture, without a registry
	@scripts/docker '$(VERSION)'

demo: ## Show the whole flow on a dev server and a simulated OpenAI (KEEP=1: leave it running)
	@$(GO) run ./e2e/demo

dev: ## Start a dev server with the plugin and a simulated OpenAI that stays until Ctrl-C
	@KEEP=1 $(GO) run ./e2e/demo

test: check unit e2e ## Run everything: format, vet, unit tests with the race detector, e2e

check: # gofmt and vet
	@out=$$(gofmt -l $$(git ls-files '*.go' 2>/dev/null || find . -name '*.go' -not -path './vendor/*')); \
	  [ -z "$$out" ] || { echo "not formatted with gofmt: $$out" >&2; exit 1; }
	$(GO) vet ./...
	$(GO) vet -tags e2e ./...

unit: ## Run the unit tests with the race detector
ifeq ($(RACE),)
	@echo "WARNING: no C compiler found: the unit tests run WITHOUT the race detector" >&2
endif
	$(GO) run ./scripts/gotest $(RACE) -count=1 -timeout 20m ./...

e2e: ## Run the end-to-end tests against real Vault servers (about 20 minutes)
	$(GO) run ./scripts/gotest -tags e2e -count=1 -timeout 60m -p 1 ./e2e/...

bench: ## Run the benchmarks, then measure on a real server (minutes)
	@$(GO) test -run '^$$' -bench . -benchmem ./... | awk '/^Benchmark/ { n++ } /^(panic|FAIL)/ { bad = 1 } { print } END { if (bad || !n) { print "a benchmark failed, or none ran" > "/dev/stderr"; exit 1 } }'
	@$(GO) run -tags e2e ./e2e/bench

fuzz: ## Run each fuzz target for a while (FUZZTIME=10s each)
	@scripts/fuzz '$(FUZZTIME)'

lint: ## Run the linters that tools/ pins: gofmt, vet, staticcheck, gosec
	@scripts/lint
