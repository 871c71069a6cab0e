//! Hosts with a systemd of their own: the real unit, edited YAML, `systemctl start`, and everything that happens to a host after that.
//!
//! Every host is a booted Debian in a systemd-nspawn container, with its own disk (an overlay), its own address on a bridge, and
//! the files of the package in their places. Nothing is seen of it outside its namespaces. What is asserted is what an operator
//! sees: `systemctl`, `journalctl`, `etcdctl`.
//!
//! # Shape
//!
//! [`host`] is one machine, [`lab`] three of them on a switch, [`layout`] puts the package's files into place, [`story`] is what they
//! have in common. The other files are the tests, one subject each. Where hosts cannot boot, every test says `skipped:` and why.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed unwrap is a failed test")]
#![allow(missing_docs, clippy::print_stdout, clippy::print_stderr, reason = "test code")]
#![allow(clippy::let_underscore_must_use, reason = "dropping what is gone")]

#[path = "../support/mod.rs"]
mod support;

mod host;
mod lab;
mod layout;
mod story;

mod bus;
mod forming;
mod mismatches;
mod network;
mod package;
mod rebooting;
mod upgrading;
mod watchdog;
