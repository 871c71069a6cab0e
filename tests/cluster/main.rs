//! Clusters of real processes: found, joined, killed, paused, cut off, moved, copied and put back, with etcd's own client.
//!
//! Every server is a `k3s-server` process with a configuration file, a data directory and a loopback address of its own, so that
//! all of them listen on the usual ports. What is measured is printed; what is asserted are outcomes, and times only as bounds that
//! a loaded machine keeps.
//!
//! # Shape
//!
//! [`machine`] is one server, [`cluster`] several of one cluster, [`ledger`] a load that remembers what was promised to it. The
//! other files are the tests, one subject each.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed unwrap is a failed test")]
#![allow(missing_docs, clippy::print_stdout, clippy::print_stderr, reason = "test code")]
#![allow(clippy::let_underscore_must_use, reason = "writing to a string, dropping what is gone")]

#[path = "../support/mod.rs"]
mod support;

mod cluster;
mod lan;
mod ledger;
mod machine;

mod failures;
mod flags;
mod healing;
mod identity;
mod joining;
mod links;
mod membership;
mod reset;
mod serving;
mod upgrade;
