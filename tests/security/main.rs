//! Who must not come in, what must not get out, and what strangers must not be able to stop.
//!
//! Servers are real processes on loopback addresses of their own, with the usual ports, configuration files and data
//! directories. [`servers`] runs them, [`shown`] makes every kind of certificate that may be shown to them, [`middle`] sits between
//! a server and one that wants to join, [`secrets`] looks for a secret in bytes. The other files are the tests:
//!
//! - [`table`]: every RPC, at every door, with every kind of credentials; [`removed`]: those of a server that was removed.
//! - [`joining`]: the man in the middle, guesses, and noise at the door for newcomers.
//! - [`canary`]: secrets that must not be found anywhere, and modes of files.
//! - [`floods`]: more strangers than a server has room for, while three go on.
//! - [`clocks`]: certificates that have ended, and boards that do not know the time.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed unwrap is a failed test")]
#![allow(missing_docs, clippy::print_stdout, clippy::print_stderr, reason = "test code")]
#![allow(clippy::let_underscore_must_use, reason = "writing to a string, dropping what is gone")]
#![allow(clippy::cast_possible_truncation, reason = "numbers of a test are small")]

#[path = "../support/mod.rs"]
mod support;

#[path = "../abuse/client.rs"]
#[allow(dead_code, reason = "shared with tests/abuse")]
mod client;
#[path = "../abuse/wire.rs"]
#[allow(dead_code, reason = "shared with tests/abuse")]
mod wire;

mod middle;
mod secrets;
mod servers;
mod shown;

mod canary;
mod clocks;
mod floods;
mod joining;
mod removed;
mod table;
