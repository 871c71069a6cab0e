//! The daemon as a service: watchdog, D-Bus, phases, credentials, status. Real program, real message bus; what stands in
//! for the rest of the machine (logind, systemd) is a few methods on a private bus.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed unwrap is a failed test")]
#![allow(missing_docs, clippy::print_stdout, clippy::print_stderr, reason = "test code")]
#![allow(clippy::let_underscore_must_use, reason = "dropping what is gone")]
#![allow(dead_code, reason = "each test file uses its part of the support")]

#[path = "../support/mod.rs"]
mod support;

mod bus;
mod on_the_bus;
mod server;
mod service;
