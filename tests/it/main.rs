//! Integration tests in one binary, so that they link once: each module drives the library through its public face.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed unwrap is a failed test")]

mod cli;
mod config;
mod metrics;
mod pki;
mod unit_file;
