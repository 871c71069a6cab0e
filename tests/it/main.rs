//! Integration tests in one binary, so that they link once: each module drives the library through its public face.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "test code: a failed unwrap is a failed test, and skips are said aloud"
)]

mod cli;
mod config;
mod events;
mod metrics;
mod pki;
mod unit_file;
