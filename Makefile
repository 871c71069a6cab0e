# The two commands of the README, and the checks behind them. Each does its own set-up.
#
#   make run      build, and start one server on loopback with its data under ./demo
#   make test     get what the tests need, and run all of them

.POSIX:
.PHONY: run test fmt lint bench bench-sd build setup test-harness transcripts clean-demo

run:
	@.ci/setup build
	@.ci/demo

test: setup
	@.ci/test

setup:
	@.ci/setup

build:
	cargo build --release

fmt:
	cargo fmt --all

lint:
	cargo fmt --all --check
	cargo clippy --all-targets -- -D warnings

bench:
	cargo bench

# k3s-server and real etcd side by side on emulated SD cards; as root. bench/README.md has the words.
#   make bench-sd                      everything: about two hours
#   make bench-sd QUICK=1              one short round of everything
#   make bench-sd ONLY=put-64,stall    cases whose names contain one of these
#   make bench-sd DIR=/mnt/card        one server on a real card instead
bench-sd: setup build
	cargo build --release --manifest-path bench/Cargo.toml
	bench/target/release/bench-sd only=$(ONLY) quick=$(QUICK) dir=$(DIR)

# The API tests against the newest real etcd in our server's place: what fails here is a wrong test.
test-harness: setup
	HARNESS_SUBJECT=$$(ls target/etcd | grep '^3' | sort -V | tail -n 1) cargo test --test etcd

# Records tests/transcripts anew from the newest real etcd.
transcripts: setup
	UPDATE_TRANSCRIPTS=1 cargo test --test etcd transcripts::

clean-demo:
	rm -rf demo
