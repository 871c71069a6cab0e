# The commands of the README, and the checks behind them. Each does its own set-up.
#
#   make demo     found a cluster of three servers on loopback, kill its leader, bring it back, and leave it running
#   make run      build, and start one server on loopback with its data under ./demo
#   make test     get what the tests need, and run all of them

.POSIX:
PROFILE = dist
ARCH =
.PHONY: demo run test test-system deb image test-image fmt lint bench bench-sd build setup test-harness transcripts sim sim-mutants cuts clean-demo

demo:
	@.ci/setup build
	@.ci/demo-cluster

run:
	@.ci/setup build
	@.ci/demo

test: setup
	@.ci/test

setup:
	@.ci/setup

build:
	cargo build --release

# Three hosts with a systemd of their own, on this machine: what tests/system asks of the unit. Part of `make test`.
test-system: setup
	cargo test --test system -- --nocapture

# Debian packages in target/deb. Needs root for the tree they are built in.
#   make deb                           arm64 and amd64
#   make deb ARCH=arm64 PROFILE=release    one of them, and quicker to build
deb:
	PROFILE=$(PROFILE) packaging/deb $(ARCH)

# The image for Raspberry Pis, target/image/*.img.zst, from the arm64 package; see image/README.md. Needs root.
image:
	PROFILE=$(PROFILE) image/build

# Boots that image on an emulated board, writes, cuts the power, and looks whether it is all there.
test-image: image
	image/test-boot

fmt:
	cargo fmt --all

lint:
	cargo fmt --all --check
	cargo clippy --all-targets -- -D warnings

bench:
	cargo bench

# Real etcd and this server side by side on emulated SD cards; see bench/README. Needs root.
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

# A whole cluster from one seed, 400 times for two simulated minutes; SIM passes more, as `--seeds 0..40 --case-dir cases`.
sim:
	cargo test --release --test sim -- --seeds 0..400 --seconds 120 $(SIM)

# Founding and joining, cut at every step and every await; `make test` makes a third of the cuts.
cuts:
	CUT_ALL=1 cargo test --lib server::life::tests -- --nocapture

# Every planted fault must be seen.
sim-mutants:
	cargo test --features mutants --test sim -- --mutants $(SIM)

clean-demo:
	rm -rf demo
