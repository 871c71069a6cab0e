//! Does to a running server what nobody should: bad certificates, bad frames, bad requests, too much of everything,
//! and bad disks.
//!
//! After each misdeed the server must still be there, answer a well-behaved client, hold a bounded amount of memory, have
//! lost nothing, and have panicked nowhere ([`host::Host::is_well`]). Servers are real processes on loopback with their own
//! temporary directories.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed unwrap is a failed test")]
#![allow(missing_docs, clippy::print_stdout, clippy::print_stderr, reason = "test code")]
#![allow(clippy::let_underscore_must_use, reason = "writing to a string, dropping what is gone")]
#![allow(clippy::cast_possible_truncation, reason = "numbers of a test are small")]

#[path = "../support/mod.rs"]
mod support;

mod client;
mod host;
mod wire;

mod answers;
mod certificates;
mod connections;
mod directory;
mod full_disk;
mod http2;
mod intake;
mod load;
mod requests;
mod stopping;
