//! The program's commands against real servers: what they print, what they change, and what they leave alone.
//!
//! Servers listen on loopback addresses of their own, 127.0.0.1 for the founder and others for those who join.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed unwrap is a failed test")]
#![allow(missing_docs, clippy::print_stdout, clippy::print_stderr, reason = "test code")]
#![allow(clippy::let_underscore_must_use, reason = "dropping what is gone")]

#[path = "../support/mod.rs"]
mod support;

mod check;
mod flags;
mod join;
mod member;
mod server;
