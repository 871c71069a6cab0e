//! Nodes call each other over real sockets on loopback, with certificates as in production.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed unwrap is a failed test")]
#![allow(missing_docs, clippy::print_stdout, clippy::print_stderr, reason = "test code")]
#![allow(clippy::cast_possible_truncation, reason = "numbers of a test are small")]

mod node;

mod addresses;
mod calls;
mod doors;
mod floods;
mod refusals;
mod streams;
