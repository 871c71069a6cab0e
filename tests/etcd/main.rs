//! Our server against etcd: etcd's own replies, etcd's own tools, and another client than ours.
//!
//! Everything here talks to real processes. `HARNESS_SUBJECT=3.5.30 cargo test --test etcd` puts that real etcd in
//! our server's place: a test that a real etcd fails says something about the test.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed unwrap is a failed test")]
#![allow(missing_docs, clippy::print_stdout, clippy::print_stderr, reason = "test code")]
#![allow(clippy::let_underscore_must_use, reason = "writing to a string, dropping what is gone")]

#[path = "../support/mod.rs"]
mod support;

mod backup;
mod client_crate;
mod differential;
mod etcdctl;
mod kill9;
mod script;
mod transcripts;
