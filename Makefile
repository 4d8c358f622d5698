SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help run test bench docs lint fmt

help: ## what can be made
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/make \1\t\2/' | expand -t 14

run: ## build and run an edge, an authority and sidecars with sample services, on loopback; Ctrl-C ends it
	cargo build --quiet --package postern
	exec target/debug/postern up

test: ## install what the tests need and run every test of the workspace
	tests/needs.sh
	cargo build --quiet --package postern
	mkdir -p target
	status=0; cargo test --workspace --no-fail-fast 2>&1 | tee target/test.log || status=$$?; \
	awk '/^test result:/ { passed += $$4; failed += $$6; ignored += $$8 } \
	     END { printf "\n%d passed, %d failed, %d ignored\n", passed, failed, ignored }' target/test.log; \
	exit $$status

bench: ## compare with nginx, HAProxy and Envoy (BENCH="--rounds 5 --seconds 5 --only http,tls")
	bench/needs.sh
	cargo build --quiet --release --package postern
	cargo build --quiet --release --package e2e --example load
	python3 bench/bench.py $(BENCH)

docs: ## make the pages of the plugins and the API documentation
	cargo run --quiet --package postern -- docs
	cargo doc --quiet --workspace --no-deps

lint: ## formatting, clippy, licences and bans of dependencies
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings
	[ -x .cache/deny/bin/cargo-deny ] || CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_LTO=off \
	    cargo install --quiet --locked --root .cache/deny --target-dir .cache/deny-target cargo-deny@0.20.2
	rm -rf .cache/deny-target
	.cache/deny/bin/cargo-deny --log-level error check bans licenses sources

fmt: ## format the code
	cargo fmt --all
